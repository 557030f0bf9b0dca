"""With `--dtype fp8`, the warmup of the learning rate runs in bfloat16.

When fp8 from the first step ended at a higher loss than bfloat16, the difference arose early in the
warmup and stayed the same afterwards (docs/results/gpu-speed.md).
"""

import dataclasses
from typing import TYPE_CHECKING

from gptforge.training.backends.cuda_graph import CudaGraphBackend

if TYPE_CHECKING:
    from gptforge.training.trainer import Trainer


def switch_precision(trainer: "Trainer") -> None:
    """Switch from bfloat16 to fp8, or back after a rollback, if the next step needs it.

    A collective. The precision depends only on the number of the step, so a run that is resumed or
    rolled back makes the same steps as one that is not.
    """
    config, step, step_fn = trainer.config, trainer.state.step, trainer.step_fn
    float8 = step_fn.precision.float8 and step >= config.warmup_steps
    if float8 == step_fn.kernels.float8:
        return
    with trainer.timer.exclude():
        has_graph = isinstance(step_fn.backend, CudaGraphBackend)
        step_fn.set_kernels(dataclasses.replace(step_fn.kernels, float8=float8))
        if has_graph:
            step_fn.capture_cuda_graph(config.context_length)
    what = "fp8 from here on" if float8 else f"bfloat16 until step {config.warmup_steps}"
    trainer.report.log_line(f"Step {step}: matmuls run in {what}.")
