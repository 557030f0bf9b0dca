"""Runs trials as child processes, several at once, and stops them so that they resume."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from gptforge.builders.memory_fit import MAX_MEMORY_FRACTION, MemoryEstimator
from gptforge.config import Config
from gptforge.data.prepare.workers import num_cpus
from gptforge.device import select_device, select_precision
from gptforge.printable import printable

POLL_SECONDS = 0.1
MAX_JOBS_PER_GPU = 4
CONTEXT_BYTES = 10**9
"""GPU memory of a process before it allocates anything: the CUDA context and libraries."""
TRIAL_MODULE = "gptforge.cli.trial_process"
Process = subprocess.Popen[bytes]


@dataclass(frozen=True)
class Run:
    """One training run: a trial with one of its seeds."""

    trial: str
    seed: int
    folder: Path
    args: tuple[str, ...]  # of `gptforge train`
    time_limit: float = 0.0  # minutes; 0: none

    @property
    def log(self) -> Path:
        """What the run prints, beside its folder."""
        return self.folder.with_name(f"{self.folder.name}.log")


def run_all(
    batches: Iterable[Sequence[Run]],
    *,
    jobs: int,
    start: Callable[[Run, int], Process],
    on_end: Callable[[Run, int], object],
) -> None:
    """Keep `jobs` runs going until there are none left.

    On Ctrl-C or SIGTERM, running ones get SIGTERM, save, and are waited for. The next batch is
    taken only when a job is free. `start` gets a run and its slot, 0 to jobs - 1, `on_end` a run
    and its exit code.
    """
    waiting = chain.from_iterable(batches)
    active: dict[int, tuple[Run, Process]] = {}
    try:
        while True:
            for slot in sorted(set(range(jobs)) - active.keys()):
                if (run := next(waiting, None)) is None:
                    break
                active[slot] = run, start(run, slot)
            if not active:
                return
            time.sleep(POLL_SECONDS)
            for slot, (run, process) in list(active.items()):
                if (code := process.poll()) is not None:
                    del active[slot]
                    on_end(run, code)
    except BaseException:
        _stop([process for _, process in active.values()])
        raise


def start_process(run: Run, *, device: str, jobs: int) -> Process:
    """Start a run on a device, as one of `jobs`; its output replaces its log."""
    env = dict(os.environ)
    if jobs > 1:
        env.setdefault("OMP_NUM_THREADS", str(max(1, num_cpus() // jobs)))
    root = Path(__file__).parents[2]  # found without an installation, too
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), env.get("PYTHONPATH"))))
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("w", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, "-m", TRIAL_MODULE, f"--device={device}", *run.args],
            stdin=subprocess.PIPE,  # closed when this process ends, however that happens
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            # Ctrl-C in a terminal then reaches the sweep alone, which stops its runs once.
            process_group=None if os.name == "nt" else 0,
        )


def last_error(run: Run, code: int) -> str:
    """The last error line that a run printed, or how it ended."""
    if not code:
        return "it ended without a finite held-out loss"
    with contextlib.suppress(OSError):
        lines = run.log.read_text("utf-8", "replace").splitlines()
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        if last := (errors or [line for line in lines if line.strip()])[-1:]:
            return printable(last[0].strip())
    return f"exit code {code}"


def _stop(processes: Sequence[Process]) -> None:
    """Let children save and end; a second Ctrl-C ends them at once."""
    try:
        for process in processes:
            # Not SIGINT: a shell's background jobs ignore it. On Windows, Ctrl-C has reached them.
            if os.name != "nt" and process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait()
    except BaseException:
        for process in processes:
            process.kill()
        raise


def find_devices(config: Config) -> list[str]:
    """Devices that runs take in turns: all GPUs, unless one is named."""
    count = torch.cuda.device_count() if config.device in ("auto", "cuda") else 0
    return [f"cuda:{i}" for i in range(count)] if count > 1 else [config.device]


def jobs_per_device(config: Config, explicit: Collection[str]) -> int:
    """Runs at a time that fit into the memory of a GPU; 1 on other devices."""
    device, _ = select_device(config.device)
    if device.type != "cuda":
        return 1
    estimator = MemoryEstimator(config, select_precision(config.dtype, device), device)
    needed = sum(estimator.memory(estimator.micro_batch(explicit)).values())
    free = MAX_MEMORY_FRACTION * (estimator.free_memory or 0)
    fitting = int(free // (needed + CONTEXT_BYTES))
    return max(1, min(MAX_JOBS_PER_GPU, fitting))
