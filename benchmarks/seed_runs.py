"""The seed's own configuration, run again: what it learned by heart, and what it learned.

    python benchmarks/seed_runs.py --tiny tinyshakespeare.txt --out results

Three runs of the preset gpt2, 500 steps each, about 8 minutes on one H100:

1. `full`: all of Shakespeare (input.txt), a tenth held out: the default.
2. `seed`: tiny Shakespeare in plain order, nothing held out: the log that the seed published.
3. `honest`: the same text with a tenth held out: what the same recipe is worth on new text.

Writes the three logs and curves, samples, and `table.md` with the seed's log beside ours. More
flags for the program may follow `--`, such as `--max_steps 20 --preset debug` to see that it works.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
STEP = re.compile(r"step (\d+) \| loss: ([\d.]+) .*norm: ([\d.]+)")


def run(name: str, out: Path, *flags: str) -> tuple[dict[int, tuple[float, float]], list[dict]]:
    """Train, and give the losses and norms by step, and the evaluations."""
    folder = out / "runs" / name
    command = [sys.executable, str(HERE.parent / "gpt.py"), "--preset", "gpt2"]
    command += [*flags, "--out_dir", str(folder), "--overwrite"]
    print(f"\n$ {' '.join(command)}", flush=True)
    begin = time.perf_counter()
    first = None
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 0 "):
                first = time.perf_counter() - begin
            if line.startswith(("step", "after", "device", "torch", "this", "Best", "error")):
                print(line, end="", flush=True)
    if process.returncode != 0:
        sys.exit(f"{name} ended with {process.returncode}")
    print(f"first step {first:.1f} s after pressing return", flush=True)
    for file in ("log.md", "training_curves.png"):
        shutil.copy(folder / file, out / f"{name}-{file}")
    prompts = ["--prompt", "ROMEO:", "--max_new_tokens", "200"]
    sample = [sys.executable, str(HERE.parent / "gpt.py"), "sample", str(folder), *prompts]
    done = subprocess.run(sample, capture_output=True, text=True, encoding="utf-8", check=True)
    print(done.stdout, flush=True)
    (out / f"{name}-sample.txt").write_text(done.stdout, encoding="utf-8")
    events = [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]
    steps = {e["step"]: (e["loss"], e["norm"]) for e in events if e["event"] == "train"}
    return steps, [e for e in events if e["event"] == "eval"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", type=Path, required=True, help="tiny Shakespeare")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("flags", nargs="*", help="more flags for the program, behind --")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tiny = ["--input", str(args.tiny)]
    plain = [*tiny, "--val_fraction", "0", "--shuffle", "false"]
    seed, _ = run("seed", args.out, *plain, *args.flags)
    honest, judged = run("honest", args.out, *tiny, *args.flags)
    run("full", args.out, *args.flags)

    published = {
        int(m[1]): (float(m[2]), float(m[3]))
        for m in map(STEP.match, (HERE / "seed-log.txt").read_text().splitlines())
        if m
    }
    held_out = {event["step"]: event["val_loss"] for event in judged}
    lines = [
        "| step | seed's log, loss | ours, loss | seed's log, norm | ours, norm "
        "| a tenth held out: training | a tenth held out: held out |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for step in sorted(set(published) | {s for s in seed if s % 50 == 0}):
        theirs = published.get(step)
        cells = [
            f"{theirs[0]:.4f}" if theirs else "",
            f"{seed[step][0]:.4f}" if step in seed else "",
            f"{theirs[1]:.2f}" if theirs else "",
            f"{seed[step][1]:.2f}" if step in seed else "",
            f"{honest[step][0]:.4f}" if step in honest else "",
            f"{held_out[step]:.4f}" if step in held_out else "",
        ]
        lines.append(f"| {step} | {' | '.join(cells)} |")
    (args.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
