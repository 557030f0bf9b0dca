"""The Triton kernels on CPU tensors, by Triton's interpreter.

Triton decides on its import whether to interpret, so this folder's tests run again in a child
process. To run one of them directly: TRITON_INTERPRET=1 pytest tests/kernels/test_decode.py
"""

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.kernels.helpers import INTERPRETED


@pytest.mark.timeout(900)
@pytest.mark.skipif(INTERPRETED, reason="is the child process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_kernels_pass_when_interpreted() -> None:
    folder = Path(__file__).parent
    # The interpreter of Triton 3.6 cannot loop over a range that is a kernel's argument (NumPy 2).
    is_old = tuple(map(int, version("triton").split(".")[:2])) < (3, 7)
    tests = [folder / "test_decode.py", folder / "test_sampling.py"] if is_old else [folder]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", "cpu", *tests],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=folder.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout
    assert " passed" in child.stdout
