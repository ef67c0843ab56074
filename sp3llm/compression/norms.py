"""Fit the norms of a post-norm model, channel by channel (docs/design.md 3.15)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sp3llm.compression.projecting import rounded
from sp3llm.compression.reading import real_rows
from sp3llm.compression.refitter import Refitter
from sp3llm.maths.basis import stream_scale
from sp3llm.maths.moments import normalise
from sp3llm.maths.products import widen
from sp3llm.models.stream import Stream, probe_stream
from sp3llm.runtime.transfer import fetch, settle, store


def fit_norm(
    refitter: Refitter,
    tensors: dict[str, Tensor],
    norm: str,
    target: Tensor,
    small_stream: Stream,
    normalised: bool = False,
) -> None:
    """Fit a norm's weight and bias in `tensors` to the dense stream behind it, and send the small
    stream, which stands in front of it, through it.

    `g'_k, b'_k = argmin sum_t |c (y T)_k - g'_k n'_k - b'_k|^2` over real tokens, `n'` the small
    stream normalised, `y` the dense one behind the norm: `target`, `(windows, tokens, D)`. A
    channel that never changes keeps the projection's weight. With `normalised` the small stream is
    `n'` already.
    """
    execution, family = refitter.execution, refitter.family
    basis_DK, weight, bias = refitter.projection.basis_DK, f"{norm}.weight", f"{norm}.bias"
    scaled_DK = stream_scale(basis_DK) * basis_DK
    sums_5K = torch.zeros(5, basis_DK.shape[1], dtype=torch.float64, device=execution.device)

    def without_weight(x: Tensor) -> Tensor:
        return widen(x) if normalised else normalise(x, refitter.eps, family.centred)

    def add_batch(rows: slice, x: Tensor) -> None:
        seen = len(x) if rows.stop <= refitter.unseen_from else refitter.unseen_from - rows.start
        if seen <= 0:
            return
        taken = slice(rows.start, rows.start + seen)
        wanted = widen(fetch(target[taken], execution.device))
        n_NK = real_rows(without_weight(x[:seen]), small_stream.real, taken)
        n_NK = n_NK.reshape(-1, n_NK.shape[-1]).double()
        y_ND = real_rows(wanted, small_stream.real, taken)
        y_NK = (y_ND.reshape(-1, y_ND.shape[-1]) @ scaled_DK.to(y_ND)).double()
        ones_NK = torch.ones_like(n_NK)
        pairs = ((ones_NK, ones_NK), (n_NK, ones_NK), (y_NK, ones_NK), (n_NK, n_NK), (n_NK, y_NK))
        for sum_K, (a_NK, b_NK) in zip(sums_5K, pairs, strict=True):
            sum_K += (a_NK * b_NK).sum(0)

    probe_stream(small_stream, add_batch, execution)
    execution.ranks.all_reduce_(sums_5K)
    weight_K, bias_K = _solved(sums_5K, tensors[weight].to(sums_5K) + family.norm_offset)
    execution.ranks.broadcast_(weight_K, bias_K)
    tensors[weight] = rounded(weight, weight_K - family.norm_offset, refitter.dtype)
    tensors[bias] = rounded(bias, bias_K, refitter.dtype)
    g_K, b_K = (tensors[name].to(execution.device) for name in (weight, bias))

    def move_on(rows: slice, x: Tensor) -> None:
        n = without_weight(x)
        moved = n * (g_K.to(n) + family.norm_offset) + b_K.to(n)
        store(small_stream.hidden[rows], moved.to(x.dtype), execution.device)

    probe_stream(small_stream, move_on, execution)
    settle(execution.device)


def _solved(sums_5K: Tensor, prior_K: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias from the sums over tokens of 1, `n`, `y`, `n n` and `n y`."""
    count_K, n_K, y_K, nn_K, ny_K = sums_5K
    variance_K = nn_K - n_K * n_K / count_K
    moves_K = variance_K > torch.finfo(torch.float32).eps * nn_K
    weight_K = torch.where(moves_K, (ny_K - n_K * y_K / count_K) / variance_K, prior_K)
    return weight_K, (y_K - weight_K * n_K) / count_K


def opened_without_norm(norm: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with a norm, by its name, of weight 1 and bias 0, so that what it hands on is
    normalised and no more.
    """
    return {
        **tensors,
        f"{norm}.weight": torch.ones_like(tensors[f"{norm}.weight"]),
        f"{norm}.bias": torch.zeros_like(tensors[f"{norm}.bias"]),
    }
