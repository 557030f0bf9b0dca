import pytest
import torch


@pytest.fixture
def place(device: torch.device) -> str:
    """Where tensors lie, if the kernels can run there."""
    if device.type == "cuda":
        pytest.importorskip("triton")
    return device.type
