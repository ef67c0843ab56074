"""The table of `sp3llm bench`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sp3llm.evaluation.speed_figures import Cell, Spread

if TYPE_CHECKING:
    from rich.table import Table


# --------------------------------------------------------------------------- the table


_COLUMNS = ("shape", "", "dense", "small", "ratio", "promised", "realised")


def lines(
    record: Mapping[str, Any], cells: Sequence[Cell], spreads: bool = True
) -> list[list[str]]:
    """The table as text, in `_COLUMNS`; a terminal has no room for the spread of every figure."""
    weights = record["weights"]
    on_disk = [weights[name]["disk_bytes"] for name in ("dense", "small")]
    found = [_sizes_line("", "weights", on_disk)]
    for cell in cells:
        where = f"{cell.batch_size} x {cell.prompt_length}"
        for name, speed_up in (("prefill", cell.prefill), ("decode", cell.decode)):
            figures = [
                getattr(measured, f"{name}_tokens_per_second")
                for measured in (cell.dense, cell.small)
            ]
            found.append(
                [
                    where,
                    f"{name}, tok/s",
                    *(_spread(figure, 0, spreads) for figure in figures),
                    _spread(speed_up.measured, 3),
                    "" if speed_up.promised is None else f"{speed_up.promised:.3f}",
                    "" if speed_up.realised is None else f"{speed_up.realised:.2f}",
                ]
            )
            where = ""
        first = [measured.first_token_seconds for measured in (cell.dense, cell.small)]
        ratio = first[1].median / first[0].median
        milliseconds = [_spread(spread.times(1000), 1, spreads) for spread in first]
        found.append(["", "first token, ms", *milliseconds, f"{ratio:.3f}", "", ""])
        peaks = [measured.peak_memory_bytes for measured in (cell.dense, cell.small)]
        if None not in peaks:
            found.append(_sizes_line("", "peak memory", peaks))
    return found


def _sizes_line(where: str, what: str, sizes: Sequence[int]) -> list[str]:
    from sp3llm.reporting.formatting import human_bytes

    return [where, what, *map(human_bytes, sizes), f"{sizes[1] / sizes[0]:.3f}", "", ""]


def _spread(spread: Spread, digits: int, shown: bool = True) -> str:
    """The median, and half of what lies between the quartiles."""
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
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    title = Text(f"{record['model']} against {record['against']}")
    found = Table(title=title, caption=Text(_legend(record)), box=SIMPLE, padding=(0, 0, 0, 1))
    for at, column in enumerate(_COLUMNS):
        found.add_column(column, justify="left" if at == 1 else "right", no_wrap=True)
    for line in lines(record, cells, spreads=False):
        found.add_row(*map(Text, line))
    return found


def markdown(record: Mapping[str, Any], cells: Sequence[Cell]) -> str:
    """The table as a page of its own."""
    from sp3llm.reporting.formatting import provenance

    head = [
        f"# Speed of {record['model']} against {record['against']}",
        "",
        f"    {record['command']}",
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "|---:|---" + "|---:" * (len(_COLUMNS) - 2) + "|",
    ]
    rows = ["| " + " | ".join(line) + " |" for line in lines(record, cells)]
    return "\n".join([*head, *rows, "", _legend(record), provenance(record), ""])
