"""What a shape will lose, in nats a token, from what the pass over the dense model measured.

Every axis of a shape loses by itself, and losses add up to first order: the hidden size what its
readers cannot get back from the subspace that is kept, the FFN and the KV groups what their
writers' curves say (`compression.curves`), smaller heads and narrower tables what their own
projections leave out, layers that go all that they add (`compression.depth`). All are weighed by
the Fisher information of what they disturb, to second order. What the refit does for one matrix is
in it, what later matrices do for an earlier one is not: so losses come out too large, much alike
within an axis, and trials set the scale of each (`compression.shape_search`).
"""

import torch
from torch import Tensor

from sp3llm.compression.basis_choice import table_roles
from sp3llm.compression.depth import depth_loss
from sp3llm.compression.projection import Projection, unembedding
from sp3llm.compression.statistics import Moments
from sp3llm.maths.refit import ridged_factor
from sp3llm.models import families
from sp3llm.models.checkpoint import Checkpoint
from sp3llm.models.families import Family
from sp3llm.models.shapes import Shape
from sp3llm.planning.search import Losses

# Relative to the mean diagonal, of the moment of what is kept: under LayerNorm it is singular.
_KEPT_RIDGE = 1e-9


def predicted_losses(moments: Moments, shape: Shape, projected: float) -> Losses:
    """What a shape loses, of which `projected` is what its projection does (`projection_loss`)."""
    return Losses(projected, _units_loss(moments, shape), depth_loss(moments, shape))


def projection_loss(
    dense: Checkpoint,
    family: Family,
    moments: Moments,
    projection: Projection,
    tokens: Tensor,
) -> float:
    """What a projection leaves out of the stream, and of the table where that has a width of its
    own, nats a token; `tokens` are the calibration windows.
    """
    lost = _stream_loss(dense, family, moments, projection)
    if projection.embedding_EJ is not None:
        lost += _table_loss(dense, family, moments, projection, tokens)
    return lost


def _stream_loss(
    dense: Checkpoint, family: Family, moments: Moments, projection: Projection
) -> float:
    """By the directions given up, at all sites; a head that is not refitted, as a tied one, has
    nothing in their place.
    """
    fisher, basis_DK = moments.fisher, projection.basis_DK
    depth = families.setting(family, dense.config, "num_hidden_layers")
    sites, slots = len(family.sites) * depth + 1, len(moments.sites_DD)
    loss = 0.0
    for slot, pair in enumerate(zip(moments.sites_DD, fisher.sites_DD, strict=True)):
        # Both are sums over the sites of the slot.
        members = sum(site * slots // sites == slot for site in range(sites))
        loss += _cost(_unexplained(pair[0], basis_DK), pair[1]) / members
    if projection.tied_scale_K is not None:
        head_DD = moments.head_DD
        given_up_DD = head_DD - basis_DK @ (basis_DK.T @ head_DD)
        given_up_DD = given_up_DD - (given_up_DD @ basis_DK) @ basis_DK.T
        rest_DD = _unexplained(head_DD, basis_DK)
        loss += _cost(given_up_DD, fisher.head_DD) - _cost(rest_DD, fisher.head_DD)
    return loss


def _table_loss(
    dense: Checkpoint, family: Family, moments: Moments, projection: Projection, tokens: Tensor
) -> float:
    """By the coordinates of the embeddings given up, in both roles of the table: what the stream
    does not get at its beginning, and what the head cannot score.
    """
    roles, embedding_EJ = table_roles(dense, family, moments, tokens), projection.embedding_EJ
    fisher, eye_EE = moments.fisher, torch.eye(len(embedding_EJ)).to(embedding_EJ)
    not_taken_EE = eye_EE - embedding_EJ @ embedding_EJ.T
    error_DD = roles.into_ED.T @ not_taken_EE @ roles.looked_up_EE @ not_taken_EE @ roles.into_ED
    taken = (roles.into_ED.T @ roles.looked_up_EE @ roles.into_ED).trace() / len(error_DD)
    loss = _cost(error_DD / taken, fisher.behind_DD[0])
    # Gradients by what the table scores, from those by what the projection in front of it reads.
    back_DE = torch.linalg.pinv(roles.read_ED)
    not_scored_EE = eye_EE - embedding_EJ @ unembedding(roles.table_VE, projection)
    error_EE = not_scored_EE @ roles.given_EE @ not_scored_EE.T
    return loss + _cost(error_EE, back_DE.T @ fisher.head_DD @ back_DE)


def _cost(error_DD: Tensor, metric_DD: Tensor) -> float:
    """What an error with that second moment costs: `tr(A E) / 2`."""
    return (metric_DD * error_DD).sum().item() / 2


def _unexplained(square_DD: Tensor, basis_DK: Tensor) -> Tensor:
    """What a least-squares fit to the kept coordinates leaves of the stream, `(D, D)`."""
    across_DK = square_DD @ basis_DK
    factor_KK, _, _ = ridged_factor(basis_DK.T @ across_DK, _KEPT_RIDGE)
    return square_DD - across_DK @ torch.cholesky_solve(across_DK.T, factor_KK)


def _units_loss(moments: Moments, shape: Shape) -> float:
    """By the neurons, KV groups and dimensions of heads that go."""
    kept = {
        families.FFN: shape.intermediate_size,
        families.QUERY: shape.num_key_value_heads,
        families.HEAD_DIM: shape.head_dim,
    }
    return sum(_at(curve, kept[axis]) for axis, curve in moments.curves.items())


def _at(curve: Tensor, units: int) -> float:
    """A curve's nats at a number of units, between its points along a straight line."""
    counts, nats = curve.flip(0).T.contiguous()
    place = torch.searchsorted(counts, counts.new_tensor(float(units))).clamp(1, len(counts) - 1)
    low, high = counts[place - 1], counts[place]
    share = (units - low) / (high - low)
    return (nats[place - 1] + share * (nats[place] - nats[place - 1])).item()
