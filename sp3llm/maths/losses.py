"""Losses of language models: those that tell how good one is, and those that one is taught by.
Tensors only.

B windows, S or N tokens, V vocabulary, J largest logits kept, D and K residual width before and
after. Losses to be taught by are means over tokens, float32.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sp3llm.maths.moments import LEAST_MEAN_SQUARE
from sp3llm.maths.products import widen

# Logits that a loss is taken of at once, 64 MB in float32: with vocabularies of a quarter million
# those of a whole window in float32 would be larger than the model's largest layer.
LOGITS_AT_ONCE = 2**24
# Of these a CPU reads so many at once, which stay in its caches: seven times as fast.
_IN_CACHE = 2**20


def tokens_at_once(vocabulary: int) -> int:
    """Tokens whose logits may be taken at once, one at least."""
    return max(1, LOGITS_AT_ONCE // vocabulary)


def label_losses(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Negative log-likelihood of every label, `(N,)`, float64, in nats, where the logits are.

    `logits_NV` are those before their labels, of any floating dtype. Logarithms are taken in
    float32 (float64 for float64 logits), a few tokens at a time, which changes no loss.
    """
    step = rows_at_once(logits_NV)
    pieces = zip(logits_NV.split(step), labels_N.split(step), strict=True)
    losses = [
        functional.cross_entropy(widen(piece_NV), piece_N, reduction="none")
        for piece_NV, piece_N in pieces
    ]
    return torch.cat(losses).double()


