"""Processes that train one model: who they are, what they tell each other, and who is missing.

torchrun starts them. Any number runs the same code, and a single one calls what does nothing.
"""

from gptforge.distributed.comm import SINGLE_PROCESS, AsyncMax, Comm
from gptforge.distributed.init import init_distributed, is_distributed_launch

__all__ = ["SINGLE_PROCESS", "AsyncMax", "Comm", "init_distributed", "is_distributed_launch"]
