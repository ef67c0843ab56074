"""Sequence classification and regression: a class or a value of a text, or of a pair of texts."""

from typing import Any

from torch import Tensor
from torch.nn import functional

from sp3llm.maths.losses import divergence
from sp3llm.models.objectives.examples import answering_objective
from sp3llm.text.examples import Examples
from sp3llm.text.labels import model_labels


def _logits(output: Any, _: Examples) -> Tensor:
    """`(rows, classes)`; of values one each."""
    return output.logits


def _divergence(logits_BC: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
    """Of distributions over classes; of values the mean squared difference."""
    if logits_BC.shape[1] == 1:
        return functional.mse_loss(logits_BC.float(), teacher_BC.float())
    return divergence(logits_BC, teacher_BC, temperature)


def _learning_loss(logits_BC: Tensor, batch: Examples) -> Tensor:
    if logits_BC.shape[1] == 1:
        return functional.mse_loss(logits_BC[:, 0].float(), batch.labels.float())
    return functional.cross_entropy(logits_BC.float(), batch.labels)


SEQUENCE_CLASSIFICATION = answering_objective(
    _logits,
    name="sequence-classification",
    architecture_suffix="ForSequenceClassification",
    auto_class="AutoModelForSequenceClassification",
    task_type="SEQ_CLS",
    pipeline="text-classification",
    divergence=_divergence,
    learning_loss=_learning_loss,
    labels=model_labels,
)
