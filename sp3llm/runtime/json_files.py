"""Objects in files of JSON. Imports no torch."""

import json
from pathlib import Path
from typing import Any

from sp3llm.errors import UserError, reason
from sp3llm.runtime.git_lfs import is_pointer, pointer_found


def read_object(path: Path, copy_of: str) -> dict[str, Any]:
    """The object in a file; `copy_of` says what to get an undamaged copy of where there is none.

    Raises UserError if the file is not JSON, or holds something else than an object.
    """
    remedy = f"get an undamaged copy of {copy_of}."
    if is_pointer(path):
        raise pointer_found(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # the latter of lists thousands deep
        raise UserError(f"'{path}' is not JSON ({reason(error)}): {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"Expected an object in '{path}', found {type(content).__name__}: {remedy}")
    return content
