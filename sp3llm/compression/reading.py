"""How a family's stream is read: through a norm, or in a post-norm family as it stands.

Before a norm the stream is read normalised, and the norm's weight and bias fold into the readers
(docs/design.md 3.1). Behind one, it is read as it is, and there is nothing to fold.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from sp3llm.maths.moments import normalise
from sp3llm.maths.products import widen
from sp3llm.models.families import Family, Site


def read_at(family: Family, site: Site) -> str:
    """The module of a layer whose input is the stream in front of a site's block."""
    return site.readers[0] if family.post_norm else site.norm


def as_read(family: Family, eps: float, x: Tensor) -> Tensor:
    """The stream, `(..., D)`, as readers get it but for a norm's own weight, float32 at least."""
    return widen(x) if family.post_norm else normalise(x, eps, family.centred)


def norm_of(
    family: Family, norm: str, tensors: Mapping[str, Tensor], like: Tensor
) -> tuple[Tensor, Tensor | None]:
    """A norm's weight, with what the class adds to it, and its bias, in the dtype of `like`."""
    bias_D = tensors.get(f"{norm}.bias")
    weight_D = tensors[f"{norm}.weight"].to(like) + family.norm_offset
    return weight_D, None if bias_D is None else bias_D.to(like)


def folded_norm(
    family: Family, norm: str, tensors: Mapping[str, Tensor], like: Tensor
) -> tuple[Tensor, Tensor | None]:
    """What of a site's norm folds into its readers, weight and bias as `norm_of` gives them; of one
    that sits behind them nothing.
    """
    weight_D, bias_D = norm_of(family, norm, tensors, like)
    return (torch.ones_like(weight_D), None) if family.post_norm else (weight_D, bias_D)


def real_rows(x: Tensor, real: Tensor | None, rows: slice) -> Tensor:
    """Of a batch, `(windows, tokens, ...)`, the tokens that are no padding, `(N, ...)`; all of it,
    as it is, where nothing is padded. `real` is a stream's, `(windows, tokens)`.
    """
    return x if real is None else x[real[rows].to(x.device)]
