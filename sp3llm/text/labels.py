"""What a model calls its classes, and the numbers of a task's labels among them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sp3llm.errors import UserError
from sp3llm.text.task_rows import Row
from sp3llm.text.tasks import CLASSES, VALUE, Task

# What the stock config class calls classes that nobody named.
_UNNAMED = "label_"


@dataclass(frozen=True)
class Labels:
    """What a model predicts of a text."""

    kind: str
    """`CLASSES` or `VALUE`."""
    names: tuple[str, ...]
    """By number what it calls its classes; of a value one."""

    @property
    def are_named(self) -> bool:
        """Whether the names say more than the numbers."""
        return not all(name.lower().startswith(_UNNAMED) for name in self.names)


def model_labels(config: Mapping[str, Any]) -> Labels:
    """What a sequence classifier predicts, by its `config.json`.

    Raises UserError if it gives a text several classes at once, or its names are no list of them.
    """
    problem = config.get("problem_type")
    if problem == "multi_label_classification":
        raise UserError(
            "Expected a model that gives a text one class or one value, found problem_type "
            f"'{problem}' in config.json: models of several classes at once are not supported."
        )
    named = config.get("id2label")
    if named is not None:
        count = len(named) if isinstance(named, Mapping) else 0
        by_number = {str(k): str(v) for k, v in named.items()} if count else {}
        names = tuple(by_number.get(str(number), "") for number in range(count))
        if not names or not all(names):
            raise UserError(
                "Expected id2label in config.json to name the classes 0, 1, ..., found "
                f"{named!r}: mend it."
            )
    else:
        count = config.get("num_labels", 2)
        names = tuple(f"LABEL_{number}" for number in range(count))
    is_value = problem == "regression" or (problem is None and len(names) == 1)
    if is_value and len(names) != 1:
        raise UserError(
            f"Expected one value of a model with problem_type 'regression', found {len(names)} "
            "labels in config.json: models of several values are not supported."
        )
    return Labels(VALUE if is_value else CLASSES, names)


def label_numbers(rows: Sequence[Row], task: Task, labels: Labels) -> list[int] | list[float]:
    """By row the number of its class as the model counts them, or its value.

    Names of the task's, or in its rows, are looked up among the model's where it has them; numbers
    are taken as they are.

    Raises UserError if the task has another number of classes, or a row a label that is none.
    """
    if labels.kind == VALUE:
        return [_value(row) for row in rows]
    if task.label_names and len(task.label_names) != len(labels.names):
        raise UserError(
            f"Expected a model of {len(task.label_names)} classes for '{task.name}' "
            f"({', '.join(task.label_names)}), found {len(labels.names)} in its config.json "
            f"({', '.join(labels.names)}): fine-tune it on this task first, or choose another task."
        )
    if not task.label_names:
        known = _by_name(labels.names) if labels.are_named else {}
        return [_number(row, known, labels) for row in rows]
    known, of_model = _by_name(task.label_names), class_numbers(task, labels)
    return [of_model[_number(row, known, labels)] for row in rows]


def _by_name(names: Sequence[str]) -> dict[str, int]:
    return {name.casefold(): number for number, name in enumerate(names)}


def class_numbers(task: Task, labels: Labels) -> tuple[int, ...]:
    """By the task's number of a class the model's: where both have the same names that of the name,
    else the same number.
    """
    known = _by_name(labels.names)
    named = [name.casefold() for name in task.label_names]
    if set(named) == set(known):
        return tuple(known[name] for name in named)
    return tuple(range(len(labels.names)))


def _number(row: Row, known: Mapping[str, int], labels: Labels) -> int:
    label = row.label
    if isinstance(label, str) and label.strip().casefold() in known:
        return known[label.strip().casefold()]
    try:
        number = int(label)
        if number == float(label) and 0 <= number < len(labels.names):
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise UserError(
        f"Expected a label that the model knows ({', '.join(labels.names)}, or their numbers from "
        f"0) in {row.origin}, found {label!r}: mend the row, or name the classes in config.json."
    )


def _value(row: Row) -> float:
    try:
        value = float(row.label)
        if abs(value) < float("inf"):  # NaN is not either
            return value
    except (TypeError, ValueError):
        pass
    raise UserError(
        f"Expected a number as the label in {row.origin}, found {row.label!r}: mend the row, or "
        "leave it out."
    )
