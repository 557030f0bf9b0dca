"""`bench --generate`: who takes turns, and what is told of them."""

import json

import pytest
import torch

from gptforge.bench.generate_speed import (
    gptforge_generator,
    time_generation,
    transformers_generator,
)
from gptforge.inference.generate import TokenGenerator
from gptforge.inference.model import InferenceModel

GENERATE = ("bench", "--generate", "true", "--preset", "debug", "--device", "cpu", "--turns", 2)


def test_each_writes_every_token_in_every_turn(tiny_model) -> None:
    tiny_model.eval()
    calls = []

    def counted(name, write):
        def writing(prompts, new_tokens):
            calls.append((name, len(prompts), len(prompts[0]), new_tokens))
            return write(prompts, new_tokens)

        return writing

    decoder = TokenGenerator(InferenceModel(tiny_model, vocab_size=64))
    writers = {
        "a": counted("a", gptforge_generator(decoder)),
        "b": counted("b", transformers_generator(tiny_model, torch.float)),
    }
    device = torch.device("cpu")
    found = time_generation(
        writers, batch=3, vocab_size=64, prompt_tokens=5, new_tokens=7, repeats=2, device=device
    )
    assert calls == [(name, 3, 5, 7) for name in "ab" * 3]
    assert [speed.implementation for speed in found] == ["a", "b"]
    mine, other = (speed.summarize(found[0]) for speed in found)
    assert mine["gptforge_speedup"] == 1
    assert mine["ms_to_first"] > 0
    assert other["ms_to_first"] is None
    assert other["tokens_per_second"] == pytest.approx(21 / found[1].median)
    ratio = mine["tokens_per_second"] / other["tokens_per_second"]
    assert other["gptforge_speedup"] == pytest.approx(ratio)


def test_transformers_writes_with_our_weights(tiny_model) -> None:
    from gptforge.bench.baselines import transformers_model

    ids = torch.arange(9)[None]
    with torch.inference_mode():
        got = transformers_model(tiny_model).eval()(ids).logits
        torch.testing.assert_close(got, tiny_model.eval()(ids), atol=1e-5, rtol=1e-5)


def test_the_command_prints_both_side_by_side(program) -> None:
    done = program(*GENERATE, "--peer", "hf", "--json", "true")
    assert done.code == 0, done.err
    figures = json.loads(done.out)["results"]
    assert [(f["implementation"], f["batch"]) for f in figures] == [
        (who, batch) for batch in (1, 8) for who in ("gptforge, float32", "hf, float32")
    ]
    shown = program(*GENERATE).out.splitlines()
    assert len([line for line in shown if line.startswith("| gptforge, float32 |")]) == 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--peer", "plain"), "--peer hf"),
        (("--profile", "x"), "--profile"),
        (("--block_size", 1, "--context_length", 1), "--block_size"),
        (("--dtype", "int4"), "--dtype"),
    ],
)
def test_what_cannot_be_measured_is_refused(program, args, words) -> None:
    done = program(*GENERATE, *args)
    assert (done.code, done.out.count("tokens/s")) == (2, 0)
    assert words in done.err
