"""The figures that tasks are judged by, as GLUE and SQuAD define them.

scikit-learn counts; it brings scipy, and with it correlations.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sp3llm.errors import UserError
from sp3llm.text.labels import Labels
from sp3llm.text.tasks import CLASSES, VALUE, Task

_INSTALL = "pip install 'sp3llm[tasks]'"


@dataclass(frozen=True)
class Metric:
    """A figure of how well rows were answered; more is better."""

    name: str
    figure: Callable[[Sequence[tuple[Any, Any]]], float]
    """Of pairs of an answer and what is true."""
    of_a_row: Callable[[Any, Any], float] | None
    """What one row adds, where the figure is a mean over rows; None: it is none."""


def check_installed() -> None:
    """Raises UserError if scikit-learn is missing."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"Scoring on a task needs the package scikit-learn, which is not installed: {_INSTALL}."
        ) from error


def metrics_of(task: Task, labels: Labels, positive: int) -> list[Metric]:
    """The metrics of a task, or those usual for what is predicted; `positive` is the number of the
    class that F1 is of, as the model counts classes.
    """
    usual = {
        CLASSES: ("accuracy", "F1", "Matthews") if len(labels.names) == 2 else ("accuracy",),
        VALUE: ("Pearson", "Spearman"),
    }
    known = {metric.name: metric for metric in _metrics(labels.kind, positive)}
    return [known[name] for name in task.metrics or usual.get(labels.kind, tuple(known))]


def _metrics(kind: str, positive: int) -> list[Metric]:
    if kind == CLASSES:

        def f1(pairs: Sequence[tuple[int, int]]) -> float:
            from sklearn.metrics import f1_score

            found, true = _columns(pairs)
            return float(f1_score(true == positive, found == positive, zero_division=0.0))

        return [
            Metric("accuracy", _mean_of(_equal), _equal),
            Metric("F1", f1, None),
            Metric("Matthews", _matthews, None),
        ]
    if kind == VALUE:
        return [Metric("Pearson", _pearson, None), Metric("Spearman", _spearman, None)]
    return [
        Metric("exact match", _mean_of(exact_match), exact_match),
        Metric("F1", _mean_of(word_f1), word_f1),
    ]


def _columns(pairs: Sequence[tuple[Any, Any]]) -> tuple[np.ndarray, np.ndarray]:
    found, true = zip(*pairs, strict=True)
    return np.asarray(found), np.asarray(true)


def _mean_of(
    of_a_row: Callable[[Any, Any], float],
) -> Callable[[Sequence[tuple[Any, Any]]], float]:
    return lambda pairs: float(np.mean([of_a_row(found, true) for found, true in pairs]))


def _equal(found: int, true: int) -> float:
    return float(found == true)


def _matthews(pairs: Sequence[tuple[int, int]]) -> float:
    """0 where answers or truths are all the same."""
    from sklearn.metrics import matthews_corrcoef

    found, true = _columns(pairs)
    if np.ptp(found) == 0 or np.ptp(true) == 0:
        return 0.0
    return float(matthews_corrcoef(true, found))


def _pearson(pairs: Sequence[tuple[float, float]]) -> float:
    return correlation("pearsonr", *_columns(pairs))


def _spearman(pairs: Sequence[tuple[float, float]]) -> float:
    return correlation("spearmanr", *_columns(pairs))


def correlation(name: str, found: np.ndarray, true: np.ndarray) -> float:
    """What scipy calls by that name; 0 where one of both is all the same, which no correlation is
    defined for.
    """
    from scipy import stats

    if np.ptp(found) == 0 or np.ptp(true) == 0:
        return 0.0
    return float(getattr(stats, name)(found, true).statistic)


# --------------------------------------------------------------------------- answers as text


def exact_match(found: str, answers: Sequence[str]) -> float:
    """1 where a text is one of the answers, but for case, punctuation, articles and white space."""
    return float(any(_words(found) == _words(answer) for answer in answers))


def word_f1(found: str, answers: Sequence[str]) -> float:
    """The largest F1, over the answers, of the words of a text."""
    return max(_f1(_words(found), _words(answer)) for answer in answers)


def _f1(found: list[str], answer: list[str]) -> float:
    if not found or not answer:
        return float(found == answer)
    common = sum((Counter(found) & Counter(answer)).values())
    return 2 * common / (len(found) + len(answer))


def _words(text: str) -> list[str]:
    """The words that SQuAD's own script compares."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()
