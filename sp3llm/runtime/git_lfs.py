"""Pointers that git leaves in place of large files where git-lfs did not fetch them. Imports no
torch.
"""

from pathlib import Path

from sp3llm.errors import UserError

_BEGINS = b"version https://git-lfs.github.com/spec/"


def is_pointer(path: Path) -> bool:
    """Whether a file is a pointer, a few lines of text, in place of what it is named for."""
    try:
        with path.open("rb") as file:
            return file.read(len(_BEGINS)) == _BEGINS
    except OSError:
        return False


def pointer_found(path: Path) -> UserError:
    """The error that says what a pointer is, and how to get the file."""
    return UserError(
        f"Expected the file itself in '{path}', found a pointer of git-lfs to it: run `git lfs "
        "pull` in that folder, or download the model with `hf download`."
    )
