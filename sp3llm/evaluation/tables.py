"""A table of figures, in the terminal and as a page: for `sp3llm score` and `sp3llm bench`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def terminal_table(
    title: str, legend: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: set[int]
) -> "Table":
    """A table for the terminal, the legend below it; the columns numbered in `left` begin at the
    left, the others end at the right.
    """
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=Text(title), caption=Text(legend), box=SIMPLE)
    for at, column in enumerate(columns):
        shown.add_column(column, justify="left" if at in left else "right")
    for row in rows:
        shown.add_row(*map(Text, row))
    return shown


def markdown_page(
    title: str,
    record: Mapping[str, Any],
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: set[int],
    notes: Sequence[str],
) -> str:
    """The table as a page in Markdown: the command of the record above it, notes below it, and the
    machine and the versions of the record in the end.
    """
    from sp3llm.reporting.formatting import provenance

    rule = "".join("|---" if at in left else "|---:" for at in range(len(columns))) + "|"
    lines = [f"# {title}", "", f"    {record['command']}", ""]
    lines += [_line(columns), rule, *map(_line, rows), ""]
    return "\n".join([*lines, *notes, provenance(record), ""])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
