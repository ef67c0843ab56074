"""What a compression will need of memory and disk, from `config.json` alone."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from sp3llm.models.served import export_of
from sp3llm.models.shapes import Shape, resized_config
from sp3llm.planning.windows import windows_that_tell

GRADIENT_TOKENS = 8192
"""Calibration tokens that the loss gradients behind the basis are taken on, in whole windows, one
at least. They only weigh directions, and four times as many gave no better basis (eval/NOTES.md),
while the input of every layer is kept on disk for each of them."""


_FLOAT64, _FLOAT32 = 8, 4

# How many tensors of which size are alive at once. They follow from reading `compression/` and are
# rounded up.

# Of `(width, width)`, float64: the second moments of the stream, the metrics that gradients make at
# the sites and behind the writers, and what a basis weighs errors by, each in the four groups that
# `compression.measuring` sums neighbouring places into; moment and metric of what the head reads.
_STREAM_MOMENTS = 4 * 4 + 2
# Of that size too, while the basis is found: gradients, directions, products with the moments.
_BASIS_WORK = 5
# Under LayerNorm also the moments in mean-free coordinates, and the map into these.
_CENTRED_MOMENTS = _STREAM_MOMENTS + 1
# Of `(inputs, inputs)`, float64, while a writer is fitted: the Gram matrices of the tokens to fit
# and of those held back, their sum where units are chosen, a factor or an inverse, made in place,
# and products of them.
_INPUT_GRAMS = 7
# Of `(inputs, small width)` beside them: the Grams' cross moments of inputs and targets, the
# weights to begin from, solutions and products.
_CROSS_GRAMS = 6
# Of both while tokens go through a layer: the Grams, a product before it is added to one, the
# weights to begin from.
_RUNNING_INPUT_GRAMS, _RUNNING_CROSS_GRAMS = 3, 4
# Of `(head size, head size)`, float64, for every head of every layer, where the heads themselves
# are cut: moments of queries, keys and outputs, and the maps of the first two.
_HEAD_MOMENTS = 5
# Of a layer's weights in the dtype of the checkpoint: the dense ones, those of the next layer,
# which is read meanwhile, and the small ones. Those that run are in the dtype of the arithmetic.
_LAYERS_AS_STORED = 3
# Of an embedding table in the dtype of the checkpoint, beside the one that runs.
_TABLES_AS_STORED = 2
# Of the head, sums of distributions times what it reads, of both models.
_TABLES_OF_SUMS = 2
# Of the saved streams: as they were after two layers, and a third while it is saved.
_SAVED_STREAMS = 3
# Of the saved moments: the last, and those that are being saved.
_SAVED_MOMENTS = 2
# Vectors a token, float32, while a layer runs: as wide as the stream, the FFN, all heads together.
_STREAM_ACTIVATIONS, _FFN_ACTIVATIONS, _HEAD_ACTIVATIONS = 8, 4, 4

# The largest file of weights that is written (`models.export`); while its parts are merged they lie
# on disk twice.
_SHARD_BYTES = 2 * 10**9


def gradient_windows(seq_len: int) -> int:
    """Windows of `seq_len` tokens that loss gradients are taken on, one at least."""
    return max(1, GRADIENT_TOKENS // seq_len)


@dataclass(frozen=True)
class Workload:
    """What goes through a compression, and in which precision."""

    samples: int
    """Calibration windows."""
    eval_samples: int
    """Evaluation windows."""
    seq_len: int
    """Tokens a window."""
    weight_itemsize: int
    """Bytes of a weight in the dense checkpoint, and in the small one."""
    compute_itemsize: int = _FLOAT32
    """Bytes of a number of the streams, and of the weights while they run."""


@dataclass(frozen=True)
class Needs:
    """What a run will need, bytes, estimated from shapes alone; none of it grows with depth but
    the disk, and `dense`, which it can do without.
    """

    streams: int
    """Residual streams of all windows, wherever `--streams` puts them."""
    working: int
    """Largest layer in both sizes with its Gram matrices, on the device that computes."""
    disk: int
    """Of the compressed weights."""
    kept: int
    """On disk while it runs, for the run to be continued after a kill."""
    running: int
    """Of `working`, what is there while tokens go through a layer."""
    token: int
    """What the activations of one token take in a layer."""
    inputs: int
    """What the FFN's writer reads, of all calibration windows: kept where there is room."""
    dense: int
    """What the dense layers leave of all calibration windows: kept where there is much room; it
    does grow with depth."""


