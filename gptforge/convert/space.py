"""Export to a Hugging Face Space.

The folder is a run folder too, with a copy of this package, so that the Space needs only packages
from the package index.
"""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import gptforge
from gptforge.checkpoint import format as checkpoints
from gptforge.checkpoint.out_dir import METRICS, SAMPLES
from gptforge.convert.bundle import ModelBundle
from gptforge.convert.model_card import Origin, copy_run_file, model_card
from gptforge.files import set_link

FILES = Path(__file__).with_name("space_files")
"""In app.py.in, TITLE and PROMPTS stand for the values."""


def write_space(
    folder: Path,
    bundle: ModelBundle,
    origin: Origin | None,
    *,
    title: str,
    prompts: Sequence[str],
    config: str,
) -> None:
    """Fill an empty folder.

    `prompts` are suggested by the page; `config` is the content of the run's config.toml.
    """
    name = f"step-{origin.step if origin else 0:06d}"
    checkpoint = folder / "checkpoints" / name
    checkpoint.mkdir(parents=True)
    tensors = {checkpoints.MODEL: dict(bundle.state_dict)}
    checkpoints.save_checkpoint(checkpoint, tensors, tokenizer=bundle.tokenizer, config=config)
    for link in ("best", "last"):
        set_link(checkpoint.parent / link, name)
    (folder / "config.toml").write_text(config, encoding="utf-8")
    if origin and origin.curves:
        copy_run_file(origin.curves, folder)
        for name in (METRICS, SAMPLES):
            if (path := origin.curves.with_name(name)).is_file():
                copy_run_file(path, folder)
    values = {"TITLE": repr(title), "PROMPTS": repr(list(prompts))}
    for path in FILES.iterdir():
        # In one pass: a title may have the word PROMPTS in it.
        text = re.sub("TITLE|PROMPTS", lambda m: values[m[0]], path.read_text("utf-8"))
        (folder / path.name.removesuffix(".in")).write_text(text, encoding="utf-8")
    card = model_card(bundle, origin, title=title, is_space=True)
    (folder / "README.md").write_text(card, encoding="utf-8")
    # New files without input.txt, since those of an installed package may be read-only.
    package = Path(gptforge.__file__).parent
    for path in sorted(package.rglob("*")):
        if path.is_file() and path.suffix != ".pyc" and path.name != "input.txt":
            target = folder / "gptforge" / path.relative_to(package)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
