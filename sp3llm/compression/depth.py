"""What layers are worth, and which of them go.

A layer adds `d_l` to the stream in front of it, `x_{l+1} = x_l + d_l`. What a linear map of `x_l`
says of `d_l` the refit can put in its place; the rest, `e_l`, is missing. With `g` the gradient of
a token's loss behind the layer, labels drawn from the model, that costs `E[(g e_l)^2] / 2` nats a
token to second order. Unlike the other axes' (`compression.predicting`) this keeps each token's
gradient with its error: a few tokens have a stream far larger than all others, and next to no
gradient. In front of the first layer nothing is fitted, and without the refit nothing is anywhere:
there all of `d_l` is missing. Losses of several layers add up, so that the layers that go for a
lower number are among those that go for a still lower one.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sp3llm.compression.dense_pass import DensePass
from sp3llm.compression.reading import real_rows
from sp3llm.compression.refitter import solves_in
from sp3llm.compression.statistics import Moments
from sp3llm.maths.moments import root_mean_square
from sp3llm.maths.products import operand, product, widen
from sp3llm.maths.refit import add_to_gram, empty_gram, gram_tensors, ridge_solution
from sp3llm.models.shapes import Shape
from sp3llm.runtime.transfer import fetch, fetched

# Relative to the mean diagonal, of the map that the addition is explained by.
_MAP_RIDGE = 1e-2


def layer_loss(
    run: DensePass,
    index: int,
    before: Tensor,
    after: Tensor,
    upstream: Tensor,
    real: Tensor | None = None,
) -> Tensor:
    """What goes with a layer, by its number, nats a token; a float64 scalar, the same on every
    process.

    `before` and `after` are the stream in front of it and behind, `upstream` is the gradient of
    the loss by the latter, none at padding; `(windows, tokens, D)`, of this process's traced
    windows. `real` says what is no padding.
    """
    width, execution = before.shape[-1], run.execution
    rows = [slice(row, row + 1) for row in range(len(before))]

    def windows() -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        for row, behind in fetched(after, rows, execution.device):
            front = fetch(before[row], execution.device)
            yield row, front, widen(behind) - widen(front), behind

    gram = empty_gram(width, width, execution.device)
    for row, *three in windows():
        front, added, behind = (real_rows(one, real, row) for one in three)
        # As the next norm will read it, which is what a writer is fitted by.
        weight = root_mean_square(behind, run.family.centred).square().reciprocal()[..., 0]
        add_to_gram(gram, operand(front), added, widen(weight))
    execution.ranks.all_reduce_(*gram_tensors(gram))
    nothing_DD = torch.zeros_like(gram.cross_PQ)
    if index and run.gaps == "bridged":
        of_map = (gram, nothing_DD, _MAP_RIDGE, True, solves_in(execution))
        map_DD, constant_D, _ = ridge_solution(*of_map)
    else:
        map_DD, constant_D = nothing_DD, nothing_DD[0]
    total = torch.zeros((), dtype=torch.float64, device=execution.device)
    for row, front, added, _ in windows():
        explained = product(operand(front)[0].T, map_DD.to(added)) + constant_D.to(added)
        gradients = widen(fetch(upstream[row], execution.device))[0]
        total += ((added[0] - explained) * gradients).sum(-1).double().square().sum()
    execution.ranks.all_reduce_(total)
    loss = total / 2 / run.traced_tokens
    execution.ranks.broadcast_(loss)  # a last bit can turn an order around
    return loss


def kept_layers(moments: Moments, shape: Shape) -> tuple[int, ...] | None:
    """Numbers of the layers that stay in a shape, rising: those that are worth most; None: all."""
    if moments.layers_L is None or shape.num_hidden_layers in (None, len(moments.layers_L)):
        return None
    order_L = moments.layers_L.argsort(descending=True, stable=True)
    return tuple(order_L[: shape.num_hidden_layers].sort().values.tolist())


def depth_loss(moments: Moments, shape: Shape) -> float:
    """What a shape loses by the layers that go, nats a token."""
    kept = kept_layers(moments, shape)
    if kept is None:
        return 0.0
    return (moments.layers_L.sum() - moments.layers_L[list(kept)].sum()).item()
