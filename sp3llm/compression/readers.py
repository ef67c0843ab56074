"""Fit the readers of a site, the head among them, through one map."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from sp3llm.compression.projecting import rounded, vocabulary_pieces
from sp3llm.compression.projection import head_reader, set_reader
from sp3llm.compression.reading import as_read, folded_norm
from sp3llm.compression.refitter import (
    LayerFit,
    Refitter,
    add_tokens,
    all_reduce_grams,
    empty_grams,
    fit_ridge,
    solves_in,
)
from sp3llm.maths.basis import stream_scale
from sp3llm.maths.products import multiply, operand
from sp3llm.maths.refit import Gram
from sp3llm.maths.ridge import Fit
from sp3llm.models import families
from sp3llm.models.families import Site
from sp3llm.models.stream import Stream, probe_stream
from sp3llm.runtime.transfer import fetch


def stream_grams(
    refitter: Refitter, dense_hidden: Tensor, small_stream: Stream
) -> tuple[Gram, Gram]:
    """Grams of a site's map from the small stream, normalised, to the dense one.

    Both are taken as they stand; `dense_hidden` is `(windows, tokens, D)`.
    """
    width, kept = refitter.projection.basis_DK.shape
    grams = empty_grams(refitter, kept, width)

    def add_batch(rows: slice, x: Tensor) -> None:
        read = partial(as_read, refitter.family, refitter.eps)
        dense_n = read(fetch(dense_hidden[rows], refitter.execution.device))
        # As the norm hands it on, whose weight is 1: in bfloat16, where the stream is.
        small_n = read(x).to(operand(x).dtype)
        add_tokens(refitter, grams, rows, small_n, dense_n, real=small_stream.real)

    probe_stream(small_stream, add_batch, refitter.execution)
    all_reduce_grams(refitter, grams)
    return grams


def reader_map(refitter: Refitter, grams: tuple[Gram, Gram], intercept: bool, name: str) -> Fit:
    """`argmin_M |n - n' M|^2 + lambda |M - T^T / c|^2`, `M` `(K, D)`."""
    basis_DK = refitter.projection.basis_DK
    prior_KD = basis_DK.T / stream_scale(basis_DK)
    zero_D = torch.zeros_like(prior_KD[0]) if intercept else None
    return fit_ridge(refitter, name, grams, prior_KD, zero_D)


def fit_readers(refitter: Refitter, layer: LayerFit, site: Site, grams: tuple[Gram, Gram]) -> None:
    """Set the readers of one site through one map, `W' = W diag(g) M^T`, in the layer's tensors.

    Constants, those of the norm's bias and of the map's intercept, go into the readers' biases, or
    through the spare direction of the stream where they have none.
    """
    family, source, tensors = refitter.family, layer.cut, layer.tensors
    names = [layer.name(reader) for reader in site.readers]
    norm = layer.name(site.norm)
    has_biases = all(f"{name}.bias" in source for name in names)
    fit = reader_map(refitter, grams, has_biases or family.norm_bias, norm)
    norm_D, bias_D = folded_norm(family, norm, source, fit.solution_PQ)
    for name in names:
        if f"{name}.bias" in source:
            tensors[f"{name}.bias"] = source[f"{name}.bias"].to(norm_D)
        matrix_FD = source[f"{name}.weight"].to(norm_D)
        constant_F = None if bias_D is None else matrix_FD @ bias_D
        _set_fitted_reader(refitter, tensors, name, (matrix_FD * norm_D, constant_F), fit)


def _set_fitted_reader(
    refitter: Refitter,
    tensors: dict[str, Tensor],
    name: str,
    folded: tuple[Tensor, Tensor | None],
    fit: Fit,
) -> None:
    """Set one reader, rounded, from the map of its site.

    `folded` are its matrix with the norm's weight folded in, `(F, D)`, and the constant that the
    norm's bias gives it, `(F,)`.
    """
    folded_FD, constant_F = folded
    if fit.intercept_Q is not None:
        constant_F = folded_FD @ fit.intercept_Q + (0 if constant_F is None else constant_F)
    dtype = solves_in(refitter.execution)
    reader_FK = multiply(folded_FD.to(dtype), fit.solution_PQ.T.to(dtype))
    set_reader(tensors, name, reader_FK.double(), constant_F)
    for part in (f"{name}.weight", f"{name}.bias"):
        if part in tensors:
            tensors[part] = rounded(part, tensors[part], refitter.dtype)


def fit_head(
    refitter: Refitter,
    source: Mapping[str, Tensor],
    tensors: dict[str, Tensor],
    dense_stream: Stream,
    small_stream: Stream,
) -> None:
    """Fit the head, or the projection before a tied one, which is one more reader.

    `source` are its dense tensors, `tensors` the projected ones, replaced in place. Without such a
    projection a tied table, with its two roles, stays as docs/design.md 3.5 has it: the
    embeddings' role is exact within the subspace, and so is the head's.
    """
    family = refitter.family
    if refitter.projection.tied_scale_K is not None:
        return
    grams = stream_grams(refitter, dense_stream.hidden, small_stream)
    fit = reader_map(refitter, grams, family.norm_bias, family.final_norm)
    group = families.groups(family, refitter.dense.config)[-1]
    pieces: dict[str, list[Tensor]] = {}
    for piece in vocabulary_pieces(family, refitter.projection, group, source):
        on_device = {name: tensor.to(refitter.execution.device) for name, tensor in piece.items()}
        name, *folded = head_reader(family, on_device, refitter.projection)
        fitted = {part: tensors[part] for part in (f"{name}.bias",) if part in tensors}
        _set_fitted_reader(refitter, fitted, name, tuple(folded), fit)
        for part, tensor in fitted.items():
            pieces.setdefault(part, []).append(tensor)
    tensors |= {part: torch.cat(p) if len(p) > 1 else p[0] for part, p in pieces.items()}
