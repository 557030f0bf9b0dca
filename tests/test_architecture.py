"""Imports point one way, and slow packages are imported where they are used."""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from tests.environment import python_path

PACKAGE = Path(__file__).parents[1] / "gptforge"

# Modules and folders of the package. Each may import only from those before it.
LAYERS = (
    *("printable", "errors", "findings", "shell", "files", "patterns", "lock", "cuda_prewarm"),
    *("config", "config_checks", "config_file", "estimate", "recipe", "presets"),
    *("kernels", "cuda_capture", "device", "kernel_select", "distributed", "model", "tokenizers"),
    *("data", "optim", "checkpoint", "report", "inference", "evaluate", "convert", "training"),
    *("builders", "bench", "doctor", "demo", "sweep", "cli", "api", "__main__"),
)
NO_TORCH = {*LAYERS[: LAYERS.index("presets") + 1], "cli", "__main__", "__init__"}
# Optional or slow: imported inside the function that uses them.
LAZY = {
    *("triton", "matplotlib", "transformers", "huggingface_hub", "uvicorn", "gguf", "pyarrow"),
    *("zstandard", "gigatoken", "tokenizers", "datasets", "wandb", "tensorboard", "lm_eval"),
    *("optuna", "IPython", "trackio", "mlflow", "bokeh", "jinja2"),
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(nodes: Iterable[ast.AST]) -> set[str]:
    """Dotted names of what these statements import."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_module_has_a_layer() -> None:
    assert {layer(path) for path in modules()} - {"__init__"} == set(LAYERS)


def test_imports_point_to_earlier_layers() -> None:
    for path in modules():
        if layer(path) == "__init__":
            continue
        later = LAYERS[LAYERS.index(layer(path)) + 1 :]
        names = imports(ast.walk(ast.parse(path.read_text("utf-8"))))
        used = {dotted.split(".")[1] for dotted in names if dotted.startswith("gptforge.")}
        assert not used & set(later), path


def test_slow_packages_are_imported_lazily() -> None:
    for path in modules():
        names = imports(ast.parse(path.read_text("utf-8")).body)
        packages = {dotted.split(".")[0] for dotted in names}
        # Modules of Triton kernels are themselves imported lazily.
        assert path.parent.name == "triton" or not packages & LAZY, path
        assert layer(path) not in NO_TORCH or "torch" not in packages, path


def test_help_and_errors_do_not_import_torch_or_numpy() -> None:
    code = (
        "import sys; from gptforge.cli import main\n"
        "assert main(['--max_stps', '3']) == 2\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_training_without_compile_does_not_import_the_compiler(tmp_path) -> None:
    (tmp_path / "text.txt").write_text("To be, or not to be. " * 200, "utf-8")
    flags = ["--preset", "debug", "--input", "text.txt", "--max_steps", "1", "--compile", "false"]
    # torch 2.11's autograd imports sympy if a backward pass starts from a given gradient, as in
    # attention on a GPU.
    unwanted = {"torch._dynamo"} if torch.cuda.is_available() else {"torch._dynamo", "sympy"}
    code = (
        "import sys; from gptforge.cli import main; from tests.pictures import use_blank_pictures\n"
        "use_blank_pictures()\n"
        f"assert main({flags}) == 0\n"
        f"assert not {unwanted} & set(sys.modules)"
    )
    env = os.environ | {"PYTHONPATH": python_path()}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_git_ignores_no_module() -> None:
    # A pattern such as `build/` in .gitignore would leave a folder out of every fresh clone.
    root = PACKAGE.parent
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        pytest.skip("not a git checkout")
    command = [git, "check-ignore", *map(str, modules())]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout == ""
