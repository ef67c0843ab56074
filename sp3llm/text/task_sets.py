"""Sets of a task's rows: to calibrate on, to learn from, and to decide when to stop.

What is reported on is drawn by `text.task_rows.evaluation_rows`, whole: these sets are all of the
training rows, and share no text with it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sp3llm.errors import UserError
from sp3llm.text.encoding import encoded, encoded_stretches
from sp3llm.text.examples import Examples
from sp3llm.text.labels import Labels, label_numbers
from sp3llm.text.task_rows import Row, training_rows
from sp3llm.text.tasks import SPAN, Task


@dataclass(frozen=True)
class TaskSet:
    """Rows of a task as tokens, and their origin: what `text.windows.Windows` is of text."""

    tokens: Examples
    """The rows."""
    sources: tuple[str, ...]
    """The task."""
    documents: frozenset[str]
    """Content hashes of the rows drawn."""
    dropped_documents: int = 0
    """Rows left out since they were to be excluded, such as those that are reported on."""

    @property
    def sha256(self) -> str:
        """SHA-256 of the tokens, as 64 hex digits."""
        return self.tokens.sha256

    def describe(self) -> dict[str, Any]:
        """What `sp3llm.json` records of these rows."""
        samples, seq_len = self.tokens.shape
        return {
            "sources": list(self.sources),
            "samples": samples,
            "seq_len": seq_len,
            "begins_with_bos": False,
            "documents": len(self.documents),
            "dropped_documents": self.dropped_documents,
            "sha256": self.sha256,
            "real_tokens": self.tokens.tokens,
        }


def drawn(
    task: Task,
    tokenizer: Any,
    samples: int,
    seq_len: int,
    seed: int,
    exclude: frozenset[str] = frozenset(),
    stopping: bool = False,
    labels: Labels | None = None,
) -> TaskSet:
    """At most `samples` training rows in an order that follows from `seed` and their content, or,
    with `stopping`, of those kept apart to decide when to stop.

    Rows whose content hash is in `exclude` are dropped and counted. Labels are read where `labels`
    says what they are for the model, and of spans always.

    Raises UserError if no row is left, or one is not as the task says.
    """
    rows = training_rows(task, stopping)
    allowed = [row for row in rows if row.digest not in exclude]
    if not allowed:
        part = "a sixteenth of the training rows, kept to decide when to stop," if stopping else ""
        raise UserError(
            f"Expected at least one row in {part or 'the training rows'} of '{task.name}' after "
            f"{len(rows)} that are reported on were dropped, found none: give the task more rows."
        )
    ordered = sorted(allowed, key=lambda row: row.digest)
    random.Random(seed).shuffle(ordered)
    ordered = ordered[:samples]
    examples = _examples(ordered, task, tokenizer, seq_len, labels)
    return TaskSet(
        tokens=examples,
        sources=task.sources,
        documents=examples.documents,
        dropped_documents=len(rows) - len(allowed),
    )


def _examples(
    rows: Sequence[Row], task: Task, tokenizer: Any, seq_len: int, labels: Labels | None
) -> Examples:
    if task.kind == SPAN:
        return encoded_stretches(rows, tokenizer, seq_len).examples
    numbers = None if labels is None else label_numbers(rows, task, labels)
    return encoded(rows, tokenizer, seq_len, numbers)
