"""Kernels of another package: taken where they run on all ranks, dropped elsewhere."""

import copy
import dataclasses

import pytest
import torch

from gptforge.builders import optional_kernels
from gptforge.builders.optional_kernels import choose_packages
from gptforge.config import Config
from gptforge.device import Precision
from gptforge.distributed.comm import Comm
from gptforge.errors import UserError
from gptforge.kernel_select import KernelConfig
from gptforge.optim.adamw import build_adamw
from gptforge.presets import get_preset
from gptforge.train.train_step import TrainStep

BY_HAND = KernelConfig(manual_backward=True)


class Doubters(Comm):
    """Ranks of which another one may have something against it."""

    def __init__(self, others: bool) -> None:
        self.others, self.asked = others, 0

    def all_true(self, flag: bool) -> bool:
        self.asked += 1
        return flag and self.others


@pytest.fixture
def config() -> Config:
    return dataclasses.replace(get_preset("debug"), max_steps=10**9, context_length=16)


@pytest.fixture
def step(tiny_model) -> TrainStep:
    return TrainStep(
        copy.deepcopy(tiny_model),
        build_adamw(tiny_model.parameters(), betas=(0.9, 0.95), weight_decay=0.1),
        precision=Precision(torch.float32, "test"),
        micro_batch_size=2,
        grad_clip=1.0,
        kernels=BY_HAND,
    )


@pytest.fixture
def installed(monkeypatch) -> list[str]:
    """quack is there; when it is imported, that is noted."""
    imported: list[str] = []
    monkeypatch.setattr(optional_kernels, "LONG_RUN", 1.0)
    monkeypatch.setattr(optional_kernels, "why_not_quack", lambda *_: "")
    monkeypatch.setattr(optional_kernels, "prepare_quack", lambda _: imported.append("quack"))
    monkeypatch.setattr(optional_kernels, "find_failure", lambda step, config: "")
    monkeypatch.setattr(
        TrainStep, "set_kernels", lambda self, kernels: setattr(self, "kernels", kernels)
    )
    return imported


def chosen(step: TrainStep, config: Config, ranks: Comm) -> list[str]:
    said: list[str] = []
    choose_packages(step, config, ranks, say=said.append)
    return said


def test_on_a_long_run_it_is_taken(step, config, installed) -> None:
    said = chosen(step, config, Comm())
    assert installed == ["quack"]
    assert step.kernels == dataclasses.replace(BY_HAND, quack=True)
    assert said == ["the MLP's products: with its GELU inside, by quack"]


@pytest.mark.parametrize("products", ["auto", "cublas"])
def test_a_short_run_and_one_that_wants_none_import_nothing(
    step, config, installed, monkeypatch, products
) -> None:
    if products == "auto":
        monkeypatch.setattr(optional_kernels, "LONG_RUN", 1e99)
    chosen(step, dataclasses.replace(config, products=products), Comm())
    assert installed == [] and step.kernels == BY_HAND


def test_what_does_not_run_is_named_and_dropped(step, config, installed, monkeypatch) -> None:
    monkeypatch.setattr(optional_kernels, "find_failure", lambda step, config: "no kernel")
    said = chosen(step, config, Comm())
    assert step.kernels == BY_HAND
    assert "quack do not run here: no kernel" in said[0]


def test_a_package_that_fails_to_load_is_no_error_unless_it_was_asked_for(
    step, config, installed, monkeypatch
) -> None:
    def fail(_: object) -> None:
        raise TypeError("another compiler")

    monkeypatch.setattr(optional_kernels, "prepare_quack", fail)
    chosen(step, config, Comm())
    assert step.kernels == BY_HAND
    with pytest.raises(UserError, match=r"--products quack cannot be: .*another compiler"):
        chosen(step, dataclasses.replace(config, products="quack"), Comm())


def test_what_is_not_installed_is_an_error_only_where_it_was_asked_for(
    step, config, installed, monkeypatch
) -> None:
    monkeypatch.setattr(optional_kernels, "why_not_quack", lambda *_: "not installed")
    assert chosen(step, config, Comm()) == []
    with pytest.raises(UserError, match="--products quack cannot be: not installed"):
        chosen(step, dataclasses.replace(config, products="quack"), Comm())


@pytest.mark.parametrize("is_here", [True, False])
def test_all_ranks_do_the_same_and_ask_as_often(
    step, config, installed, monkeypatch, is_here
) -> None:
    if not is_here:
        monkeypatch.setattr(optional_kernels, "why_not_quack", lambda *_: "not installed")
    ranks = Doubters(others=False)
    chosen(step, config, ranks)
    assert step.kernels == BY_HAND
    assert installed == []
    assert ranks.asked == 1, "a rank that asked more often would wait for ever"
