"""Dividing the work: which stretches of the data become shards of their own.

It depends on the data and the size asked for alone, not on how many processes there are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from gptforge.data.input_errors import BadInput, BadInputHandler
from gptforge.data.prepare.job import FileSpan, Job
from gptforge.data.prepare.json_reader import is_json_array
from gptforge.data.prepare.readers import has_many_documents
from gptforge.data.prepare.scan import (
    ScanResult,
    byte_offset,
    find_safe_cuts,
    scan_text,
)
from gptforge.data.prepare.sources import Source
from gptforge.data.prepare.table_reader import open_parquet
from gptforge.data.prepare.text_io import TextFormat


def partition(
    sources: Sequence[Source],
    scan: ScanResult,
    text_format: TextFormat,
    skipped: BadInputHandler,
    *,
    job_bytes: int,
) -> list[Job]:
    """Jobs of about `size` bytes of the files each, in the order of the data."""
    jobs: list[Job] = []
    pieces: list[FileSpan] = []
    weight = 0
    for number, source in enumerate(sources):
        for piece in _pieces(number, source, scan, text_format, skipped, job_bytes):
            pieces.append(piece)
            weight += piece.num_bytes
            if weight >= job_bytes:
                jobs.append(Job(len(jobs), tuple(pieces)))
                pieces, weight = [], 0
    if pieces:
        jobs.append(Job(len(jobs), tuple(pieces)))
    return jobs


def _pieces(
    number: int,
    source: Source,
    survey: ScanResult,
    text_format: TextFormat,
    skipped: BadInputHandler,
    size: int,
) -> Iterator[FileSpan]:
    whole = FileSpan(number, source, num_bytes=source.size)
    is_plain = not source.compression and text_format.encoding == "utf-8" and source.size > size
    # With few documents their numbers count, and those are known only from a file's beginning.
    is_counted = survey.split_rule.rule in ("character", "boundary")
    if not has_many_documents(source, text_format):
        found = _long_text(whole, survey, text_format, skipped, size) if is_plain else [whole]
    elif source.kind == "jsonl" and is_plain and not is_counted:
        found = [whole] if is_json_array(source, text_format.encoding) else _lines(whole, size)
    elif source.kind == "parquet" and not is_counted:
        found = _row_groups(whole, text_format, size)
    else:
        found = [whole]
    yield from found


def _long_text(
    whole: FileSpan,
    survey: ScanResult,
    text_format: TextFormat,
    skipped: BadInputHandler,
    size: int,
) -> Iterator[FileSpan]:
    source, split = whole.source, survey.split_rule
    try:
        facts = survey.text_stats.get(whole.source_index) or scan_text(source, text_format.encoding)
    except BadInput as bad:
        skipped.handle(bad)
        return
    if facts.is_blank:
        return
    parts = [(0, source.size, split.assign((whole.source_index, 0), facts.digest))]
    if split.rule == "character":
        cut = byte_offset(source, facts, split.cut)
        parts = [(0, cut, "train"), (cut, source.size, "val")]
    for start, stop, side in parts:
        for piece in _stretches(whole, start, stop, find_safe_cuts(source, start, stop, size)):
            yield replace(piece, split=side, starts_document=piece.start == start)


def _lines(whole: FileSpan, size: int) -> Iterator[FileSpan]:
    borders: list[int] = []
    with whole.source.path.open("rb") as file:
        while (wanted := (borders[-1] if borders else 0) + size) < whole.source.size:
            file.seek(wanted - 1)
            file.readline()
            if file.tell() >= whole.source.size:
                break
            borders.append(file.tell())
    return _stretches(whole, 0, whole.source.size, borders)


def _stretches(whole: FileSpan, start: int, stop: int, borders: list[int]) -> Iterator[FileSpan]:
    places = [start, *borders, stop]
    for begin, end in pairwise(places):
        yield replace(whole, start=begin, stop=end, num_bytes=end - begin)


def _row_groups(whole: FileSpan, text_format: TextFormat, size: int) -> Iterator[FileSpan]:
    try:
        file = open_parquet(whole.source, text_format)
    except BadInput:
        # The job that takes it says so, or counts it.
        yield whole
        return
    with file:
        facts = file.metadata
        sizes = [facts.row_group(i).total_byte_size for i in range(facts.num_row_groups)]
    total, begin, taken = max(1, sum(sizes)), 0, 0
    for group, group_size in enumerate(sizes, 1):
        taken += group_size
        if taken >= size or group == len(sizes):
            weight = whole.source.size * sum(sizes[begin:group]) // total
            yield replace(whole, start=begin, stop=group, num_bytes=weight)
            begin, taken = group, 0
