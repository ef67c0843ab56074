"""What a compression will need of memory and disk, from `config.json` alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sp3llm.models.families import (
    VOCAB,
    Family,
    axis_sizes,
    count_largest_layer,
    count_parameters,
    is_parallel,
    is_sparse,
    is_square,
    setting,
)
from sp3llm.models.shapes import Shape, resized_config

# Loss gradients are taken on this many tokens, in whole windows: their moments only weigh
# directions, more gain nothing (docs/design.md 3.2), and every layer's input is kept for them.
GRADIENT_TOKENS = 8192


def gradient_windows(seq_len: int) -> int:
    """Windows of `seq_len` tokens that loss gradients are taken on, one at least."""
    return max(1, GRADIENT_TOKENS // seq_len)


@dataclass(frozen=True)
class Needs:
    """What a run will need, bytes, estimated from shapes alone; none of it grows with depth but
    the disk.
    """

    streams: int
    """Residual streams of all windows, wherever `--streams` puts them."""
    working: int
    """Largest layer in both sizes with its Gram matrices, on the device that computes."""
    disk: int
    """Of the compressed weights."""
    kept: int
    """On disk while it runs, for the run to be continued after a kill."""
    token: int
    """What the activations of one token take in a layer."""


def needs_of(
    family: Family,
    config: Mapping[str, Any],
    shape: Shape,
    samples: int,
    eval_samples: int,
    seq_len: int,
    itemsize: int,
    compute_itemsize: int,
) -> Needs:
    """Estimate the memory and disk of `sp3llm compress`.

    The first pass holds calibration and evaluation streams; the second the dense stream before and
    between the writers of a layer, the small one and what attention's writer reads. Of a layer
    there are the dense weights, the next layer's, those placed to run and the small ones, made in
    float64. Gram matrices are float64: one to fit and one held back, their sum where something is
    chosen, and a factor or an inverse, made in place; at the end of a layer products of them. The
    basis takes second moments and metrics of four groups of sites. On disk lie a shard of weights
    twice, every layer's input for the windows (`gradient_windows`) whose gradients the basis is
    made from, and the streams as they were after two layers, and a third while it is saved.
    """
    dense = Shape.of(family, config)
    wide, narrow = dense.hidden_size, shape.hidden_size
    depth = setting(family, config, "num_hidden_layers")
    traced = min(samples, gradient_windows(seq_len)) * (depth + 1)
    heads = dense.num_attention_heads * dense.head_dim
    first = (samples + eval_samples) * wide
    second = samples * ((1 + len(family.sites[1:])) * wide + narrow + heads)
    streams = max(first, second) * seq_len * compute_itemsize
    layer = count_largest_layer(family, config)
    table = axis_sizes(family, config)[VOCAB] * wide
    # The only writers that are not fitted are experts'.
    is_fitted = not all(is_sparse(family, config, index) for index in range(depth))
    widest_input = max(dense.intermediate_size if is_fitted else 0, heads)
    if is_parallel(family, config):  # all writers in one regression
        widest_input = dense.intermediate_size + heads
    basis = 8 * (24 if family.centred else 14) * wide**2
    grams = 8 * (7 * widest_input**2 + 6 * widest_input * narrow)
    # What heads are cut by is kept for all layers.
    of_heads = 8 * 3 * depth * heads * dense.head_dim if is_square(family, config) else 0
    layers = layer * (3 * itemsize + compute_itemsize)
    weights = count_parameters(family, resized_config(family, config, shape)) * itemsize
    kept = 3 * (first if first > second else samples * (wide + narrow)) * seq_len
    return Needs(
        streams=streams,
        working=of_heads
        + max(layers + max(grams, basis, 8 * layer), table * (2 * itemsize + compute_itemsize)),
        disk=weights,
        kept=min(weights, 2 * 10**9)
        + (traced * wide * seq_len + kept) * compute_itemsize
        + 2 * 8 * 9 * wide**2,
        token=4 * (8 * wide + 4 * dense.intermediate_size + 4 * heads),
    )
