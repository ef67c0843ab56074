"""Tasks of labelled text: GLUE's and SQuAD's by name, and people's own files.

A task is data: where its rows are, which of their columns are read, what is predicted, and by which
figures that is judged.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sp3llm.errors import UserError

CLASSES, VALUE, SPAN = "classes", "value", "span"
"""What is predicted of a row: a class, a number, or where in a text its answer stands."""
_PREDICTED = {CLASSES: "classes", VALUE: "values", SPAN: "answers in a text"}
# Tokens a row at most where nothing else is said: sentences, and SQuAD's contexts.
_USUAL_LENGTH = {SPAN: 384}
_SENTENCES = 128

# Of files that are read by `datasets`: what it calls the format, and how it is told.
FORMATS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    ".jsonl": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),  # "NA" and "null" are words too
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".parquet": ("parquet", {}),
}


@dataclass(frozen=True)
class Task:
    """Labelled text, and what is asked about it."""

    name: str
    """What tables call it."""
    columns: tuple[str, ...]
    """Of the text, or of both texts of a pair; of spans those of the question and its context."""
    label: str
    """The column of what is predicted: a class, a value, or answers as SQuAD has them."""
    kind: str | None
    """`CLASSES`, `VALUE` or `SPAN`; None: what the model predicts decides."""
    metrics: tuple[str, ...]
    """Names of the figures that judge it; none: those usual for what the model predicts."""
    label_names: tuple[str, ...] = ()
    """By number what the classes are called; none: unknown."""
    dataset: str | None = None
    """Of a hub data set: `owner/name`; None: files."""
    config: str | None = None
    """That data set's configuration."""
    training: str | Path = "train"
    """The split, or the file, that is calibrated on and learned from."""
    evaluations: Mapping[str, str | Path] | None = None
    """The splits or files that are reported on, by what is added to the task's name; None: there
    are none, and a part of the training rows, told by their content, serves."""
    words: str = ""
    """What the user called it, where that is not its name."""

    @property
    def sources(self) -> tuple[str, ...]:
        """As a record names them."""
        return (self.words or self.name,)

    @property
    def files(self) -> dict[str, Path]:
        """Those that rows are read from, by what they are called."""
        places = (self.training, *(self.evaluations or {}).values())
        return {str(place): place for place in places if isinstance(place, Path)}


def _glue(
    config: str,
    columns: str,
    label_names: str = "",
    metrics: str = "accuracy",
    evaluations: tuple[str, ...] = ("validation",),
) -> Task:
    """A task of GLUE; words are separated by spaces."""
    return Task(
        name=config,
        columns=tuple(columns.split()),
        label="label",
        kind=CLASSES if label_names else VALUE,
        metrics=tuple(metrics.split()),
        label_names=tuple(label_names.split()),
        dataset="nyu-mll/glue",
        config=config,
        evaluations={name.removeprefix("validation").strip("_"): name for name in evaluations},
    )


def _squad(name: str) -> Task:
    return Task(
        name=name,
        columns=("question", "context"),
        label="answers",
        kind=SPAN,
        metrics=("exact match", "F1"),
        dataset=f"rajpurkar/{name}",
        evaluations={"": "validation"},
    )


_PAIR = "sentence1 sentence2"
_MATCHED = ("validation_matched", "validation_mismatched")
# Columns, classes in the order of their numbers, and figures as the data sets and GLUE's own
# scripts have them.
TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        _glue("cola", "sentence", "unacceptable acceptable", "Matthews"),
        _glue("sst2", "sentence", "negative positive"),
        _glue("mrpc", _PAIR, "not_equivalent equivalent", "accuracy F1"),
        _glue("qqp", "question1 question2", "not_duplicate duplicate", "accuracy F1"),
        _glue("stsb", _PAIR, metrics="Pearson Spearman"),
        _glue(
            "mnli",
            "premise hypothesis",
            "entailment neutral contradiction",
            evaluations=_MATCHED,
        ),
        _glue("qnli", "question sentence", "entailment not_entailment"),
        _glue("rte", _PAIR, "entailment not_entailment"),
        _glue("wnli", _PAIR, "not_entailment entailment"),
        _squad("squad"),
    )
}


