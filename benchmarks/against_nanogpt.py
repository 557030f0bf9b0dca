"""Updates a second against nanoGPT's own model and loop, in one process, in turns.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python benchmarks/against_nanogpt.py ../nanoGPT --text tinyshakespeare.txt
    python benchmarks/against_nanogpt.py ../nanoGPT --text tinyshakespeare.txt --device cuda

On a CPU: nanoGPT's own recipe for characters (4 layers, 128 wide, 12 windows of 64) and GPT-2 small
(4 windows of 256), and ours alone, from the same weights over the same batches: the losses in
float32 by the plain path beside those of the fast one. On a GPU: its recipe for characters there (6
layers, 384 wide, 64 windows of 256), with its dropout of 0.2 and without, and GPT-2 small (4 times
32 windows of 1024).

nanoGPT runs as its train.py does: on a CPU in float32, on a GPU compiled, in bfloat16, with its
batches copied beside the computing and its loss read every ten updates. Ours runs with what this
machine's defaults choose.
"""

import argparse
import copy
import statistics
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from gptforge.builders.train_step import CUDA_GRAPH_MAX_FLOPS
from gptforge.config import Config, GPTConfig
from gptforge.data.dataloader import DataLoader
from gptforge.device import (
    Precision,
    select_device,
    select_precision,
    synchronize,
)
from gptforge.estimate import formulas
from gptforge.kernel_select import DEFAULT_KERNELS, select_kernels
from gptforge.model import GPT
from gptforge.optim.adamw import build_adamw
from gptforge.tokenizers import from_name
from gptforge.train.train_step import TrainStep

FLOAT32 = Precision(torch.float32, "to compare")


@dataclass(frozen=True)
class Recipe:
    name: str
    tokenizer: str
    shape: GPTConfig
    windows: int
    """In a micro-batch."""
    bias: bool
    turns: int
    steps: int
    matched: int = 0
    """Updates whose losses are compared."""
    parts: int = 1
    """Micro-batches in an update."""


SMALL = GPTConfig(1024, 50304, 12, 12, 768)
RECIPES = {
    "cpu": (
        Recipe("characters, 4 x 128", "char", GPTConfig(64, 65, 4, 4, 128), 12, False, 7, 60, 400),
        Recipe("GPT-2 small", "gpt2", replace(SMALL, block_size=256), 4, True, 3, 2),
    ),
    "cuda": (
        Recipe(
            "characters, 6 x 384, dropout 0.2", "char",
            GPTConfig(256, 65, 6, 6, 384, dropout=0.2), 64, False, 5, 100,
        ),
        Recipe(
            "characters, 6 x 384", "char", GPTConfig(256, 65, 6, 6, 384), 64, False, 5, 100
        ),
        Recipe("GPT-2 small", "gpt2", SMALL, 32, True, 3, 10, parts=4),
    ),
}  # fmt: skip


class NanoGPT:
    """One update, as nanoGPT's train.py makes it."""

    def __init__(
        self, folder: Path, recipe: Recipe, tokens: np.ndarray, device: torch.device
    ) -> None:
        sys.path.insert(0, str(folder))
        import model as nanogpt  # type: ignore[import-not-found]

        s, self.recipe, self.tokens, self.device = recipe.shape, recipe, tokens, device
        shape = nanogpt.GPTConfig(
            s.block_size, s.vocab_size, s.n_layer, s.n_head, s.n_embd, s.dropout, recipe.bias
        )
        self.model = nanogpt.GPT(shape).to(device)
        self.optimizer = self.model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device.type)
        self.context: AbstractContextManager[object] = nullcontext()
        self.made = 0
        if device.type == "cuda":
            self.context = torch.autocast("cuda", torch.bfloat16)
            self.model = torch.compile(self.model)
        self.batch = self.get_batch()

    def get_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        length = self.recipe.shape.block_size
        starts = torch.randint(len(self.tokens) - length, (self.recipe.windows,))
        pieces = [self.tokens[i : i + length + 1].astype(np.int64) for i in starts]
        x = torch.stack([torch.from_numpy(piece[:-1]) for piece in pieces])
        y = torch.stack([torch.from_numpy(piece[1:]) for piece in pieces])
        if self.device.type == "cpu":
            return x, y
        x, y = (z.pin_memory().to(self.device, non_blocking=True) for z in (x, y))
        return x, y

    def __call__(self) -> None:
        for _ in range(self.recipe.parts):
            with self.context:
                _, loss = self.model(*self.batch)
                loss = loss / self.recipe.parts
            self.batch = self.get_batch()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.made += 1
        if self.device.type == "cpu" or self.made % 10 == 0:
            loss.item()


