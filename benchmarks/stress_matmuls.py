"""Runs every cuBLASLt kernel of a training step while several processes share the GPU.

    python benchmarks/stress_matmuls.py --jobs 4 -- --n_embd 448 --n_head 7 --vocab_size 128

A kernel that fails only when the GPU switches between processes fails here within seconds instead
of hours: each of the kernels that autotuning can choose for the GEMMs of a step runs without a
pause, in as many processes as `--jobs`. A process that a failure ends is started again with the
next kernel. After `--` come the flags of a run, which has one layer by default: all are alike.

Prints one line for each kernel: the GEMM, cuBLASLt's attributes of the kernel, its name, and how
often it ran or the error. The exit status is 1 if one failed.
"""

import argparse
import contextlib
import ctypes
import functools
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from unittest import mock

import torch

from gptforge.bench.train_speed import random_batch
from gptforge.builders.step_timing import build_bench_step
from gptforge.cli.parsing import parse_train_args, resolve_preset
from gptforge.config import Config
from gptforge.kernels.cublaslt import MatmulPlan

# cublasLt.h: cublasLtMatmulAlgoConfigAttributes_t
ATTRIBUTES = (
    "id",
    "tile",
    "split_k",
    "reduction",
    "swizzle",
    "custom",
    "stages",
    "inner",
    "cluster",
)
RUNS_BETWEEN_CHECKS = 200
keep_alive: list[object] = []  # the plans point to biases and outputs of the step


class Gemm(NamedTuple):
    plan: MatmulPlan
    operands: tuple[tuple[torch.Size, torch.dtype], ...]  # left, right and out


def record_gemms(flags: list[str]) -> list[Gemm]:
    """The GEMMs of one training step."""
    recorded: dict[int, Gemm] = {}
    call = MatmulPlan.__call__

    def recording_call(plan: MatmulPlan, *operands: Any, **options: Any) -> Any:
        recorded[id(plan)] = Gemm(plan, tuple((t.shape, t.dtype) for t in operands))
        return call(plan, *operands, **options)

    args, explicit = parse_train_args(["--n_layer", "1", "--device", "cuda", *flags], cls=Config)
    config = resolve_preset(args, explicit)
    with mock.patch.object(MatmulPlan, "__call__", recording_call):
        step = build_bench_step(config, explicit)  # small models are captured here
        step(*random_batch(config, step.device), lr=1e-3)
    keep_alive.append(step)
    if not recorded:
        raise SystemExit("error: no GEMM of this step runs in cuBLASLt")
    return list(recorded.values())


def attributes(plan: MatmulPlan, candidate: Any) -> dict[str, int]:
    """What cuBLASLt says of a kernel; attributes have two or four bytes."""
    found = {}
    for number, name in enumerate(ATTRIBUTES):
        for value in (ctypes.c_uint32(), ctypes.c_uint16()):
            written = ctypes.c_size_t()
            with contextlib.suppress(RuntimeError):
                plan._lib.call(
                    "MatmulAlgoConfigGetAttribute", ctypes.byref(candidate.algo), number,
                    ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value)),
                    ctypes.byref(written),
                )  # fmt: skip
                found[name] = value.value
                break
    return found


def kernel_names(run: Any) -> str:
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    return " ".join(sorted({event.name for event in profile.events()}))


def work(flags: list[str], first: int, step: int, seconds: float, only: str) -> None:
    """Run the kernels `first`, `first + step`, and so on, if `only` is in their names."""
    gemms = record_gemms(flags)
    kernels = [(*gemm, index) for gemm in gemms for index in range(len(gemm[0]._candidates))]
    for number in range(first, len(kernels), step):
        plan, operands, index = kernels[number]
        candidate = plan._candidates[index]
        shapes = " ".join("x".join(map(str, shape)) for shape, _ in operands)
        best = "*" if bytes(candidate.algo) == bytes(plan._best.algo) else ""
        described = f"{shapes} {index}{best} {attributes(plan, candidate)}"
        print(f"start {number} {described}", flush=True)
        tensors = [torch.randn(shape, device="cuda").to(dtype) for shape, dtype in operands]
        try:
            name = kernel_names(functools.partial(plan._run, candidate, *tensors))
        except torch.AcceleratorError:
            raise
        except RuntimeError as error:
            print(f"end {number} refused: {error}", flush=True)
            continue
        if only not in name:
            print(f"end {number} {name}: skipped", flush=True)
            continue
        count, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            for _ in range(RUNS_BETWEEN_CHECKS):
                plan._run(candidate, *tensors)
            torch.cuda.synchronize()
            count += RUNS_BETWEEN_CHECKS
        print(f"end {number} {name}: {count:,} runs", flush=True)


def supervise(job: int, jobs: int, seconds: float, only: str, flags: list[str]) -> int:
    """Run every `jobs`-th kernel in processes of their own; returns how many failed."""
    first, num_failed = job, 0
    while True:
        command = [sys.executable, __file__, "--work", str(first), "--jobs", str(jobs)]
        command += ["--seconds", str(seconds), "--only", only, "--", *flags]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        running, output = "", []
        for line in process.stdout:
            output.append(line)
            kind, _, rest = line.strip().partition(" ")
            if kind == "start":
                running = rest
                first = int(rest.split()[0]) + jobs  # where to continue if this one fails
            elif kind == "end":
                print(f"{running}: {rest.partition(' ')[2]}", flush=True)
                running = ""
        if process.wait() == 0:
            return num_failed
        num_failed += 1
        if not running:
            print("".join(output), flush=True)
            return num_failed
        error = next((line for line in reversed(output) if "CUDA error" in line), output[-1])
        print(f"FAILED {running}: {error.strip()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=4, help="processes at once")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each kernel")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only kernels with it in their name"
    )
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    args, flags = sys.argv[1:], []
    if "--" in args:
        args, flags = args[: args.index("--")], args[args.index("--") + 1 :]
    options = parser.parse_args(args)
    if options.work is not None:
        work(flags, options.work, options.jobs, options.seconds, options.only)
        return
    with ThreadPoolExecutor(options.jobs) as pool:
        failures = sum(
            pool.map(
                lambda job: supervise(job, options.jobs, options.seconds, options.only, flags),
                range(options.jobs),
            )
        )
    print(f"{failures} failed")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
