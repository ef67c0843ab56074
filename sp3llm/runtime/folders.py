"""Output folders: locked, written aside, and given their name when everything is in them.

Writing goes to a folder beside the target, `<out>.partial`, which gets the target's name only when
the result is whole, so that a killed run leaves nothing that loads.
"""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sp3llm.errors import ResumableError, UserError
from sp3llm.runtime.journal import MANIFEST
from sp3llm.runtime.processes import Ranks

# Inside the folder of a run: what becomes the result. What a journal knows groups and shards as.
MODEL = "model"
# Headers, tokenizer, card, and what a file system loses to blocks.
_DISK_MARGIN = 64 * 2**20


# --------------------------------------------------------------------------- writing


@contextlib.contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes `out` when the block ends without an exception.

    Until then it is called `out` + `.partial`; an exception removes it, and what a killed run
    left under that name is removed by the next one. An earlier result of sp3llm at `out` is
    replaced at the very end.

    Raises UserError if `out` exists and is not ours, or another run is writing it.
    """
    with _working_folder(out) as partial:
        _empty(partial)
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        (partial / ".lock").unlink()
        _replace_folder(partial, out)


@contextlib.contextmanager
def run_folder(out: Path, fresh: bool, ranks: Ranks) -> Iterator[Path]:
    """A folder to work in that outlives a killed run; its `model` becomes `out` in the end.

    It is called `out` + `.partial`. Bad input removes it, everything else leaves it for the same
    command to continue; `fresh` empties it first. An earlier result of sp3llm at `out` is replaced
    at the very end. Only the first of several processes holds and clears it.

    Raises UserError if `out` exists and is not ours, or another run is writing it.
    """
    with contextlib.ExitStack() as stack:

        def begin() -> Path:
            partial = stack.enter_context(_working_folder(out))
            if fresh:
                _empty(partial)
            shutil.rmtree(partial / "scratch", ignore_errors=True)
            (partial / MODEL).mkdir(exist_ok=True)
            return partial

        partial = ranks.from_first(begin)
        continued = any(partial.glob(f"state-*/{MANIFEST}"))
        try:
            with _full_disk_told(partial):
                yield partial
        except UserError as error:
            # What an earlier run has done is not this one's to throw away.
            if ranks.is_first and not continued and not isinstance(error, ResumableError):
                _remove(partial)
            raise
        if ranks.is_first:
            _replace_folder(partial / MODEL, out)
            _remove(partial)


@contextlib.contextmanager
def _working_folder(out: Path) -> Iterator[Path]:
    """`out` + `.partial`, locked for the duration of the block."""
    check_output(out)
    out = Path(os.path.abspath(out))  # `.` and `..` have no name to add to
    partial = out.with_name(out.name + ".partial")
    for beside in (partial, _earlier(out)):
        if beside.is_dir() and any(beside.iterdir()) and not _is_ours(beside):
            raise UserError(
                f"The folder '{beside}' is needed while '{out}' is written, but exists and was not "
                "written by sp3llm: move it away, or choose another --out."
            )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        lock = (partial / ".lock").open("a")
    except OSError as error:
        raise UserError(
            f"Cannot write to '{out.parent}' ({error.strerror}): choose another --out."
        ) from error
    with lock:
        _take_lock(lock, out)
        with _full_disk_told(partial):
            yield partial


@contextlib.contextmanager
def _full_disk_told(partial: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResumableError(
            f"Cannot write to '{partial}' ({error.strerror}): free some disk space, and give the "
            "same command again, or choose another --out."
        ) from error


def _remove(partial: Path) -> None:
    """Remove a folder of ours, last of all what says that it is ours."""
    _empty(partial)
    shutil.rmtree(partial, ignore_errors=True)


def held_by_run(out: Path) -> int:
    """Bytes that a run of the same `--out` has on the disk already."""
    out = Path(os.path.abspath(out))
    partial = out.with_name(f"{out.name}.partial")
    return sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())


def _empty(partial: Path) -> None:
    for leftover in partial.iterdir():
        if leftover.name != ".lock":
            leftover.unlink() if leftover.is_file() else shutil.rmtree(leftover)


def _take_lock(lock: IO[str], out: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(
            f"Another sp3llm run is writing '{out}': wait for it, or choose another --out."
        ) from error


def check_output(out: Path) -> None:
    """Raise UserError if `out` exists and is neither empty nor an earlier result of sp3llm."""
    if out.is_dir() and os.path.ismount(out):
        raise UserError(
            f"Expected a folder that can be renamed for --out, found the mount point '{out}': "
            "choose a folder inside it."
        )
    if out.exists() and not out.is_dir():
        raise UserError(f"Expected a folder for --out, found the file '{out}': choose another.")
    if out.is_dir() and any(out.iterdir()) and not (out / RECORD).is_file():
        raise UserError(
            f"The output folder '{out}' exists and was not written by sp3llm (no {RECORD} in it): "
            "choose another --out, or empty it."
        )


def _is_ours(folder: Path) -> bool:
    """Whether sp3llm wrote the folder, or began to."""
    return (folder / RECORD).is_file() or (folder / ".lock").is_file()


def _replace_folder(partial: Path, out: Path) -> None:
    """Give `partial` the name `out`; an earlier result goes only when the new one stands."""
    out = Path(os.path.abspath(out))
    earlier = _earlier(out)
    if out.is_dir() and any(out.iterdir()):
        shutil.rmtree(earlier, ignore_errors=True)
        os.replace(out, earlier)
    os.replace(partial, out)
    if _is_ours(earlier):
        shutil.rmtree(earlier, ignore_errors=True)


def _earlier(out: Path) -> Path:
    """Where an earlier result waits while the new one takes its name."""
    return out.with_name(out.name + ".replaced")


def check_disk(out: Path, weight_bytes: int) -> None:
    """Raise UserError if the disk of `out` has no room for the compressed weights."""
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    needed = weight_bytes + _DISK_MARGIN
    if free < needed:
        raise UserError(
            f"Expected {needed / 1e9:.2f} GB of free disk for '{out}', found {free / 1e9:.2f} GB: "
            "free some, or choose another --out."
        )


RECORD = "sp3llm.json"
