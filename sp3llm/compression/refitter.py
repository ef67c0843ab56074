"""What every fit of the second pass needs: both models, the fit over all processes, the log."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sp3llm.compression.projection import Projection
from sp3llm.compression.reading import real_rows
from sp3llm.errors import UserError
from sp3llm.maths.refit import (
    Gram,
    NotFinite,
    add_to_gram,
    empty_gram,
    gram_tensors,
    squared_error,
)
from sp3llm.maths.ridge import Fit, Tried, ridge_errors, ridge_fit, search_ridge
from sp3llm.models import families
from sp3llm.models.checkpoint import Checkpoint
from sp3llm.models.families import Family, Group
from sp3llm.models.objectives.catalogue import objective_of
from sp3llm.models.objectives.schema import Objective
from sp3llm.models.shapes import Shape, resized_config
from sp3llm.models.stream import LayeredModel, Stream
from sp3llm.runtime.devices import Execution

# Names of matrices without the numbers of their layers.
_WITHOUT_NUMBERS = partial(re.compile(r"\d+").sub, "")
# Held back from every fit to choose its ridge: one window in this many, one at least.
_HELD_BACK = 8
# A fit to so many tokens of text for each of its inputs misses some two hundredths more than it
# must, which is enough; but where a Gram takes next to no time, tokens times inputs squared below
# so much, more of them are seen.
_TOKENS_AN_INPUT, _LITTLE = 48, 2**33


@dataclass(frozen=True)
class Refitter:
    """What every step of the second pass needs."""

    dense: Checkpoint
    family: Family
    shape: Shape
    projection: Projection
    dtype: torch.dtype
    """Of the export: fitted tensors are rounded to it before their output is used."""
    execution: Execution
    unit_selection: str
    """How the refit chooses units, if not known before: `maths.unit_selection.select_units`."""
    held_from: int
    """First window that is held back to choose ridges."""
    unseen_from: int
    """First window that no fit sees at all, for trials to be scored on, or the factor on the logits
    to be found."""
    log: list[dict[str, Any]]
    """One entry a fit."""
    layers: tuple[int, ...] | None = None
    """Numbers of the dense model's layers that stay, rising; None: all."""
    neurons_LF: Tensor | None = None
    """Which FFN neurons of every layer of the dense model stay, boolean; None: all do, or the refit
    chooses."""
    finished: Callable[[int], Mapping[str, Tensor]] | None = None
    """Reads, on the first process, a group of the small model again that is finished, by its
    number. With it the head takes a step, and the final norm a factor, that the windows that no fit
    sees judge (docs/design.md 3.16, 3.17); None: neither does."""
    tells_errors: bool = True
    """Whether entries of the log say what held-back tokens miss: of all outputs it takes as long as
    a factor, and of trials nobody asks."""
    text_tokens: int = 0
    """In the windows of all processes that fits see; 0: of rows that are padded all count."""

    @property
    def objective(self) -> Objective:
        """What the model is for."""
        return objective_of(self.family.architecture)

    @property
    def small_config(self) -> dict[str, Any]:
        """The small model's, in the dense model's family."""
        return resized_config(self.family, self.dense.config, self.shape, self.layers)

    @property
    def eps(self) -> float:
        """The norms' epsilon."""
        return families.norm_eps(self.family, self.dense.config)

    @property
    def multiplier(self) -> float:
        """The family's factor on what writers add to the stream."""
        return families.residual_multiplier(self.family, self.dense.config)


@dataclass(frozen=True)
class HeadFit:
    """What a head was given by what it says."""

    logit_scale: float
    """The factor in the final norm."""
    step_gain: float
    """By how much the divergence fell, on windows that no fit saw, by a step of the head's matrix,
    nats a token; 0: none was taken."""


@dataclass(frozen=True)
class FinishedGroup:
    """A group of the small model's parameters as they are to be written."""

    index: int
    """Its number among all groups of the small model: embeddings, layers, head."""
    group: Group
    """As the small model numbers its layers."""
    tensors: Mapping[str, Tensor]
    """The small model's, by their names on disk; of a tied head the table as well, where it has
    taken a step (docs/design.md 3.17), which then takes the place of what the embeddings had."""
    dense: Stream | None = None
    """The dense model's stream behind this group, and behind the layers after it that go; None
    where nothing was refitted."""
    small: Stream | None = None
    """The small model's."""
    head_fit: HeadFit | None = None
    """Of the head; None: it is as it was fitted to the stream, and nothing else was looked for."""


@dataclass(frozen=True)
class DenseLayer:
    """One layer of the dense model, and its stream in front of it."""

    index: int
    """Its number among the layers."""
    group: Group
    source: Mapping[str, Tensor]
    """Its weights, as they are on disk."""
    model: LayeredModel
    stream: Stream
    summed: Tensor | None = None
    """In a post-norm family where what the last norm of a layer reads is kept, in place, `(windows,
    tokens, D)`; None in others, where it is the stream behind the layer."""


@dataclass(frozen=True)
class LayerFit:
    """One layer while it is fitted: its weights, both models, and their streams in front of it."""

    dense: DenseLayer
    group: Group
    """The layer's parameters in the dense model, named as the small one numbers its layers."""
    cut: Mapping[str, Tensor]
    """Dense weights with attention cut, still in the coordinates of the dense stream."""
    tensors: dict[str, Tensor]
    """The small model's weights: projected ones that fitted ones take the place of."""
    small_models: list[LayeredModel]
    """Small models whose first 0, 1, ... writers have their inputs cut already."""
    small_stream: Stream

    @property
    def index(self) -> int:
        """Its number among the small model's layers."""
        return self.group.layer

    def name(self, module: str) -> str:
        """The full name of a module of the layer."""
        return f"{self.group.prefix}{module}"


