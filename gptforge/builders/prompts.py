"""Prompts to suggest, from the text that a run was trained on."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from gptforge.checkpoint.out_dir import SAMPLES
from gptforge.config import Config
from gptforge.data.dataset import resolve_input
from gptforge.data.input_errors import BadInputHandler
from gptforge.data.prepare.scan import iter_text
from gptforge.data.prepare.sources import find_sources
from gptforge.data.prepare.text_io import TextFormat
from gptforge.errors import UserError
from gptforge.report.run_info import read_samples

MAX_PROMPTS = 6
MAX_CHARS = 8_000_000  # how much of the text is read
SPEAKER = re.compile(r"^([^\W\d_][^\n:]{0,30}:)([ \n])", re.MULTILINE)
"""The start of a speech: a name and a colon, on a line of its own or before the words."""
MIN_SPEECHES = 0.02  # speeches per line of a text that is a dialogue
MIN_SPEECHES_EACH = 3
OPENING_WORDS = 4


def suggest_prompts(run: str, config: Config | None) -> list[str]:
    """Speakers or the openings of lines, as they are spelled in the training text of a run.

    Where that is not on this machine, the run's samples serve.
    """
    text = "".join(_read(config))[:MAX_CHARS] if config else ""
    samples = (sample for _, sample in read_samples(Path(run) / SAMPLES))
    return find_prompts(text or "\n\n".join(samples))


def find_prompts(text: str) -> list[str]:
    """The most frequent speakers of a text that has several, else evenly spaced openings."""
    speeches = Counter(match.groups() for match in SPEAKER.finditer(text))
    speakers = [pair for pair, n in speeches.most_common(MAX_PROMPTS) if n >= MIN_SPEECHES_EACH]
    if len(speakers) > 1 and speeches.total() > MIN_SPEECHES * text.count("\n"):
        # A space after the colon would be the start of the next token in most vocabularies.
        return [name + end.strip(" ") for name, end in speakers]
    lines = [line.split() for line in text.splitlines()]
    openings = [words[:OPENING_WORDS] for words in lines if len(words) > OPENING_WORDS]
    chosen = openings[:: max(1, len(openings) // MAX_PROMPTS)][:MAX_PROMPTS]
    return list(dict.fromkeys(" ".join(words) for words in chosen))


def _read(config: Config) -> Iterator[str]:
    """The beginning of the training text, in any format; nothing if it is not there any more."""
    num_chars, text_format = 0, TextFormat(config.field, config.encoding)
    with suppress(UserError, OSError):
        for source in find_sources([str(resolve_input(config.input))], kind=config.kind):
            for text in iter_text(source, text_format, BadInputHandler(skip=True)):
                yield text
                num_chars += len(text)
                if num_chars > MAX_CHARS:
                    return
