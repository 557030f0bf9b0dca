"""Partition the input files into jobs.

The jobs depend on the data and `job_bytes` alone, not on the number of processes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from gptforge.data.input_errors import BadInput
from gptforge.data.prepare.job import Job
from gptforge.data.prepare.json_reader import is_json_array
from gptforge.data.prepare.readers import FileSpan, has_many_documents
from gptforge.data.prepare.scan import ScanResult, byte_offset, find_safe_cuts
from gptforge.data.prepare.sources import Source
from gptforge.data.prepare.table_reader import open_parquet
from gptforge.data.prepare.text_io import TextFormat, scan_text


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
            if not is_json_array(source, text_format.encoding):
                return _split_lines(file, job_bytes)
        elif source.kind == "parquet" and not needs_index:
            return _split_row_groups(file, text_format, job_bytes)
    except BadInput:
        pass  # the job that reads the file raises or counts it
    return [file]


def _split_text(file: FileSpan, scan: ScanResult, job_bytes: int) -> list[FileSpan]:
    source, rule = file.source, scan.split_rule
    stats = scan.text_stats.get(file.source_index) or scan_text(source, "utf-8")
    if stats.is_blank:
        return []
    parts = [(0, source.size, rule.assign((file.source_index, 0), stats.digest))]
    if rule.rule == "character":
        cut = byte_offset(source, stats, rule.cut)
        parts = [(0, cut, "train"), (cut, source.size, "val")]
    return [
        replace(span, split=split, starts_document=span.start == start)
        for start, stop, split in parts
        for span in _cut(file, start, stop, find_safe_cuts(source, start, stop, job_bytes))
    ]


def _split_lines(file: FileSpan, job_bytes: int) -> Iterator[FileSpan]:
    size, cuts = file.source.size, [0]
    with file.source.path.open("rb") as lines:
        while (target := cuts[-1] + job_bytes) < size:
            lines.seek(target - 1)
            position = target - 1 + len(lines.readline())
            if position >= size:
                break
            cuts.append(position)
    return _cut(file, 0, size, cuts[1:])


def _cut(file: FileSpan, start: int, stop: int, cuts: list[int]) -> Iterator[FileSpan]:
    for begin, end in pairwise([start, *cuts, stop]):
        yield replace(file, start=begin, stop=end, num_bytes=end - begin)


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
