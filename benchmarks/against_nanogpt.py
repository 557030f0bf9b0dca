"""Steps/s beside nanoGPT's model and training loop, interleaved in one process.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python benchmarks/against_nanogpt.py ../nanoGPT --text tinyshakespeare.txt
    python benchmarks/against_nanogpt.py ../nanoGPT --text tinyshakespeare.txt --device cuda

On a CPU: nanoGPT's recipe for characters (4 layers, 128 channels, 12 sequences of 64) and GPT-2
small (4 sequences of 256); then the losses of the plain path in float32 beside those of the fast
one, from the same weights over the same batches. On a GPU: its recipe for characters there (6
layers, 384 channels, 64 sequences of 256), with its dropout of 0.2 and without, and GPT-2 small (4
micro-batches of 32 sequences of 1024).

nanoGPT runs as its train.py does: on a CPU in float32, on a GPU compiled, in bfloat16, with batches
copied asynchronously and the loss read every ten steps. GPT-Forge runs with its defaults for the
device.
"""

import argparse
import copy
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from nanogpt import import_model

from gptforge.builders.build_train_step import CUDA_GRAPH_MAX_FLOPS
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
from gptforge.training.train_step import TrainStep


@dataclass(frozen=True)
class Recipe:
    """A model, its batch, and how often to time it.

    Attributes:
        micro_batch: sequences in a micro-batch.
        bias: whether nanoGPT's model has biases.
        compared_steps: steps whose losses are compared between the plain and the fast path.
        accumulation: micro-batches in a step.
    """

    name: str
    tokenizer: str
    model: GPTConfig
    micro_batch: int
    bias: bool
    repeats: int
    steps: int
    compared_steps: int = 0
    accumulation: int = 1


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
        Recipe("GPT-2 small", "gpt2", SMALL, 32, True, 3, 10, accumulation=4),
    ),
}  # fmt: skip


class NanoGPTStep:
    """A training step as in nanoGPT's train.py."""

    def __init__(
        self, folder: Path, recipe: Recipe, tokens: np.ndarray, device: torch.device
    ) -> None:
        nanogpt = import_model(folder)
        c, self.recipe, self.tokens, self.device = recipe.model, recipe, tokens, device
        config = nanogpt.GPTConfig(
            c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd, c.dropout, recipe.bias
        )
        self.model = nanogpt.GPT(config).to(device)
        self.optimizer = self.model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device.type)
        self.context: AbstractContextManager[object] = nullcontext()
        self.num_steps = 0
        if device.type == "cuda":
            self.context = torch.autocast("cuda", torch.bfloat16)
            self.model = torch.compile(self.model)
        self.batch = self.get_batch()

    def get_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        length = self.recipe.model.block_size
        starts = torch.randint(len(self.tokens) - length, (self.recipe.micro_batch,))
        sequences = [self.tokens[i : i + length + 1].astype(np.int64) for i in starts]
        x = torch.stack([torch.from_numpy(ids[:-1]) for ids in sequences])
        y = torch.stack([torch.from_numpy(ids[1:]) for ids in sequences])
        if self.device.type == "cpu":
            return x, y
        x, y = (z.pin_memory().to(self.device, non_blocking=True) for z in (x, y))
        return x, y

    def __call__(self) -> None:
        for _ in range(self.recipe.accumulation):
            with self.context:
                _, loss = self.model(*self.batch)
                loss = loss / self.recipe.accumulation
            self.batch = self.get_batch()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.num_steps += 1
        if self.device.type == "cpu" or self.num_steps % 10 == 0:
            loss.item()


