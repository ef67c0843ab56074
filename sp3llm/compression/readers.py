"""Fit the readers of a site, the head among them, through one map."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sp3llm.compression.projecting import rounded, vocabulary_pieces
from sp3llm.compression.projection import head_reader, norm_of, place_reader
from sp3llm.compression.refitter import (
    Refitter,
    add_tokens,
    all_reduce_grams,
    fit_ridge,
)
from sp3llm.maths.basis import stream_scale
from sp3llm.maths.moments import normalise
from sp3llm.maths.refit import Fit, Gram, empty_gram
from sp3llm.models import families
from sp3llm.models.families import Group, Site
from sp3llm.models.stream import Stream, probe_stream


def stream_grams(
    refitter: Refitter, dense_hidden: Tensor, small_stream: Stream
) -> tuple[Gram, Gram]:
    """Grams of a site that reads the streams as they stand."""
    width, kept = refitter.projection.basis_DK.shape
    grams = tuple(empty_gram(kept, width, refitter.execution.device) for _ in range(2))

    def see(rows: slice, x: Tensor) -> None:
        centred = refitter.family.centred
        dense_n = normalise(dense_hidden[rows].to(refitter.execution.device), refitter.eps, centred)
        add_tokens(refitter, grams, rows, normalise(x, refitter.eps, centred), dense_n)

    probe_stream(small_stream, see, refitter.execution)
    all_reduce_grams(refitter, grams)
    return grams


def _reader_map(refitter: Refitter, grams: tuple[Gram, Gram], intercept: bool, name: str) -> Fit:
    """`argmin_M |n - n' M|^2 + lambda |M - T^T / c|^2`, `M` `(K, D)`."""
    basis_DK = refitter.projection.basis_DK
    prior_KD = basis_DK.T / stream_scale(basis_DK)
    zero_D = torch.zeros_like(prior_KD[0]) if intercept else None
    return fit_ridge(refitter, name, grams, prior_KD, zero_D)


def fit_readers(
    refitter: Refitter,
    group: Group,
    site: Site,
    grams: tuple[Gram, Gram],
    source: Mapping[str, Tensor],
    tensors: dict[str, Tensor],
) -> None:
    """Readers of one site through one map: `W' = W diag(g) M^T`, constants into their biases, or
    through the spare direction where they have none.
    """
    family = refitter.family
    names = [f"{group.prefix}{reader}" for reader in site.readers]
    norm = f"{group.prefix}{site.norm}"
    has_biases = all(f"{name}.bias" in source for name in names)
    fit = _reader_map(refitter, grams, has_biases or family.norm_bias, norm)
    norm_D, bias_D = norm_of(family, norm, source, fit.solution_PQ)
    for name in names:
        if f"{name}.bias" in source:
            tensors[f"{name}.bias"] = source[f"{name}.bias"].to(norm_D)
        matrix_FD = source[f"{name}.weight"].to(norm_D)
        constant_F = None if bias_D is None else matrix_FD @ bias_D
        _place(refitter, tensors, name, matrix_FD * norm_D, constant_F, fit)


def _place(
    refitter: Refitter,
    tensors: dict[str, Tensor],
    name: str,
    folded_FD: Tensor,
    constant_F: Tensor | None,
    fit: Fit,
) -> None:
    """Set one reader from its site's map and what its norm's bias gives it."""
    if fit.intercept_Q is not None:
        constant_F = folded_FD @ fit.intercept_Q + (0 if constant_F is None else constant_F)
    place_reader(tensors, name, folded_FD @ fit.solution_PQ.T, constant_F)
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
    """The head, or the projection before a tied one, is one more reader.

    Without such a projection a tied table, with its two roles, stays as DESIGN 3.5 has it: the
    embeddings' role is exact within the subspace, and so is the head's.
    """
    family = refitter.family
    if refitter.projection.tied_scale_K is not None:
        return
    grams = stream_grams(refitter, dense_stream.hidden, small_stream)
    fit = _reader_map(refitter, grams, family.norm_bias, family.final_norm)
    group = families.groups(family, refitter.dense.config)[-1]
    found: dict[str, list[Tensor]] = {}
    for piece in vocabulary_pieces(family, refitter.projection, group, source):
        on_device = {name: tensor.to(refitter.execution.device) for name, tensor in piece.items()}
        name, folded_FD, constant_F = head_reader(family, on_device, refitter.projection)
        placed = {part: tensors[part] for part in (f"{name}.bias",) if part in tensors}
        _place(refitter, placed, name, folded_FD, constant_F, fit)
        for part, tensor in placed.items():
            found.setdefault(part, []).append(tensor)
    tensors |= {part: torch.cat(p) if len(p) > 1 else p[0] for part, p in found.items()}
