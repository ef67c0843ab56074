"""Folders that one run holds at a time, on one host or on several."""

import contextlib
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from sp3llm.errors import UserError, of_all
from sp3llm.runtime.processes import Ranks

# Held by the run that writes a folder; what tells a folder that we began from other folders.
LOCK = ".lock"
# A lock file that its holder removed while we opened it is opened anew, so often at most: each time
# another run has to end in between, so that two are plenty.
_ATTEMPTS = 100


@contextlib.contextmanager
def locked_folder(
    folder: Path, unwritable: str, taken: str, say: Callable[[str], None] = print
) -> Iterator[None]:
    """Hold a folder, made where there is none, against other runs for the duration of the block.

    The block may remove the folder; while it does so it still holds it. On a file system without
    locks `say` gets a line and the block runs unprotected.

    Raises UserError, which begins with `unwritable` or `taken`, if the folder cannot be written or
    another run holds it.
    """
    try:
        lock = _locked_file(folder, taken, say)
    except OSError as error:
        raise UserError(f"{unwritable} ({error.strerror}): choose another --out.") from error
    with lock:
        yield


def _locked_file(folder: Path, taken: str, say: Callable[[str], None]) -> IO[str]:
    """The folder's lock file, open and locked; closing it ends the lock."""
    for _ in range(_ATTEMPTS):
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                lock = stack.enter_context((folder / LOCK).open("a"))
            except FileNotFoundError:  # another run has just removed the folder
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                    break
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS):
                    raise
                say(
                    f"The file system of '{folder}' has no locks ({error.strerror}): see to it "
                    "that no other run has the same --out."
                )
            # A run that ended may have removed the file between the two calls: a lock on it would
            # keep nobody out, since the next run makes another file of the same name.
            if _is_file_of(folder / LOCK, lock):
                stack.pop_all()
                return lock
    raise UserError(f"{taken}: wait for it, or choose another --out.")


def marked(folder: Path) -> str:
    """Write into the lock of a folder that is held what tells it from all others, and return it."""
    mark = uuid.uuid4().hex
    with (folder / LOCK).open("w") as lock:
        lock.write(mark)
        lock.flush()
        os.fsync(lock.fileno())
    return mark


def mark_of(folder: Path) -> str:
    """What `marked` wrote into a folder, on this host or another; nothing where it did not."""
    try:
        # A file system of a network remembers what was not there, until the folder is opened.
        os.listdir(folder.parent)
        os.listdir(folder)
        return (folder / LOCK).read_text()
    except OSError:
        return ""


def _is_file_of(path: Path, file: IO[str]) -> bool:
    """Whether an open file is still the one that a path names."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def check_shared(folder: Path, ranks: Ranks, place: str, advice: str) -> None:
    """Raise UserError, as all processes do, where one does not see the folder that the first one
    holds locked: `place` names it, with what it is for, and `advice` says what to do.
    """
    mark = ranks.from_first(lambda: marked(folder))
    if not all(ranks.all_gather(mark_of(folder) == mark)):
        raise of_all(
            UserError(
                f"Expected a file system that all hosts share at {place}, found one on each: "
                f"{advice}."
            )
        )


def empty_folder(folder: Path) -> None:
    """Remove everything in a locked folder but its lock."""
    for leftover in folder.iterdir():
        if leftover.name != LOCK:
            leftover.unlink() if leftover.is_file() else shutil.rmtree(leftover)


def remove_folder(folder: Path) -> None:
    """Remove a locked folder, last of all its lock, which says that it is ours.

    What cannot be removed stays, with the lock: a later run removes it.
    """
    with contextlib.suppress(OSError):
        empty_folder(folder)
        shutil.rmtree(folder)
