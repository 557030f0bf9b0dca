"""The configuration of the original project, run again: memorization and generalization.

    python benchmarks/seed_runs.py --tiny tinyshakespeare.txt --out results

Runs of the preset gpt2, 500 steps each, two to three minutes each on one large GPU:

1. `seed`: tiny Shakespeare without shuffling, nothing held out: the log that the project published.
2. `cut`: without the last sequences of the text. A loader that starts over when fewer than 32
   sequences are left, as many do, never reaches those; this has its exact order.
3. `weights`: `cut` from weights drawn as the original program drew them. It meant to scale down the
   init of all residual projections, but misspelled the flag of the MLP's: those stay at 0.02.
4. `honest`: the same text with a tenth held out: the loss of the same recipe on new text.
5. `full`: all of Shakespeare (input.txt), a tenth held out: the default.

Writes each run's log and curves, samples, and `table.md` with the published log beside these. More
flags for the program may follow `--`, such as `--max_steps 20 --preset debug` to see that it works.
"""

import argparse
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from gptforge.checkpoint.format import MODEL, save_checkpoint
from gptforge.checkpoint.state_dict import model_state_dict
from gptforge.config_file import to_toml
from gptforge.model import GPT
from gptforge.presets import get_preset
from gptforge.tokenizers import from_name

HERE = Path(__file__).resolve().parent
NAMES = ("seed", "cut", "weights", "honest", "full")
LENGTH, MICRO_BATCH = 1024, 32
STEP = re.compile(r"step (\d+) \| loss: ([\d.]+) .*norm: ([\d.]+)")


def run(name: str, out: Path, *flags: str) -> tuple[dict[int, tuple[float, float]], list[dict]]:
    """Train; returns loss and norm by step, and the evaluations."""
    folder = out / "runs" / name
    command = [sys.executable, str(HERE.parent / "gpt.py"), "--preset", "gpt2"]
    command += [*flags, "--out_dir", str(folder), "--restart"]
    print(f"\n$ {' '.join(command)}", flush=True)
    start = time.perf_counter()
    first = None
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 0 "):
                first = time.perf_counter() - start
            if line.startswith(("step", "after", "device", "torch", "this", "Best", "error")):
                print(line, end="", flush=True)
    if process.returncode != 0:
        sys.exit(f"{name} ended with {process.returncode}")
    print(f"first step after {first:.1f} s", flush=True)
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


def cut(text: Path, out: Path) -> Path:
    """The part of a text that a loader of full micro-batches reads."""
    tokenizer = from_name("gpt2", "")
    tokens = tokenizer.encode(text.read_text(encoding="utf-8"))
    sequences = (len(tokens) - 1) // LENGTH // MICRO_BATCH * MICRO_BATCH
    part = tokenizer.decode_bytes(tokens[: sequences * LENGTH + 1].tolist()).decode("utf-8")
    assert (len(tokenizer.encode(part)) - 1) // LENGTH == sequences
    path = out / f"first-{sequences}-sequences.txt"
    path.write_text(part, encoding="utf-8", newline="")
    return path


def published_weights(out: Path, seed: int) -> Path:
    """A checkpoint to start from, with the MLP's projections at the std of all other matrices."""
    tokenizer = from_name("gpt2", "")
    config = dataclasses.replace(get_preset("gpt2"), vocab_size=50304)
    model = GPT(config.model).init_weights(torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.c_proj.weight"):
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    path = out / "published-weights"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    text = to_toml(config, {})
    tensors = {MODEL: model_state_dict(model)}
    save_checkpoint(path, tensors, tokenizer=tokenizer, config=text)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", type=Path, required=True, help="tiny Shakespeare")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--weights_seed", type=int, default=1337, help="of the run `weights`")
    parser.add_argument("flags", nargs="*", help="more flags for the program, after --")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    plain = ["--val_fraction", "0", "--shuffle", "false"]
    flags = {
        "seed": ["--input", str(args.tiny), *plain],
        "cut": ["--input", str(cut(args.tiny, args.out)), *plain],
        "weights": [],
        "honest": ["--input", str(args.tiny)],
        "full": [],
    }
    if "weights" in args.only:
        checkpoint = published_weights(args.out, args.weights_seed)
        flags["weights"] = [*flags["cut"], "--init_from", str(checkpoint)]
    # In this order, whatever the order of --only.
    done = {
        name: run(name, args.out, *flags[name], *args.flags) for name in NAMES if name in args.only
    }
    losses = {name: steps for name, (steps, _) in done.items()}
    val_losses = {e["step"]: e["val_loss"] for e in done["honest"][1]} if "honest" in done else {}

    published = {
        int(m[1]): (float(m[2]), float(m[3]))
        for m in map(STEP.match, (HERE / "seed-log.txt").read_text().splitlines())
        if m
    }
    logged = set(published) | {
        step for steps in losses.values() for step in steps if step % 50 == 0
    }
    names = [name for name in losses if name != "full"]
    header = ["step", "published, loss", "norm"]
    for name in names:
        header += [f"{name}, loss", "norm"]
    lines = [
        f"| {' | '.join([*header, 'honest, validation'])} |",
        "| --- " * (len(header) + 1) + "|",
    ]
    for step in sorted(logged):
        cells = [str(step)]
        for steps in (published, *(losses[name] for name in names)):
            loss, norm = steps.get(step, (None, None))
            cells += [f"{loss:.4f}" if loss is not None else "", f"{norm:.2f}" if norm else ""]
        cells.append(f"{val_losses[step]:.4f}" if step in val_losses else "")
        lines.append(f"| {' | '.join(cells)} |")
    (args.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
