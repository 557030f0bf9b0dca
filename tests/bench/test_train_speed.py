"""`bench`: what is told of an update, and of those beside it."""

import pytest
import torch

from gptforge.bench.baselines import describe_baseline
from gptforge.device import select_precision
from gptforge.report.format import format_count

TINY = ("--preset", "debug", "--device", "cpu", "--turns", 1, "--n_layer", 1, "--n_embd", 8)


def test_a_peer_is_called_compiled_only_where_it_is() -> None:
    precision = select_precision("float32", torch.device("cpu"))
    for kind in ("hf", "plain"):
        on_cpu = describe_baseline(kind, torch.device("cpu"), precision)
        assert on_cpu.endswith("; not compiled, float32, AdamW")
        on_gpu = describe_baseline(kind, torch.device("cuda"), precision)
        assert on_gpu.endswith("; compiled, float32, AdamW")


def test_the_flops_of_a_tiny_model_are_not_rounded_to_nothing(program) -> None:
    done = program("bench", *TINY, "--n_head", 2, "--peer", "plain")
    assert done.code == 0, done.err
    assert "baseline: a plain loop" in done.out
    assert " KFLOP per token" in done.out


@pytest.mark.parametrize(
    ("count", "words"), [(7, "7"), (999, "999"), (28_640, "28.6 K"), (123.6e6, "124 M")]
)
def test_large_numbers_have_three_digits(count, words) -> None:
    assert format_count(count) == words


def test_a_profile_that_has_no_place_is_refused_before_anything_is_timed(program, tmp_path) -> None:
    (tmp_path / "file").write_text("taken")
    done = program("bench", *TINY, "--n_head", 2, "--profile", "file")
    assert (done.code, done.out) == (2, "")
    assert "--profile file: cannot create the folder" in done.err
