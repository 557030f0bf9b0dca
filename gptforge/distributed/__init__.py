"""Several processes that train one model, started by torchrun, and a watchdog for lost ones."""

from gptforge.distributed.comm import SINGLE_PROCESS, AsyncMax, Comm
from gptforge.distributed.init import init_distributed, is_distributed_launch

__all__ = ["SINGLE_PROCESS", "AsyncMax", "Comm", "init_distributed", "is_distributed_launch"]
