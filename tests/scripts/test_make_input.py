"""`scripts/make_input.py`: each typographic style of the source on a snippet, then `input.txt`."""

import hashlib
import re
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import make_input as m  # noqa: E402
import shakespeare_cast as cast_tables  # noqa: E402

HEAD = "A PLAY\n\nby Anonymous\n\nPERSONS REPRESENTED.\n\n"
LABEL = re.compile(r"[A-Z][A-Za-z', -]*:")


def play(body: str, work: str = "macbeth", cast: str = "ANN, a queen.") -> list[tuple[str, str]]:
    source = f"{HEAD}{cast}\n\nACT I.\n\nSCENE I. A heath.\n\n{body}"
    return [(speech.speaker, " / ".join(speech.lines)) for speech in m.parse_play(source, work)]


def test_capitals_style_with_directions() -> None:
    body = "[Enter ANN.]\n\nANN.\nOne [aside] two.\n\n[Exit.]\n\nThree.\n\nBOB.\n[To\nANN.] Four.\n"
    assert play(body) == [("Ann", "One two. / Three."), ("Bob", "Four.")]


def test_label_without_stop_beside_its_speech_and_without_blank_line() -> None:
    body = "ANN.\nOne.\n\nANN\nTwo.\n\nANN. Three.\nBOB.\nFour.\n"
    assert play(body) == [("Ann", "One."), ("Ann", "Two."), ("Ann", "Three."), ("Bob", "Four.")]


def test_capitals_style_without_stops() -> None:
    body = "ANN\nOne.\n\nKING BOB\n      Two.\n"
    assert play(body, "midsummer_nights_dream") == [("Ann", "One."), ("King Bob", "Two.")]


def test_short_labels_grow_by_the_cast_list() -> None:
    cast = "Ann, a Queen.\nBobadil, her son.\nFirst Lord."
    body = "Ann.\nOne.\n\nBob.\nYes.\n\nNo.\n\nBob. and Ann.\nTwo.\n\n1 Lord.\nThree.\n"
    assert play(body, "hamlet", cast) == [
        ("Ann", "One."),
        ("Bobadil", "Yes. / No."),
        ("Bobadil and Ann", "Two."),
        ("First Lord", "Three."),
    ]


def test_punctuation_left_by_a_direction_joins_the_line_or_goes() -> None:
    body = "ANN.\nOne\n[to BOB],\ntwo [Exit].\n\n[Exit BOB].\n\nBOB.\nThree [aside] .\n"
    assert play(body) == [("Ann", "One, / two."), ("Bob", "Three.")]


def test_setting_is_left_out_and_prologue_speaks() -> None:
    body = "ANN.\nOne.\n\nSCENE II.\n\nA wood.\n\nBOB.\nTwo.\n\nEPILOGUE\n\nThree.\n"
    assert play(body) == [("Ann", "One."), ("Bob", "Two."), ("Epilogue", "Three.")]


@pytest.mark.parametrize(
    ("short", "name"), [("mar", "marcellus"), ("ma", "ma"), ("lady p.", "lady percy"), ("x", "x")]
)
def test_expand_needs_one_match(short: str, name: str) -> None:
    cast = [["Marcellus"], ["Macbeth"], ["Lady", "Percy"], ["Lady", "Macbeth"]]
    assert m.expand(short, cast) == name


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("DUKE OF YORK.", "Duke of York"),
        ("VARRO'S SERVANT.", "Varro's Servant"),
        ("1 KEEPER.", "First Keeper"),
        ("FIRST and SECOND LORD.", "First and Second Lord"),
        ("ANN & BOB.", "Ann and Bob"),
        ("ANN, BOB, and CID.", "Ann, Bob and Cid"),
        ("ANN. BOB.", "Ann and Bob"),
    ],
)
def test_full_name(label: str, name: str) -> None:
    assert m.full_name(label, "macbeth", []) == name


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("a [b [c] d] e", "a  e"),
        ("a {b.] c", "a  c"),
        ("a [b\n\nc", "a \n\nc"),
        ("a] b", "a b"),
        ("a [b\nc] d", "a  d"),
    ],
)
def test_strip_directions(text: str, kept: str) -> None:
    assert m.strip_directions(text) == kept


