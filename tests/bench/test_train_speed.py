"""`gptforge bench` of training."""

import pytest
import torch

from gptforge.bench.baselines import describe_baseline
from gptforge.cli.bench import VOCAB_SIZES
from gptforge.device import select_precision
from gptforge.report.format import format_count
from gptforge.tokenizers import NAMES

TINY = ("--preset", "debug", "--device", "cpu", "--repeats", 1, "--n_layer", 1, "--n_embd", 8)


@pytest.mark.parametrize(("device", "compiled"), [("cpu", "not compiled"), ("cuda", "compiled")])
def test_baselines_are_compiled_on_a_gpu_only(device, compiled) -> None:
    precision = select_precision("float32", torch.device("cpu"))
    for kind in ("hf", "plain"):
        description = describe_baseline(kind, torch.device(device), precision)
        assert description.endswith(f"; {compiled}, float32, AdamW")


def test_flops_of_a_tiny_model_are_not_rounded_to_zero(program) -> None:
    done = program("bench", *TINY, "--n_head", 2, "--peer", "plain")
    assert done.code == 0, done.err
    assert "a plain loop" in done.out
    assert " KFLOP per token" in done.out


@pytest.mark.parametrize(
    ("count", "text"), [(7, "7"), (999, "999"), (28_640, "28.6 K"), (123.6e6, "124 M")]
)
def test_large_numbers_have_three_digits(count, text) -> None:
    assert format_count(count) == text


def test_an_impossible_profile_folder_is_refused_before_timing(program, tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = program("bench", *TINY, "--n_head", 2, "--profile", "file")
    assert (done.code, done.out) == (2, "")
    assert "--profile file: " in done.err


def test_each_tokenizer_has_a_vocabulary_to_measure_with() -> None:
    assert VOCAB_SIZES.keys() == set(NAMES)