def usual_length(kind: str) -> int:
    """Tokens a row at most, where nothing else is said."""
    return _USUAL_LENGTH.get(kind, _SENTENCES)


def resolve_task(words: str) -> Task:
    """The task that `--task` names.

    That is a name of `TASKS`, whose rows come from the hub; files of one's own,
    `reviews.csv:text,label` or `pairs.jsonl:a,b,label`, the label last; or files laid out as a
    named task has them, `sst2=FOLDER`. A folder holds `train` and `validation` files of one format,
    and so does that of a file called `train`; of another file the part that its rows' content
    chooses is reported on.

    Raises UserError if it is none of them.
    """
    if words in TASKS:
        return TASKS[words]
    name, is_copy, place = words.partition("=")
    if is_copy:
        if name not in TASKS:
            raise _unknown(words)
        known = TASKS[name]
        found = _files(words, Path(place))
        return replace(known, words=words, dataset=None, config=None, **found)
    place, colon, columns = words.rpartition(":")
    place = place if colon else words
    if not colon and not Path(place).exists():
        raise _unknown(words)
    found = _files(words, Path(place))
    named = tuple(column.strip() for column in columns.split(",")) if colon else ()
    if len(named) not in (2, 3) or not all(named) or len(set(named)) < len(named):
        raise UserError(
            "Expected two or three columns with the file of a task, the label last, as "
            f"{place}:sentence,label or {place}:first,second,label, found '{words}': name them."
        )
    *texts, label = named
    return Task(
        name=Path(place).name,
        columns=tuple(texts),
        label=label,
        kind=None,
        metrics=(),
        words=words,
        **found,
    )


def task_for(words: str, kind: str) -> Task:
    """`resolve_task`, for a model that predicts what is of that kind.

    Raises UserError, too, if the task asks for something else.
    """
    task = resolve_task(words)
    if task.kind is None and kind == SPAN and len(task.columns) != 2:
        raise UserError(
            "Expected three columns with the file of a task of answers in a text, which the model "
            f"predicts, as {task.name}:question,context,answers, found '{words}': name them."
        )
    if task.kind is None:
        return replace(task, kind=kind)
    if task.kind != kind:
        fitting = ", ".join(name for name, known in TASKS.items() if known.kind == kind)
        raise UserError(
            f"Expected a task of {_PREDICTED[kind]}, which the model predicts ({fitting}, or a "
            f"file), found '{words}' of {_PREDICTED[task.kind]}: choose another task or model."
        )
    return task


def _unknown(words: str) -> UserError:
    return UserError(
        f"Unknown task '{words}': expected one of {', '.join(TASKS)}, a file with its columns as "
        "train.jsonl:sentence,label, or NAME=FOLDER for a copy of a named task."
    )


def _files(words: str, place: Path) -> dict[str, object]:
    """The fields `training` and `evaluations` of a task whose rows are in files."""
    if not place.exists():
        raise UserError(
            f"The file '{place}' of the task '{words}' does not exist: name one that does."
        )
    if place.is_dir():
        training = _split_file(place, "train")
        if training is None:
            raise UserError(
                f"Expected train and validation files ({', '.join(FORMATS)}) in '{place}', found "
                "no train file: put one there, or name a file."
            )
        evaluation = _split_file(place, "validation")
        if evaluation is None:
            raise UserError(
                f"Expected a validation file ({', '.join(FORMATS)}) beside '{training}', found "
                "none: put one there, or name the file alone, a part of which is then kept apart."
            )
        return {"training": training, "evaluations": {"": evaluation}}
    if place.suffix.lower() not in FORMATS:
        raise UserError(
            f"Expected the file of a task to be one of {', '.join(FORMATS)}, found '{place}': "
            "convert it to one of them."
        )
    beside = _split_file(place.parent, "validation") if place.stem == "train" else None
    return {"training": place, "evaluations": {"": beside} if beside else None}


def _split_file(folder: Path, split: str) -> Path | None:
    files = (folder / f"{split}{suffix}" for suffix in FORMATS)
    return next((file for file in files if file.is_file()), None)
