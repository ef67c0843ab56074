"""Output folders: locked, written aside, and given their name when everything is in them.

Writing goes to a folder beside the target, `<out>.partial`, which gets the target's name only when
the result is whole, so that a killed run leaves nothing that loads.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from sp3llm.errors import ResumableError, UserError, reason
from sp3llm.runtime.journal import MANIFEST
from sp3llm.runtime.locks import (
    LOCK,
    empty_folder,
    locked_folder,
    mark_of,
    marked,
    remove_folder,
)
from sp3llm.runtime.processes import Ranks

# What a result records of itself, which is also what tells a result of ours from other folders.
RECORD = "sp3llm.json"
# Inside the folder of a run: what becomes the result, written beside the journals' own files.
MODEL = "model"
# Headers, tokenizer, card, and what a file system loses to blocks.
_DISK_MARGIN = 64 * 2**20


# --------------------------------------------------------------------------- writing


@contextlib.contextmanager
def output_folder(out: Path, say: Callable[[str], None] = print) -> Iterator[Path]:
    """A folder to write into that becomes `out` when the block ends without an exception.

    Until then it is called `out` + `.partial`; an exception removes it, and what a killed run
    left under that name is removed by the next one. An earlier result of sp3llm at `out` is
    replaced at the very end. `say` gets a line where the folder cannot be locked.

    Raises UserError if `out` exists and is not ours, or another run is writing it.
    """
    final = Path(os.path.realpath(out))  # `.` is another folder when it has been replaced
    with _working_folder(out, say) as partial:
        empty_folder(partial)
        try:
            yield partial
        except BaseException:
            remove_folder(partial)
            raise
        _replace_folder(partial, final)
        # Only now: without it another run could begin in the folder that is about to be renamed.
        (final / LOCK).unlink()


@contextlib.contextmanager
def run_folder(
    out: Path, fresh: bool, ranks: Ranks, say: Callable[[str], None] = print
) -> Iterator[Path]:
    """A folder to work in that outlives a killed run; its `model` becomes `out` in the end.

    It is called `out` + `.partial`. Bad input removes it, everything else leaves it for the same
    command to continue; `fresh` empties it first. An earlier result of sp3llm at `out` is replaced
    at the very end. Only the first of several processes holds and clears it, and on every host that
    does not share it the first there one of its own, which goes in the end. `say` gets a line where
    it cannot be locked.

    Raises UserError if `out` exists and is not ours, or another run is writing it.
    """
    partial = _partial(Path(os.path.realpath(out)))
    with contextlib.ExitStack() as stack:

        def begin() -> str:
            stack.enter_context(_working_folder(out, say))
            if fresh:
                empty_folder(partial)
            shutil.rmtree(partial / "scratch", ignore_errors=True)
            (partial / MODEL).mkdir(exist_ok=True)
            return marked(partial)

        def begin_beside(mark: str) -> bool:
            """On a host that does not share the folder of the first process."""
            return mark_of(partial) != mark and bool(begin())

        first = ranks.from_first(begin)
        holds = ranks.in_all(
            lambda: ranks.is_first or (ranks.is_first_on_host and begin_beside(first))
        )
        continued = any(partial.glob(f"state-*/{MANIFEST}"))
        try:
            with _full_output_told(partial):
                yield partial
        except UserError as error:
            # What an earlier run has done is not this one's to throw away.
            if holds and not continued and not isinstance(error, ResumableError):
                remove_folder(partial)
            raise
        if ranks.is_first:
            _replace_folder(partial / MODEL, out)
        ranks.all_gather(None)  # the result has its name when the others go on
        if holds:
            remove_folder(partial)


@contextlib.contextmanager
def _working_folder(out: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """`out` + `.partial`, locked for the duration of the block."""
    check_output(out)
    out = Path(os.path.realpath(out))  # `.` and `..` have no name to add to
    partial = _partial(out)
    for beside in (partial, _earlier(out)):
        if beside.is_dir() and any(beside.iterdir()) and not _is_ours(beside):
            raise UserError(
                f"The folder '{beside}' is needed while '{out}' is written, but exists and was not "
                "written by sp3llm: move it away, or choose another --out."
            )
    with (
        locked_folder(
            partial,
            unwritable=f"Cannot write to '{out.parent}'",
            taken=f"Another sp3llm run is writing '{out}'",
            say=say,
        ),
        _full_output_told(partial),
    ):
        yield partial


def _full_output_told(partial: Path) -> contextlib.AbstractContextManager[None]:
    return full_disk_told(
        f"Cannot write to '{partial}'",
        ", and give the same command again, or choose another --out.",
    )


def _replace_folder(partial: Path, out: Path) -> None:
    """Give `partial` the name `out`; an earlier result goes only when the new one stands."""
    out = Path(os.path.realpath(out))
    earlier = _earlier(out)
    if out.is_dir() and any(out.iterdir()):
        shutil.rmtree(earlier, ignore_errors=True)
        os.replace(out, earlier)
    os.replace(partial, out)
    if _is_ours(earlier):
        shutil.rmtree(earlier, ignore_errors=True)


def _partial(out: Path) -> Path:
    """Where a result waits until it is whole."""
    return out.with_name(f"{out.name}.partial")


def _earlier(out: Path) -> Path:
    """Where an earlier result waits while the new one takes its name."""
    return out.with_name(f"{out.name}.replaced")


# --------------------------------------------------------------------------- full disks


@contextlib.contextmanager
def full_disk_told(what: str, then: str, kinds: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn the error that a full disk raises into one sentence that says what to do.

    That is an OSError with such a number, or, in a block that only writes, any of `kinds`:
    libraries raise errors of their own without a number. A limit on the size of a file, as some
    file systems and `ulimit` have one, is told as such.

    Raises ResumableError: "`what` (why): free some disk space`then`".
    """
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        no_room = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not (no_room or isinstance(error, kinds)):
            raise
        why = getattr(error, "strerror", None) or reason(error)
        remedy = "free some disk space"
        if number == errno.EFBIG:
            remedy = "allow larger files (ulimit -f, the file system)"
        raise ResumableError(f"{what} ({why}): {remedy}{then}") from error


