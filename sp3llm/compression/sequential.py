"""Fit a layer whose blocks come one after the other: attention, then the FFN."""

from torch import Tensor

from sp3llm.compression.readers import fit_readers, stream_grams
from sp3llm.compression.refitter import DenseLayer, LayerFit, Refitter
from sp3llm.compression.writers import fit_writer
from sp3llm.maths.refit import Gram
from sp3llm.models.hooks import ValueCounts, value_counts
from sp3llm.models.stream import LayerPart, LinearWriter, add_to_stream, run_layer
from sp3llm.runtime.transfer import store


def fit_first_writers(
    refitter: Refitter,
    layer: LayerFit,
    grams: tuple[Gram, Gram],
    targets: list[Tensor],
    counts: ValueCounts,
) -> None:
    """Fit the readers of one layer, and all writers but the last, one block after the other.

    The small stream moves on by each fitted writer's own output; of the blocks behind it nothing
    runs again, and what is before it is silent.

    `grams` are those of the first site, `targets` the dense stream behind each of these writers,
    `counts` how many values each block returns.
    """
    small_stream = layer.small_stream
    for number, site in enumerate(layer.group.sites):
        if number:
            grams = stream_grams(refitter, targets[number - 1], small_stream)
        fit_readers(refitter, layer, site, grams)
        if number < len(targets):
            zeroed = _silent(layer, number, counts)
            inputs, kept_P = fit_writer(refitter, layer, number, targets[number], zeroed, True)
            writer = _linear_writer(refitter, layer, number, kept_P)
            add_to_stream(small_stream, inputs, writer, refitter.execution)


def fit_last_writer(refitter: Refitter, layer: LayerFit, counts: ValueCounts) -> None:
    """Fit the last writer of a layer to the dense stream as it stands, and send the small stream
    through it.

    Experts' writers, each of which sees some tokens only, stay projected.
    """
    small_stream, number = layer.small_stream, len(layer.group.sites) - 1
    zeroed = _silent(layer, number, counts)
    if not layer.group.sparse:
        keeps, target = refitter.execution.keeps_inputs, layer.dense.stream.hidden
        inputs, kept_P = fit_writer(refitter, layer, number, target, zeroed, keeps)
        if keeps:
            writer = _linear_writer(refitter, layer, number, kept_P)
            add_to_stream(small_stream, inputs, writer, refitter.execution)
            return
    # The last writer's inputs are the widest of all: running its block again costs less memory.
    part = LayerPart(zeroed=zeroed)
    run_layer(layer.small_models[-1], layer.index, layer.tensors, [(small_stream, {})], part)


def _silent(layer: LayerFit, number: int, counts: ValueCounts) -> dict[str, int | None]:
    """The blocks in front of a site, whose output is in the small stream already."""
    return {done.block: counts[done.block] for done in layer.group.sites[:number]}


def _linear_writer(
    refitter: Refitter, layer: LayerFit, number: int, kept_P: Tensor | None
) -> LinearWriter:
    """A layer's fitted writer, which reads those at `kept_P` of its inputs; None: all."""
    name = layer.name(refitter.family.writers[number])
    weight_KP, bias_K = layer.tensors[f"{name}.weight"], layer.tensors.get(f"{name}.bias")
    return LinearWriter(f"the small {name}", weight_KP, bias_K, kept_P, refitter.multiplier)


def run_dense(refitter: Refitter, dense: DenseLayer) -> tuple[list[Tensor], ValueCounts]:
    """Run the dense layer.

    Returns the stream after each of its writers but the last, and how many values each of its
    blocks returns.
    """
    family, hidden = refitter.family, dense.stream.hidden
    between = [
        refitter.execution.empty_stream(tuple(hidden.shape), hidden.dtype) for _ in family.sites[1:]
    ]
    probes = {}
    for site, place in zip(family.sites[1:], between, strict=True):

        def keep(rows: slice, x: Tensor, place: Tensor = place) -> None:
            store(place[rows], x, refitter.execution.device)

        probes[site.norm] = keep
    blocks = [site.block for site in family.sites]
    with value_counts(dense.model.layer(dense.index), blocks) as counts:
        run_layer(dense.model, dense.index, dense.source, [(dense.stream, probes)])
    return between, counts
