"""Updates a second against nanoGPT's own model and loop, in one process, in turns.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python benchmarks/against_nanogpt.py ../nanoGPT --text tinyshakespeare.txt

Two recipes on a CPU: nanoGPT's own for characters (4 layers, 128 wide, 12 windows of 64) and GPT-2
small (4 windows of 256). nanoGPT runs as its train.py does on a CPU: float32, batches from memory,
clipping, the loss read after each step. Ours runs with what this machine's defaults choose.

Then ours alone, from the same weights over the same batches: the losses in float32 by the plain
path beside those of the fast one.
"""

import argparse
import copy
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gptforge.config import GPTConfig
from gptforge.data.loader import Loader
from gptforge.hardware import PLAIN, Precision, choose_kernels, choose_precision
from gptforge.model import GPT
from gptforge.optim.adamw import build_adamw
from gptforge.tokenizers import named
from gptforge.train.step import TrainStep

CPU = torch.device("cpu")
FLOAT32 = Precision(torch.float32, "to compare")


@dataclass(frozen=True)
class Recipe:
    name: str
    tokenizer: str
    shape: GPTConfig
    windows: int
    bias: bool
    turns: int
    steps: int
    matched: int


RECIPES = (
    Recipe("characters, 4 x 128", "char", GPTConfig(64, 65, 4, 4, 128), 12, False, 7, 60, 400),
    Recipe("GPT-2 small", "gpt2", GPTConfig(256, 50304, 12, 12, 768), 4, True, 3, 2, 0),
)


class NanoGPT:
    """One update, as nanoGPT's train.py makes it on a CPU."""

    def __init__(self, folder: Path, recipe: Recipe, tokens: np.ndarray) -> None:
        sys.path.insert(0, str(folder))
        import model as nanogpt  # type: ignore[import-not-found]

        s, self.recipe, self.tokens = recipe.shape, recipe, tokens
        self.model = nanogpt.GPT(
            nanogpt.GPTConfig(
                s.block_size, s.vocab_size, s.n_layer, s.n_head, s.n_embd, 0.0, recipe.bias
            )
        )
        self.optimizer = self.model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")

    def __call__(self) -> None:
        length = self.recipe.shape.block_size
        starts = torch.randint(len(self.tokens) - length, (self.recipe.windows,))
        pieces = [self.tokens[i : i + length + 1].astype(np.int64) for i in starts]
        x = torch.stack([torch.from_numpy(piece[:-1]) for piece in pieces])
        y = torch.stack([torch.from_numpy(piece[1:]) for piece in pieces])
        _, loss = self.model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()


class Ours:
    """One update of ours, with its loader."""

    def __init__(
        self, model: GPT, recipe: Recipe, tokens: np.ndarray, precision: Precision
    ) -> None:
        self.step = TrainStep(
            model,
            build_adamw(model, betas=(0.9, 0.99), weight_decay=0.1),
            precision=precision,
            micro_batch=recipe.windows,
            grad_clip=1.0,
            kernels=PLAIN if precision is FLOAT32 else choose_kernels(CPU, precision),
        )
        self.loader = Loader(
            tokens, context_length=recipe.shape.block_size, global_batch=recipe.windows, seed=1,
            shuffle=True, device=CPU,
        )  # fmt: skip

    def __call__(self) -> float:
        loss, _ = self.step(*self.loader.next(), lr=1e-3)
        return float(loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nanogpt", type=Path, help="folder of a checkout of nanoGPT")
    parser.add_argument("--text", type=Path, required=True)
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8")
    fast = choose_precision("auto", CPU)
    lines, matches = [], []
    for recipe in RECIPES:
        tokens = named(recipe.tokenizer, text).encode(text)
        torch.manual_seed(1337)
        model = GPT(recipe.shape).initialize()
        theirs = NanoGPT(args.nanogpt, recipe, tokens)
        ours = Ours(copy.deepcopy(model), recipe, tokens, fast)
        seconds: dict[str, list[float]] = {"nanoGPT": [], "gptforge": []}
        for turn in range(recipe.turns + 1):
            for name, update in (("nanoGPT", theirs), ("gptforge", ours)):
                begin = time.perf_counter()
                for _ in range(recipe.steps):
                    update()
                if turn:  # the first one warms up
                    seconds[name].append((time.perf_counter() - begin) / recipe.steps)
        a, b = (statistics.median(seconds[name]) for name in ("nanoGPT", "gptforge"))
        spread = f"{min(seconds['gptforge']) * 1e3:.1f} to {max(seconds['gptforge']) * 1e3:.1f}"
        lines.append(
            f"| {recipe.name} | {1 / a:.2f} | {1 / b:.2f} | {spread} | {a / b:.2f} |"
        )  # fmt: skip
        if recipe.matched:
            plain = Ours(copy.deepcopy(model), recipe, tokens, FLOAT32)
            quick = Ours(copy.deepcopy(model), recipe, tokens, fast)
            for step in range(recipe.matched):
                one, two = plain(), quick()
                if step in (0, 10, 100, recipe.matched // 2, recipe.matched - 1):
                    matches.append(f"| {step} | {one:.4f} | {two:.4f} | {two / one - 1:+.2%} |")
    threads = torch.get_num_threads()
    print(f"\ntorch {torch.__version__}, {threads} threads, ours in {fast.name}\n")
    print("| recipe | nanoGPT, steps/s | gptforge, steps/s | ms a step, from to | ratio |")
    print("| --- | --- | --- | --- | --- |", *lines, sep="\n")
    print("\n| step | loss, float32, plain path | loss, fast path | difference |")
    print("| --- | --- | --- | --- |", *matches, sep="\n")


if __name__ == "__main__":
    main()
