"""What `sp3llm score` and `sp3llm bench` measured, as entries of a record (`report --add`)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sp3llm.errors import UserError, reason
from sp3llm.reporting.record import Scores
from sp3llm.reporting.typed_json import from_json


def measured(path: Path, folder: Path) -> dict[str, Any]:
    """The entry that a file of `sp3llm score` or `sp3llm bench` makes for the model in `folder`:
    `scores` or `speed`, as `Record` has them.

    Raises UserError if it is neither, or of another model.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
        model = str(content["model"])
        entry = (
            {
                "scores": from_json(
                    Scores, {"rows": content["rows"], "command": content.get("command")}
                )
            }
            if "rows" in content
            else {"speed": tuple(row for cell in content["cells"] for row in _speed_rows(cell))}
        )
    except OSError as error:
        raise UserError(f"Cannot read '{path}' ({error.strerror}): name a file that is.") from error
    except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
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


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no figure")


def _median(figure: Mapping[str, Any]) -> float:
    median = figure["median"]
    if isinstance(median, bool) or not isinstance(median, int | float):
        raise TypeError(f"a median is {median!r}")
    return median


def _speed_rows(cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of `speed` from a batch size and prompt length of `sp3llm bench`: medians, and the
    ratio beside the one that the shapes promise.
    """
    where = {"batch": cell["batch_size"], "prompt": cell["prompt_length"]}
    dense, small = cell["dense"], cell["small"]
    rows = []
    for name in ("prefill", "decode"):
        key = f"{name}_tokens_per_second"
        rows.append(
            {
                **where,
                "": f"{name}, tokens/s",
                "dense": _median(dense[key]),
                "compressed": _median(small[key]),
                "ratio": _median(cell[name]["measured"]),
                "promised": cell[name]["promised"],
                "realised": cell[name]["realised"],
            }
        )
    first = [_median(side["first_token_seconds"]) for side in (dense, small)]
    peaks = [side["peak_memory_bytes"] for side in (dense, small)]
    for what, scale, (before, after) in (
        ("first token, ms", 1e3, first),
        ("peak memory, MB", 1e-6, peaks),
    ):
        if before is not None and after is not None:
            rows.append(
                {
                    **where,
                    "": what,
                    "dense": before * scale,
                    "compressed": after * scale,
                    "ratio": after / before,
                }
            )
    return rows
