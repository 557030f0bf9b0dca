import pytest
import torch


@pytest.fixture
def device(device: torch.device) -> torch.device:
    """A device on which the kernels can run."""
    if device.type == "cuda":
        pytest.importorskip("triton")
    return device
