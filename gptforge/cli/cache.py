"""`gptforge cache`: the prepared texts in the user's cache."""

from dataclasses import dataclass

from gptforge.cli.parsing import parse_args
from gptforge.printable import pluralize, safe_print


@dataclass(frozen=True)
class CacheArgs:
    """Show where texts are cached once they are tokenized, and how much disk they take."""

    clear: bool = False
    """Delete them; training prepares them again when it needs them."""


def main(argv: list[str]) -> int:
    """Print the folder and its size, after clearing it if requested; returns the exit code."""
    args = parse_args(CacheArgs, argv, "gptforge cache")
    from gptforge.data.cache import clear_cache, writable_cache

    if args.clear:
        clear_cache()
    folder = writable_cache()
    num_bytes = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    entries = pluralize(len(list(folder.iterdir())), "entry", "entries")
    safe_print(f"{folder.as_posix()}: {entries}, {num_bytes / 1e6:,.1f} MB")
    return 0
