from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptforge.data.text import find_text, read_text, split_text
from gptforge.errors import UserError


def test_a_byte_order_mark_and_crlf_are_mended_with_a_notice(tmp_path) -> None:
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    text = read_text(tmp_path / "t.txt")
    assert text.content == "one\ntwo\n"
    assert len(text.notices) == 2


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "empty"),
        (b" \n\t\n", "empty"),
        (b"caf\xe9 au lait", "byte 0xe9 at offset 3"),
        (b"PNG\0\0data", "NUL byte at offset 3"),
        ("text".encode("utf-16"), "NUL byte"),
    ],
)
def test_what_is_not_text_is_refused_with_the_place(tmp_path, raw, words) -> None:
    (tmp_path / "t.txt").write_bytes(raw)
    with pytest.raises(UserError, match=words):
        read_text(tmp_path / "t.txt")


def test_a_missing_file_and_a_folder_are_named(tmp_path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_text(tmp_path / "missing.txt")
    with pytest.raises(UserError, match="is a folder"):
        read_text(tmp_path)


def test_the_text_in_the_working_folder_comes_before_the_packages(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "ROMEO" in read_text(find_text("")).content.upper()
    Path("input.txt").write_text("mine")
    assert read_text(find_text("")).content == "mine"
    assert find_text("other.txt") == Path("other.txt")


@given(st.text(min_size=2), st.floats(0.01, 0.99))
def test_the_cut_is_where_the_contract_puts_it(content, fraction) -> None:
    cut = int(len(content) * (1 - fraction))
    if 0 < cut < len(content):
        assert split_text(content, fraction) == (content[:cut], content[cut:])
    else:
        with pytest.raises(UserError, match="--val_fraction"):
            split_text(content, fraction)


def test_nothing_is_held_out_when_none_is_asked_for() -> None:
    assert split_text("abc", 0) == ("abc", "")
