"""A run in other programs: logits, greedy text, perplexity and file sizes.

    python benchmarks/exports.py runs/shakespeare-cpu

Needs transformers, gguf and llama-cpp-python (its installation compiles it, five minutes).
Perplexity is over the first sequences of the run's held-out text; greedy text continues a prompt
from it, and is compared token by token.
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
from gptforge.checkpoint import format as checkpoints
from gptforge.convert.gguf import GGUF_TYPES
from gptforge.data.dataset import DatasetOptions, open_dataset
from gptforge.inference.sampling import SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--sequences", type=int, default=16)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()

    lm = load(args.run, device="cpu", dtype="float32")
    config = checkpoints.read_config(checkpoints.resolve_checkpoint(args.run))
    options = DatasetOptions(tokenizer=lm.tokenizer, val_fraction=config.val_fraction)
    val_tokens = open_dataset(Path(config.input), options).val
    block = lm.model.config.block_size
    count = min(args.sequences, len(val_tokens) // block) * block
    sequences = torch.tensor(val_tokens[:count].astype("int64")).view(-1, block)
    size = lm.tokenizer.vocab_size
    prompt, steps = sequences[0, :16].tolist(), block - 16
    [completion] = lm.generate_batch([lm.decode(prompt)], steps, SamplingParams(0))

    print(f"{args.run}: {os.cpu_count()} cores, torch {torch.__version__}, transformers "
          f"{transformers.__version__}, llama-cpp-python {llama_cpp.__version__}")  # fmt: skip
    print(f"{len(sequences)} sequences of {block} tokens; greedy: {steps} tokens\n")
    print("| format | size, MB | max logit difference | perplexity | ratio | equal greedy tokens |")
    print("| --- | --- | --- | --- | --- | --- |")
    with torch.inference_mode():
        expected = torch.cat([lm.logits(row.tolist())[None] for row in sequences])
    base = perplexity(expected, sequences)
    report("gptforge, float32", None, 0.0, base, base, "")

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "hf"
        export_hf(args.run, out)
        exported = transformers.GPT2LMHeadModel.from_pretrained(out, local_files_only=True).eval()
        with torch.inference_mode():
            logits = exported(sequences).logits[..., :size]
            text = exported.generate(torch.tensor([prompt]), max_new_tokens=steps, do_sample=False)
        same = agreement(completion.ids, text[0, 16:].tolist())
        worst = float((logits - expected).abs().max())
        report("transformers", out / "model.safetensors", worst, perplexity(logits, sequences),
               base, same)  # fmt: skip
        for kind in GGUF_TYPES:
            path = Path(folder) / f"{kind}.gguf"
            export_gguf(args.run, path, dtype=kind)
            llama = llama_cpp.Llama(str(path), n_ctx=block, logits_all=True, verbose=False)
            logits = torch.stack([scores(llama, row.tolist())[:, :size] for row in sequences])
            worst = float((logits - expected).abs().max())
            same = agreement(completion.ids, greedy(llama, prompt, steps, size))
            report(f"llama.cpp, {kind}", path, worst, perplexity(logits, sequences), base, same)


def perplexity(logits: torch.Tensor, sequences: torch.Tensor) -> float:
    """Over all tokens but the first of each sequence."""
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, sequences[:, 1:, None])
    return math.exp(-float(logprobs.double().mean()))


def scores(model: llama_cpp.Llama, ids: list[int]) -> torch.Tensor:
    """llama.cpp's logits after each id, (T, V)."""
    model.reset()
    model.eval(ids)
    return torch.from_numpy(model.scores[: len(ids)].copy())


def greedy(model: llama_cpp.Llama, prompt: list[int], steps: int, size: int) -> list[int]:
    """The tokens of llama.cpp's greedy decoding."""
    model.reset()
    model.eval(prompt)
    completion = []
    for _ in range(steps):
        completion.append(int(model.scores[model.n_tokens - 1][:size].argmax()))
        model.eval(completion[-1:])
    return completion


def agreement(a: list[int], b: list[int]) -> str:
    """How many tokens are equal before the first that is not."""
    equal = next((n for n, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return "all" if equal == len(a) else f"{equal} of {len(a)}"


def report(
    form: str, path: Path | None, worst: float, value: float, base: float, same: str
) -> None:
    megabytes = f"{path.stat().st_size / 1e6:.2f}" if path else ""
    print(f"| {form} | {megabytes} | {worst:.1e} | {value:.4f} | {value / base:.5f} | {same} |",
          flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
