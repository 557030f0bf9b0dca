"""Selection of kernels, with fake devices."""

import dataclasses

import pytest
import torch

from gptforge.config import Config
from gptforge.device import Precision
from gptforge.errors import UserError
from gptforge.kernel_select import (
    DEFAULT_KERNELS,
    KernelConfig,
    sdpa_backend,
    select_kernels,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_sdpa_backend(monkeypatch) -> None:
    config = Config(n_head=2, n_embd=16, context_length=16)
    assert sdpa_backend(config, CPU, torch.float32) in ("flash", "math")
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_: 99)
    assert sdpa_backend(config, CPU, torch.float32) == "unknown"
    monkeypatch.setattr(torch, "_fused_sdp_choice", None)
    assert sdpa_backend(config, CPU, torch.float32) == "unknown"


def test_fp8_needs_the_manual_backward() -> None:
    precision = Precision(torch.bfloat16, "", float8=True)
    kernels = select_kernels(Config(), CUDA, precision)
    assert kernels.float8 and kernels.manual_backward
    assert not select_kernels(Config(), CUDA, Precision(torch.bfloat16, "")).float8
    for options in (
        {"compile": "true"},
        {"activation": "gelu"},
        {"dropout": 0.1, "activation_checkpointing": True},
    ):
        with pytest.raises(UserError, match="--dtype fp8 does not work with"):
            select_kernels(dataclasses.replace(Config(), **options), CUDA, precision)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_only_bfloat16_has_the_manual_backward(dtype) -> None:
    assert select_kernels(Config(), CUDA, Precision(dtype, "")) == DEFAULT_KERNELS
    # A CPU has the fused cross-entropy in float32 too.
    expected = KernelConfig(fused_cross_entropy=True) if dtype == torch.float32 else DEFAULT_KERNELS
    assert select_kernels(Config(), CPU, Precision(dtype, "")) == expected


def test_manual_backward_is_selected_where_it_is_fast_and_supported(monkeypatch) -> None:
    bf16 = Precision(torch.bfloat16, "")
    monkeypatch.setattr(torch.version, "hip", None)
    assert select_kernels(Config(), CUDA, bf16).manual_backward
    assert select_kernels(Config(dropout=0.1), CUDA, bf16).manual_backward
    checkpointing = Config(dropout=0.1, activation_checkpointing=True)
    assert not select_kernels(checkpointing, CUDA, bf16).manual_backward
    assert not select_kernels(Config(compile="true"), CUDA, bf16).manual_backward
    assert not select_kernels(Config(), CPU, bf16).manual_backward
    assert select_kernels(Config(), torch.device("mps"), bf16) == DEFAULT_KERNELS
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert select_kernels(Config(), CUDA, bf16) == DEFAULT_KERNELS
