"""What is wrong with texts: every file is read to its end."""

from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from gptforge.data.checks import (
    LARGE_VOCAB,
    Finding,
    check_bytes_per_token,
    error,
    ok,
    warning,
)
from gptforge.data.dataloader import count_sequences, too_short_hint
from gptforge.data.input_errors import MAX_EXAMPLES, BadInput, BadInputHandler
from gptforge.data.prepare.readers import has_many_documents, read_documents
from gptforge.data.prepare.request import FileSelection, PrepareRequest, select_files
from gptforge.data.prepare.scan import collect_alphabet, scan, scan_text
from gptforge.data.prepare.sources import FileKind, Source, open_sources
from gptforge.data.prepare.split import MIN_HASH_DOCUMENTS, text_digest
from gptforge.data.prepare.text_io import TextFormat, describe_fixes, read_chunks
from gptforge.doctor.duplicates import Duplicates
from gptforge.errors import UserError
from gptforge.printable import pluralize
from gptforge.tokenizers import Tokenizer, from_name
from gptforge.tokenizers.base import END_OF_TEXT
from gptforge.tokenizers.fast_encode import FastEncoder

MAX_SAMPLE_CHARS = 2**22
"""Characters that are encoded to tell how many tokens there are."""

TAIL = len(END_OF_TEXT) - 1
"""Characters on either side of a border in which there is room for a mark that lies across."""


def check_texts(
    path: Path,
    *,
    tokenizer: str,
    val_fraction: float,
    context_length: int,
    text_format: TextFormat,
    kind: FileKind | Literal["auto"] = "auto",
    split_by_name: bool = True,
) -> list[Finding]:
    """Findings about a file or a folder of texts."""
    with ExitStack() as stack:
        try:
            sources = stack.enter_context(open_sources([path.as_posix()], kind=kind))
            request = PrepareRequest(
                (path.as_posix(),),
                val_fraction=val_fraction,
                kind=kind,
                form=text_format,
                split_by_name=split_by_name,
                sources=sources,
            )
            chosen = select_files(request)
        except UserError as mistake:
            return [error(str(mistake))]
        return _examine(path, chosen, request, tokenizer, context_length)


def _examine(
    path: Path, chosen: FileSelection, request: PrepareRequest, tokenizer: str, context_length: int
) -> list[Finding]:
    sources, form, val_fraction = chosen.sources, request.form, request.val_fraction
    look = _Look(form, chosen)
    for number, source in enumerate(sources):
        look.at(number, source)
    found = [*look.findings(), *(warning(notice) for notice in chosen.notices)]
    if not look.documents:
        return [*found, error(f"{path.as_posix()}: there is no text to learn")]
    found += _tokens(look, sources, tokenizer, context_length, form)
    if val_fraction:
        found += _sides(look, chosen, request)
    return found


