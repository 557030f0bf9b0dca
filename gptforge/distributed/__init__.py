"""Processes that train one model: who they are, what they tell each other, and who is missing.

torchrun starts them. Any number runs the same code, and a single one calls what does nothing.
"""

from gptforge.distributed.join import is_launched, join
from gptforge.distributed.ranks import ALONE, Agreement, Ranks

__all__ = ["ALONE", "Agreement", "Ranks", "is_launched", "join"]