@dataclass(frozen=True)
class _Widths:
    """Lengths that the estimates are made of."""

    dense: int
    """Of the dense residual stream."""
    small: int
    """Of the compressed one."""
    ffn: int
    """Of the dense FFN."""
    heads: int
    """Of all dense query heads together."""
    table: int
    """Of a row of the compressed model's table, and of its head."""


def needs_of(
    family: Family,
    config: Mapping[str, Any],
    shape: Shape,
    workload: Workload,
    export_as: str = "same",
) -> Needs:
    """Estimate the memory and disk of `sp3llm compress` for a model that is cut to `shape` and
    written as `export_as` says (`models.served.export_of`).
    """
    if family.task_head is None:
        telling = windows_that_tell(workload.samples, workload.seq_len)
        workload = replace(workload, samples=workload.samples + telling)
    dense = Shape.of(family, config)
    widths = _Widths(
        dense=dense.hidden_size,
        small=shape.hidden_size,
        ffn=dense.intermediate_size,
        heads=dense.num_attention_heads * dense.head_dim,
        table=shape.word_embed_proj_dim or shape.hidden_size,
    )
    measuring, building = _channels(family, widths, workload)
    export = export_of(family, resized_config(family, config, shape), export_as)
    small_parameters = count_parameters(export.family, export.config)
    small_bytes = small_parameters * workload.weight_itemsize
    # Between layers of the building pass the dense and the small stream are all there is to save.
    saved = measuring if measuring > building else workload.samples * (widths.dense + widths.small)
    return Needs(
        streams=max(measuring, building) * workload.seq_len * workload.compute_itemsize,
        working=_working_bytes(family, config, widths, workload),
        running=_running_bytes(family, config, widths, workload),
        disk=small_bytes,
        kept=min(small_bytes, _SHARD_BYTES)
        + _SAVED_STREAMS * saved * workload.seq_len * workload.compute_itemsize
        + _traced_bytes(family, config, widths, workload)
        + _SAVED_MOMENTS * _FLOAT64 * _STREAM_MOMENTS * widths.dense**2,
        inputs=workload.samples * workload.seq_len * widths.ffn * workload.compute_itemsize,
        dense=_left_behind(family, config, widths, workload),
        token=_FLOAT32
        * (
            _STREAM_ACTIVATIONS * widths.dense
            + _FFN_ACTIVATIONS * widths.ffn
            + _HEAD_ACTIVATIONS * widths.heads
        ),
    )


def _channels(family: Family, widths: _Widths, workload: Workload) -> tuple[int, int]:
    """Numbers held for every position of a window, over all windows, while the dense model is
    measured and while the small one is built.

    The first pass holds the stream of the calibration and the evaluation windows. The second holds,
    of the calibration windows, the dense stream as a layer gets it and between its blocks, the
    small stream, and what the writer of attention reads.
    """
    measuring = (workload.samples + workload.eval_samples) * widths.dense
    between_blocks = len(family.sites) - 1
    building = (1 + between_blocks) * widths.dense + widths.small + widths.heads
    return measuring, workload.samples * building


def _left_behind(
    family: Family, config: Mapping[str, Any], widths: _Widths, workload: Workload
) -> int:
    """Of the dense stream behind every writer; in a post-norm family in front of the norms too."""
    places = 1 if is_parallel(family, config) else len(family.sites)
    numbers = places * (2 if family.post_norm else 1) * widths.dense
    positions = workload.samples * workload.seq_len * setting(family, config, "num_hidden_layers")
    return positions * numbers * workload.compute_itemsize


