"""Progress of long work: bars on a terminal, lines in a log file."""

import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Item = TypeVar("Item")

# A log is looked at every now and then: between lines of one stage.
_SECONDS_BETWEEN_LINES = 15.0


def tracked(
    progress: Progress | None, description: str, items: Iterable[Item], start: int, count: int
) -> Iterator[Item]:
    """The items, number `start` to `count`, with a bar where there is one to show."""
    bar = None if progress is None else progress.add_task(description, total=count, completed=start)
    for item in items:
        yield item
        if bar is not None:
            progress.advance(bar)


class _ProgressLines(Progress):
    """The same where nobody looks: a line when a stage begins, when it ends, and now and then."""

    def __init__(self, console: Console) -> None:
        super().__init__(console=console, disable=True)  # no bars; tasks are kept all the same
        self._begun: dict[TaskID, tuple[float, float]] = {}
        """By task: when it began, and how far it was then."""
        self._told: dict[TaskID, float] = {}

    def add_task(self, description: str, **options: Any) -> TaskID:
        """Begin a stage, with a line."""
        task_id = super().add_task(description, **options)
        done = float(options.get("completed") or 0)
        self._begun[task_id] = (time.monotonic(), done)
        self._tell(task_id, "begins" if done == 0 else "goes on")
        return task_id

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Go on, with a line where it is time for one."""
        super().advance(task_id, advance)
        self._tell_at_times(task_id)

    def update(self, task_id: TaskID, **options: Any) -> None:
        """Set how far a stage is, with a line where it is time for one."""
        super().update(task_id, **options)
        self._tell_at_times(task_id)

    def stop(self) -> None:
        """Nothing: no bars were begun. Releases of rich before 14.3 print an empty line here."""

    def _tell_at_times(self, task_id: TaskID) -> None:
        task, now = self._tasks[task_id], time.monotonic()
        is_done = task.total is not None and task.completed >= task.total
        if not is_done and now - self._told[task_id] < _SECONDS_BETWEEN_LINES:
            return
        began, first = self._begun[task_id]
        spent, done = now - began, task.completed - first
        if is_done:
            self._tell(task_id, f"done in {human_time(spent)}")
            return
        if task.total is None:
            self._tell(task_id, f"{task.completed:g} so far, {human_time(spent)}")
            return
        words = f"{task.completed:g} of {task.total:g}"
        if done > 0:
            left = spent / done * (task.total - task.completed)
            words += f", {human_time(spent)}, about {human_time(left)} left"
        self._tell(task_id, words)

    def _tell(self, task_id: TaskID, words: str) -> None:
        self._told[task_id] = time.monotonic()
        line = f"{self._tasks[task_id].description}: {words}"
        print_line(self.console, line)


def print_line(console: Console, line: str) -> None:
    """Print it in one piece: what breaks it is the terminal, so that a command can be copied."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def progress_bars(console: Console) -> Progress:
    """Progress with the time left: bars on a terminal; elsewhere, in a file or a batch job's log, a
    line a stage and one every so often.
    """
    if not console.is_terminal:
        return _ProgressLines(console)
    return Progress(
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def human_time(seconds: float) -> str:
    """`42 s`, `3 min 5 s`, `2 h 10 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"
