"""What the difference between two models' scores is worth: paired by question, with its error."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sp3llm.evaluation.selection import Mean, Selection, TokenPerplexity
from sp3llm.evaluation.tables import markdown_page, terminal_table
from sp3llm.reporting.formatting import figure

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from sp3llm.text.windows import Windows


# Resamples for the standard error of what is no mean.
_RESAMPLES = 1000
# As lm-eval has it: one resample of these takes seconds.
_FEW_RESAMPLES = {"bleu": 100, "chrf": 100, "ter": 100}

Items = dict[Hashable, Any]
"""By document: what a metric found there."""


@dataclass(frozen=True)
class Scored:
    """What one model scored."""

    values: dict[tuple[str, str], float]
    """By task or group, and by metric and filter, as in lm-eval's results."""
    errors: dict[tuple[str, str], float]
    """lm-eval's standard errors of them, where it has one."""
    counts: dict[str, int]
    """Questions of each task or group."""
    higher_is_better: dict[str, dict[str, bool | None]]
    """By task or group, and by metric."""
    items: dict[tuple[str, str], Items]
    """Each metric's finding on each document."""
    windows: "dict[TokenPerplexity, Windows]"
    """Text of the token perplexities."""
    losses: "dict[TokenPerplexity, Tensor]"
    """Token losses on it, `(windows, tokens - 1)`, float64, nats."""
    hashes: dict[str, str]
    """lm-eval's hash of each task's questions."""


@dataclass(frozen=True)
class Row:
    """One line of the comparison."""

    task: str
    metric: str
    """With its filter, as lm-eval has it: `acc,none`."""
    samples: int
    """Questions, or windows."""
    small: float
    standard_error: float | None
    """Of `small` by itself."""
    higher_is_better: bool | None = None
    dense: float | None = None
    paired_standard_error: float | None = None
    """Of `small - dense`, over the same questions."""

    @property
    def difference(self) -> float | None:
        """`small - dense`."""
        return None if self.dense is None else self.small - self.dense

    def describe(self) -> dict[str, Any]:
        """As plain values, for JSON, which knows no NaN."""
        values = {**asdict(self), "difference": self.difference}
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }


@dataclass(frozen=True)
class Comparison:
    """What `sp3llm score` found."""

    model: str
    against: str | None
    rows: list[Row]
    notes: list[str]
    """What was not measured, and why."""
    hashes: dict[str, str]
    """Of what the small model was asked: each task's questions, each text's token ids."""

    def describe(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "model": self.model,
            "against": self.against,
            "rows": [row.describe() for row in self.rows],
            "notes": self.notes,
            "sha256": self.hashes,
        }


def mean(values: Sequence[float]) -> float:
    """The plain mean."""
    return float(np.mean(np.asarray(values, dtype=np.float64)))


def paired_standard_error(
    small: Sequence[Any],
    dense: Sequence[Any] | None,
    aggregate: Callable[[Any], float] | None = None,
    resamples: int = _RESAMPLES,
) -> float | None:
    """Standard error of `aggregate(small) - aggregate(dense)`, the documents in the same order;
    without `dense` that of `aggregate(small)`.

    Where the aggregate is a mean (None), it is the sample deviation of the differences over
    `sqrt(n)`. Anything else is resampled, both models with the same documents (seed 0). None where
    it is unknown: fewer than two documents.
    """
    count = len(small)
    if count < 2:
        return None
    if aggregate is None:
        differences = np.asarray(small, dtype=np.float64)
        if dense is not None:
            differences = differences - np.asarray(dense, dtype=np.float64)
        return float(differences.std(ddof=1) / math.sqrt(count))
    generator = np.random.default_rng(0)
    values = []
    for _ in range(resamples):
        drawn = generator.integers(count, size=count)
        value = aggregate([small[at] for at in drawn])
        values.append(value - aggregate([dense[at] for at in drawn]) if dense else value)
    return float(np.std(values, ddof=1))


