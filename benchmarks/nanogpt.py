"""What the benchmarks need of nanoGPT: its model, its data format and its training script.

All of it runs from a checkout that the user names; it stays unchanged.
"""

import pickle  # noqa: TID251  nanoGPT reads its alphabet from one; nothing is unpickled here
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

CHAR_RECIPE = "config/train_shakespeare_char.py"
CHECKPOINT = "ckpt.pt"
# train.py seeds torch with a constant: replace that number, and run it as it is.
SEEDED_TRAIN = """
import runpy, sys, torch
seed, manual_seed = int(sys.argv.pop(1)), torch.manual_seed
torch.manual_seed = lambda _: manual_seed(seed)
runpy.run_path("train.py", run_name="__main__")
"""


def import_model(checkout: Path) -> ModuleType:
    """nanoGPT's model.py."""
    sys.path.insert(0, str(checkout))
    import model  # type: ignore[import-not-found]

    return model


def write_char_dataset(text: str, folder: Path, cut: int) -> None:
    """Write train.bin, val.bin and meta.pkl, as data/shakespeare_char/prepare.py does.

    The alphabet is that of the whole text; the validation set begins at character `cut`.
    """
    alphabet = sorted(set(text))
    if len(alphabet) > 2**16:
        raise SystemExit(f"error: {len(alphabet):,} characters do not fit nanoGPT's uint16 ids")
    stoi = {char: i for i, char in enumerate(alphabet)}
    ids = np.array([stoi[char] for char in text], np.uint16)
    folder.mkdir(parents=True, exist_ok=True)
    ids[:cut].tofile(folder / "train.bin")
    ids[cut:].tofile(folder / "val.bin")
    meta = {"vocab_size": len(alphabet), "itos": dict(enumerate(alphabet)), "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def train_command(dataset: Path, out_dir: Path, *, seed: int, flags: Sequence[str]) -> list[str]:
    """The command that trains the recipe for characters; run it in the checkout.

    Args:
        dataset: folder that `write_char_dataset` wrote.
        out_dir: where it writes CHECKPOINT, the best of its evaluations.
        seed: of weights, batches and dropout.
        flags: overrides of the recipe, `--key=value`.
    """
    return [
        *(sys.executable, "-c", SEEDED_TRAIN, str(seed), CHAR_RECIPE),
        *(f"--dataset={dataset.resolve()}", f"--out_dir={out_dir.resolve()}"),
        *flags,
    ]


def read_steps(output: str) -> tuple[int, int]:
    """Steps made, and at which one CHECKPOINT was saved, from what train.py printed."""
    made = re.findall(r"^iter (\d+): loss", output, re.MULTILINE)
    saved = re.findall(r"^step (\d+): train loss .*\nsaving checkpoint", output, re.MULTILINE)
    return int(made[-1]) + 1, int(saved[-1])
