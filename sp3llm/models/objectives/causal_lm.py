"""Causal language models: packed windows of text, and the loss on every next token."""

from typing import Any

import torch
from torch import Tensor

from sp3llm.errors import UserError
from sp3llm.maths.losses import divergence, label_losses, language_model_loss
from sp3llm.maths.paired import perplexity
from sp3llm.models.head import backward_head, token_divergences, token_losses
from sp3llm.models.objectives.schema import Objective, Recipe
from sp3llm.text import windows

# Losses beyond are of no model of language; their perplexity, from some 709 on, is no float.
_MOST_NATS = 700.0


def _calibration_windows(*arguments: Any, **options: Any) -> windows.Windows:
    return windows.calibration_windows(*arguments, **options)


def _evaluation_windows(*arguments: Any, **options: Any) -> windows.Windows:
    return windows.evaluation_windows(*arguments, **options)


def _training_windows(*arguments: Any, **options: Any) -> windows.Windows:
    return windows.training_windows(*arguments, **options)


def _inputs(tokens_BS: Tensor) -> dict[str, Any]:
    return {"input_ids": tokens_BS, "use_cache": False}


def _all_real(_: Tensor) -> None:
    """Packed windows hold no padding."""


def _in_rows(tokens_BS: Tensor, rows: Tensor) -> Tensor:
    return rows.to(tokens_BS.device)[tokens_BS]


def _of_rows(logits_BSV: Tensor, rows: Tensor) -> Tensor:
    return logits_BSV[..., rows.to(logits_BSV.device)]


def _logits(output: Any, _: Tensor) -> Tensor:
    return output.logits


def _scored(logits_BSV: Tensor) -> Tensor:
    """All but the last: nothing is known of what follows it."""
    return logits_BSV[:, :-1]


def merit(losses: Tensor) -> float:
    """Perplexity of token losses, in nats.

    Raises UserError where they have none that a number can hold.
    """
    mean = losses.mean().item()
    if not mean < _MOST_NATS:  # NaN too
        raise UserError(
            f"Expected a loss on the held-out text that has a perplexity, found {mean:g} nats a "
            "token, where guessing costs some 10: the weights are damaged, or not of this "
            "config.json, so get an undamaged copy of the checkpoint."
        )
    return perplexity(losses)


def _learning_loss(scored_BSV: Tensor, tokens_BS: Tensor) -> Tensor:
    return language_model_loss(scored_BSV, tokens_BS[:, 1:])


@torch.no_grad()
def window_losses(model: Any, window: Tensor, device: torch.device) -> Tensor:
    """Losses of a model in memory on one window of token ids, `(tokens - 1,)`, float64 on the
    host, in nats.

    The first token is not predicted. Logits are taken in the model's own dtype, their logarithm in
    float32 at least.
    """
    tokens_1S = window.to(device)[None]
    logits_NV = _scored(model(**_inputs(tokens_1S)).logits)[0]
    return label_losses(logits_NV, tokens_1S[0, 1:]).cpu()


CAUSAL_LM = Objective(
    name="causal-lm",
    architecture_suffix="ForCausalLM",
    auto_class="AutoModelForCausalLM",
    task_type="CAUSAL_LM",
    pipeline="text-generation",
    calibration_windows=_calibration_windows,
    training_windows=_training_windows,
    join=torch.cat,
    inputs=_inputs,
    real_tokens=_all_real,
    in_rows=_in_rows,
    of_rows=_of_rows,
    logits=_logits,
    scored=_scored,
    divergence=divergence,
    learning_loss=_learning_loss,
    recipe=Recipe(
        steps=300,
        epochs=1,
        lr_of_weights=0.06,  # measured at a width of 576 (eval/NOTES.md)
        far=0.3 * 2048,  # there, too
        temperature=1.0,
        kl_weight=1.0,
        hidden_weight=0.0,
        stop_windows=32,
        patience=5,
    ),
    evaluation_windows=_evaluation_windows,
    losses=token_losses,
    divergences=token_divergences,
    loss_gradients=backward_head,
    losses_in_memory=window_losses,
    merit=merit,
    merit_name="perplexity",
)
