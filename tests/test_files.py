import errno
import json
import os
import stat
import tempfile
from pathlib import Path

import numpy as np
import pytest

from gptforge import files

needs_posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")


def test_failed_write_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / "config.toml"
    files.atomic_write(path, "old")
    with pytest.raises(RuntimeError), files.atomic_replace(path) as partial:
        partial.write_text("half")
        raise RuntimeError("crash")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.toml"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_error_of_a_full_disk_names_the_file(tmp_path) -> None:
    def write_bytes(file) -> None:
        file.write(b"x" * 10**6)

    def write_array(file) -> None:
        np.zeros(10**6).tofile(file)

    for write in (write_bytes, write_array):
        with (
            pytest.raises(OSError) as caught,
            files.atomic_replace(tmp_path / "model.gguf"),
            Path("/dev/full").open("wb", buffering=0) as full,
        ):
            write(full)
        assert caught.value.filename == (tmp_path / "model.gguf").as_posix()
        assert caught.value.errno == errno.ENOSPC
        assert not any(tmp_path.iterdir())


def test_link_moves_from_one_folder_to_the_next(tmp_path) -> None:
    for name in ("step-1", "step-2"):
        (tmp_path / name).mkdir()
        files.set_link(tmp_path / "last", name)
        assert files.read_link(tmp_path / "last") == name
    assert files.read_link(tmp_path / "best") is None


def test_link_is_a_one_line_file_where_the_system_has_no_links(tmp_path, monkeypatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    for name in ("step-1", "step-2"):
        files.set_link(tmp_path / "last", name)
        assert (tmp_path / "last").read_text() == f"{name}\n"
        assert files.read_link(tmp_path / "last") == name


def test_folder_in_place_of_a_link_is_moved_to_a_backup(tmp_path) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "mine.txt").write_text("kept")
    files.set_link(tmp_path / "best", "step-2")
    assert files.read_link(tmp_path / "best") == "step-2"
    assert (tmp_path / "best.old-1" / "mine.txt").read_text() == "kept"


def test_json_line_writes_nan_and_infinity_as_null() -> None:
    line = files.json_line({"loss": float("nan"), "norm": float("inf"), "step": 3})
    assert json.loads(line) == {"loss": None, "norm": None, "step": 3}


def test_backup_never_overwrites(tmp_path) -> None:
    for number in (1, 2, 3):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "mark").write_text(str(number))
        files.move_to_backup(tmp_path / "run", "old")
    for number in (1, 2, 3):
        assert (tmp_path / f"run.old-{number}" / "mark").read_text() == str(number)


def test_removing_a_link_keeps_its_target(tmp_path) -> None:
    (tmp_path / "folder").mkdir()
    if os.name != "nt":
        (tmp_path / "link").symlink_to("folder")
        files.remove(tmp_path / "link")
    assert (tmp_path / "folder").is_dir()


@pytest.mark.skipif(os.name == "nt", reason="Windows has a temporary folder for each user")
def test_private_temp_dir_is_the_same_each_time(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = files.private_temp_dir()
    assert path == tmp_path / f"gptforge-{os.getuid()}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    files._private_dir_in.cache_clear()
    assert files.private_temp_dir() == path


@pytest.mark.skipif(os.name == "nt", reason="Windows has a temporary folder for each user")
@pytest.mark.parametrize("kind", ["open to others", "a link", "a file", "of another user"])
def test_private_temp_dir_of_another_user_is_not_used(tmp_path, monkeypatch, kind) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    planted = tmp_path / f"gptforge-{os.getuid()}"
    if kind == "a link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        planted.symlink_to(tmp_path / "theirs")
    elif kind == "a file":
        planted.write_text("")
    else:
        planted.mkdir(mode=0o700)
        if kind == "open to others":
            planted.chmod(0o777)
        else:
            # A test cannot create a folder of another user, so this process poses as one.
            monkeypatch.setattr(os, "getuid", lambda: 12345)
            planted.rename(tmp_path / "gptforge-12345")
            planted = tmp_path / "gptforge-12345"
    path = files.private_temp_dir()
    assert path not in (planted, planted.resolve())
    assert path.parent == tmp_path
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert files.private_temp_dir() == path


def make_nonregular(path: Path, kind: str) -> Path:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path.with_name("target"))
        path.with_name("target").write_text("secret")
    return path


@needs_posix
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link"])
@pytest.mark.parametrize("mode", ["rb", "ab", "r+"])
def test_only_regular_files_are_opened(tmp_path, kind, mode) -> None:
    path = make_nonregular(tmp_path / "metrics.jsonl", kind)
    with pytest.raises(files.NonRegularFileError, match=r"metrics.jsonl is a .*, not a regular"):
        files.open_regular(path, mode, follow_symlinks=False)
    if kind != "link":
        for read in (files.sha256, files.read_text):
            with pytest.raises(files.NonRegularFileError):
                read(path)
    assert not (tmp_path / "target").exists() or (tmp_path / "target").read_text() == "secret"


@needs_posix
@pytest.mark.parametrize("kind", ["pipe", "link"])
@pytest.mark.parametrize("mode", ["rb", "ab", "r+"])
def test_a_file_that_is_replaced_after_the_check_is_not_opened(
    tmp_path, monkeypatch, kind, mode
) -> None:
    path = make_nonregular(tmp_path / "metrics.jsonl", kind)
    monkeypatch.setattr(files, "nonregular_kind", lambda *args, **kwargs: "")
    with pytest.raises(OSError):
        files.open_regular(path, mode, follow_symlinks=False)
    assert kind == "pipe" or (tmp_path / "target").read_text() == "secret"


@needs_posix
def test_a_file_without_a_size_is_read_within_the_bound() -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("there is no /proc")
    with pytest.raises(OSError, match="more than any"):
        files.read_bounded(status, 9)


@needs_posix
def test_link_is_followed_by_default(tmp_path) -> None:
    assert files.read_text(make_nonregular(tmp_path / "config.toml", "link")) == "secret"


def test_oversized_file_is_not_read(tmp_path) -> None:
    path = tmp_path / "manifest.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match=f"{2**40:,} bytes, more than any"):
        files.read_text(path)
    path.write_bytes(b"x" * 10)
    assert files.read_bounded(path, 10) == b"x" * 10
    with pytest.raises(OSError, match="more than any"):
        files.read_bounded(path, 9)


def test_byte_order_mark_and_line_ends_are_normalized(tmp_path) -> None:
    (tmp_path / "merges.txt").write_bytes("\ufeffa b\r\nc d\re f\n".encode())
    assert files.read_text(tmp_path / "merges.txt") == "a b\nc d\ne f\n"


@needs_posix
def test_atomic_write_does_not_follow_a_planted_link(tmp_path) -> None:
    (tmp_path / "secret").write_text("mine")
    (tmp_path / ".config.partial.toml").symlink_to(tmp_path / "secret")
    files.atomic_write(tmp_path / "config.toml", "new")
    assert (tmp_path / "secret").read_text() == "mine"
    assert (tmp_path / "config.toml").read_text() == "new"
    assert not (tmp_path / "config.toml").is_symlink()


@needs_posix
def test_backup_does_not_replace_a_dangling_link(tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run.old-1").symlink_to("nowhere")
    assert files.move_to_backup(tmp_path / "run", "old").name == "run.old-2"
