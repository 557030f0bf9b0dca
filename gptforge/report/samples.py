"""samples.md, read back for the web page."""

import re
from pathlib import Path

from gptforge.files import read_text

SAMPLE = re.compile(r"^## After (\d+) steps\n\n(~{3,})text\n(.*?)\n\2$", re.MULTILINE | re.DOTALL)


def read_samples(path: Path) -> list[tuple[int, str]]:
    """Steps with the text that was generated after each; none if the file is missing or no text."""
    try:
        text = read_text(path, follow_symlinks=False)
    except (OSError, UnicodeDecodeError):
        return []
    return [(int(step), sample.strip("\n")) for step, _, sample in SAMPLE.findall(text)]
