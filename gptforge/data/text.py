"""Reading the training text, and cutting off the part that is held out."""

from dataclasses import dataclass
from pathlib import Path

from gptforge.errors import UserError

PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Text:
    """A text, where it came from, and what was mended on the way in."""

    path: Path
    content: str
    notices: tuple[str, ...] = ()


def find_text(flag: str) -> Path:
    """The file that `--input` names, else input.txt here, else Shakespeare from the package."""
    if flag:
        return Path(flag)
    # A checkout keeps the one copy at its root; an installed package has it inside.
    places = [Path("input.txt"), PACKAGE / "input.txt", PACKAGE.parents[1] / "input.txt"]
    for place in places:
        if place.is_file():
            return place
    raise UserError("there is no input.txt here: give a text file with --input PATH")


def read_text(path: Path) -> Text:
    """A UTF-8 text file. A byte order mark is dropped and CRLF becomes LF, with a notice.

    Raises:
        UserError: for a missing, unreadable, empty or binary file, or one in another encoding.
    """
    if path.is_dir():
        raise UserError(f"--input {path} is a folder: give one text file")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"--input {path}: there is no such file") from None
    except OSError as error:
        raise UserError(f"--input {path}: cannot be read: {error.strerror}") from None
    notices = []
    if raw.startswith(b"\xef\xbb\xbf"):
        raw = raw[3:]
        notices.append("dropped the byte order mark")
    if b"\0" in raw:
        raise UserError(
            f"--input {path}: NUL byte at offset {raw.index(0)}: this is a binary file or UTF-16; "
            "save it as UTF-8 text"
        )
    try:
        content = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--input {path}: not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}; "
            "convert it, for instance with `iconv -f latin1 -t utf-8`"
        ) from None
    if "\r\n" in content:
        content = content.replace("\r\n", "\n")
        notices.append("turned CRLF line ends into LF")
    if not content.strip():
        raise UserError(f"--input {path} is empty: there is nothing to learn")
    return Text(path, content, tuple(notices))


def split_text(content: str, val_fraction: float) -> tuple[str, str]:
    """Training and held-out part: one cut at character int(n * (1 - val_fraction)).

    Raises:
        UserError: if either part would be empty though a held-out part was asked for.
    """
    if val_fraction == 0:
        return content, ""
    cut = int(len(content) * (1 - val_fraction))
    if cut == 0 or cut == len(content):
        raise UserError(
            f"--val_fraction {val_fraction} of {len(content)} characters leaves one side empty: "
            "use --val_fraction 0 or more text"
        )
    return content[:cut], content[cut:]