def compare(
    loaded: Mapping[str, Any], selection: Selection, small: Scored, dense: Scored | None
) -> list[Row]:
    """All rows: tasks and groups as lm-eval lists them, means, token perplexities."""
    rows: dict[tuple[str, str], Row] = {}
    for (name, key), value in small.values.items():
        row = Row(
            task=name,
            metric=key,
            samples=small.counts[name],
            small=value,
            standard_error=small.errors.get((name, key)),
            higher_is_better=small.higher_is_better.get(name, {}).get(_metric(key)),
        )
        if dense is not None and (name, key) in dense.values:
            error = _error_of_task(loaded, small, dense, name, key)
            row = replace(row, dense=dense.values[name, key], paired_standard_error=error)
        rows[name, key] = row
    for name, group in loaded["groups"].items():
        for key in [key for task, key in rows if task == name]:
            rows[name, key] = _with_error_of_group(group, rows[name, key], rows)
    means = [row for asked in selection.means for row in [_mean_row(asked, rows)] if row]
    return [*rows.values(), *means, *_perplexity_rows(small, dense)]


def _metric(key: str) -> str:
    """The metric of lm-eval's `metric,filter`."""
    return key.partition(",")[0]


def _error_of_task(
    loaded: Mapping[str, Any], small: Scored, dense: Scored, name: str, key: str
) -> float | None:
    """Standard error of `small - dense` on a task; None for a group, or where the two models were
    not asked the same.
    """
    ours, theirs = small.items.get((name, key), {}), dense.items.get((name, key), {})
    if name not in loaded["tasks"] or set(ours) != set(theirs):
        return None
    metric = _metric(key)
    aggregate = loaded["tasks"][name].aggregation().get(metric)
    is_mean = aggregate is None or getattr(aggregate, "__name__", "") == "mean"
    order = sorted(ours)
    return paired_standard_error(
        [ours[at] for at in order],
        [theirs[at] for at in order],
        None if is_mean else aggregate,
        _FEW_RESAMPLES.get(metric, _RESAMPLES),
    )


def _with_error_of_group(group: Any, row: Row, rows: Mapping[tuple[str, str], Row]) -> Row:
    """A group's row with the standard error of its difference: a group's score is a weighted mean
    of its tasks', which err independently.
    """
    metric = _metric(row.metric)
    how = next(how for how in group.aggregate_metric_list if how.metric == metric)
    names = [task.task_name for task in group.get_all_tasks()]
    tasks = [rows[name, row.metric] for name in names if (name, row.metric) in rows]
    weights = [task.samples if how.weight_by_size else 1 for task in tasks]
    errors = [task.paired_standard_error for task in tasks]
    return replace(row, paired_standard_error=_combined(errors, weights))


def _combined(errors: Sequence[float | None], weights: Sequence[float]) -> float | None:
    """Standard error of the weighted mean of independent figures, from theirs; None where one of
    them is unknown, or there is none.
    """
    if not errors or None in errors:
        return None
    squares = sum((w * e) ** 2 for w, e in zip(weights, errors, strict=True))
    return math.sqrt(squares) / sum(weights)


def _mean_row(asked: Mean, rows: Mapping[tuple[str, str], Row]) -> Row | None:
    """The mean that a preset asks for; None where it names a task that has none of its metrics."""
    of_tasks = []
    for task in asked.tasks:
        by_metric = {_metric(row.metric): row for (name, _), row in rows.items() if name == task}
        row = next((by_metric[metric] for metric in asked.metrics if metric in by_metric), None)
        if row is None:
            return None
        of_tasks.append(row)
    if not of_tasks:
        return None
    first, equal = of_tasks[0], [1] * len(of_tasks)
    return Row(
        task=f"mean ({asked.preset}, {len(of_tasks)} tasks)",
        metric=" or ".join(asked.metrics),
        samples=sum(row.samples for row in of_tasks),
        small=mean([row.small for row in of_tasks]),
        standard_error=_combined([row.standard_error for row in of_tasks], equal),
        higher_is_better=first.higher_is_better,
        dense=None if first.dense is None else mean([row.dense for row in of_tasks]),
        paired_standard_error=_combined([row.paired_standard_error for row in of_tasks], equal),
    )


