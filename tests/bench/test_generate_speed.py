"""`gptforge bench --generate`."""

import json

import pytest
import torch

from gptforge.bench.baselines import transformers_model
from gptforge.bench.generate_speed import (
    gptforge_generator,
    time_generation,
    transformers_generator,
)
from gptforge.inference.generate import TokenGenerator
from gptforge.inference.model import InferenceModel

GENERATE = ("bench", "--generate", "true", "--preset", "debug", "--device", "cpu", "--repeats", 2)


def test_every_implementation_generates_all_tokens_in_every_repeat(tiny_model) -> None:
    tiny_model.eval()
    calls = []

    def counted(name, generate):
        def count(prompts, new_tokens):
            calls.append((name, len(prompts), len(prompts[0]), new_tokens))
            return generate(prompts, new_tokens)

        return count

    generator = TokenGenerator(InferenceModel(tiny_model, vocab_size=64))
    generators = {
        "a": counted("a", gptforge_generator(generator)),
        "b": counted("b", transformers_generator(tiny_model, torch.float)),
    }
    device = torch.device("cpu")
    first, second = time_generation(
        generators, batch=3, vocab_size=64, prompt_tokens=5, new_tokens=7, repeats=2, device=device
    )
    assert calls == [(name, 3, 5, 7) for name in "ab" * 3]
    assert (first["implementation"], second["implementation"]) == ("a", "b")
    assert first["gptforge_speedup"] == 1
    assert first["ms_to_first"] > 0
    assert second["ms_to_first"] is None
    assert second["tokens_per_second_min"] <= second["tokens_per_second"]
    ratio = first["tokens_per_second"] / second["tokens_per_second"]
    assert second["gptforge_speedup"] == pytest.approx(ratio)


def test_transformers_model_has_the_same_logits(tiny_model) -> None:
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        logits = transformers_model(tiny_model).eval()(ids).logits
        torch.testing.assert_close(logits, tiny_model.eval()(ids), atol=1e-5, rtol=1e-5)


def test_both_implementations_are_printed(program) -> None:
    done = program(*GENERATE, "--peer", "hf", "--json", "true")
    assert done.code == 0, done.err
    results = json.loads(done.out)["results"]
    assert [(r["implementation"], r["batch"]) for r in results] == [
        (name, batch) for batch in (1, 8) for name in ("gptforge, float32", "hf, float32")
    ]
    lines = program(*GENERATE).out.splitlines()
    assert len([line for line in lines if line.startswith("| gptforge, float32 |")]) == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--peer", "plain"), "--peer hf"),
        (("--profile", "x"), "--profile"),
        (("--block_size", 1, "--context_length", 1), "--block_size"),
        (("--dtype", "int4"), "--dtype"),
    ],
)
def test_invalid_flags_are_refused(program, args, message) -> None:
    done = program(*GENERATE, *args)
    assert (done.code, done.out.count("tokens/s")) == (2, 0)
    assert message in done.err
