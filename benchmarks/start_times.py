"""Seconds from pressing return to the first step line: with nothing cached, and again.

    python benchmarks/start_times.py
    python benchmarks/start_times.py -- --preset debug --device cpu      to see that it works

Each start is a process of its own, ended when it has made its first step. Caches are kept in a
folder that is empty at first. On a machine that has just started, the first program also waits for
the disk to give torch's libraries: its row is not like the others.
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
    """One start, in folders that may be there already, and when it said what."""
    environment = {**os.environ, **{name: str(cache / name) for name in CACHES}}
    command = [sys.executable, str(SCRIPT), *flags, "--out_dir", str(run)]
    begin = time.perf_counter()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as program:
        assert program.stdout is not None
        said = []
        for line in program.stdout:
            seconds = time.perf_counter() - begin
            said.append(f"{seconds:5.1f}  {line}")
            if line.startswith("step 0 "):
                program.kill()
                return seconds, "".join(said)
    raise SystemExit("".join(said) + "error: it never came to its first step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cold", type=int, default=2, help="starts with nothing cached")
    parser.add_argument("--warm", type=int, default=2, help="starts behind the last of them")
    parser.add_argument("--lines", action="store_true", help="also when the last one said what")
    parser.add_argument("flags", nargs="*", default=["--preset", "gpt2"], help="of gpt.py")
    args = parser.parse_args()
    said = ""
    print("| start | seconds |\n| --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as home:
        starts = [(f"cold {n + 1}", f"cache-{n}") for n in range(args.cold)]
        starts += [
            (f"warm {n + 1}", starts[-1][1] if starts else "cache") for n in range(args.warm)
        ]
        for number, (name, cache) in enumerate(starts):
            seconds, said = seconds_to_first_step(
                args.flags, Path(home) / cache, Path(home) / f"run-{number}"
            )
            print(f"| {name} | {seconds:.1f} |", flush=True)
    if args.lines:
        print(f"\n{said}")


if __name__ == "__main__":
    main()
