"""samples.md, read back for the web page and report.html."""

import re
from pathlib import Path

from gptforge.files import read_text

HEADING = re.compile(r"^## After (\d{1,18}) steps\n\n(~{3,})text\n", re.MULTILINE)


def read_samples(path: Path) -> list[tuple[int, str]]:
    """Steps with the text that was generated after each; none if the file is missing or no text."""
    try:
        text = read_text(path, follow_symlinks=False)
    except (OSError, UnicodeDecodeError):
        return []
    samples, end = [], 0
    while heading := HEADING.search(text, end):
        end = text.find(f"\n{heading[2]}\n", heading.end())
        if end == -1:
            break  # a crash may leave a part of the last one
        samples.append((int(heading[1]), text[heading.end() : end].strip("\n")))
    return samples
