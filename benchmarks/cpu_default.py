"""The CPU default on a text: validation loss, time and a sample.

    python benchmarks/cpu_default.py                            input.txt
    python benchmarks/cpu_default.py --input tinyshakespeare.txt

Runs `gpt.py --preset shakespeare-cpu` as a user would, then evaluates its best checkpoint on all of
the held-out text. Nats per character is what others report for tiny Shakespeare; nanoGPT's CPU
recipe was measured at 1.886 there, in 199 s on two cores.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

PROGRAM = [sys.executable, str(Path(__file__).resolve().parents[1] / "gpt.py")]


def run_program(*args: str) -> str:
    command = [*PROGRAM, *args]
    done = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", default="input.txt")
    parser.add_argument("--out_dir", help="keep the run here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = args.out_dir or str(Path(scratch) / "run")
        start = time.perf_counter()
        train = [*PROGRAM, "--preset", "shakespeare-cpu", "--input", args.input, "--out_dir", run]
        subprocess.run(train, check=True)
        seconds = time.perf_counter() - start
        score = json.loads(run_program("eval", run, "--json"))
        sample = run_program("sample", run, "--prompt", "Romeo:", "--max_new_tokens", "400")
    print(f"\n{sample}")
    print(f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}\n")
    print("| text | held-out loss, nats per character | bits per byte | seconds |")
    print("| --- | --- | --- | --- |")
    name = Path(args.input).name
    print(
        f"| {name} | {score['nats_per_char']:.4f} | {score['bits_per_byte']:.4f} | {seconds:.0f} |"
    )


if __name__ == "__main__":
    main()
