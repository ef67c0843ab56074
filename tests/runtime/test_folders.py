"""A folder is written by one run at a time, whatever its file system and whoever removes it."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from sp3llm.errors import ResumableError, UserError
from sp3llm.runtime import files
from sp3llm.runtime.files import rename_durably, write_durably
from sp3llm.runtime.folders import (
    RECORD,
    check_not_input,
    check_output,
    full_disk_told,
    output_folder,
)
from sp3llm.runtime.locks import locked_folder, remove_folder


def lock(folder: Path, said: list[str] | None = None):
    say = print if said is None else said.append
    return locked_folder(folder, "Cannot write there", "Another run is there", say)


def failing(number: int):
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_folder_has_one_holder_at_a_time(tmp_path):
    with (
        lock(tmp_path / "work"),
        pytest.raises(UserError, match=r"Another run is there: wait for it"),
        lock(tmp_path / "work"),
    ):
        pass
    with lock(tmp_path / "work"):
        pass


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES])
def test_a_lock_that_is_held_means_another_run(number, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with pytest.raises(UserError, match="Another run is there"), lock(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_written_all_the_same(number, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", failing(number))
    said: list[str] = []
    with output_folder(tmp_path / "out", said.append) as partial:
        (partial / RECORD).write_text("{}")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [RECORD]
    (line,) = said
    assert os.strerror(number) in line
    assert "no other run" in line


def test_a_lock_that_fails_otherwise_is_not_taken_for_another_run(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", failing(errno.EIO))
    with pytest.raises(UserError, match="Cannot write there"), lock(tmp_path):
        pass


@pytest.mark.parametrize("gone", ["the file", "the folder"])
def test_a_lock_file_that_its_holder_removed_meanwhile_is_opened_anew(gone, tmp_path, monkeypatch):
    """Another run ends, and clears up, between this one's opening of the file and its lock."""
    work = tmp_path / "work"
    flock, locked = fcntl.flock, []

    def slow(file, how: int) -> None:
        if not locked:
            remove_folder(work) if gone == "the folder" else (work / ".lock").unlink()
        flock(file, how)
        locked.append(os.fstat(file.fileno()).st_ino)

    monkeypatch.setattr(fcntl, "flock", slow)
    with lock(work):
        assert len(locked) == 2
        assert (work / ".lock").stat().st_ino == locked[-1]
        monkeypatch.setattr(fcntl, "flock", flock)
        with pytest.raises(UserError, match="Another run is there"), lock(work):
            pass


def test_a_result_is_locked_until_it_has_its_name(tmp_path, monkeypatch):
    """Between the two no run may begin to write in the folder that gets the name."""
    out, replace = tmp_path / "out", os.replace

    def late(*names: Path) -> None:
        with pytest.raises(UserError, match="Another sp3llm run"), output_folder(out):
            pass
        replace(*names)

    with output_folder(out) as partial:
        (partial / RECORD).write_text("{}")
        monkeypatch.setattr(os, "replace", late)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == [RECORD]


@pytest.mark.parametrize("name", ["x" * 300, "x" * 250, "a\udce9b", "loop", "loop/below"])
def test_a_name_that_no_folder_can_have_is_refused_before_any_work(name, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match=r"^Expected a name that a folder can have for --out"):
        check_output(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


@pytest.mark.parametrize("name", ["new", "größe", "x" * 240, "new/below", "link"])
def test_any_other_name_is_taken(name, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "later")
    with output_folder(tmp_path / name) as partial:
        (partial / RECORD).write_text("{}")
    assert (tmp_path / name / RECORD).is_file()


def test_a_file_that_is_read_may_not_lie_where_the_result_goes(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "text.jsonl").write_text("")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "out" / "text.jsonl")
    for text in (tmp_path / "out" / "text.jsonl", tmp_path / "link.jsonl"):
        with pytest.raises(UserError, match=r"that of the text .*which would be replaced"):
            check_not_input(tmp_path / "out", text, "the text")
        check_not_input(tmp_path / "out2", text, "the text")


def test_what_fills_a_disk_is_told_from_other_errors():
    def told(error: Exception, *kinds: type[Exception]) -> None:
        with full_disk_told("Cannot write", ".", kinds):
            raise error

    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ResumableError, match=r"^Cannot write \(No space left on device\): free"):
        told(full)
    large = OSError(errno.EFBIG, "File too large")
    with pytest.raises(ResumableError, match=r"\(File too large\): allow larger files \(ulimit -f"):
        told(large)
    with pytest.raises(PermissionError):
        told(PermissionError(errno.EACCES, "Permission denied"))
    with pytest.raises(ResumableError, match=r"\(it is full\)"):
        told(RuntimeError("it is full"), RuntimeError)


def test_what_gets_its_name_is_on_the_disk_first(tmp_path, monkeypatch):
    order: list[str] = []
    flush, replace = files.flush, os.replace
    monkeypatch.setattr(files, "flush", lambda path: order.append(path.name) or flush(path))
    monkeypatch.setattr(os, "replace", lambda *names: order.append("renamed") or replace(*names))
    write_durably(tmp_path / "file", lambda path: path.write_text("x"))
    assert order == ["file.new", "renamed", tmp_path.name]
    order.clear()
    (tmp_path / "aside" / "inner").mkdir(parents=True)
    (tmp_path / "aside" / "inner" / "part").write_text("y")
    rename_durably(tmp_path / "aside", tmp_path / "final")
    assert sorted(order[:3]) == ["aside", "inner", "part"]
    assert order[3:] == ["renamed", tmp_path.name]
    assert (tmp_path / "final" / "inner" / "part").read_text() == "y"
