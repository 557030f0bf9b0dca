"""Several processes that train one model, started by torchrun, and a watchdog for lost ones."""

from gptforge.distributed.comm import SINGLE_PROCESS, AsyncMax, Comm
from gptforge.distributed.init import init_distributed

__all__ = ["SINGLE_PROCESS", "AsyncMax", "Comm", "init_distributed"]
