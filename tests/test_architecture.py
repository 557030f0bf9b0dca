"""The house keeps its order: imports go one way, and nothing heavy loads before it is needed."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PACKAGE = Path(__file__).parents[1] / "gptforge"

# A room may import from those before it in this list, never from those behind it.
ROOMS = [
    *(
        "printable",
        "errors",
        "shell",
        "launch_env",
        "files",
        "holding",
        "waking",
        "config",
        "presets",
        "kernels",
        "hardware",
        "distributed",
        "costs",
        "model",
        "tokenizers",
        "data",
    ),
    *(
        "optim",
        "checkpoint",
        "report",
        "generate",
        "evaluate",
        "convert",
        "train",
        "build",
        "plan",
        "bench",
        "doctor",
        "demo",
        "flags",
    ),
    *("commands", "cli"),
    "__main__",
]

# Optional, or slow to load: only inside the function that uses them.
LAZY = {"triton", "matplotlib", "transformers", "huggingface_hub", "gradio", "gguf"}
LAZY |= {"pyarrow", "zstandard", "gigatoken", "tokenizers", "datasets"}
LAZY |= {"wandb", "tensorboard", "quack", "lm_eval"}
NO_TORCH = {"errors", "config", "presets", "files", "holding", "costs", "flags", "commands", "cli"}
NO_TORCH |= {"printable", "launch_env", "waking", "shell", "__main__", "__init__"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def top_level_imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def project_imports(path: Path) -> set[str]:
    """Rooms that a file imports from anywhere in it, but for type checking alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
        if isinstance(node, ast.ImportFrom) and node.module == "gptforge":
            found |= {alias.name for alias in node.names if alias.name in ROOMS}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gptforge."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("gptforge.")}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_only_to_rooms_above(path: Path) -> None:
    own = room(path)
    if own == "__init__":
        return
    assert own in ROOMS, f"{own} has no place in the list of rooms"
    for other in project_imports(path):
        allowed = other == own or ROOMS.index(other) < ROOMS.index(own)
        assert allowed, f"{path.name} is in {own} and imports from {other}, which lies below"


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_heavy_packages_load_only_where_they_are_used(path: Path) -> None:
    if path.name.startswith("in_triton"):
        pytest.skip("is itself only imported where it is used")
    heavy = {name.split(".")[0] for name in top_level_imports(path)} & LAZY
    assert not heavy
    if room(path) in NO_TORCH:
        assert "torch" not in {name.split(".")[0] for name in top_level_imports(path)}


def test_help_and_mistakes_answer_without_torch() -> None:
    code = (
        "import sys; from gptforge.cli import main\n"
        "assert main(['--max_stps', '3']) == 2\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_training_that_is_not_compiled_does_not_wait_for_torchs_compiler(tmp_path) -> None:
    (tmp_path / "text.txt").write_text("To be, or not to be. " * 200, "utf-8")
    flags = ["--preset", "debug", "--input", "text.txt", "--max_steps", "1",
             "--compile", "false"]  # fmt: skip
    # torch 2.11's autograd itself loads sympy where it is given a gradient to begin with, as
    # attention's way back on a GPU does.
    unwanted = {"torch._dynamo"} if torch.cuda.is_available() else {"torch._dynamo", "sympy"}
    code = (
        "import sys; from gptforge.cli import main\n"
        f"assert main({flags}) == 0\n"
        f"assert not {unwanted} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_clone_holds_the_whole_package() -> None:
    # A pattern in .gitignore once left out the folder gptforge/build: everything worked here, and
    # nothing in a fresh clone.
    root = PACKAGE.parent
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        pytest.skip("not a git checkout")
    ask = [git, "check-ignore", *map(str, modules())]
    done = subprocess.run(ask, cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout == ""


def test_no_room_is_a_lumber_room() -> None:
    names = {path.stem for path in modules()}
    assert not names & {"utils", "util", "helpers", "common", "misc"}
