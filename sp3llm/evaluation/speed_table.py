"""The table of `sp3llm bench`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sp3llm.evaluation.speed_figures import Cell, SpeedUp, Spread
from sp3llm.evaluation.tables import markdown_page, terminal_table

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = ("shape", "", "dense", "small", "ratio", "promised", "realised")
_LEFT = {1}


def rows(record: Mapping[str, Any], cells: Sequence[Cell], spreads: bool = True) -> list[list[str]]:
    """The rows of the table as text, in `_COLUMNS`.

    Without `spreads` the speeds and times of each model stand without theirs, for which a terminal
    has no room.
    """
    weights = record["weights"]
    on_disk = [weights[name]["disk_bytes"] for name in ("dense", "small")]
    lines = [_sizes_row("weights", on_disk)]
    for cell in cells:
        lines += _cell_rows(cell, spreads)
    return lines


def _cell_rows(cell: Cell, spreads: bool) -> list[list[str]]:
    """What was measured at one batch size and prompt length."""
    models = (cell.dense, cell.small)
    prefill = [one.prefill_tokens_per_second for one in models]
    decode = [one.decode_tokens_per_second for one in models]
    first = [one.first_token_seconds for one in models]
    peaks = [one.peak_memory_bytes for one in models]
    milliseconds = [_spread(spread.times(1000), 1, spreads) for spread in first]
    first_ratio = f"{first[1].median / first[0].median:.3f}"
    shape = f"{cell.batch_size} x {cell.prompt_length}"
    lines = [
        [shape, "prefill, tok/s", *_speed_row(prefill, cell.prefill, spreads)],
        ["", "decode, tok/s", *_speed_row(decode, cell.decode, spreads)],
        ["", "first token, ms", *milliseconds, first_ratio, "", ""],
    ]
    return lines if None in peaks else [*lines, _sizes_row("peak memory", peaks)]


def _speed_row(speeds: Sequence[Spread], speed_up: SpeedUp, spreads: bool) -> list[str]:
    return [
        *(_spread(speed, 0, spreads) for speed in speeds),
        _spread(speed_up.measured, 3),
        "" if speed_up.promised is None else f"{speed_up.promised:.3f}",
        "" if speed_up.realised is None else f"{speed_up.realised:.2f}",
    ]


def _sizes_row(what: str, sizes: Sequence[int]) -> list[str]:
    from sp3llm.reporting.formatting import human_bytes

    return ["", what, *map(human_bytes, sizes), f"{sizes[1] / sizes[0]:.3f}", "", ""]


def _spread(spread: Spread, digits: int, shown: bool = True) -> str:
    """The median and, if `shown`, half of the interquartile range."""
    if not shown:
        return f"{spread.median:.{digits}f}"
    half = (spread.high - spread.low) / 2
    return f"{spread.median:.{digits}f} ±{half:.{digits}f}"


def _legend(record: Mapping[str, Any]) -> str:
    settings, machine = record["settings"], record["machine"]
    how = [
        f"{settings['new_tokens']} new tokens",
        record["dtype"],
        f"{record['attention']} attention",
        *(["compiled"] if settings["compile"] else []),
        machine.get("device_name", machine["device"]),
        f"{machine['threads']} threads",
    ]
    return (
        "Shapes are batch x prompt tokens, weights as on disk. Medians of "
        f"{settings['repeats']} measurements in turns ± half of their interquartile range; "
        f"{', '.join(how)}. Ratios of speeds, times and sizes are small over dense. Promised are "
        "the ratio of FLOPs for prefill and of bytes read for decoding; realised is the measured "
        "ratio over it."
    )


def table(record: Mapping[str, Any], cells: Sequence[Cell]) -> "Table":
    """The table for the terminal."""
    shown = terminal_table(
        f"{record['model']} against {record['against']}",
        _legend(record),
        _COLUMNS,
        rows(record, cells, spreads=False),
        _LEFT,
    )
    shown.padding = (0, 0, 0, 1)  # else so many columns do not fit into a terminal
    for column in shown.columns:
        column.no_wrap = True
    return shown


def markdown(record: Mapping[str, Any], cells: Sequence[Cell]) -> str:
    """The table as a page of its own."""
    title = f"Speed of {record['model']} against {record['against']}"
    return markdown_page(
        title, record, _COLUMNS, rows(record, cells), _LEFT, notes=[_legend(record)]
    )
