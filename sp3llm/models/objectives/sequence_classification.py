"""Sequence classification and regression: a class or a value of a text, or of a pair of texts."""

from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional

from sp3llm.maths.losses import divergence
from sp3llm.models.objectives.examples import (
    ENCODER_RECIPE,
    calibration_rows,
    of_rows,
    real_tokens,
    training_rows,
)
from sp3llm.models.objectives.schema import Objective
from sp3llm.models.task_head import backward_answers, row_divergences, row_losses
from sp3llm.text.examples import Examples, joined
from sp3llm.text.labels import model_labels


def _logits(output: Any, _: Examples) -> Tensor:
    """`(rows, classes)`; of values one each."""
    return output.logits


def _scored(logits_BC: Tensor) -> Tensor:
    return logits_BC


def _divergence(logits_BC: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
    """Of distributions over classes; of values the mean squared difference."""
    if logits_BC.shape[1] == 1:
        return functional.mse_loss(logits_BC.float(), teacher_BC.float())
    return divergence(logits_BC, teacher_BC, temperature)


def _learning_loss(logits_BC: Tensor, batch: Examples) -> Tensor:
    if logits_BC.shape[1] == 1:
        return functional.mse_loss(logits_BC[:, 0].float(), batch.labels.float())
    return functional.cross_entropy(logits_BC.float(), batch.labels)


SEQUENCE_CLASSIFICATION = Objective(
    name="sequence-classification",
    architecture_suffix="ForSequenceClassification",
    auto_class="AutoModelForSequenceClassification",
    task_type="SEQ_CLS",
    pipeline="text-classification",
    calibration_windows=calibration_rows,
    training_windows=training_rows,
    join=joined,
    inputs=Examples.inputs,
    real_tokens=real_tokens,
    in_rows=Examples.reread,
    of_rows=of_rows,
    logits=_logits,
    scored=_scored,
    divergence=_divergence,
    learning_loss=_learning_loss,
    recipe=ENCODER_RECIPE,
    labels=model_labels,
    states_are_stream=True,
    losses=partial(row_losses, _logits),
    divergences=partial(row_divergences, _logits),
    loss_gradients=partial(backward_answers, _logits, ENCODER_RECIPE.temperature),
)
