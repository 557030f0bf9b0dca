"""Seconds from starting the program to its first step, with empty and with warm caches.

    python benchmarks/start_times.py
    python benchmarks/start_times.py -- --preset debug --device cpu      to see that it works

Each start is a process that is killed after its first step. The caches are in a folder that is
empty at first. On a machine that has just booted, the first program also waits for the disk to load
torch's libraries.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "gpt.py"
CACHES = ("XDG_CACHE_HOME", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")


def seconds_to_first_step(flags: list[str], cache: Path, run: Path) -> tuple[float, str]:
    """Seconds of one start, and the lines it printed with their times."""
    environment = {**os.environ, **{name: str(cache / name) for name in CACHES}}
    command = [sys.executable, str(SCRIPT), *flags, "--out_dir", str(run)]
    start = time.perf_counter()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as program:
        assert program.stdout is not None
        lines = []
        for line in program.stdout:
            seconds = time.perf_counter() - start
            lines.append(f"{seconds:5.1f}  {line}")
            if line.startswith("step 0 "):
                program.kill()
                return seconds, "".join(lines)
    raise SystemExit("".join(lines) + "error: no first step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cold", type=int, default=2, help="starts with nothing cached")
    parser.add_argument("--warm", type=int, default=2, help="starts with those caches")
    parser.add_argument("--lines", action="store_true", help="print the last start's output")
    parser.add_argument("flags", nargs="*", default=["--preset", "gpt2"], help="of gpt.py")
    args = parser.parse_args()
    lines = ""
    print("| start | seconds |\n| --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as home:
        starts = [(f"cold {n + 1}", f"cache-{n}") for n in range(args.cold)]
        starts += [
            (f"warm {n + 1}", starts[-1][1] if starts else "cache") for n in range(args.warm)
        ]
        for number, (name, cache) in enumerate(starts):
            seconds, lines = seconds_to_first_step(
                args.flags, Path(home) / cache, Path(home) / f"run-{number}"
            )
            print(f"| {name} | {seconds:.1f} |", flush=True)
    if args.lines:
        print(f"\n{lines}")


if __name__ == "__main__":
    main()