class GPTForgeStep:
    """A training step of GPT-Forge, with its data loader."""

    def __init__(
        self,
        model: GPT,
        recipe: Recipe,
        tokens: np.ndarray,
        device: torch.device,
        *,
        plain: bool = False,
        dtype: str = "auto",
    ) -> None:
        precision = select_precision(dtype, device)
        kernels = select_kernels(Config(dropout=recipe.model.dropout), device, precision)
        if plain:
            precision, kernels = Precision(torch.float32, ""), DEFAULT_KERNELS
        model = model.to(device)
        self.step = TrainStep(
            model,
            build_adamw(model.parameters(), betas=(0.9, 0.99), weight_decay=0.1),
            Config(batch_size=recipe.micro_batch),
            precision=precision,
            kernels=kernels,
        )
        length = recipe.model.block_size
        flops = formulas.flops_per_token(recipe.model, length) * recipe.micro_batch * length
        is_small = flops < CUDA_GRAPH_MAX_FLOPS and self.step.kernels.manual_backward
        if is_small:
            self.step.capture_cuda_graph(length)
        self.loader = DataLoader(
            tokens,
            context_length=length,
            global_batch_size=recipe.micro_batch * recipe.accumulation,
            seed=1,
            shuffle=True,
            device=device,
        )
        self.num_steps = 0

    def __call__(self) -> float:
        loss, _ = self.step(*self.loader.next_batch(), lr=1e-3)
        self.loader.prefetch_to_device()
        self.num_steps += 1
        is_read = self.step.device.type == "cpu" or self.num_steps % 10 == 0
        return float(loss) if is_read else 0.0


def time_recipe(
    recipe: Recipe, nanogpt: Path, tokens: np.ndarray, device: torch.device, dtype: str
) -> dict[str, list[float]]:
    """Seconds of a step of each implementation, one value per repeat."""
    torch.manual_seed(1337)
    # The program rounds the vocabulary up to a multiple of 64.
    vocab_size = -(-recipe.model.vocab_size // 64) * 64
    model = GPT(replace(recipe.model, vocab_size=vocab_size)).init_weights()
    steps = {
        "nanoGPT": NanoGPTStep(nanogpt, recipe, tokens, device),
        "gptforge": GPTForgeStep(copy.deepcopy(model), recipe, tokens, device, dtype=dtype),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(recipe.repeats + 1):
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            for _ in range(recipe.steps):
                step()
            synchronize(device)
            if repeat:  # the first is a warmup
                seconds[name].append((time.perf_counter() - start) / recipe.steps)
    return seconds


def compare_losses(recipe: Recipe, tokens: np.ndarray, device: torch.device) -> list[str]:
    """Rows of the losses of the plain and the fast path."""
    torch.manual_seed(1337)
    model = GPT(recipe.model).init_weights()
    plain = GPTForgeStep(copy.deepcopy(model), recipe, tokens, device, plain=True)
    fast = GPTForgeStep(copy.deepcopy(model), recipe, tokens, device)
    shown = (0, 10, 100, recipe.compared_steps // 2, recipe.compared_steps - 1)
    rows = []
    for step in range(recipe.compared_steps):
        a, b = plain(), fast()
        if step in shown:
            rows.append(f"| {step} | {a:.4f} | {b:.4f} | {b / a - 1:+.2%} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nanogpt", type=Path, help="folder of a checkout of nanoGPT")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--device", default="cpu", choices=RECIPES)
    parser.add_argument("--dtype", default="auto", help="of gptforge")
    parser.add_argument("--only", default="", help="recipes whose names contain this")
    args = parser.parse_args()
    device, name = select_device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    text = args.text.read_text(encoding="utf-8")
    speeds, losses = [], []
    for recipe in [r for r in RECIPES[args.device] if args.only in r.name]:
        tokens = from_name(recipe.tokenizer, text).encode(text)
        seconds = time_recipe(recipe, args.nanogpt, tokens, device, args.dtype)
        a, b = (statistics.median(times) for times in seconds.values())
        times = [1e3 * value for value in seconds["gptforge"]]
        rate = recipe.micro_batch * recipe.accumulation * recipe.model.block_size / b
        speeds.append(
            f"| {recipe.name} | {1 / a:.2f} | {1 / b:.2f} | {min(times):.1f} to {max(times):.1f} "
            f"| {rate:,.0f} | {a / b:.2f} |"
        )
        print(speeds[-1], flush=True)
        if recipe.compared_steps:
            losses += compare_losses(recipe, tokens, device)
    precision = select_precision(args.dtype, device).name
    print(f"\n{name}, torch {torch.__version__}, gptforge in {precision}\n")
    print("| recipe | nanoGPT, steps/s | gptforge, steps/s | ms/step | tokens/s | speedup |")
    print("| --- | --- | --- | --- | --- | --- |", *speeds, sep="\n")
    if losses:
        print("\n| step | loss, plain path in float32 | loss, fast path | difference |")
        print("| --- | --- | --- | --- |", *losses, sep="\n")


if __name__ == "__main__":
    main()
