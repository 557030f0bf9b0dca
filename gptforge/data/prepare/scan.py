"""A first pass over the data, which builds the split rule."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from gptforge.data.input_errors import BadInput, BadInputHandler
from gptforge.data.prepare.readers import has_many_documents, read_documents
from gptforge.data.prepare.request import FileSelection, PrepareRequest
from gptforge.data.prepare.sources import Source
from gptforge.data.prepare.split import (
    MIN_HASH_DOCUMENTS,
    DocumentStats,
    SplitRule,
    make_split_rule,
)
from gptforge.data.prepare.text_io import InputPart, TextFormat, TextStats, text_stats
from gptforge.errors import UserError
from gptforge.printable import join_first, pluralize
from gptforge.shell import quote
from gptforge.tokenizers.base import code_points


@dataclass
class ScanResult:
    """What the first pass found."""

    split_rule: SplitRule
    sha256: str  # hash of the text if there is only one, else empty
    text_stats: dict[int, TextStats]  # source index to statistics
    notices: tuple[str, ...] = ()  # about the split


def scan(request: PrepareRequest, selection: FileSelection) -> ScanResult:
    """Read as many documents as the split rule needs, and build the rule."""
    bad_input = BadInputHandler(request.skip_bad)  # the jobs count it for the report
    stats: dict[int, TextStats] = {}
    scanned = _scan_documents(selection.sources, request.text_format, bad_input, stats)
    documents = list(islice(scanned, MIN_HASH_DOCUMENTS))
    if not documents:
        raise UserError(no_text_message([s.name for s in selection.sources], bad_input))
    fraction, val_sources = request.val_fraction, selection.val_sources
    if val_sources:
        _require_text_in_both_splits(request, selection)
        rule = SplitRule("files", fraction, val_sources=val_sources)
        return ScanResult(rule, "", stats, _describe_separator(documents, request.text_format))
    rule = make_split_rule(documents, fraction, split_duplicates=not request.split_by_name)
    sha256 = documents[0].sha256 if len(documents) == 1 else ""
    notices = _describe_separator(documents, request.text_format)
    return ScanResult(rule, sha256, stats, notices + _describe_duplicates(documents, rule))


def _scan_documents(
    sources: Sequence[Source],
    text_format: TextFormat,
    bad_input: BadInputHandler,
    found: dict[int, TextStats],
) -> Iterator[DocumentStats]:
    """The statistics of each document that is not blank; those of text files go to `found`, too."""
    for index, source in enumerate(sources):
        part = InputPart(source, text_format, bad_input)
        try:
            if has_many_documents(source, text_format):
                for number, text in read_documents(part):
                    sha256 = hashlib.sha256(text.encode("utf-8")).hexdigest()
                    yield DocumentStats((index, number), len(text), int(sha256[:16], 16), sha256)
            else:
                stats = found[index] = text_stats(part.read_chunks())
                if not stats.is_blank:
                    yield DocumentStats((index, 0), stats.num_chars, stats.digest, stats.sha256)
        except BadInput as bad:
            bad_input.handle(bad)


def _describe_separator(
    documents: Sequence[DocumentStats], text_format: TextFormat
) -> tuple[str, ...]:
    separator, is_all = text_format.split_on, len(documents) < MIN_HASH_DOCUMENTS
    if not separator or not is_all or any(document.id[1] for document in documents):
        return ()
    hint = "; a line end is $'\\n' in bash" if "\\" in separator else ""
    return (f"--split_on {quote(separator)} is not in the text: each file is one document{hint}",)


def _describe_duplicates(documents: Sequence[DocumentStats], rule: SplitRule) -> tuple[str, ...]:
    if rule.rule != "boundary":
        return ()
    if repeated := len(rule.exceptions):
        subject = pluralize(repeated, "document appears", "documents appear")
        return (f"{subject} in the text more than once: all copies are in one split",)
    splits: dict[int, set[str]] = {}
    for document in documents:
        split = rule.assign(document.id, document.digest)
        splits.setdefault(document.digest, set()).add(split)
    if in_both := sum(len(names) > 1 for names in splits.values()):
        subject = pluralize(in_both, "document is", "documents are")
        return (f"{subject} in both splits, as copies: the validation loss will be too low",)
    return ()


def _require_text_in_both_splits(request: PrepareRequest, selection: FileSelection) -> None:
    sources, val = selection.sources, set(selection.val_sources)
    for is_val, use in ((False, "to train on"), (True, "held out by name")):
        split = [source for index, source in enumerate(sources) if (index in val) == is_val]
        bad_input = BadInputHandler(request.skip_bad)
        texts = (t for source in split for t in iter_text(source, request.text_format, bad_input))
        if not any(text.strip() for text in texts):
            message = no_text_message([source.name for source in split], bad_input)
            hint = "--split_by_name false treats them like all others"
            raise UserError(f"{message}; these are the files {use}: {hint}")


def no_text_message(names: Sequence[str], bad_input: BadInputHandler) -> str:
    """Explain why there is no text in some files."""
    where = join_first(names, 3)
    if not bad_input.counts:
        return f"{where}: there is no text in it"
    problems = ", ".join(f"{count:,} x {problem}" for problem, count in bad_input.counts.items())
    return (
        f"{where}: all input was skipped ({problems}), and no text is left; first "
        f"{bad_input.examples[0]}: {bad_input.hints[0]}"
    )


def collect_alphabet(sources: Sequence[Source], text_format: TextFormat, *, skip_bad: bool) -> str:
    """Return every character of the data, in code point order."""
    seen = np.zeros(0x110000, bool)
    for source in sources:
        for text in iter_text(source, text_format, BadInputHandler(skip_bad)):
            seen[code_points(text)] = True
    return "".join(map(chr, np.flatnonzero(seen).tolist()))


def iter_text(source: Source, text_format: TextFormat, bad_input: BadInputHandler) -> Iterator[str]:
    """Yield all text of a file: one document at a time, or chunks of a text."""
    part = InputPart(source, text_format, bad_input)
    try:
        if has_many_documents(source, text_format):
            yield from (text for _, text in read_documents(part))
        else:
            yield from (chunk.text for chunk in part.read_chunks())
    except BadInput as bad:
        bad_input.handle(bad)
