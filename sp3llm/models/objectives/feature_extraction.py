"""Encoders without a head: what they are for is their stream, as sentence encoders pool it."""

from typing import Any

from torch import Tensor
from torch.nn import functional

from sp3llm.models.objectives.examples import row_objective
from sp3llm.models.task_head import pooled_distances, pooled_gradients
from sp3llm.text.examples import Examples


def _states(output: Any, batch: Examples) -> Tensor:
    """The stream of the real tokens, `(tokens, width)`."""
    return output.last_hidden_state[batch.attention_mask.bool()]


def _divergence(states_ND: Tensor, teacher_ND: Tensor, _: float) -> Tensor:
    """Nothing: models of other widths have the error of their streams to compare, not these."""
    return states_ND.new_zeros(())


def _learning_loss(states_ND: Tensor, _: Examples) -> Tensor:
    return functional.mse_loss(states_ND, states_ND.detach())


FEATURE_EXTRACTION = row_objective(
    name="feature-extraction",
    architecture_suffix="Model",
    auto_class="AutoModel",
    task_type="FEATURE_EXTRACTION",
    pipeline="feature-extraction",
    logits=_states,
    divergence=_divergence,
    learning_loss=_learning_loss,
    divergences=pooled_distances,
    loss_gradients=pooled_gradients,
)