def rows_at_once(logits_NV: Tensor) -> int:
    """Rows of logits that a loss is taken of at once, one at least: what a CPU's caches hold."""
    vocabulary = logits_NV.shape[1]
    if logits_NV.device.type == "cpu":
        return max(1, min(_IN_CACHE, LOGITS_AT_ONCE) // vocabulary)
    return tokens_at_once(vocabulary)


def drawn_labels(logits_NV: Tensor, generator: torch.Generator) -> Tensor:
    """A label from each distribution, `(N,)`, int64, from one random number a token: torch's own
    draw takes one for every entry, which on a CPU costs more than the logits.
    """
    chance_N1 = torch.rand(
        (len(logits_NV), 1), generator=generator, device=logits_NV.device, dtype=torch.float32
    )
    step, places = rows_at_once(logits_NV), []
    for piece_NV, piece_N1 in zip(logits_NV.split(step), chance_N1.split(step), strict=True):
        shares_NV = piece_NV.detach().softmax(-1, dtype=torch.float32).cumsum(-1)
        places.append(torch.searchsorted(shares_NV, piece_N1 * shares_NV[:, -1:], right=True))
    return torch.cat(places)[:, 0].clamp_max(logits_NV.shape[1] - 1)


def label_gradients(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Gradients of the summed negative log-likelihood of the labels by the logits before them,
    `(N, V)`, in the dtype of these: each distribution, less one at its label.
    """
    gradients_NV, step = torch.empty_like(logits_NV), rows_at_once(logits_NV)
    parts = (logits_NV.split(step), labels_N.split(step), gradients_NV.split(step))
    for piece_NV, piece_N, place_NV in zip(*parts, strict=True):
        shares_NV = widen(piece_NV).softmax(-1)
        shares_NV[torch.arange(len(piece_N), device=piece_N.device), piece_N] -= 1
        place_NV.copy_(shares_NV)
    return gradients_NV


def distribution_divergences(several_NV: Sequence[Tensor], dense_NV: Tensor) -> list[Tensor]:
    """Kullback-Leibler divergences of the distributions of several models from those of the dense
    one, `(N,)` each, float64, in nats, where the logits, of any floating dtype, are. Logarithms
    are taken in float32.
    """
    step = rows_at_once(dense_NV)
    found: list[list[Tensor]] = [[] for _ in several_NV]
    for dense_piece_NV, *pieces in zip(
        *(logits_NV.split(step) for logits_NV in (dense_NV, *several_NV)), strict=True
    ):
        dense_log_NV = widen(dense_piece_NV).log_softmax(-1)
        shares_NV = dense_log_NV.exp()
        for piece_NV, divergences in zip(pieces, found, strict=True):
            by_entry_NV = shares_NV * (dense_log_NV - widen(piece_NV).log_softmax(-1))
            divergences.append(by_entry_NV.sum(-1, dtype=torch.float64))
    return [torch.cat(divergences) for divergences in found]


@dataclass(frozen=True)
class TopLogits:
    """A teacher's distribution at a temperature: its largest entries, and how much the others
    hold together.
    """

    ids_BSJ: Tensor
    """Token ids of the largest logits, int64."""
    log_probs_BSJ: Tensor
    """Their log-probabilities."""
    log_rest_BS: Tensor
    """Log-probability of all others together; minus infinity where there are none."""


def divergence(student_BSV: Tensor, teacher_BSV: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of the student from the teacher, both logits at a temperature;
    `(N, V)` will do as well.

    Times the temperature squared, so that its gradients do not shrink with it. Those by the
    student's logits are taken along, a few tokens at a time: of several copies of all logits in
    float32, which a step's memory is largest by, one is left.
    """
    return _Divergence.apply(student_BSV, teacher_BSV, temperature)


class _Divergence(torch.autograd.Function):
    """`divergence`, which has gradients by the student's logits alone."""

    @staticmethod
    def forward(ctx: Any, student_BSV: Tensor, teacher_BSV: Tensor, temperature: float) -> Tensor:
        wanted, tokens = ctx.needs_input_grad[0], math.prod(student_BSV.shape[:-1])
        gradient_BSV = torch.empty_like(student_BSV) if wanted else student_BSV
        total = torch.zeros((), device=student_BSV.device)
        for student_NV, teacher_NV, place_NV in zip(
            *map(_in_pieces, (student_BSV, teacher_BSV, gradient_BSV)), strict=True
        ):
            log_NV, dense_log_NV = (
                (widen(one) / temperature).log_softmax(-1) for one in (student_NV, teacher_NV)
            )
            dense_NV = dense_log_NV.exp()
            total = total + (dense_NV * (dense_log_NV - log_NV)).sum()
            if wanted:
                place_NV.copy_((log_NV.exp() - dense_NV) * (temperature / tokens))
        ctx.gradient_BSV = gradient_BSV if wanted else None
        return temperature**2 * total / tokens

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        gradient_BSV, ctx.gradient_BSV = ctx.gradient_BSV, None
        return gradient_BSV.mul_(scale), None, None


def _in_pieces(logits_BSV: Tensor) -> Iterator[Tensor]:
    """Views of all logits, `(N, V)`, of so many tokens as a loss is taken of at once."""
    windows = [logits_BSV] if logits_BSV.ndim == 2 else logits_BSV
    for window_NV in windows:
        yield from window_NV.split(rows_at_once(window_NV))


def top_logits(teacher_BSV: Tensor, count: int, temperature: float) -> TopLogits:
    """The `count` largest of a teacher's logits, as log-probabilities at a temperature."""
    scaled_BSV = teacher_BSV.float() / temperature
    total_BS = scaled_BSV.logsumexp(-1)
    values_BSJ, ids_BSJ = scaled_BSV.topk(count)
    return TopLogits(
        ids_BSJ, values_BSJ - total_BS[..., None], _rest(scaled_BSV, ids_BSJ) - total_BS
    )


def top_divergence(student_BSV: Tensor, teacher: TopLogits, temperature: float) -> Tensor:
    """`divergence` where all but the teacher's largest logits count as one outcome.

    With every logit kept it is the same; otherwise it is a lower bound.
    """
    scaled_BSV = student_BSV.float() / temperature
    total_BS = scaled_BSV.logsumexp(-1)
    student_BSJ = scaled_BSV.gather(-1, teacher.ids_BSJ) - total_BS[..., None]
    log_probs_BSJ = teacher.log_probs_BSJ
    divergence_BS = (log_probs_BSJ.exp() * (log_probs_BSJ - student_BSJ)).sum(-1)
    if teacher.ids_BSJ.shape[-1] < student_BSV.shape[-1]:
        rest_BS = _rest(scaled_BSV, teacher.ids_BSJ) - total_BS
        log_rest_BS = teacher.log_rest_BS
        divergence_BS = divergence_BS + log_rest_BS.exp() * (log_rest_BS - rest_BS)
    return temperature**2 * divergence_BS.mean()


def _rest(scaled_BSV: Tensor, ids_BSJ: Tensor) -> Tensor:
    """Log of the sum of exponentials over all but the given ids."""
    return scaled_BSV.scatter(-1, ids_BSJ, -math.inf).logsumexp(-1)


def language_model_loss(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Cross-entropy, the logits already those before their labels."""
    return functional.cross_entropy(logits_BSV.float().flatten(0, 1), labels_BS.flatten())


def stream_error(
    small: Sequence[Tensor],
    dense: Sequence[Tensor],
    target_DK: Tensor,
    real_BS: Tensor | None = None,
) -> Tensor:
    """How far the small model's stream is from the dense one's seen through the basis.

    `small` and `dense` hold the stream at the same places, `(B, S, K)` and `(B, S, D)`;
    `target_DK` is `c T` (docs/design.md 3.3). Each token's error is relative to what it should be,
    the scale at which the next norm reads it. `real_BS` is 1 for tokens that count; None: all do.
    """
    errors = []
    for x_BSK, x_BSD in zip(small, dense, strict=True):
        wanted_BSK = x_BSD.float() @ target_DK
        error_BS = (x_BSK.float() - wanted_BSK).square().mean(-1)
        error_BS = error_BS / wanted_BSK.square().mean(-1).clamp_min(LEAST_MEAN_SQUARE)
        if real_BS is None:
            errors.append(error_BS.mean())
        else:
            errors.append((error_BS * real_BS).sum() / real_BS.sum())
    return torch.stack(errors).mean()
