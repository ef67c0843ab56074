"""Fit what reads an encoder's stream behind its last layer."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from sp3llm.compression.post_norm import keep_units
from sp3llm.compression.projecting import rounded
from sp3llm.compression.readers import reader_map, stream_grams
from sp3llm.compression.refitter import (
    Refitter,
    add_tokens,
    all_reduce_grams,
    empty_grams,
    fit_ridge,
    solves_in,
)
from sp3llm.compression.writers import CHOICE_RIDGE
from sp3llm.maths.products import operand, widen
from sp3llm.maths.refit import Gram, restricted, sum_grams
from sp3llm.maths.unit_selection import select_units
from sp3llm.models.stream import Stream, first_tokens, probe_stream
from sp3llm.runtime.transfer import fetch


def fit_task_head(
    refitter: Refitter,
    source: Mapping[str, Tensor],
    tensors: dict[str, Tensor],
    dense_stream: Stream,
    small_stream: Stream,
) -> None:
    """Fit the units that read the stream, one more site, and the answer that is read from them, one
    more writer, to what the dense head makes of the dense stream.

    A stock head has as many units as the stream is wide: those stay without which the refitted
    answer would lose most. `source` are the dense tensors, `tensors` the small ones, replaced in
    place.
    """
    head, dtype = refitter.family.task_head, refitter.dtype
    if head.reader is None:
        return
    if head.first_only:
        dense_stream, small_stream = first_tokens(dense_stream), first_tokens(small_stream)
    grams = stream_grams(refitter, dense_stream.hidden, small_stream)
    fit = reader_map(refitter, grams, True, head.reader)
    weight, bias = f"{head.reader}.weight", f"{head.reader}.bias"
    on_device = {n: t.to(fit.solution_PQ) for n, t in source.items()}
    read_UD, constant_U = on_device[weight], on_device[bias]
    mapped = dict(on_device)
    mapped[weight] = read_UD @ fit.solution_PQ.T
    mapped[bias] = constant_U + read_UD @ fit.intercept_Q
    if head.units is not None:
        mapped = _fitted_answer(refitter, on_device, mapped, dense_stream, small_stream)
    tensors |= {name: rounded(name, tensor, dtype) for name, tensor in mapped.items()}


def _fitted_answer(
    refitter: Refitter,
    dense: Mapping[str, Tensor],
    small: Mapping[str, Tensor],
    dense_stream: Stream,
    small_stream: Stream,
) -> dict[str, Tensor]:
    """The small head, which still has all units, with those that stay and the answer refitted."""
    family, execution = refitter.family, refitter.execution
    head, kept = family.task_head, small_stream.hidden.shape[-1]
    all_units = len(small[f"{head.units}.weight"])
    weight_AU = torch.eye(all_units).to(dense[f"{head.units}.weight"])
    constant_A = torch.zeros_like(weight_AU[0])
    if head.answer is not None:
        weight_AU, constant_A = (dense[f"{head.answer}.{part}"] for part in ("weight", "bias"))
    grams = empty_grams(refitter, all_units, len(weight_AU))

    def units(of: Mapping[str, Tensor], x: Tensor) -> Tensor:
        parts = (of[f"{head.units}.{part}"].to(x) for part in ("weight", "bias"))
        return getattr(torch, head.activation)(functional.linear(x, *parts))

    def add_batch(rows: slice, x: Tensor) -> None:
        there = widen(fetch(dense_stream.hidden[rows], execution.device))
        answers = functional.linear(units(dense, there), weight_AU.to(there), constant_A.to(there))
        read = units(small, widen(x)).to(operand(x).dtype)
        add_tokens(refitter, grams, rows, read, answers, real=small_stream.real)

    probe_stream(small_stream, add_batch, execution)
    all_reduce_grams(refitter, grams)
    prior_UA = weight_AU.T
    if kept < all_units:
        kept_U = _survivors(refitter, grams, prior_UA, kept)
        small, prior_UA = keep_units(family, small, kept_U), prior_UA[kept_U]
        grams = tuple(restricted(gram, kept_U) for gram in grams)
    fitted = dict(small)
    if head.answer is not None:
        fit = fit_ridge(refitter, head.answer, grams, prior_UA, constant_A, by_input=True)
        fitted[f"{head.answer}.weight"] = fit.solution_PQ.T
        fitted[f"{head.answer}.bias"] = fit.intercept_Q
    return fitted


def _survivors(refitter: Refitter, grams: tuple[Gram, Gram], prior_UA: Tensor, kept: int) -> Tensor:
    """Numbers of the units that stay, rising."""
    choose = partial(select_units, sum_grams(*grams), prior_UA, kept, 1)
    kept_U = choose(refitter.unit_selection, CHOICE_RIDGE, solves_in(refitter.execution))
    refitter.execution.ranks.broadcast_(kept_U)
    return kept_U
