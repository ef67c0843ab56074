"""The record of a run, `sp3llm.json` in the folder of a compressed model.

`sp3llm compress` writes what it did and measured (`compress._record`). Later commands add entries
of their own, and reports and model cards show whatever there is:

`scores`, what `sp3llm score` found (`compress --score`, or `report --add` of its comparison)
    `{"rows": [{"task": str, "metric": str, "samples": int, "dense": float | None, "small": float,
    "difference": float | None, "paired_standard_error": float | None, ...}], ...}`. `difference`
    is small minus dense and `paired_standard_error` its standard error over the same samples,
    metrics are lm-eval's (`acc,none`, ...), everything in the metric's unit.

`speed`, what `sp3llm bench` found (`report --add` of its --output)
    A list of rows, each `{column: text or number}`, shown as the table that they make.

`recoveries`, by `sp3llm recover`
    What each run did and measured (`recover._entry`); the latest, the last, made the weights.

`quantization`, by `sp3llm quantize`, in the record beside the quantized weights
    `{"bits": "int8" | "nf4", "models": {NAME: {"perplexity": float, "excess_log_perplexity": {...},
    "weight_bytes": int, "linear_bytes": int, "window_losses": [float, ...]}}, "cost": {"dense":
    {...}, "small": {...}}, ...}`, NAME one of `dense`, `dense_quantized`, `small`,
    `small_quantized`. Excess is over `dense`, cost that of a quantized model over itself in full
    precision; each window's mean loss is there for paired comparisons with other runs
    (`quantize._entry`).

`samples`, by `sp3llm report`
    `{"new_tokens": int, "texts": [{"prompt": str, "text": str, "dense": str, "small": str}]}`:
    held-out text, how it goes on, and how the two models continue it, greedily.
"""

import json
import os
from pathlib import Path
from typing import Any

from sp3llm.errors import UserError, reason
from sp3llm.runtime.folders import RECORD

# Entries about the weights as they are, which no longer hold when those change.
MEASURED = ("scores", "speed", "samples")

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


def measured(path: Path, folder: Path) -> dict[str, Any]:
    """The entry that a file of `sp3llm score` or `sp3llm bench` makes for the model in `folder`.

    Raises UserError if it is neither, or of another model.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        model = str(found["model"])
        entry = (
            {"scores": {"rows": list(found["rows"])}}
            if "rows" in found
            else {"speed": [row for cell in found["cells"] for row in _speed_rows(cell)]}
        )
    except OSError as error:
        raise UserError(f"Cannot read '{path}' ({error.strerror}): name a file that is.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"Expected the JSON that sp3llm score or sp3llm bench writes in '{path}', found "
            f"something else ({type(error).__name__}: {reason(error)}): name one of their files."
        ) from error
    if Path(model).name != folder.resolve().name:
        raise UserError(
            f"Expected measurements of '{folder}' in '{path}', found those of '{model}': name a "
            "file about this model."
        )
    return entry


def _speed_rows(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of `speed` from a batch size and prompt length of `sp3llm bench`: medians, and the
    ratio beside the one that the shapes promise.
    """
    dense, small = cell["dense"], cell["small"]
    rows = []
    for name in ("prefill", "decode"):
        key = f"{name}_tokens_per_second"
        rows.append(
            {
                "batch": cell["batch_size"],
                "prompt": cell["prompt_length"],
                "": f"{name}, tokens/s",
                "dense": dense[key]["median"],
                "compressed": small[key]["median"],
                "ratio": cell[name]["measured"]["median"],
                "promised": cell[name]["promised"],
                "realised": cell[name]["realised"],
            }
        )
    for key, what, scale in (
        ("first_token_seconds", "first token, ms", 1e3),
        ("peak_memory_bytes", "peak memory, MB", 1e-6),
    ):
        pair = [
            side[key] if key.startswith("peak") else side[key]["median"] for side in (dense, small)
        ]
        if None not in pair:
            rows.append(
                {
                    "batch": cell["batch_size"],
                    "prompt": cell["prompt_length"],
                    "": what,
                    "dense": pair[0] * scale,
                    "compressed": pair[1] * scale,
                    "ratio": pair[1] / pair[0],
                }
            )
    return rows


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