def empty_grams(refitter: "Refitter", inputs: int, outputs: int) -> tuple[Gram, Gram]:
    """Grams of no tokens: one to fit and one to choose the ridge on."""
    device = refitter.execution.device
    return empty_gram(inputs, outputs, device), empty_gram(inputs, outputs, device)


def stride(refitter: Refitter, inputs: int) -> int:
    """Every how many tokens of a window one is seen by a fit of so many inputs: neighbours are much
    alike, so that windows lose less by it than by going.
    """
    enough = max(_TOKENS_AN_INPUT * inputs, _LITTLE // inputs**2)
    return max(1, refitter.text_tokens // enough)


def add_tokens(
    refitter: Refitter,
    grams: tuple[Gram, Gram],
    rows: slice,
    a: Tensor,
    y: Tensor,
    weight: Tensor | None = None,
    real: Tensor | None = None,
) -> None:
    """Add a batch of windows to the fitting Gram and to the one held back, each by its number.

    `rows` are the windows' numbers; `a`, `(windows, tokens, P)`, is what the fitted matrix reads,
    `y`, `(windows, tokens, Q)`, what it should give, `weight`, `(windows, tokens)`, what each token
    counts; of padding, where `real`, a stream's, says what is none, nothing is added. Of much text
    it is one token in every `stride`.
    """
    every = stride(refitter, a.shape[-1])
    if every > 1:
        a, y, weight = (None if one is None else one[:, ::every] for one in (a, y, weight))
    bounds = (0, refitter.held_from, refitter.unseen_from)
    first, second, third = (min(max(bound - rows.start, 0), len(a)) for bound in bounds)
    parts = (slice(first, second), slice(second, third))
    for gram, part in zip(grams, parts, strict=True):
        if len(a[part]):
            taken = slice(rows.start + part.start, rows.start + part.stop)
            tokens = [
                None if one is None else real_rows(one[part], real, taken) for one in (a, y, weight)
            ]
            add_to_gram(gram, *tokens)


def all_reduce_grams(refitter: Refitter, grams: tuple[Gram, Gram]) -> None:
    """Sum what every process saw of its windows."""
    for gram in grams:
        refitter.execution.ranks.all_reduce_(*gram_tensors(gram))


def fit_ridge(
    refitter: Refitter,
    name: str,
    grams: tuple[Gram, Gram],
    prior_PQ: Tensor,
    prior_intercept_Q: Tensor | None = None,
    by_input: bool = False,
) -> Fit:
    """A ridge fit (`maths.ridge.ridge_fit`) whose trials are shared out over processes.

    `name` is what the log calls it: the ridge that the last fit of such a name found, but for its
    numbers, is where the search begins. `by_input` says how inputs are penalised
    (`maths.refit.ridge_solution`). The result is the same on every process.
    """
    ranks, priors, dtype = (
        refitter.execution.ranks,
        (prior_PQ, prior_intercept_Q),
        solves_in(refitter.execution),
    )

    def try_all(ridges: Sequence[float]) -> Tried:
        by_rank = ranks.all_gather(
            ridge_errors(*grams, *priors, ranks.share(ridges), dtype, by_input)
        )
        return {ridge: tried for own in by_rank for ridge, tried in own.items()}

    tried = search_ridge(try_all, _last_ridge(refitter, name))
    fit = ridge_fit(*grams, *priors, tried, dtype, by_input)
    ranks.broadcast_(fit.solution_PQ, fit.intercept_Q)
    entry = {
        "name": name,
        "ridge": None if fit.ridge == float("inf") else fit.ridge,
        "raised": fit.raised,
    }
    if refitter.tells_errors:
        plain_error = squared_error(grams[1], *priors)
        entry |= {"error": plain_error - fit.gain, "plain_error": plain_error}
    refitter.log.append(entry)
    return fit


def solves_in(execution: Execution) -> torch.dtype:
    """The dtype of factors: float32, where it is enough, for Grams of bfloat16 products."""
    return torch.float32 if execution.dtype == torch.bfloat16 else torch.float64


def _last_ridge(refitter: Refitter, name: str) -> float | None:
    """The ridge of the last fit of the same matrix of another layer; None: there was none."""
    for entry in reversed(refitter.log):
        if _WITHOUT_NUMBERS(entry["name"]) == _WITHOUT_NUMBERS(name):
            return float("inf") if entry["ridge"] is None else entry["ridge"]
    return None


@contextmanager
def overflow_refused() -> Iterator[None]:
    """Tell the user what to do where a fit or a choice in the block meets NaN or infinity.

    Raises UserError in place of `NotFinite`.
    """
    try:
        yield
    except NotFinite as error:
        raise UserError(
            "The activations of the compressed model hold NaN or infinity, or have squares that no "
            "float32 holds: try --dtype bfloat16 or float32 where it is float16, or an undamaged "
            "copy of the checkpoint."
        ) from error


def held_back_from(windows: int) -> int:
    """First window that is held back to choose ridges.

    Raises UserError if there is nothing to hold back.
    """
    if windows < 2:
        raise UserError(
            f"The refit needs at least 2 calibration windows, one of them held back, found "
            f"{windows}: raise --samples, or use --no-refit."
        )
    return windows - max(1, windows // _HELD_BACK)
