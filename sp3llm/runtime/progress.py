"""Progress of long work."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Item = TypeVar("Item")


def tracked(
    progress: Progress | None, description: str, items: Iterable[Item], start: int, count: int
) -> Iterator[Item]:
    """The items, number `start` to `count`, with a bar where there is one to show."""
    bar = None if progress is None else progress.add_task(description, total=count, completed=start)
    for item in items:
        yield item
        if bar is not None:
            progress.advance(bar)


def progress_bars(console: Console) -> Progress:
    """Progress bars with the time left."""
    return Progress(
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