def _perplexity_rows(small: Scored, dense: Scored | None) -> list[Row]:
    """Token perplexity and its logarithm, both models' where they saw the same windows: what one
    with other tokens loses on each of its own compares with nothing.
    """
    rows = []
    for asked, losses in small.losses.items():
        ours = losses.mean(1).tolist()
        is_compared = dense is not None and _saw_the_same(asked, small, dense)
        theirs = dense.losses[asked].mean(1).tolist() if is_compared else None
        for metric, aggregate in (("token perplexity", _exp_mean), ("log perplexity", None)):
            value = aggregate or mean
            error = paired_standard_error(ours, theirs, aggregate) if is_compared else None
            rows.append(
                Row(
                    task=str(asked),
                    metric=metric,
                    samples=len(ours),
                    small=value(ours),
                    standard_error=paired_standard_error(ours, None, aggregate),
                    higher_is_better=False,
                    dense=None if theirs is None else value(theirs),
                    paired_standard_error=error,
                )
            )
    return rows


def not_compared(small: Scored, dense: Scored) -> list[str]:
    """Which token perplexities stand without the other model's, and what to look at instead."""
    return [
        f"The token perplexity on {asked} is that of the first model alone: the other's tokens are "
        "not the same, and what each of them costs does not compare. Bits or perplexity a byte, of "
        "lm-eval's tasks and in sp3llm.json, do."
        for asked in small.losses
        if not _saw_the_same(asked, small, dense)
    ]


def _saw_the_same(asked: TokenPerplexity, small: Scored, dense: Scored) -> bool:
    return small.windows[asked].sha256 == dense.windows[asked].sha256


def _exp_mean(values: Sequence[float]) -> float:
    """Perplexity from mean losses, in nats."""
    return math.exp(mean(values))


# --------------------------------------------------------------------------- the table


_LEFT = {0, 1}  # task and metric


def cells(row: Row, compared: bool) -> list[str]:
    """A row as text: task, metric, number of questions, and the figures."""
    better = {True: " ↑", False: " ↓", None: ""}[row.higher_is_better]
    head = [row.task, row.metric.removesuffix(",none") + better, str(row.samples)]
    if not compared:
        return [*head, figure(row.small), figure(row.standard_error)]
    difference = "" if row.difference is None else f"{row.difference:+.4f}"
    error = figure(row.paired_standard_error)
    return [*head, figure(row.dense), figure(row.small), difference, error]


def columns(compared: bool) -> list[str]:
    """Headings of `cells`."""
    figures = ["dense", "small", "difference", "±"] if compared else ["score", "±"]
    return ["task", "metric", "n", *figures]


def _legend(compared: bool) -> str:
    return (
        "± is the standard error of the difference, both models paired over the same n questions "
        "or windows."
        if compared
        else "± is the standard error of the score."
    )


def _title(comparison: Comparison) -> str:
    against = "" if comparison.against is None else f" against {comparison.against}"
    return comparison.model + against


def markdown(comparison: Comparison, record: Mapping[str, Any]) -> str:
    """The comparison as a page of its own; `record` names command, machine and versions."""
    compared = comparison.against is not None
    rows = [cells(row, compared) for row in comparison.rows]
    notes = [_legend(compared), *comparison.notes]
    return markdown_page(_title(comparison), record, columns(compared), rows, _LEFT, notes)


def table(comparison: Comparison) -> "Table":
    """The comparison for the terminal."""
    compared = comparison.against is not None
    rows = [cells(row, compared) for row in comparison.rows]
    return terminal_table(_title(comparison), _legend(compared), columns(compared), rows, _LEFT)
