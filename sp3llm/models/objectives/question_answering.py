"""Extractive question answering: where in a context the answer to a question stands."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sp3llm.maths.losses import divergence
from sp3llm.models.objectives.examples import answering_objective
from sp3llm.text.examples import Examples
from sp3llm.text.labels import Labels
from sp3llm.text.tasks import SPAN

# The logit of a token of padding, where no answer begins or ends: no probability, and no NaN. Of
# float16, which ends before, its least number.
_NEVER = -1e9


def _labels(_: Mapping[str, Any]) -> Labels:
    return Labels(SPAN, ("start", "end"))


def _logits(output: Any, batch: Examples) -> Tensor:
    """`(rows, 2, tokens)`: over the tokens of a row where the answer begins, and where it ends."""
    logits_B2S = torch.stack([output.start_logits, output.end_logits], 1)
    never = max(_NEVER, torch.finfo(logits_B2S.dtype).min)
    return logits_B2S.masked_fill(batch.attention_mask[:, None] == 0, never)


def _learning_loss(logits_B2S: Tensor, batch: Examples) -> Tensor:
    return functional.cross_entropy(logits_B2S.float().flatten(0, 1), batch.labels.flatten())


QUESTION_ANSWERING = answering_objective(
    _logits,
    name="question-answering",
    architecture_suffix="ForQuestionAnswering",
    auto_class="AutoModelForQuestionAnswering",
    task_type="QUESTION_ANS",
    pipeline="question-answering",
    divergence=divergence,
    learning_loss=_learning_loss,
    labels=_labels,
)