class _Look:
    """Counts, and what stood out."""

    def __init__(self, form: TextFormat, chosen: FileSelection) -> None:
        self.form, self.held_out = form, frozenset(chosen.val_sources)
        self.only_source = chosen.sources[0].name if len(chosen.sources) == 1 else ""
        self.is_text = any(source.kind == "text" for source in chosen.sources)
        self.skipped = BadInputHandler(skip=True)
        self.mended: set[str] = set()
        self.sample: list[str] = []
        self.sampled = self.documents = self.characters = self.bytes = self.marks = 0
        self.places: list[tuple[tuple[int, int], int]] = []
        self.duplicates = Duplicates()

    def at(self, number: int, source: Source) -> None:
        if has_many_documents(source, self.form):
            for document in read_documents(source, self.form, self.skipped):
                self._count(document.text)
                self._document((number, document.index), text_digest(document.text), source.name)
            return
        try:
            facts = scan_text(source, self.form.encoding)
        except BadInput as bad:
            self.skipped.handle(bad)
            return
        if facts.is_blank:
            return
        before = ""
        for chunk in read_chunks(source, encoding=self.form.encoding):
            self.mended |= {f"{source.name}: {words}" for words in describe_fixes(chunk)}
            self._count(chunk.text, before)
            before = (before + chunk.text[-TAIL:])[-TAIL:]
        self._document((number, 0), facts.digest, source.name)

    def findings(self) -> list[Finding]:
        documents, characters, n_bytes = self.documents, self.characters, self.bytes
        of = pluralize(documents, "document", "documents")
        counts = f"{of}, {characters:,} characters, {n_bytes:,} bytes"
        found = [ok(counts)] if documents or not self.skipped.examples else []
        notices = sorted(self.mended | self.skipped.notices)
        found += [warning(f"{words} when it is read") for words in notices[:MAX_EXAMPLES]]
        for example, remedy in zip(self.skipped.examples, self.skipped.hints, strict=True):
            if not example.startswith(f"{self.only_source}: "):
                # Without its only file nothing would be left.
                remedy += ", or leave it out with `prepare --skip_bad true`"
            found.append(error(example, remedy))
        more = sum(self.skipped.counts.values()) - len(self.skipped.examples)
        if more > 0:
            found.append(error(f"and {more:,} more of these"))
        if self.marks:
            of = pluralize(self.marks, "time", "times")
            what = f"{END_OF_TEXT} stands in the text {of}, as plain characters"
            way = f"`prepare --split_on '{END_OF_TEXT}'` makes documents of what lies between"
            found.append(warning(what, way if self.is_text else "remove it from the texts"))
        if self.duplicates.repeated:
            what = pluralize(self.duplicates.repeated, "document stands", "documents stand")
            found.append(
                warning(
                    f"{what} there a second time",
                    "the model will learn them by heart; leave them out",
                )
            )
        if self.duplicates.is_full:
            found.append(warning("not all documents could be remembered to look for doubles"))
        return found

    def _document(self, place: tuple[int, int], digest: int, where: str) -> None:
        self.documents += 1
        side = "val" if place[0] in self.held_out else ""
        self.duplicates.add(digest, side, where)
        if len(self.places) < MIN_HASH_DOCUMENTS:
            self.places.append((place, digest))

    def _count(self, text: str, before: str = "") -> None:
        """Count a piece of a document; `before` is the end of what stands in front of it."""
        self.characters += len(text)
        self.bytes += len(text) if text.isascii() else len(text.encode("utf-8"))
        if not self.form.split_on:
            # A mark may lie across the border of two pieces.
            self.marks += text.count(END_OF_TEXT) + (before + text[:TAIL]).count(END_OF_TEXT)
        if self.sampled < MAX_SAMPLE_CHARS:
            self.sample.append(text[: MAX_SAMPLE_CHARS - self.sampled])
            self.sampled += len(self.sample[-1])


def _tokens(
    look: _Look, sources: list[Source], name: str, context_length: int, form: TextFormat
) -> list[Finding]:
    known: Tokenizer = from_name(
        name, collect_alphabet(sources, form, skip_bad=True) if name == "char" else ""
    )
    encoder = FastEncoder(known)
    try:
        tokens = sum(len(encoder.encode(text)) for text in look.sample)
    except UserError as mistake:
        return [error(f"the tokenizer {name} cannot write it", str(mistake))]
    ratio = look.sampled / max(1, tokens)
    total = round(look.characters / ratio) if ratio else 0
    about = "about " if look.sampled < look.characters else ""
    windows = count_sequences(total, context_length)
    what = f"{about}{pluralize(total, 'token', 'tokens')}, {windows:,} windows of {context_length}"
    found = [ok(what)]
    if windows == 0:
        remedy = (
            f"{too_short_hint(total)} (this is by the tokenizer {known.name}; --preset judges by "
            "another preset's)"
        )
        found = [error(what, remedy)]
    elif windows < 100:
        remedy = "a model of any size will soon know it by heart; more text helps most"
        found = [warning(what, remedy)]
    sample_bytes = sum(len(text.encode("utf-8")) for text in look.sample)
    if known.vocab_size >= LARGE_VOCAB and tokens:
        found += check_bytes_per_token(sample_bytes / tokens, known.name)
    return found


def _sides(look: _Look, chosen: FileSelection, asked: PrepareRequest) -> list[Finding]:
    fraction, sources = asked.val_fraction, chosen.sources
    try:
        split = scan(
            sources,
            asked.form,
            fraction,
            skip_bad=True,
            val_sources=chosen.val_sources,
            split_duplicates=not asked.split_by_name,
        ).split_rule
    except UserError as mistake:
        return [error(str(mistake))]
    both = look.duplicates
    if split.rule == "boundary":
        both = Duplicates()
        for place, digest in look.places:
            both.add(digest, split.assign(place, digest), sources[place[0]].name)
    if both.in_both_splits:
        what = pluralize(both.in_both_splits, "document stands", "documents stand")
        return [
            warning(
                f"{what} on both sides of the split, first {both.first_in_both}",
                "the held-out loss will look better than it is; leave the doubles out",
            )
        ]
    words = {
        "character": f"the last {fraction:.0%} of the text, cut at character {split.cut:,}",
        "boundary": "the last documents, and all copies of one on one side",
        "files": "the files whose names say so",
        "hash": "documents chosen by their hash, so that none is on both sides",
    }
    return [ok(f"held out: {words[split.rule]}")]
