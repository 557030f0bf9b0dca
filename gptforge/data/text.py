"""Which text a run learns where none is named."""

from pathlib import Path

from gptforge.errors import UserError

PACKAGE = Path(__file__).resolve().parent


def find_text(flag: str) -> Path:
    """What `--input` names, else input.txt here, else Shakespeare from the package."""
    if flag:
        return Path(flag)
    # A checkout keeps the one copy at its root; an installed package has it inside.
    places = [Path("input.txt"), PACKAGE / "input.txt", PACKAGE.parents[1] / "input.txt"]
    for place in places:
        if place.is_file():
            return place
    raise UserError("there is no input.txt here: give a text with --input PATH")
