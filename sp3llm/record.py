"""The record of a run, `sp3llm.json` in the folder of a compressed model.

`sp3llm compress` writes what it did and measured (`compress._record`). Later commands add entries
of their own, and reports and model cards show whatever there is:

`scores`, by `sp3llm score`
    `{task: {metric: {"dense": float, "small": float, "difference": float,
    "standard_error": float | None}}}`. `difference` is small minus dense, `standard_error` that of
    the difference, paired over the task's samples (None where it is not known), metrics by
    lm-eval's names (`acc`, `acc_norm`, `token_perplexity`, ...), everything in the metric's unit.

`speed`, by `sp3llm bench`
    A list of rows, each `{column: text or number}`, shown as the table that they make.

`samples`, by `sp3llm report`
    `{"new_tokens": int, "texts": [{"prompt": str, "text": str, "dense": str, "small": str}]}`:
    held-out text, how it goes on, and how the two models continue it, greedily.
"""

import json
import os
from pathlib import Path
from typing import Any

from sp3llm.errors import UserError, reason

RECORD = "sp3llm.json"

_NEEDED = ("model", "base_model", "plan", "settings", "parameters", "dense_weight_bytes")


def read_record(folder: Path) -> dict[str, Any]:
    """The record in a folder that `sp3llm compress` wrote.

    Raises UserError if there is none, or it is damaged or of an earlier version of sp3llm.
    """
    path = folder / RECORD
    if not path.is_file():
        raise UserError(
            f"Expected a folder that sp3llm wrote, found no {RECORD} in '{folder}': name the "
            "output folder of sp3llm compress."
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"'{path}' is not JSON ({reason(error)}): get an undamaged copy of it."
        ) from error
    missing = [key for key in _NEEDED if not isinstance(record, dict) or key not in record]
    if missing:
        raise UserError(
            f"Expected '{missing[0]}' in '{path}', found none: it was written by an earlier "
            "version of sp3llm, so compress the model again."
        )
    return record


def add_to_record(folder: Path, **entries: Any) -> dict[str, Any]:
    """Set entries of a record, in one step; returns all of it.

    Raises UserError as `read_record` does, or if the folder cannot be written.
    """
    record = {**read_record(folder), **entries}
    aside = folder / f"{RECORD}.partial"
    try:
        aside.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(aside, folder / RECORD)
    except OSError as error:
        raise UserError(
            f"Cannot write to '{folder}' ({error.strerror}): make it writable, or copy it to where "
            "it is."
        ) from error
    return record