class Ours:
    """One update of ours, with its loader."""

    def __init__(
        self,
        model: GPT,
        recipe: Recipe,
        tokens: np.ndarray,
        device: torch.device,
        *,
        plain: bool = False,
    ) -> None:
        precision = FLOAT32 if plain else select_precision("auto", device)
        kernels = select_kernels(Config(dropout=recipe.shape.dropout), device, precision)
        model = model.to(device)
        self.step = TrainStep(
            model,
            build_adamw(model.parameters(), betas=(0.9, 0.99), weight_decay=0.1),
            precision=precision,
            micro_batch_size=recipe.windows,
            grad_clip=1.0,
            kernels=DEFAULT_KERNELS if plain else kernels,
        )
        length = recipe.shape.block_size
        flops = formulas.flops_per_token(recipe.shape, length) * recipe.windows * length
        is_small = flops < CUDA_GRAPH_MAX_FLOPS and self.step.kernels.manual_backward
        if is_small and not self.step.capture_cuda_graph(length):
            self.step.set_kernels(self.step.kernels)
        self.loader = DataLoader(
            tokens, context_length=length, global_batch_size=recipe.windows * recipe.parts, seed=1,
            shuffle=True, device=device,
        )  # fmt: skip
        self.made = 0

    def __call__(self) -> float:
        loss, _ = self.step(*self.loader.next_batch(), lr=1e-3)
        self.loader.prefetch_to_device()
        self.made += 1
        is_read = self.step.device.type == "cpu" or self.made % 10 == 0
        return float(loss) if is_read else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nanogpt", type=Path, help="folder of a checkout of nanoGPT")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--device", default="cpu", choices=RECIPES)
    parser.add_argument("--only", default="", help="recipes whose names hold this")
    args = parser.parse_args()
    device, name = select_device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    text = args.text.read_text(encoding="utf-8")
    lines, matches = [], []
    for recipe in [r for r in RECIPES[args.device] if args.only in r.name]:
        tokens = from_name(recipe.tokenizer, text).encode(text)
        torch.manual_seed(1337)
        # As the program sizes its table: round numbers.
        rows = -(-recipe.shape.vocab_size // 64) * 64
        model = GPT(replace(recipe.shape, vocab_size=rows)).init_weights()
        theirs = NanoGPT(args.nanogpt, recipe, tokens, device)
        ours = Ours(copy.deepcopy(model), recipe, tokens, device)
        seconds: dict[str, list[float]] = {"nanoGPT": [], "gptforge": []}
        for turn in range(recipe.turns + 1):
            for who, update in (("nanoGPT", theirs), ("gptforge", ours)):
                synchronize(device)
                begin = time.perf_counter()
                for _ in range(recipe.steps):
                    update()
                synchronize(device)
                if turn:  # the first one warms up
                    seconds[who].append((time.perf_counter() - begin) / recipe.steps)
        a, b = (statistics.median(seconds[who]) for who in ("nanoGPT", "gptforge"))
        spread = f"{min(seconds['gptforge']) * 1e3:.1f} to {max(seconds['gptforge']) * 1e3:.1f}"
        rate = recipe.windows * recipe.parts * recipe.shape.block_size / b
        lines.append(
            f"| {recipe.name} | {1 / a:.2f} | {1 / b:.2f} | {spread} | {rate:,.0f} | {a / b:.2f} |"
        )
        print(lines[-1], flush=True)
        if recipe.matched:
            torch.manual_seed(1337)
            model = GPT(recipe.shape).init_weights()
            plain = Ours(copy.deepcopy(model), recipe, tokens, device, plain=True)
            quick = Ours(copy.deepcopy(model), recipe, tokens, device)
            for step in range(recipe.matched):
                one, two = plain(), quick()
                if step in (0, 10, 100, recipe.matched // 2, recipe.matched - 1):
                    matches.append(f"| {step} | {one:.4f} | {two:.4f} | {two / one - 1:+.2%} |")
        del theirs, ours
    fast = select_precision("auto", device).name
    print(f"\n{name}, torch {torch.__version__}, ours in {fast}\n")
    print("| recipe | nanoGPT, steps/s | gptforge, steps/s | ms a step | tokens/s | ratio |")
    print("| --- | --- | --- | --- | --- | --- |", *lines, sep="\n")
    if matches:
        print("\n| step | loss, float32, plain path | loss, fast path | difference |")
        print("| --- | --- | --- | --- |", *matches, sep="\n")


if __name__ == "__main__":
    main()
