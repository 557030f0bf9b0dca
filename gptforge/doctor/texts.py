"""Checks of texts: reads every file to its end."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

from gptforge.data.checks import LARGE_VOCAB, check_bytes_per_token
from gptforge.data.dataloader import count_sequences, too_short_hint
from gptforge.data.dataset import DatasetOptions
from gptforge.data.input_errors import MAX_EXAMPLES, BadInputHandler
from gptforge.data.prepare.readers import FileSpan, read_split
from gptforge.data.prepare.request import (
    RAW_BIN_UNUSED,
    FileSelection,
    PrepareRequest,
    select_files,
)
from gptforge.data.prepare.scan import collect_alphabet, scan
from gptforge.data.prepare.sources import Source
from gptforge.data.prepare.split import MIN_HASH_DOCUMENTS, DocumentId, SplitRule
from gptforge.data.prepare.text_io import TextFormat
from gptforge.doctor.duplicates import Duplicates
from gptforge.errors import UserError
from gptforge.findings import Finding, error, ok, warning
from gptforge.printable import pluralize
from gptforge.report.console import ProgressMeter
from gptforge.tokenizers import from_name
from gptforge.tokenizers.base import END_OF_TEXT
from gptforge.tokenizers.fast_encode import FastEncoder

MAX_SAMPLE_CHARS = 2**22  # encoded to estimate the number of tokens
UNDIVIDED = SplitRule("none", 0.0)


def check_texts(path: Path, options: DatasetOptions, *, context_length: int) -> list[Finding]:
    """Findings about a file or a folder of texts."""
    request = options.request(path)
    with TemporaryDirectory(prefix="gptforge-") as spool_dir, ProgressMeter("reading") as meter:
        try:
            selection = select_files(request, spool_dir=Path(spool_dir))
            meter.start(sum(source.size for source in selection.sources))
            text_scan = _TextScan(request.text_format, selection)
            for i, source in enumerate(selection.sources):
                text_scan.read(i, source, meter)
        except UserError as problem:
            return [error(str(problem))]
        notices = [*selection.notices, *([RAW_BIN_UNUSED] if request.raw_bin else ())]
        found = [*text_scan.findings(), *map(warning, notices)]
        if not text_scan.num_documents:
            empty = error(f"{path.as_posix()}: there is no text in it")
            return found if text_scan.bad_input.examples else [*found, empty]
        rule, problems = UNDIVIDED, []
        try:
            if request.val_fraction:
                rule = scan(replace(request, skip_bad=True), selection).split_rule
        except UserError as problem:
            problems = [error(str(problem))]
        found += _check_tokens(text_scan, request, selection.sources, rule, context_length)
        return found + _check_split(text_scan, selection.sources, rule) + problems


class _TextScan:
    """Counts, samples and problems of all texts."""

    def __init__(self, text_format: TextFormat, selection: FileSelection) -> None:
        self.text_format, self.val_sources = text_format, frozenset(selection.val_sources)
        sources = selection.sources
        self.only_source = sources[0].name if len(sources) == 1 else ""
        self.has_plain_text = any(source.kind == "text" for source in sources)
        self.bad_input = BadInputHandler(skip=True)
        self.sample: list[str] = []
        self.num_sampled = self.num_documents = self.num_chars = self.num_bytes = 0
        self.num_eot_literals = self.num_val_file_chars = 0
        self.documents: list[tuple[DocumentId, int, int]] = []  # the first ones: digest, characters
        self.duplicates = Duplicates()

    def read(self, i: int, source: Source, meter: ProgressMeter) -> None:
        """Read one file."""
        done = 0
        texts = read_split(FileSpan(i, source), UNDIVIDED, self.text_format, self.bad_input)
        for number, parts in groupby(texts, key=lambda part: part.document):
            digest, first_char = hashlib.sha256(), self.num_chars
            for part in parts:
                encoded = part.text.encode("utf-8")
                digest.update(encoded)
                self._add_text(part.text, len(encoded))
                meter.add(part.bytes_read - done, len(encoded))
                done = part.bytes_read
            self.num_documents += 1
            value, num_chars = int(digest.hexdigest()[:16], 16), self.num_chars - first_char
            is_val = i in self.val_sources
            self.num_val_file_chars += num_chars if is_val else 0
            self.duplicates.add(value, "val" if is_val else "", source.name)
            if len(self.documents) < MIN_HASH_DOCUMENTS:
                self.documents.append(((i, number), value, num_chars))

    def _add_text(self, text: str, num_bytes: int) -> None:
        self.num_chars += len(text)
        self.num_bytes += num_bytes
        if not self.text_format.split_on:
            self.num_eot_literals += text.count(END_OF_TEXT)
        if self.num_sampled < MAX_SAMPLE_CHARS:
            self.sample.append(text[: MAX_SAMPLE_CHARS - self.num_sampled])
            self.num_sampled += len(self.sample[-1])

    def count_train_chars(self, rule: SplitRule) -> int:
        """Characters to train on; if documents are chosen by their hash, an estimate."""
        if rule.rule == "character":
            return rule.cut
        if rule.rule == "files":
            return self.num_chars - self.num_val_file_chars
        if rule.rule == "boundary":  # there are no others than the first documents
            splits = ((rule.assign(i, digest), chars) for i, digest, chars in self.documents)
            return sum(chars for split, chars in splits if split == "train")
        return round(self.num_chars * (1 - rule.fraction))

    def findings(self) -> list[Finding]:
        """Counts and problems, without those of tokens and splits."""
        found = []
        if self.num_documents or not self.bad_input.examples:
            documents = pluralize(self.num_documents, "document")
            size = f"{pluralize(self.num_chars, 'character')}, {pluralize(self.num_bytes, 'byte')}"
            found = [ok(f"{documents}, {size}")]
        notices = sorted(self.bad_input.notices)[:MAX_EXAMPLES]
        found += [warning(f"{notice} while reading") for notice in notices]
        for example, hint in zip(self.bad_input.examples, self.bad_input.hints, strict=True):
            # Without its only file nothing would be left.
            can_skip = not example.startswith(f"{self.only_source}: ")
            skip = ", or skip it with `prepare --skip_bad true`" if can_skip else ""
            found.append(error(example, hint + skip))
        more = sum(self.bad_input.counts.values()) - len(self.bad_input.examples)
        if more > 0:
            found.append(error(f"and {more:,} more of these"))
        if self.num_eot_literals:
            times = pluralize(self.num_eot_literals, "time")
            hint = "remove it from the texts"
            if self.has_plain_text:
                hint = f"`prepare --split_on '{END_OF_TEXT}'` splits the text into documents there"
            found.append(warning(f"the text contains {END_OF_TEXT} {times}, as characters", hint))
        return found


def _check_tokens(
    text_scan: _TextScan,
    request: PrepareRequest,
    sources: list[Source],
    rule: SplitRule,
    context_length: int,
) -> list[Finding]:
    """Estimate the number of tokens from a sample, and check the vocabulary by it."""
    name = str(request.tokenizer)
    text = "".join(text_scan.sample) if name == "bpe" else ""
    if name == "char":
        text = collect_alphabet(sources, text_scan.text_format, skip_bad=True)
    tokenizer = from_name(name, text)
    encoder = FastEncoder(tokenizer)
    try:
        num_sampled = sum(len(encoder.encode(text)) for text in text_scan.sample)
    except UserError as problem:
        return [error(f"the tokenizer {name} cannot encode it", str(problem))]
    chars_per_token = text_scan.num_sampled / max(1, num_sampled)
    num_tokens = round(text_scan.num_chars / chars_per_token) if chars_per_token else 0
    if text_scan.num_documents > 1:
        num_tokens += text_scan.num_documents  # an end-of-text id before each
    # Training learns bpe from the training part alone.
    is_estimate = text_scan.num_sampled < text_scan.num_chars or name == "bpe"
    about = "about " if is_estimate else ""
    train_share = text_scan.count_train_chars(rule) / max(1, text_scan.num_chars)
    num_train = round(num_tokens * train_share)
    num_sequences = count_sequences(num_train, context_length)
    tokens = pluralize(num_tokens, "token")
    message = f"{about}{tokens}, {num_sequences:,} sequences of {context_length} to train on"
    found = [ok(message)]
    if num_sequences == 0:
        which = f"with the tokenizer {tokenizer.name}; --preset chooses that of another preset"
        found = [error(message, f"{too_short_hint(num_train)} ({which})")]
    elif num_sequences < 100:
        hint = "a model of any size will soon memorize it; more text helps most"
        found = [warning(message, hint)]
    if tokenizer.vocab_size >= LARGE_VOCAB and num_sampled:
        sample_bytes = sum(len(text.encode("utf-8")) for text in text_scan.sample)
        found += check_bytes_per_token(sample_bytes / num_sampled, tokenizer.name)
    return found


def _check_split(text_scan: _TextScan, sources: Sequence[Source], rule: SplitRule) -> list[Finding]:
    """Duplicates, and what is held out."""
    duplicates = text_scan.duplicates
    if rule.rule == "none":
        return duplicates.findings()
    if rule.rule == "boundary":
        duplicates = Duplicates()
        for document_id, digest, _ in text_scan.documents:
            split = rule.assign(document_id, digest)
            duplicates.add(digest, split, sources[document_id[0]].name)
    if duplicates.in_both_splits:
        return duplicates.findings()
    val_part = {
        "character": f"the last {100 * rule.fraction:g}% of the text, from character {rule.cut:,}",
        "boundary": "the last documents, with all duplicates of a document in one split",
        "files": "the files whose names say so",
        "hash": "documents chosen by their hash, so that none is in both splits",
    }
    return [*duplicates.findings(), ok(f"held out: {val_part[rule.rule]}")]
