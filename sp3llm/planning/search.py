"""Which candidate loses least: which are worth a trial, and what trials say of the others."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sp3llm.models.families import Family
from sp3llm.models.shapes import Shape

# Trials at most. Later ones that promise no more than this beyond the best trial are worth one.
_MOST_TRIALS, _AS_GOOD = 5, 1.03
# How much more a narrower stream, and layers that go, lose of what is predicted than units do: of
# what units lose, later fits mend more. Trials said 1.3 of the stream and 2.2 of layers of
# SmolLM2-135M, 1 to 1.5 and 0.7 of models of 4 to 8 million parameters.
_MORE_OF_STREAM, _MORE_OF_DEPTH = 1.3, 1.3
# How much more than the best one a candidate may promise to lose and still be worth a trial at
# first, by what it loses more or less of: as far as the above is uncertain.
_CLOSE = {"stream": 1.15, "depth": 1.25}
# By which share of the best trial's loss one may lose more and be as good: trials of so little text
# cannot tell, and little text flatters narrow streams, whose matrices have fewer inputs to fit.
_TIE = 0.01
# How strongly scales are drawn towards each other, against one trial, and how small a share of the
# common one each is at least: errors of trials cannot make a part of a loss a gain.
_DRAWN, _LEAST_SHARE = 0.1, 0.1


def learnable(family: Family, config: Mapping[str, Any], shapes: list[Shape]) -> list[Shape]:
    """Of the candidates those that a learned mask chooses from.

    It finds the width, the FFN width and the number of KV groups; whether the head is tied, and the
    width of the embedding table, are as in the first candidate.
    """
    first, dense = shapes[0], Shape.of(family, config)
    heads_shrink = any(shape.head_dim != dense.head_dim for shape in shapes)

    def is_learnable(shape: Shape) -> bool:
        same_table = shape.word_embed_proj_dim == first.word_embed_proj_dim
        keeps_table = family.projections is not None and first.tie_word_embeddings
        keeps_groups = shape.num_key_value_heads == dense.num_key_value_heads
        return (
            shape.tie_word_embeddings == first.tie_word_embeddings
            and (same_table or not keeps_table)
            and (keeps_groups or not heads_shrink)
        )

    return [shape for shape in shapes if is_learnable(shape)]


def nearest(shapes: list[Shape], sizes: Mapping[str, float]) -> Shape:
    """The shape nearest to the `sizes` asked for, by field of `Shape`: the least sum of squared
    logarithms of the ratios. A size beyond what any shape has counts as the nearest that one has.
    """
    reached = {name: [getattr(shape, name) for shape in shapes] for name in sizes}
    wanted = {
        name: min(max(size, min(reached[name])), max(reached[name])) for name, size in sizes.items()
    }

    def distance(shape: Shape) -> float:
        return sum(math.log(getattr(shape, name) / size) ** 2 for name, size in wanted.items())

    return min(shapes, key=distance)


@dataclass(frozen=True)
class Losses:
    """What a candidate loses as predicted axis by axis, nats a token, before any scale."""

    stream: float
    """By the narrower stream, and by a narrower table of embeddings."""
    units: float
    """By fewer FFN neurons and KV groups, and by smaller heads."""
    depth: float = 0.0
    """By the layers that go."""
    vocabulary: float = 0.0
    """By fewer tokens, which is known and needs no scale."""

    @property
    def parts(self) -> tuple[float, ...]:
        """Those that trials set the scale of, as far as it is known without."""
        return _MORE_OF_STREAM * self.stream, self.units, _MORE_OF_DEPTH * self.depth


_PARTS = len(Losses(0.0, 0.0).parts)


@dataclass(frozen=True)
class Findings:
    """What a search found out, nats a token, by shape."""

    predicted: Mapping[Shape, float] = field(default_factory=dict)
    """Of all candidates, the scale set by the trials."""
    tried: Mapping[Shape, float] = field(default_factory=dict)
    """In the order of the trials."""


def shapes_to_try(predicted: Mapping[Shape, Losses], tried: Mapping[Shape, float]) -> list[Shape]:
    """Which candidates are worth a trial next; none: what is known is enough.

    At first those of a few mixes that promise most: the best, and the best of those that lose more
    and less of it by the stream, and by the layers that go, and of those with all layers, unless it
    is far behind; none where all are. Then one after the other whatever the scales that these have
    set promise to be as good as the best of them, while there are trials left.
    """
    promised = expected(predicted, tried)
    untried = [shape for shape in predicted if shape not in tried]
    best = min(untried, key=promised.__getitem__, default=None)
    if not tried:
        return _first_tries(predicted, promised, best)
    if best is None or len(tried) >= _MOST_TRIALS:
        return []
    return [best] if promised[best] <= _AS_GOOD * min(tried.values()) else []


def _first_tries(
    predicted: Mapping[Shape, Losses], promised: Mapping[Shape, float], best: Shape
) -> list[Shape]:
    """The first of `shapes_to_try`."""
    others: dict[Shape, float] = {}

    def look(shapes: Sequence[Shape], part: str) -> None:
        nearest = min(shapes, key=promised.__getitem__, default=best)
        if nearest is not best and promised[nearest] <= _CLOSE[part] * promised[best]:
            others[nearest] = promised[nearest]

    for part in _CLOSE:
        at = getattr(predicted[best], part)
        look([shape for shape in predicted if getattr(predicted[shape], part) > at], part)
        look([shape for shape in predicted if getattr(predicted[shape], part) < at], part)
    if predicted[best].depth > 0:  # both ends of that axis, whose scale is the least certain
        look([shape for shape in predicted if predicted[shape].depth == 0], "depth")
    close = sorted(others, key=others.__getitem__)
    return [best, *close[: _MOST_TRIALS - 2]] if close else []


def choose(predicted: Mapping[Shape, Losses], tried: Mapping[Shape, float]) -> Shape:
    """The candidate that loses least, of those that were tried, if any was; of those whose trials
    lose next to the same, one of the widest stream, which more text mends most.
    """
    if not tried:
        known = expected(predicted, tried)
        return min(known, key=known.__getitem__)
    least = min(tried.values())
    as_good = [shape for shape, loss in tried.items() if loss <= least + _TIE * abs(least)]
    return min(as_good, key=lambda shape: (-shape.hidden_size, tried[shape]))


def expected(predicted: Mapping[Shape, Losses], tried: Mapping[Shape, float]) -> dict[Shape, float]:
    """What each candidate will lose, nats a token: the prediction, the scales of all its parts set
    by the trials.

    The scales minimise the squared relative errors of the predictions of what was tried; where
    trials leave a mix of them open, it is that of one scale for all.
    """
    scales = _scales(
        [
            (predicted[shape], loss - predicted[shape].vocabulary)
            for shape, loss in tried.items()
            if loss > predicted[shape].vocabulary
        ]
    )
    return {
        shape: sum(scale * part for scale, part in zip(scales, losses.parts, strict=True))
        + losses.vocabulary
        for shape, losses in predicted.items()
    }


def _scales(known: Sequence[tuple[Losses, float]]) -> list[float]:
    """Of the parts of `Losses`, from predictions and what came out; 1 where nothing is known."""
    import numpy as np

    pairs = [(losses.parts, loss) for losses, loss in known if sum(losses.parts) > 0]
    if not pairs:
        return [1.0] * _PARTS
    logs = [math.log(loss / sum(losses)) for losses, loss in pairs]
    common = math.exp(sum(logs) / len(logs))
    # Least squares over the scales, all of them drawn towards the common one.
    rows = [[part / loss for part in losses] for losses, loss in pairs]
    design = np.concatenate([np.array(rows), np.eye(_PARTS) * _DRAWN / common])
    wanted = np.array([1.0] * len(pairs) + [_DRAWN] * _PARTS)
    found = np.linalg.lstsq(design, wanted, rcond=None)[0]
    return np.maximum(found, _LEAST_SHARE * common).tolist()
