"""Partition the input files into jobs.

The jobs depend on the data and `job_bytes` alone, not on the number of processes.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import IO

from gptforge.data.input_errors import BadInput
from gptforge.data.prepare.job import Job
from gptforge.data.prepare.json_reader import is_json_array
from gptforge.data.prepare.readers import FileSpan, has_many_documents
from gptforge.data.prepare.scan import ScanResult
from gptforge.data.prepare.sources import Source
from gptforge.data.prepare.table_reader import open_parquet
from gptforge.data.prepare.text_io import InputPart, TextFormat, TextStats, text_stats

# GPT-2's pre-tokenization pattern always splits here: before the last of several blanks.
SAFE_CUT_BYTES = re.compile(rb"(?<!\r)[ \n](?=[^\s])")
SEARCH_BLOCK = 2**16
MAX_SEARCH_BYTES = 2**26  # stop looking for a safe cut after this many bytes
FindNext = Callable[[IO[bytes], int, int], int | None]


def partition(
    sources: Sequence[Source], scan: ScanResult, text_format: TextFormat, *, job_bytes: int
) -> list[Job]:
    """Partition the sources, in order, into jobs of about `job_bytes` bytes of the files each."""
    jobs: list[Job] = []
    spans: list[FileSpan] = []
    num_bytes = 0
    for index, source in enumerate(sources):
        file = FileSpan(index, source, num_bytes=source.size)
        for span in _spans(file, scan, text_format, job_bytes):
            spans.append(span)
            num_bytes += span.num_bytes
            if num_bytes >= job_bytes:
                jobs.append(Job(len(jobs), tuple(spans)))
                spans, num_bytes = [], 0
    if spans:
        jobs.append(Job(len(jobs), tuple(spans)))
    return jobs


def _spans(
    file: FileSpan, scan: ScanResult, text_format: TextFormat, job_bytes: int
) -> Iterable[FileSpan]:
    source, is_utf8 = file.source, text_format.encoding == "utf-8"
    is_seekable = source.size > job_bytes and not source.compression and is_utf8
    # These rules need a document's index in its file, which is known only when reading from its
    # start.
    needs_index = scan.split_rule.rule in ("character", "boundary")
    try:
        if not has_many_documents(source, text_format):
            if is_seekable:
                return _split_text(file, scan, job_bytes)
        elif source.kind == "jsonl" and is_seekable and not needs_index:
            if not is_json_array(source, text_format):
                return list(_cut(file, 0, source.size, job_bytes, _next_line))
        elif source.kind == "parquet" and not needs_index:
            return _split_row_groups(file, text_format, job_bytes)
    except (BadInput, OSError):
        pass  # the job that reads the file raises or counts it
    return [file]


def _split_text(file: FileSpan, scan: ScanResult, job_bytes: int) -> list[FileSpan]:
    source, rule = file.source, scan.split_rule
    stats = scan.text_stats.get(file.source_index) or text_stats(InputPart(source).read_chunks())
    if stats.is_blank:
        return []
    parts = [(0, source.size, rule.assign((file.source_index, 0), stats.digest))]
    if rule.rule == "character":
        cut = byte_offset(source, stats, rule.cut)
        parts = [(0, cut, "train"), (cut, source.size, "val")]
    return [
        replace(span, split=split, starts_document=span.start == start)
        for start, stop, split in parts
        for span in _cut(file, start, stop, job_bytes, _next_safe_cut)
    ]


def _cut(
    file: FileSpan, start: int, stop: int, job_bytes: int, find_next: FindNext
) -> Iterator[FileSpan]:
    """Spans of about `job_bytes`, which end where `find_next` allows it."""
    with file.source.path.open("rb") as opened:
        while start < stop:
            target = start + job_bytes
            end = find_next(opened, target, stop) if target < stop else None
            end = stop if end is None else end
            yield replace(file, start=start, stop=end, num_bytes=end - start)
            start = end


def _split_row_groups(file: FileSpan, text_format: TextFormat, size: int) -> list[FileSpan]:
    with open_parquet(file.source, text_format) as parquet:
        metadata = parquet.metadata
        sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    spans: list[FileSpan] = []
    total, begin, num_bytes = max(1, sum(sizes)), 0, 0
    for end, group_bytes in enumerate(sizes, 1):
        num_bytes += group_bytes
        if num_bytes >= size or end == len(sizes):
            span_bytes = file.source.size * num_bytes // total
            spans.append(replace(file, start=begin, stop=end, num_bytes=span_bytes))
            begin, num_bytes = end, 0
    return spans


def byte_offset(source: Source, stats: TextStats, char_index: int) -> int:
    """Return the byte of a UTF-8 file where a character of its text starts."""
    chars_before = [num_chars for _, num_chars in stats.offsets]
    start, num_chars = stats.offsets[bisect_right(chars_before, char_index) - 1]
    for chunk in InputPart(source, start=start).read_chunks():
        if char_index <= num_chars + len(chunk.text):
            break
        num_chars += len(chunk.text)
    target = char_index - num_chars
    # The BOM and the CR of each CRLF are bytes of the file, but not characters of the text.
    bom = len(chunk.raw) - len(chunk.text) - chunk.raw.count("\r\n")
    line_ends = accumulate(len(line) + 1 for line in chunk.raw[bom:].split("\r\n")[:-1])
    carriage_returns = sum(end <= target for end in line_ends)
    return chunk.offset + len(chunk.raw[: bom + target + carriage_returns].encode("utf-8"))


def _next_line(file: IO[bytes], target: int, stop: int) -> int | None:
    file.seek(target - 1)
    while (part := file.readline(SEARCH_BLOCK)) and not part.endswith(b"\n"):
        pass  # not in one piece: a line may be longer than memory
    return file.tell() if file.tell() < stop else None


def _next_safe_cut(file: IO[bytes], target: int, stop: int) -> int | None:
    """The next byte where cutting a UTF-8 text changes none of its ids."""
    for begin in range(target, min(stop, target + MAX_SEARCH_BYTES), SEARCH_BLOCK):
        # Include the byte before the block, for the lookbehind, and the bytes of the character
        # after it.
        file.seek(begin - 1)
        block = file.read(min(SEARCH_BLOCK + 8, stop - begin + 1))
        for match in SAFE_CUT_BYTES.finditer(block, 1, SEARCH_BLOCK):
            following = block[match.end() : match.end() + 4].decode("utf-8", errors="ignore")
            if following and not following[0].isspace():
                return begin - 1 + match.start()
    return None
