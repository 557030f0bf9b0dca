"""What child processes would otherwise import one by one; see `fork_server`."""

# ruff: noqa: F401
import filelock
import matplotlib.backends.backend_agg
import torch
import torch._dynamo  # which FSDP and optimizers import
import torch.distributed.fsdp

import gptforge.builders.build_trainer
import gptforge.cli.train
import gptforge.report.curves
import gptforge.report.html_report
import gptforge.report.run_report
import tests.conftest
import tests.distributed.runs
import tests.faults.child
