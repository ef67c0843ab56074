"""The rows of a task's splits, read by `datasets`, and which of them are for what."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sp3llm.errors import UserError, reason
from sp3llm.text.split import content_hash, is_for_stopping, part_of
from sp3llm.text.tasks import FORMATS, SPAN, Task

# Between both texts of a row where its content is told.
_JOINT = "\n\n"


@dataclass(frozen=True)
class Row:
    """One row of a task."""

    texts: tuple[str, ...]
    """A text or a pair, in the order of the task's columns."""
    label: Any
    """As the data set has it."""
    origin: str
    """Where it stands, for refusals."""

    @property
    def content(self) -> str:
        """Its text, by which it is told from others."""
        return _JOINT.join(self.texts)

    @property
    def digest(self) -> str:
        """The hash of its text (`text.split.content_hash`)."""
        return content_hash(self.content)


def training_rows(task: Task, stopping: bool = False) -> list[Row]:
    """What is calibrated on and learned from; with `stopping` the sixteenth of it that is kept
    apart to decide when to stop. Each text once, in the data set's order.

    Raises UserError as `_read` does.
    """
    rows = _read(task, task.training)
    if task.evaluations is None:
        rows = [row for row in rows if part_of(row.content) != "evaluation"]
    kept: dict[str, Row] = {}
    for row in rows:
        if is_for_stopping(row.content) == stopping:
            kept.setdefault(row.digest, row)
    return list(kept.values())


def evaluation_rows(task: Task) -> dict[str, list[Row]]:
    """What is reported on, all of it: by the name of the task with what its split adds.

    Raises UserError as `_read` does, or if there are none.
    """
    if task.evaluations is None:
        rows = [row for row in _read(task, task.training) if part_of(row.content) == "evaluation"]
        found = {task.name: rows}
    else:
        found = {
            f"{task.name} {added}".strip(): _read(task, place)
            for added, place in task.evaluations.items()
        }
    for name, rows in found.items():
        if not rows:
            raise UserError(
                f"Expected rows to report on in the task '{name}', found none: give it more rows, "
                "or a validation file beside the one called train."
            )
    return found


def _read(task: Task, place: str | Path) -> list[Row]:
    """The rows of a split or file.

    Raises UserError if it cannot be read, lacks a column, or has a row without text or label.
    """
    table = _table(task, place)
    missing = [name for name in (*task.columns, task.label) if name not in table.column_names]
    if missing:
        raise UserError(
            f"Expected a column '{missing[0]}' in {_shown(task, place)}, found columns "
            f"{', '.join(table.column_names)}: name those that are meant, as "
            "train.jsonl:sentence,label."
        )
    columns = [table[name] for name in (*task.columns, task.label)]
    rows = []
    for number, (*texts, label) in enumerate(zip(*columns, strict=True), 1):
        origin = f"row {number} of {_shown(task, place)}"
        for name, text in zip(task.columns, texts, strict=True):
            if not isinstance(text, str) or not text.strip():
                raise UserError(
                    f"Expected a text as '{name}' in {origin}, found {_found(text)}: mend the "
                    "row, or leave it out."
                )
        if label is None:
            raise UserError(
                f"Expected a label as '{task.label}' in {origin}, found none: mend the row, or "
                "leave it out."
            )
        if task.kind == SPAN:
            _check_answers(label, texts[1], origin, task.label)
        rows.append(Row(tuple(texts), label, origin))
    return rows


def _check_answers(answers: Any, context: str, origin: str, name: str) -> None:
    """Raise UserError where answers are not as SQuAD has them."""
    known = answers if isinstance(answers, dict) else {}
    texts, starts = known.get("text"), known.get("answer_start")
    is_known = _holds(texts, str) and _holds(starts, int)
    if not is_known or len(texts) != len(starts):
        raise UserError(
            f"Expected answers as '{name}' in {origin}, lists 'text' and 'answer_start' of one "
            f"entry at least, found {_found(answers)}: write them as SQuAD does, or leave the row "
            "out."
        )
    for text, start in zip(texts, starts, strict=True):
        if context[start : start + len(text)] != text:
            raise UserError(
                f"Expected the answer {_found(text)} at character {start} of the context in "
                f"{origin}, found {_found(context[start : start + len(text)])}: mend the row, or "
                "leave it out."
            )


def _holds(values: Any, kind: type) -> bool:
    """Whether values are a list of one entry at least, each of a kind."""
    return isinstance(values, list) and bool(values) and all(isinstance(v, kind) for v in values)


def _table(task: Task, place: str | Path) -> Any:
    """A split as `datasets` has it."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"The task '{task.name}' needs the package datasets, which is not installed: "
            "pip install datasets."
        ) from error
    if task.dataset is not None:
        return _loaded(
            f"Cannot load the hub data set '{task.dataset}' for the task '{task.name}'",
            f"check the network, or name a copy of it as {task.name}=FOLDER.",
            lambda: datasets.load_dataset(task.dataset, task.config, split=str(place)),
        )
    kind, options = FORMATS[Path(place).suffix.lower()]
    if not Path(place).stat().st_size:
        raise UserError(f"Expected rows in '{place}', found an empty file: name another.")
    return _loaded(
        f"Cannot read '{place}' as {Path(place).suffix} rows",
        "mend the file, or convert it.",
        lambda: datasets.load_dataset(kind, data_files=str(place), split="train", **options),
    )


def _loaded(what: str, advice: str, load: Callable[[], Any]) -> Any:
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bar()
    try:
        return load()
    except Exception as error:  # datasets raises many kinds, about files and networks
        cause = error.__cause__ or error
        raise UserError(f"{what} ({type(cause).__name__}: {reason(cause)}): {advice}") from error
    finally:
        if shown:
            datasets.enable_progress_bar()


def _shown(task: Task, place: str | Path) -> str:
    return f"'{place}'" if task.dataset is None else f"the split '{place}' of '{task.name}'"


def _found(value: Any) -> str:
    if value is None:
        return "none"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def digests(rows: Sequence[Row]) -> frozenset[str]:
    """Content hashes of rows."""
    return frozenset(row.digest for row in rows)