@contextlib.contextmanager
def unwritable_told(folder: Path) -> Iterator[None]:
    """Raise UserError in place of the OSError of a block that writes a few files into a folder."""
    try:
        yield
    except OSError as error:
        found = error.strerror or reason(error)
        if error.filename is not None:
            found = f"{Path(error.filename).name}: {found}"
        raise UserError(
            f"Cannot write to '{folder}' ({found}): make it writable, or copy it to where it is."
        ) from error


# --------------------------------------------------------------------------- before any work


def check_not_input(out: Path, folder: Path, what: str) -> None:
    """Raise UserError if writing `out` would replace `folder`, which is `what` says it is."""
    target, source = Path(os.path.realpath(out)), Path(os.path.realpath(folder))
    if target in (source, *source.parents):
        raise UserError(
            f"Expected another folder for --out than that of {what} or one around it, found "
            f"'{out}', which would be replaced: choose another."
        )


def check_output(out: Path) -> None:
    """Raise UserError if `out` exists and is neither empty nor an earlier result of sp3llm, or no
    folder can have its name.
    """
    _check_name(out)
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


def _check_name(out: Path) -> None:
    """Raise UserError for a name that the folder, or one of those beside it, cannot have."""
    real = Path(os.path.realpath(out))
    for path in (out, real, _partial(real), _earlier(real)):
        try:
            str(path).encode()  # safetensors takes no other paths
            path.stat()
        except (OSError, UnicodeEncodeError) as error:
            number = getattr(error, "errno", None)
            if number in (errno.ENAMETOOLONG, errno.ELOOP) or number is None:
                raise UserError(
                    f"Expected a name that a folder can have for --out, found {str(out)!r} "
                    f"({getattr(error, 'strerror', None) or reason(error)}): choose another."
                ) from error


def _is_ours(folder: Path) -> bool:
    """Whether sp3llm wrote the folder, or began to."""
    return (folder / RECORD).is_file() or (folder / LOCK).is_file()


def held_by_run(out: Path) -> int:
    """Bytes that a run of the same `--out` has on the disk already."""
    partial = _partial(Path(os.path.realpath(out)))
    return sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())


def check_disk(out: Path, weight_bytes: int) -> None:
    """Raise UserError if the disk of `out` has no room for so many bytes, of the weights and of
    what a run keeps until it is done.
    """
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
