"""Dividing the work: which stretches of the data become shards of their own.

It depends on the data and the size asked for alone, not on how many processes there are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from gptforge.data.bad import BadInput, Skipped
from gptforge.data.documents import Form, holds_many, open_parquet
from gptforge.data.job import Job, Piece
from gptforge.data.json_array import is_array
from gptforge.data.sources import Source
from gptforge.data.survey import Survey, byte_of, clefts, measure


def divide(
    sources: Sequence[Source], survey: Survey, form: Form, skipped: Skipped, *, size: int
) -> list[Job]:
    """Jobs of about `size` bytes of the files each, in the order of the data."""
    jobs: list[Job] = []
    pieces: list[Piece] = []
    weight = 0
    for number, source in enumerate(sources):
        for piece in _pieces(number, source, survey, form, skipped, size):
            pieces.append(piece)
            weight += piece.weight
            if weight >= size:
                jobs.append(Job(len(jobs), tuple(pieces)))
                pieces, weight = [], 0
    if pieces:
        jobs.append(Job(len(jobs), tuple(pieces)))
    return jobs


def _pieces(
    number: int, source: Source, survey: Survey, form: Form, skipped: Skipped, size: int
) -> Iterator[Piece]:
    whole = Piece(number, source, weight=source.size)
    is_plain = not source.packing and form.encoding == "utf-8" and source.size > size
    # With few documents their numbers count, and those are known only from a file's beginning.
    is_counted = survey.split.rule in ("character", "boundary")
    if not holds_many(source, form):
        found = _long_text(whole, survey, form, skipped, size) if is_plain else [whole]
    elif source.kind == "jsonl" and is_plain and not is_counted:
        found = [whole] if is_array(source, form.encoding) else _lines(whole, size)
    elif source.kind == "parquet" and not is_counted:
        found = _row_groups(whole, form, size)
    else:
        found = [whole]
    yield from found


def _long_text(
    whole: Piece, survey: Survey, form: Form, skipped: Skipped, size: int
) -> Iterator[Piece]:
    source, split = whole.source, survey.split
    try:
        facts = survey.facts.get(whole.number) or measure(source, form.encoding)
    except BadInput as bad:
        skipped.add(bad)
        return
    if facts.is_blank:
        return
    parts = [(0, source.size, split.side((whole.number, 0), facts.digest))]
    if split.rule == "character":
        cut = byte_of(source, facts, split.cut)
        parts = [(0, cut, "train"), (cut, source.size, "val")]
    for start, stop, side in parts:
        for piece in _stretches(whole, start, stop, clefts(source, start, stop, size)):
            yield replace(piece, side=side, begins=piece.start == start)


def _lines(whole: Piece, size: int) -> Iterator[Piece]:
    borders: list[int] = []
    with whole.source.path.open("rb") as file:
        while (wanted := (borders[-1] if borders else 0) + size) < whole.source.size:
            file.seek(wanted - 1)
            file.readline()
            if file.tell() >= whole.source.size:
                break
            borders.append(file.tell())
    return _stretches(whole, 0, whole.source.size, borders)


def _stretches(whole: Piece, start: int, stop: int, borders: list[int]) -> Iterator[Piece]:
    places = [start, *borders, stop]
    for begin, end in pairwise(places):
        yield replace(whole, start=begin, stop=end, weight=end - begin)


def _row_groups(whole: Piece, form: Form, size: int) -> Iterator[Piece]:
    try:
        file = open_parquet(whole.source, form)
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
            yield replace(whole, start=begin, stop=group, weight=weight)
            begin, taken = group, 0
