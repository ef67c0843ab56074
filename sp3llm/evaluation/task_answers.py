"""What a stock model answers to rows of a task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sp3llm.models.objectives.schema import Objective
from sp3llm.text.encoding import Stretches, encoded, encoded_stretches
from sp3llm.text.examples import Examples
from sp3llm.text.labels import Labels, label_numbers
from sp3llm.text.task_rows import Row
from sp3llm.text.tasks import CLASSES, SPAN, Task

# As SQuAD's scripts have it: an answer's longest length, tokens, and how many of the likeliest
# beginnings and ends are paired.
_LONGEST_ANSWER, _LIKELIEST = 30, 20


@dataclass(frozen=True)
class Questions:
    """Rows of a task as a model reads them, and what is true."""

    rows: Sequence[Row]
    labels: Labels
    examples: Examples
    stretches: Stretches | None
    """Of spans: the contexts' stretches, which `examples` are."""
    truths: Sequence[Any]
    """By row the number of its class, its value, or its answers."""

    @property
    def documents(self) -> frozenset[str]:
        """Content hashes of the rows."""
        return self.examples.documents


def questions_of(
    rows: Sequence[Row], task: Task, labels: Labels, tokenizer: Any, seq_len: int
) -> Questions:
    """Rows of a task for a model that predicts `labels`, of at most `seq_len` tokens.

    Raises UserError if one of them is not as the task says.
    """
    if labels.kind == SPAN:
        stretches = encoded_stretches(rows, tokenizer, seq_len)
        truths = [row.label["text"] for row in rows]
        return Questions(rows, labels, stretches.examples, stretches, truths)
    truths = label_numbers(rows, task, labels)
    return Questions(rows, labels, encoded(rows, tokenizer, seq_len, truths), None, truths)


@torch.no_grad()
def answers_of(
    model: nn.Module,
    objective: Objective,
    questions: Questions,
    batch: int,
    advance: Callable[[int], Any] = lambda _: None,
) -> list[Any]:
    """By row what a stock model answers: the number of a class, a value, or a text.

    Rows of like lengths run together, `batch` at once. `advance` is told how many are done.
    """
    examples = questions.examples
    device = next(model.parameters()).device
    order = examples.attention_mask.sum(1).argsort(descending=True, stable=True)
    logits: list[Tensor] = [torch.empty(0)] * len(examples)
    for numbers in order.split(batch):
        some = examples[numbers].to(device)
        found = objective.scored(objective.logits(model(**objective.inputs(some)), some))
        for number, row in zip(numbers.tolist(), found.float().cpu(), strict=True):
            logits[number] = row
        advance(len(numbers))
    if questions.stretches is not None:
        return _texts(logits, questions.rows, questions.stretches)
    if questions.labels.kind == CLASSES:
        return [int(row.argmax()) for row in logits]
    return [float(row[0]) for row in logits]


def _texts(logits: Sequence[Tensor], rows: Sequence[Row], stretches: Stretches) -> list[str]:
    """By row the likeliest answer in any stretch of its context."""
    best: list[tuple[float, str]] = [(-torch.inf, "")] * len(rows)
    for number, (owner, logits_2S) in enumerate(zip(stretches.rows, logits, strict=True)):
        found = _likeliest(logits_2S, stretches.offsets[number])
        if found is not None and found[0] > best[owner][0]:
            score, begin, end = found
            best[owner] = score, rows[owner].texts[1][begin:end]
    return [text for _, text in best]


def _likeliest(logits_2S: Tensor, offsets_S2: Tensor) -> tuple[float, int, int] | None:
    """Of the spans in a stretch the one with the largest sum of logits: that sum, and where the
    span begins and ends in the context; None: it holds none.
    """
    tokens = logits_2S.shape[1]
    count = min(_LIKELIEST, tokens)
    (starts, first), (ends, last) = (row.topk(count) for row in logits_2S)
    is_context = offsets_S2[:tokens, 0] >= 0
    length = last[None] - first[:, None] + 1
    allowed = is_context[first][:, None] & is_context[last][None]
    allowed &= (length > 0) & (length <= _LONGEST_ANSWER)
    if not allowed.any():
        return None
    sums = (starts[:, None] + ends[None]).masked_fill(~allowed, -torch.inf)
    at = int(sums.argmax())
    begin, end = first[at // count], last[at % count]
    return float(sums.flatten()[at]), int(offsets_S2[begin, 0]), int(offsets_S2[end, 1])
