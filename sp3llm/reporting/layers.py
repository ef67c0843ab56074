"""How well each layer of a compressed model does what the dense one's did: the fits as pictures."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sp3llm.models import families
from sp3llm.models.families import Family
from sp3llm.reporting.plots import Line, layers_plot
from sp3llm.reporting.record import Fit

# A fit at its place in the depth of the model, in layers.
_Placed = tuple[float, Fit]


def layer_plots(
    fits: Sequence[Fit], family: Family, config: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Caption and SVG: the energy that readers of the stream get, and what its writers miss.

    `config` is the compressed model's. Nothing where there were no fits.
    """
    reads, writes = _placed(fits, family, config)
    plots = []
    if reads:
        lines = [
            Line("projected", *_points(reads, lambda fit: 1 - fit.plain_error), False, "o"),
            Line("refitted", *_points(reads, lambda fit: 1 - fit.error), True, "o"),
        ]
        picture = layers_plot(lines, "energy kept, %", "reads", percent=True)
        plots.append(("Energy kept, layer by layer", picture))
    # Parallel blocks are fitted together, under both names.
    is_parallel = bool(writes[0]) and " + " in writes[0][0][1].name
    blocks = ["both"] if is_parallel else ["attention", "FFN"]
    lines = []
    for block, placed, marker in zip(blocks, writes, "os", strict=False):
        if placed:
            plain = _points(placed, lambda fit: fit.plain_error)
            refitted = _points(placed, lambda fit: fit.error)
            lines.append(Line(f"{block}, projected", *plain, False, marker))
            lines.append(Line(f"{block}, refitted", *refitted, True, marker))
    if lines:
        picture = layers_plot(lines, "relative squared error", "writes")
        plots.append(("Refit error, layer by layer", picture))
    return plots


def _placed(
    fits: Sequence[Fit], family: Family, config: Mapping[str, Any]
) -> tuple[list[_Placed], list[list[_Placed]]]:
    """Fits of what reads the stream, and of what writes to it by block, attention first.

    Readers of a layer lie evenly between it and the next; the head's come last.
    """
    named = {fit.name: fit for fit in fits}
    layers = [group for group in families.groups(family, config) if group.prefix]
    reads: list[_Placed] = []
    writes: list[list[_Placed]] = [[] for _ in family.writers]
    for group in layers:
        for number, site in enumerate(group.sites):
            if fit := named.get(f"{group.prefix}{site.norm}"):
                reads.append((group.layer + number / len(group.sites), fit))
        writers = [f"{group.prefix}{writer}" for writer in group.writers]
        if fit := named.get(" + ".join(writers)):  # parallel blocks are fitted together
            writes[0].append((group.layer, fit))
        for number, name in enumerate(writers[: len(writes)]):
            if fit := named.get(name):
                writes[number].append((group.layer, fit))
    if fit := named.get(family.final_norm):
        reads.append((len(layers), fit))
    return reads, writes


def _points(
    placed: Sequence[_Placed], value: Callable[[Fit], float]
) -> tuple[list[float], list[float]]:
    """Places, and the values there."""
    return [at for at, _ in placed], [value(fit) for _, fit in placed]
