"""What a preparation is asked for, and what it tells on the way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from gptforge.data.documents import Form
from gptforge.data.sources import Kind, Source
from gptforge.tokenizers import Tokenizer

Say = Callable[[str], None]


class Meter(Protocol):
    """Shows how far the work is."""

    def start(self, total: int, done: int) -> None:
        """So many bytes there are, and so many were done before."""
        ...

    def add(self, read: int, text: int) -> None:
        """So many more bytes of the files are done, and so many bytes of text."""
        ...


class Silent:
    """No meter."""

    def start(self, total: int, done: int) -> None:
        """Show nothing."""

    def add(self, read: int, text: int) -> None:
        """Show nothing."""


@dataclass(frozen=True)
class Request:
    """What is to be made of what."""

    names: tuple[str, ...]
    """Files, folders, patterns, pipes, - for standard input."""
    tokenizer: str | Tokenizer = "gpt2"
    val_fraction: float = 0.1
    form: Form = field(default_factory=Form)
    kind: Kind | Literal["auto"] = "auto"
    shard_bytes: int = 2**26
    """Bytes of the files that go into a shard, more or less."""
    split_by_name: bool = True
    """Whether files whose names say validation are held out, and those that say test left out."""
    is_to_judge: bool = False
    """Whether such files are held out though no share is asked for."""
    skip_bad: bool = False
    headerless: bool = False
    """One file for each side, without a header, as nanoGPT reads them."""
    sources: Sequence[Source] = ()
    """The files behind the names, where they are known already."""
    identity: str = ""
    """What tells this request from others; empty: names and dates of the files, and the rest."""