@pytest.mark.parametrize(
    ("line", "clean"),
    [
        ("  I 'll   go -- now ,sir.", "I'll go--now, sir."),
        ("_tremor_ 't is fix&egrave;d,;", "tremor 'tis fixed;"),
        ("\u2018ay\u2019 \u2014 no", "'ay'--no"),
        ("ducats- I think", "ducats--I think"),
    ],
)
def test_clean_line(line: str, clean: str) -> None:
    assert m.clean_line(line) == clean
    assert m.clean_line(clean) == clean


def test_poem_keeps_stanzas_only() -> None:
    source = "A POEM\n\nby William Shakespeare\n\nI.\n\nOne,\n  Two.\n\nXIV\n\nThree.\n\n  * * *\n"
    assert m.parse_poem(source) == [["One,", "Two."], ["Three."]]


def test_order_has_each_work_once_and_ends_with_each_kind() -> None:
    order = m.works_in_order()
    assert len(order) == len(set(order)) == 42
    assert order[-3:] == [
        cast_tables.COMEDIES[-1],
        cast_tables.HISTORIES[-1],
        cast_tables.TRAGEDIES[-1],
    ]
    assert order[:5] == list(cast_tables.POEMS)


def test_fix_of_text_that_is_not_in_the_source_raises() -> None:
    with pytest.raises(ValueError, match="not in the source"):
        m.apply_fixes("nothing", "macbeth")


def test_wrong_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "other.tar.gz"
    with tarfile.open(archive, "w:gz"):
        pass
    out = tmp_path / "input.txt"
    monkeypatch.setattr(sys, "argv", ["make_input.py", str(archive), "--out", str(out)])
    with pytest.raises(SystemExit, match="not the expected archive"):
        m.main()
    assert not out.exists()


@pytest.fixture(scope="module")
def text() -> str:
    return (ROOT / "input.txt").read_bytes().decode("ascii")


def test_file_has_the_expected_hash(text: str) -> None:
    assert hashlib.sha256(text.encode()).hexdigest() == m.OUTPUT_SHA256


def test_alphabet_and_whitespace(text: str) -> None:
    assert len(set(text)) < 80
    assert not set(text) & set("[]{}_*@/<>\t\r")
    assert not re.search(r" $|^ |  |\n\n\n", text, re.MULTILINE)
    assert all(re.search(r"\w", line) for line in text.splitlines() if line)
    assert not re.search(r" [.,;:?!]", text)
    assert text.endswith("\n") and not text.endswith("\n\n")


def test_every_block_of_a_play_is_a_speech_or_a_title(text: str) -> None:
    blocks = text[text.index("ALL'S WELL THAT ENDS WELL") : -1].split("\n\n")
    others = []
    for block in blocks:
        label, _, speech = block.partition("\n")
        if not (LABEL.fullmatch(label) and speech):
            others.append(block)
    assert len(others) == 37
    assert all(other == other.upper() and "\n" not in other for other in others)


def test_no_foreign_words_and_no_leftover_directions(text: str) -> None:
    lowered = text.lower()
    for word in (
        "gutenberg",
        " etext",
        "copyright",
        "dramatis",
        "persons represented",
        "exeunt",
    ):
        assert word not in lowered
    assert not re.search(r"^(ACT|SCENE|Act|Scene) [IVX1-9]", text, re.MULTILINE)
    assert not re.search(r"^(Enter|Exit|Scene|Song|Flourish)[a-z ]*:?$", text, re.MULTILINE)


def test_last_tenth_is_plays_of_each_kind(text: str) -> None:
    tail = text[-len(text) // 10 :]
    assert "\nKing Richard:\n" in tail and "\nTroilus:\n" in tail and "\nLeontes:\n" in tail
