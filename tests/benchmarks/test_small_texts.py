"""`benchmarks/small_texts.py`: the loss per character, the split, and results that add up."""

import math
import pickle  # noqa: TID251  as nanoGPT reads it
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gptforge.config import GPTConfig
from gptforge.device import Precision
from gptforge.evaluate.val_loss import ValEvaluator
from gptforge.model import GPT
from gptforge.tokenizers import Tokenizer, from_name
from gptforge.tokenizers.base import byte_lengths

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import nanogpt  # noqa: E402
import small_texts as bench  # noqa: E402

CPU = torch.device("cpu")
TEXT = "The quick brown fox — naïve, 木漏れ日 — jumps over the lazy dog.\n" * 5 + "end"


def tiny_model(tokenizer: Tokenizer, block_size: int = 64) -> GPT:
    config = GPTConfig(block_size, tokenizer.vocab_size + 3, 1, 2, 8)
    model = GPT(config).init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.transformer["wte"].weight.mul_(20)  # far from uniform
    return model.eval()


def test_characters_agree_with_the_evaluator_of_training() -> None:
    tokenizer = from_name("char", TEXT)
    model = tiny_model(tokenizer)
    expected = ValEvaluator(
        tokenizer.encode(TEXT), byte_lengths(tokenizer), context_length=16, batch_size=4
    ).evaluate(model, Precision(torch.float32, ""))
    assert expected.num_tokens == len(TEXT) - 1
    actual = bench.nats_per_character(model, tokenizer, TEXT, window=16, device=CPU)
    assert actual == pytest.approx(expected.loss, rel=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "byte"])
def test_tokens_of_several_bytes_see_only_their_window(name: str) -> None:
    tokenizer = from_name(name, "")
    model = tiny_model(tokenizer)
    ids = tokenizer.encode(TEXT).tolist()
    starts, position = [], 0
    for token in ids:  # in characters: bytes within a character count for its start
        before = TEXT.encode()[:position]
        starts.append(len(before.decode("utf-8", errors="ignore")) if before else 0)
        position += len(tokenizer.decode_bytes([token]))
    starts = [
        start + any(b & 0xC0 == 0x80 for b in tokenizer.decode_bytes([token])[:1])
        for start, token in zip(starts, ids, strict=True)
    ]
    nats = 0.0
    for i in range(1, len(ids)):
        window = starts[i - 1] // 16  # that of the token before it
        context = [t for t, s in zip(ids[:i], starts[:i], strict=True) if s // 16 == window]
        logits = model(torch.tensor([context]))[0, -1, : tokenizer.vocab_size].detach()
        nats -= float(torch.log_softmax(logits.float(), 0)[ids[i]])
    first = len(tokenizer.decode_bytes(ids[:1]).decode())
    actual = bench.nats_per_character(model, tokenizer, TEXT, window=16, device=CPU)
    assert actual == pytest.approx(nats / (len(TEXT) - first), rel=1e-4)


def test_window_longer_than_the_model_is_an_error() -> None:
    tokenizer = from_name("char", TEXT)
    with pytest.raises(SystemExit, match="32 tokens, and the model has 8 positions"):
        bench.nats_per_character(tiny_model(tokenizer, 8), tokenizer, TEXT, window=32, device=CPU)


def test_data_of_nanogpt(tmp_path: Path) -> None:
    cut = bench.cut(TEXT)
    assert cut == int(len(TEXT) * (1 - 0.1))  # as --val_fraction 0.1
    nanogpt.write_char_dataset(TEXT, tmp_path, cut)
    meta = pickle.loads((tmp_path / "meta.pkl").read_bytes())  # noqa: S301
    ids = [np.fromfile(tmp_path / f"{split}.bin", np.uint16) for split in ("train", "val")]
    texts = ["".join(meta["itos"][i] for i in split.tolist()) for split in ids]
    assert texts == [TEXT[:cut], TEXT[cut:]]
    assert meta["vocab_size"] == len(meta["stoi"]) == len(set(TEXT))


def test_steps_in_the_output_of_nanogpt() -> None:
    output = (
        "step 0: train loss 4.2, val loss 4.2\niter 0: loss 4.2, time 9ms, mfu -1%\n"
        "step 250: train loss 2, val loss 2\nsaving checkpoint to out\niter 250: loss 2, time 9ms\n"
        "step 500: train loss 1, val loss 3\niter 500: loss 1, time 9ms\n"
    )
    assert nanogpt.read_steps(output) == (501, 250)


def result(program: str, seed: int, nats: float, *, text: str = "a") -> bench.Result:
    task = bench.Task(text, "f00d", "first", program, "", seed, 256)
    return {
        **vars(task), "nats": nats, "steps": 10, "best_step": 5, "characters": 1000,
        "alphabet": 30, "seconds": 1.0,
    }  # fmt: skip


def test_table_compares_means_over_seeds() -> None:
    results = [result(bench.NANOGPT, seed, 1.4 + seed / 10) for seed in (0, 2)]
    results += [result(bench.GPTFORGE, seed, 1.2 + seed / 10) for seed in (0, 2)]
    row = bench.table(results).splitlines()[4]
    assert "1.5000 (1.4000 to 1.6000) | 1.3000 (1.2000 to 1.4000)" in row
    assert f"{1.3 / 1.5 - 1:+.2%}" in row
    assert math.isclose(1.3 / 1.5 - 1, -0.1333, abs_tol=1e-4)


def test_a_result_is_found_again_only_for_the_same_task() -> None:
    results = [result(bench.GPTFORGE, 1, 1.2)]
    task = bench.Task("a", "f00d", "first", bench.GPTFORGE, "", 1, 256)
    assert bench.find_task(results, task) == results[0]
    for change in ({"seed": 2}, {"protocol": "second"}, {"flags": "--seed 1"}, {"sha256": ""}):
        assert bench.find_task(results, bench.Task(**{**vars(task), **change})) is None
