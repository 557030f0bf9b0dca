"""What becomes of a run in other programs: logits, greedy text, perplexity, sizes.

    python benchmarks/exports.py runs/shakespeare-cpu

Needs transformers, gguf and llama-cpp-python (it is compiled when it is installed, five minutes).
Perplexity is over the first windows of the part of the run's text that it held out; greedy text
goes on from a prompt out of it, and is compared token by token.
"""

import argparse
import math
import os
import tempfile
from pathlib import Path

import llama_cpp
import torch
import transformers

from gptforge import load
from gptforge.builders.export_model import export_gguf, export_hf
from gptforge.checkpoint import store
from gptforge.convert.gguf import GGUF_TYPES
from gptforge.data.dataset import read_text, split_text
from gptforge.inference.sampling import SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--windows", type=int, default=16)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()

    ours = load(args.run, device="cpu", dtype="float32")
    config = store.read_config(store.resolve_checkpoint(args.run))
    _, held_out = split_text(read_text(Path(config.input)).content, config.val_fraction)
    block = ours.model.config.block_size
    ids = ours.encode(held_out[: 40 * args.windows * block])[: args.windows * block]
    windows = torch.tensor(ids).view(-1, block)
    size = ours.tokenizer.vocab_size
    prompt, steps = windows[0, :16].tolist(), block - 16
    [written] = ours.generate_batch([ours.decode(prompt)], steps, SamplingParams(0))

    print(f"{args.run}: {os.cpu_count()} cores, torch {torch.__version__}, transformers "
          f"{transformers.__version__}, llama-cpp-python {llama_cpp.__version__}")  # fmt: skip
    print(f"{len(windows)} windows of {block} tokens; greedy: {steps} tokens\n")
    print("| form | size, MB | largest difference of logits | perplexity | ratio | same greedy |")
    print("| --- | --- | --- | --- | --- | --- |")
    with torch.inference_mode():
        mine = torch.cat([ours.logits(row.tolist())[None] for row in windows])
    base = perplexity(mine, windows)
    report("gptforge, float32", None, 0.0, base, base, "")

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "hf"
        export_hf(args.run, out, log=lambda _: None)
        peer = transformers.GPT2LMHeadModel.from_pretrained(out, local_files_only=True).eval()
        with torch.inference_mode():
            theirs = peer(windows).logits[..., :size]
            text = peer.generate(torch.tensor([prompt]), max_new_tokens=steps, do_sample=False)
        same = agreement(written.ids, text[0, 16:].tolist())
        worst = float((theirs - mine).abs().max())
        report("transformers", out / "model.safetensors", worst, perplexity(theirs, windows),
               base, same)  # fmt: skip
        for kind in GGUF_TYPES:
            path = Path(folder) / f"{kind}.gguf"
            export_gguf(args.run, path, dtype=kind, log=lambda _: None)
            model = llama_cpp.Llama(str(path), n_ctx=block, logits_all=True, verbose=False)
            theirs = torch.stack([scores(model, row.tolist())[:, :size] for row in windows])
            worst = float((theirs - mine).abs().max())
            same = agreement(written.ids, greedy(model, prompt, steps, size))
            report(f"llama.cpp, {kind}", path, worst, perplexity(theirs, windows), base, same)


def perplexity(logits: torch.Tensor, windows: torch.Tensor) -> float:
    """Over all tokens of the windows but their first."""
    known = logits[:, :-1].log_softmax(-1).gather(-1, windows[:, 1:, None])
    return math.exp(-float(known.double().mean()))


def scores(model: llama_cpp.Llama, ids: list[int]) -> torch.Tensor:
    """llama.cpp's logits behind each id, (T, V)."""
    model.reset()
    model.eval(ids)
    return torch.from_numpy(model.scores[: len(ids)].copy())


def greedy(model: llama_cpp.Llama, prompt: list[int], steps: int, size: int) -> list[int]:
    """What llama.cpp writes when it always takes the likeliest."""
    model.reset()
    model.eval(prompt)
    written = []
    for _ in range(steps):
        written.append(int(model.scores[model.n_tokens - 1][:size].argmax()))
        model.eval(written[-1:])
    return written


def agreement(ours: list[int], theirs: list[int]) -> str:
    """How many tokens are the same before the first that is not."""
    same = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))
    return "all" if same == len(ours) else f"{same} of {len(ours)}"


def report(
    form: str, path: Path | None, worst: float, value: float, base: float, same: str
) -> None:
    megabytes = f"{path.stat().st_size / 1e6:.2f}" if path else ""
    print(f"| {form} | {megabytes} | {worst:.1e} | {value:.4f} | {value / base:.5f} | {same} |",
          flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