def _working_bytes(
    family: Family, config: Mapping[str, Any], widths: _Widths, workload: Workload
) -> int:
    """Memory of the device that computes: of a layer and what is solved for it, or of the
    embedding table and what the head's step is made of (docs/design.md 3.17), whichever is more,
    and what is known of all heads.
    """
    stored, computed = workload.weight_itemsize, workload.compute_itemsize
    layer = count_largest_layer(family, config)
    weights = layer * (_LAYERS_AS_STORED * stored + computed)
    # One after the other: the search for the basis, the fits, the small layer before rounding.
    solving = max(
        _gram_bytes(family, config, widths), _basis_bytes(family, widths), _FLOAT64 * layer
    )
    rows = axis_sizes(family, config)[VOCAB]
    tables = rows * widths.dense * (_TABLES_AS_STORED * stored + computed)
    if family.task_head is None:
        tables += rows * widths.table * (_TABLES_OF_SUMS * _FLOAT32 + stored + computed)
    return _head_moment_bytes(family, config, widths) + max(weights + solving, tables)


def _running_bytes(
    family: Family, config: Mapping[str, Any], widths: _Widths, workload: Workload
) -> int:
    """Of that, what is there while tokens go through a layer: nothing is solved meanwhile."""
    stored, computed = workload.weight_itemsize, workload.compute_itemsize
    weights = count_largest_layer(family, config) * (_LAYERS_AS_STORED * stored + computed)
    inputs, small = _most_inputs(family, config, widths), widths.small
    grams = _RUNNING_INPUT_GRAMS * inputs**2 + _RUNNING_CROSS_GRAMS * inputs * small
    moments = max(grams, _STREAM_MOMENTS * widths.dense**2)
    return _head_moment_bytes(family, config, widths) + weights + _FLOAT64 * moments


def _most_inputs(family: Family, config: Mapping[str, Any], widths: _Widths) -> int:
    """Inputs of the fitted writer that reads most."""
    depth = setting(family, config, "num_hidden_layers")
    # Writers in experts are not fitted.
    fits_ffn = not all(is_sparse(family, config, layer) for layer in range(depth))
    inputs = max(widths.ffn if fits_ffn else 0, widths.heads)
    if is_parallel(family, config):  # one regression for both writers of a layer
        inputs = widths.ffn + widths.heads
    return inputs


def _gram_bytes(family: Family, config: Mapping[str, Any], widths: _Widths) -> int:
    """Of the fit of the writer that reads most."""
    inputs = _most_inputs(family, config, widths)
    return _FLOAT64 * (_INPUT_GRAMS * inputs**2 + _CROSS_GRAMS * inputs * widths.small)


def _basis_bytes(family: Family, widths: _Widths) -> int:
    """Of the moments, and of the search for the basis among them."""
    centred = _CENTRED_MOMENTS if family.centred else 0
    return _FLOAT64 * (_STREAM_MOMENTS + _BASIS_WORK + centred) * widths.dense**2


def _head_moment_bytes(family: Family, config: Mapping[str, Any], widths: _Widths) -> int:
    """Of what heads are cut by, which is kept for all layers."""
    if not is_square(family, config):
        return 0
    depth = setting(family, config, "num_hidden_layers")
    head_dim = Shape.of(family, config).head_dim
    return _FLOAT64 * _HEAD_MOMENTS * depth * widths.heads * head_dim


def _traced_bytes(
    family: Family, config: Mapping[str, Any], widths: _Widths, workload: Workload
) -> int:
    """Of the input of every layer, and of the head, for the windows that gradients are taken on."""
    depth = setting(family, config, "num_hidden_layers")
    windows = min(workload.samples, gradient_windows(workload.seq_len))
    positions = windows * workload.seq_len * (depth + 1)
    return positions * widths.dense * workload.compute_itemsize
