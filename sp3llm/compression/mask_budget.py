"""What a learned mask may take of a model, and what is demanded of it.

Gates are learned against expectations: how many are open. What these count is the plan's own
count, continued to sizes that are no whole numbers.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sp3llm.maths.gates import Gates, interpolated, unevenness
from sp3llm.models.families import Family, is_square
from sp3llm.models.served import export_of
from sp3llm.models.shapes import Shape, cost_of, resized_config
from sp3llm.planning.limits import Limits, cost_in
from sp3llm.planning.search import learnable

_UNITS = ("intermediate_size", "num_key_value_heads")
_SIZES = ("hidden_size", *_UNITS)
# By field of gates, what they decide of a shape.
_DECIDES = dict(zip(("stream_C", "neurons_LF", "groups_LG"), _SIZES, strict=True))


@dataclass(frozen=True)
class Budget:
    """What may go, what it counts, and what is demanded of it."""

    dense: Shape
    shapes: list[Shape]
    """To choose from in the end."""
    keep: float
    """Share of the dense count that the largest of them has."""
    cost: Callable[[dict[str, Tensor]], Tensor]
    """Share of it that expected sizes make, by field of a shape; those of the dense model where
    none is given."""
    square: bool
    """The width is heads times head size."""

    def gated(self) -> list[str]:
        """Gates that there are: those of what any candidate has less of."""
        shapes, dense = self.shapes, self.dense
        return [
            gate
            for gate, name in _DECIDES.items()
            if any(getattr(shape, name) != getattr(dense, name) for shape in shapes)
        ]

    def fixed(self, name: str) -> int | None:
        """The size that all candidates have."""
        sizes = {getattr(shape, name) for shape in self.shapes}
        return sizes.pop() if len(sizes) == 1 else None

    def target(self, fallen: float) -> float:
        """What is to be left when the target has `fallen` from all there is to the budget."""
        # More than 1 where a narrower stream brings projections that the dense model has not.
        start = self.cost(self._sizes(0.0)).item()
        if self.is_fixed():
            return self.cost(self._sizes(fallen)).item()
        return start + fallen * (self.keep - start)

    def is_fixed(self) -> bool:
        """Whether there is nothing to trade."""
        return len(set(self.shapes)) == 1

    def _sizes(self, fallen: float) -> dict[str, Tensor]:
        """Those of the dense model, on the way to what is fixed."""
        found = {}
        for name in _SIZES:
            whole = getattr(self.dense, name)
            size = whole + fallen * ((self.fixed(name) or whole) - whole)
            found[name] = torch.tensor(size, dtype=torch.float64)
        return found

    def violated(self, opened: Gates, fallen: float) -> tuple[Tensor, dict[str, Tensor]]:
        """What is over the target, `(E,)`, and the expected sizes."""
        dense, sizes = self.dense, {}
        per_layer = (opened.neurons_LF, opened.groups_LG)
        if opened.stream_C is not None:
            # Under LayerNorm the stream has a coordinate more, which no gate is on.
            missing = dense.hidden_size - len(opened.stream_C)
            sizes["hidden_size"] = opened.stream_C.sum() + missing
        for name, open_LU in zip(_UNITS, per_layer, strict=True):
            if open_LU is not None:
                sizes[name] = open_LU.sum(1).mean()
        found = []
        if not self.is_fixed():
            found.append((self.cost(sizes) - self.target(fallen))[None])
        found += [unevenness(open_LU) for open_LU in per_layer if open_LU is not None]
        for name, size in sizes.items():
            if self.fixed(name) is not None:
                over = (size - self._sizes(fallen)[name]) / getattr(dense, name)
                found.append(over[None])
        in_step = self.square and self.fixed("num_key_value_heads") is None
        if in_step and "num_key_value_heads" in sizes:
            groups = sizes["num_key_value_heads"] / dense.num_key_value_heads
            found.append((groups - sizes["hidden_size"] / dense.hidden_size)[None])
        return torch.cat(found), sizes


def budget_of(
    family: Family, config: Mapping[str, Any], limits: Limits, candidates: list[Shape]
) -> Budget:
    """What a mask may take of a model, by the candidates of its plan."""
    shapes, dense = learnable(family, config, candidates), Shape.of(family, config)
    square = limits.square or is_square(family, config)
    base = dense if shapes[0].tie_word_embeddings == dense.tie_word_embeddings else dense.untied()
    if family.projections and base.tie_word_embeddings:
        base = replace(base, word_embed_proj_dim=shapes[0].word_embed_proj_dim)
    shrinks = any(shape.head_dim != dense.head_dim for shape in shapes)
    unit = dense.num_attention_heads
    if square and not shrinks:  # a width is a number of groups
        unit = dense.hidden_size // dense.num_key_value_heads
    names = [
        name
        for name in _SIZES
        if len({getattr(shape, name) for shape in (dense, *shapes)}) > 1
        and not (square and name == "num_key_value_heads")
    ]
    steps = {"hidden_size": unit, "intermediate_size": 1, "num_key_value_heads": 1}
    # A count is of second degree in the width at most, where heads go with it, of first in others.
    # The class has projections around a table only where it is not as wide as the stream.
    table = base.word_embed_proj_dim if base.tie_word_embeddings else None
    nodes = [
        _spread(steps[name], getattr(dense, name), table if name == "hidden_size" else None)
        for name in names
    ]

    def shape_at(point: tuple[int, ...]) -> Shape:
        sizes = dict(zip(names, point, strict=True))
        width = sizes.get("hidden_size", dense.hidden_size)
        groups = sizes.get("num_key_value_heads", dense.num_key_value_heads)
        if square and not shrinks:
            groups = dense.num_key_value_heads * width // dense.hidden_size
        found = base.with_groups(groups).with_width(width)
        if shrinks:
            found = replace(found, head_dim=width // dense.num_attention_heads)
        if not found.tie_word_embeddings:
            found = found.untied()
        ffn = sizes.get("intermediate_size", dense.intermediate_size)
        return replace(found, intermediate_size=ffn)

    export_as = _class_of_all(family, config, limits, shapes)

    def count(shape: Shape) -> int:
        cost = cost_of(family, config, shape, limits.context, limits.itemsize, export_as)
        return cost.of(limits.of)

    whole = cost_in(family, config, limits, dense)
    values = {point: count(shape_at(point)) / whole for point in itertools.product(*nodes)}

    def cost(sizes: dict[str, Tensor]) -> Tensor:
        whole = {name: torch.tensor(float(getattr(dense, name))) for name in names}
        return interpolated(nodes, values, [{**whole, **sizes}[name] for name in names])

    return Budget(dense, shapes, max(map(count, shapes)) / whole, cost, square)


def _class_of_all(
    family: Family, config: Mapping[str, Any], limits: Limits, shapes: list[Shape]
) -> str:
    """What to count every size as, `same` or another class: the one written at any of the shapes.

    A count whose added parameters came and went with the width would be no polynomial in it.
    """
    for shape in shapes:
        export = export_of(family, resized_config(family, config, shape), limits.export_as)
        if export.family is not family:
            return export.family.model_type
    return "same"


def _spread(step: int, most: int, but: int | None) -> list[int]:
    """Three sizes up to `most`, or as many as there are, all multiples of `step`, far from one
    another, none of them `but`.
    """
    sizes = [size for size in range(step, most + 1, step) if size != but]
    return sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]})
