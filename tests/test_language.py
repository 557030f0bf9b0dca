"""The words of PyTorch, transformers and nanoGPT: no private vocabulary in code, docs or output.

`WORDS` are searched in all text, `NAMES` in the identifiers of Python files. Run it on some files
with `pytest tests/test_language.py -k "gptforge/training"`.
"""

import io
import keyword
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("gptforge", "tests", "benchmarks", "examples", "scripts", "docs")
SPACE = r"[ _\n-]+"
SUFFIXES = {".py", ".md", ".sh", ".ipynb", ".css", ".html", ".js"}

# Private word -> the field's word. A space stands for a space, an underscore or a hyphen.
WORDS = (
    (r"dice", "RNG state, draw"),
    (r"nought", "zero"),
    (r"no number", "NaN or Inf"),
    (r"way (?:back|forward)", "backward, forward"),
    (r"by hand", "explicit; manual backward"),
    (r"written out", "manual backward"),
    (r"upstream", "grad_output"),
    (r"products", "matmul, GEMM"),
    (r"by heart", "memorized, overfit"),
    (r"remed(?:y|ies)", "hint"),
    (r"mend(?:s|ed|ing)?", "fix"),
    (r"judg(?:e|es|ed|ing|ement|ements|ment|ments)", "evaluate"),
    (r"anew", "from scratch"),
    (r"(?:to go|going|goes|went|gone) on", "resume, continue"),
    (r"as begun", "started"),
    (r"is loudest", "is_main"),
    (r"savings", "config"),
    (r"descent", "optimizer_step"),
    (r"lumber room", "utils"),
    (r"once more stops", "Ctrl-C again quits"),
    (r"what it writes now", "Sample"),
    (r"tables of tokens", "embeddings"),
    (r"not known here", "unknown"),
    (r"whoever", "name the person or program"),
    (r"nobody", "no one; name the thing"),
    (r"to the letter", "exactly"),
    (r"all told", "in total"),
    (r"the house", "the package"),
)
CONSTANTS = r"(?<![A-Za-z_])(?-i:MOST|LONGEST|LEAST|FEWEST|FEW)(?:_[A-Za-z0-9_]+)?"
PATTERN = re.compile(
    "|".join(f"(?<![A-Za-z])({word.replace(' ', SPACE)})(?![A-Za-z])" for word, _ in WORDS)
    + f"|{CONSTANTS}(?![A-Za-z])",
    re.IGNORECASE,
)

# Identifiers that contain one of these words, between underscores and capitals.
NAME_WORDS = re.compile("asked|told|nought|dice|wish|wishes|begun|judged?|mend|mended|cleft|anew")
# Identifiers that are one of these names.
NAMES = re.compile(
    "say|said|who|whole|is_whole|nowhere|own|its|given|wanted|settled|ways?|room|apart|shares|drops|"
    "holding|waking|descent|savings|throw|throw_dice|by_hand|ByHand|by_autograd|ByAutograd|give_up|"
    "has_broken_down|go_back|in_words|in_short|set_aside|outlined|unfilled|norm_backward|to_queries|"
    "to_keys|rehearse|rehearsal|in_turns|time_in_turns|ours|theirs|how_to_part|held_out|HeldOut|"
    "heldout|Unfinished|Ending|Hold|NoHold|hold|upstream|beside|slope|wide|narrow"
)

# Where a word is what it says it is: file -> patterns that are removed before the search.
ALLOWED: dict[str, tuple[str, ...]] = {
    "gptforge/cli/parsing.py": (r'"products"',),
    "gptforge/config.py": (r'"products"',),
    "CHANGELOG.md": (r"`--products`",),
    "tests/test_language.py": (r"(?s).*",),
    "tests/training/test_old_run.py": (r"--products",),
}


def files() -> list[Path]:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    found += [*ROOT.glob("*.md"), *ROOT.glob("*.py")]
    golden = ROOT / "tests/golden"
    return sorted(p for p in found if p.suffix in SUFFIXES and golden not in p.parents)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def read(path: Path) -> str:
    text = path.read_text("utf-8")
    # Gradient descent is the field's word, and `given` is hypothesis's decorator.
    allowed = (r"(?i)gradient\s+descent", r"@given\b", r"(?m)^from hypothesis import .*")
    for pattern in (*allowed, *ALLOWED.get(name(path), ())):
        text = re.sub(pattern, "", text)
    return text


def identifiers(text: str) -> list[tuple[int, str]]:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [
        (token.start[0], token.string)
        for token in tokens
        if token.type == tokenize.NAME and not keyword.iskeyword(token.string)
    ]


def is_private(identifier: str) -> bool:
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", identifier)
    is_banned = NAMES.fullmatch(identifier.strip("_")) is not None
    return is_banned or any(NAME_WORDS.fullmatch(word.lower()) for word in words)


@pytest.mark.parametrize("path", files(), ids=name)
def test_text_uses_the_words_of_the_field(path: Path) -> None:
    text = read(path)
    found = []
    for match in PATTERN.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        better = WORDS[match.lastindex - 1][1] if match.lastindex else "MAX_, MIN_"
        found.append(f"{name(path)}:{line}: '{match[0]}', better: {better}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", [path for path in files() if path.suffix == ".py"], ids=name)
def test_names_are_those_of_the_field(path: Path) -> None:
    found = [
        f"{name(path)}:{line}: {identifier}"
        for line, identifier in identifiers(read(path))
        if is_private(identifier)
    ]
    assert not found, "\n".join(found)


def test_no_module_has_a_private_name() -> None:
    stems = {path.stem for path in (ROOT / "gptforge").rglob("*.py")}
    stems |= {path.parent.name for path in (ROOT / "gptforge").rglob("*.py")}
    old = {
        *("holding", "waking", "costs", "hardware", "by_hand", "block_by_hand", "by_autograd"),
        *("replay", "descent", "savings", "gradients", "gathered", "anomalies", "guards"),
        *("in_triton", "products", "product", "sums", "head", "gelu_products", "choice", "slots"),
        *("ranks", "join", "heartbeat", "run_folder", "order", "stream", "ahead", "corpus", "bad"),
        *("cached", "chosen", "crew", "finding", "finishing", "jobs", "side", "survey"),
        *("bulk", "hf_json", "asked", "quick", "settled", "fitting", "rehearsal", "questions"),
        *("heldout", "paper", "gate", "patience", "meter", "digits", "duration", "log_file"),
        *("unwritten", "peers", "writing", "commands"),
        *("utils", "util", "helpers", "common", "misc"),
    }
    assert sorted(stems & old) == []
