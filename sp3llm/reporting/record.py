"""The record of a compressed model, `sp3llm.json` in its folder, as frozen dataclasses.

`sp3llm compress` writes what it did and measured; `score`, `bench`, `recover`, `quantize` and
`report` add entries; model cards, reports and tables show whatever there is. The fields are the
keys of the file. Losses are in nats a token, sizes in bytes, times in seconds; `dense` is the
original model and `small` the compressed one.

A file without `schema_version` is of version 1, whose keys are those of version 2. Keys that this
version does not know are kept in `other`, and written again.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from sp3llm.errors import UserError
from sp3llm.models.shapes import Shape
from sp3llm.planning.limits import Plan
from sp3llm.reporting.typed_json import LATER, MismatchError, from_json, to_json
from sp3llm.runtime.folders import RECORD, unwritable_told
from sp3llm.runtime.json_files import read_object

SCHEMA_VERSION = 2

# Settings that are read from a record; the others are only shown.
_SETTINGS_READ = (
    *("model", "calib", "samples", "seq_len", "eval_text", "eval_samples", "seed"),
    *("moments", "basis", "refit"),
)
# Entries that are left out of the file while there is nothing in them.
_LEFT_OUT_EMPTY = (
    "dense_architecture",
    "layers",
    "mask",
    "vocabulary",
    "same_text",
    "predictions",
    "scores",
    "speed",
    "recoveries",
    "quantization",
    "samples",
)


# --------------------------------------------------------------------------- the compression


@dataclass(frozen=True)
class TextSet:
    """Windows of text that were calibrated on, trained on or scored."""

    sources: tuple[str, ...]
    """Named sets, files or hub data sets."""
    samples: int
    """Windows."""
    seq_len: int
    """Tokens a window."""
    begins_with_bos: bool
    """Each window begins with the tokenizer's BOS."""
    documents: int
    """Documents drawn."""
    dropped_documents: int
    """Documents left out since they also occur in a set that must share none with this one."""
    sha256: str
    """Hash of the token ids."""
    real_tokens: int | None = field(default=None, metadata={LATER: True})
    """Of rows of a task, which are padded: those that are no padding; None: all are."""

    @property
    def tokens(self) -> int:
        """In all windows together."""
        return self.real_tokens or self.samples * self.seq_len


@dataclass(frozen=True)
class Excess:
    """Log-perplexity of a model over another's on the same tokens, nats a token."""

    mean: float
    paired_standard_error: float | None
    """Over windows; None: a single one leaves it unknown."""

    def __str__(self) -> str:
        """`0.0614 ± 0.0028`, or the mean alone."""
        from sp3llm.maths import paired

        error = self.paired_standard_error
        return str(paired.Excess(self.mean, math.nan if error is None else error))


@dataclass(frozen=True)
class SameText:
    """Held-out text of which models with different vocabularies predict exactly the same."""

    dense_tokens: int
    """That are predicted, in the dense model's tokens."""
    tokens: int
    """The same text in those of the compressed one."""
    bytes: int
    """The same text in UTF-8."""
    bits_a_byte: Mapping[str, float]
    """What it costs each model: `dense`, `small`, `before` a recovery, and in few bits."""


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens stayed of the vocabulary (`--vocab-from`)."""

    sources: tuple[str, ...]
    """Text that they were chosen by."""
    counted_tokens: int
    """Of that text."""
    used_tokens: int
    """Different ones among them."""
    covered: float
    """Share of the text's tokens that stay one token."""
    dense_tokens: int
    """Of the dense tokenizer."""
    tokens: int
    """Of the compressed model's."""
    parameters: int
    """Of the dense model with these tokens, before anything else is cut."""
    files_left_out: Mapping[str, str]
    """Files of the dense model that could not come along, and why."""
    other: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Trial(Shape):
    """A shape that the search tried."""

    trial_loss: float
    """Of the model refitted to it on a little calibration text, on text that no fit saw: nats a
    token more than the dense model, or, where there are no predictions, all of them."""
    other: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Prediction(Shape):
    """A shape that the search considered."""

    predicted_loss: float
    """What `Trial.trial_loss` would be, as measurements of the dense model predict it and trials
    set its scale."""
    other: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Fit:
    """A closed-form fit of matrices that read the stream, or of one that writes to it."""

    name: str
    """Of the norm before the readers, or of the writers, joined by ` + ` where fitted together."""
    ridge: float | None
    """None: infinite, nothing was refitted."""
    error: float
    """Relative squared error after the refit, on held-back calibration text."""
    plain_error: float
    """The same without it."""
    raised: bool
    """The Gram matrix was singular, and the ridge was raised for that."""
    other: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LearnedMask:
    """How the mask of `--mask learned` was found."""

    expected: Mapping[str, float]
    """Sizes that were expected to stay in the end, by field of a shape."""
    undecided: Mapping[str, float]
    """Share of the gates neither open nor closed, by name."""
    history: tuple[Mapping[str, float], ...]
    """Step, target, expected share of the budget's count, and divergence, or what an encoder's
    recovery descends; some of the steps."""
    training: TextSet
    other: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PartCounts:
    """Parameters by part of the model: embeddings, attention, FFN, norms, head."""

    dense: Mapping[str, int]
    small: Mapping[str, int]


# --------------------------------------------------------------------------- what came later


@dataclass(frozen=True)
class ScoreRow:
    """A task's metric for both models, in the metric's unit."""

    task: str
    metric: str
    """With its filter, as lm-eval has it: `acc,none`."""
    samples: int
    """Questions, or windows."""
    small: float | None = None
    standard_error: float | None = None
    """Of `small` by itself."""
    higher_is_better: bool | None = None
    dense: float | None = None
    paired_standard_error: float | None = None
    """Of `difference`, over the same questions."""
    difference: float | None = None
    """`small - dense`."""
    other: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """What `sp3llm score` found (`compress --score`, or `report --add` of its comparison)."""

    rows: tuple[ScoreRow, ...]
    model: str | None = None
    against: str | None = None
    """The model compared with."""
    command: str | None = None
    """The one that scored."""
    notes: tuple[str, ...] = ()
    """What was not measured, and why."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Of what the models were asked, by task or text."""
    other: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskFigure:
    """A figure of how well both models answer the rows of a task; more is better."""

    task: str
    metric: str
    samples: int
    """Rows."""
    dense: float
    small: float
    paired_standard_error: float | None
    """Of `small - dense`, over the same rows."""


@dataclass(frozen=True, kw_only=True)
class RecoveredFigure(TaskFigure):
    """The same of the models of a recovery."""

    before: float
    """Of the model that was tuned."""
    paired_standard_error_before: float | None
    """Of `before - dense`."""


@dataclass(frozen=True, kw_only=True)
class RecoveryEntry:
    """What a run of `sp3llm recover` did and measured."""

    command: str
    settings: Mapping[str, Any]
    trained_parameters: int
    """Of the adapters, where those were trained."""
    steps: int
    """Taken."""
    best_step: int
    """The one whose weights were written; 0: those from before."""
    stopped_early: bool
    held_out_losses: tuple[tuple[float, ...], ...]
    """Step and loss of every check, on the text that decides when to stop."""
    training_losses: tuple[tuple[float, ...], ...]
    """Step and mean training loss since the check before."""
    training: TextSet
    stopping: TextSet
    evaluation: TextSet
    dense_perplexity: float | None = field(default=None, metadata={LATER: True})
    """Of text, like the next four; None: a task's rows were answered (`scores`)."""
    perplexity_before: float | None = field(default=None, metadata={LATER: True})
    perplexity: float | None = field(default=None, metadata={LATER: True})
    excess_log_perplexity_before: Excess | None = field(default=None, metadata={LATER: True})
    excess_log_perplexity: Excess | None = field(default=None, metadata={LATER: True})
    scores: tuple[RecoveredFigure, ...] | None = field(default=None, metadata={LATER: True})
    """Of a task."""
    processes: int
    training_seconds: float
    seconds: float
    peak_memory_bytes: int
    """Of the host."""
    device_memory_bytes: int
    """Of the GPU; 0: there was none."""
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    same_text: SameText | None = field(default=None, metadata={LATER: True})
    """As in `Record`."""
    other: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MeasuredModel:
    """One of the four models that a quantization compares."""

    perplexity: float
    excess_log_perplexity: Excess
    """Over the dense model in full precision."""
    weight_bytes: int
    """Of its files of weights."""
    linear_bytes: int
    """Of what is, or would be, quantized, scales included."""
    window_losses: tuple[float, ...]
    """Each window's mean loss, for paired comparisons with other runs."""


@dataclass(frozen=True)
class FourModels:
    """The models that a quantization compares: both, in full precision and in few bits."""

    dense: MeasuredModel
    small: MeasuredModel
    dense_quantized: MeasuredModel
    small_quantized: MeasuredModel


@dataclass(frozen=True)
class QuantizationCost:
    """What quantization costs each model: quantized, over itself in full precision."""

    dense: Excess
    small: Excess


@dataclass(frozen=True, kw_only=True)
class QuantizationEntry:
    """What a run of `sp3llm quantize` did and measured; the weights beside it are in few bits."""

    command: str
    settings: Mapping[str, Any]
    bits: str
    """`int8` or `nf4`."""
    parameters: int
    """Of the compressed model."""
    quantized_parameters: int
    """Those of them that are in few bits."""
    models: FourModels
    cost: QuantizationCost
    over_dense_quantized: Excess
    """The compressed model over the dense one, both quantized."""
    dense_runs_elsewhere_only: str | None
    """What of the dense model bitsandbytes cannot run on this CPU."""
    compute_dtype: str
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    seconds: float
    peak_memory_bytes: int
    """Of the host."""
    device_memory_bytes: int
    """Of the GPU; 0: there was none."""
    same_text: SameText | None = field(default=None, metadata={LATER: True})
    """As in `Record`."""
    other: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """Held-out text, how it goes on, and how both models continue it, greedily."""

    prompt: str
    text: str
    dense: str
    small: str
    other: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Samples:
    """What `sp3llm report` shows of both models' writing."""

    new_tokens: int
    """At most, of each continuation."""
    texts: tuple[Sample, ...]
    other: Mapping[str, Any] = field(default_factory=dict)


# --------------------------------------------------------------------------- the record


@dataclass(frozen=True, kw_only=True)
class Record:
    """All that is known of a model that `sp3llm compress` made."""

    schema_version: int = SCHEMA_VERSION
    model: str
    """The dense model's name, to show."""
    base_model: str | None
    """Its hub id; None: it was a folder, or the bundled one."""
    architecture: str
    """The stock class of the compressed model."""
    dense_architecture: str | None = None
    """The stock class of the dense model, which `--export-as` may have changed; None: an earlier
    version of sp3llm made the model, in the same class."""
    command: str
    settings: Mapping[str, Any]
    """Of `sp3llm compress`, defaults resolved."""
    plan: Plan
    calibration: TextSet
    evaluation: TextSet
    dense_perplexity: float | None
    """Of text, like the next two; None: a task's rows were answered (`answers`)."""
    perplexity: float | None
    excess_log_perplexity: Excess | None = None
    answers: tuple[TaskFigure, ...] | None = field(default=None, metadata={LATER: True})
    """Of a task; None: the models are of text."""
    layers: tuple[int, ...] = ()
    """Numbers of the dense model's layers that stay; none: all do."""
    trials: tuple[Trial, ...]
    """In the order of the search; none where there was nothing to choose."""
    fits: tuple[Fit, ...]
    """In the order of the model; none without a refit."""
    logit_scale: float | None = field(default=None, metadata={LATER: True})
    """What the final norm was multiplied by, as windows that no fit saw ask for; None: no such
    factor was looked for."""
    head_step_gain: float | None = field(default=None, metadata={LATER: True})
    """By how much a step of the head's matrix brought what the model says nearer to what the dense
    one does, on windows that no fit saw, nats a token; 0: it did not, and was not taken; None: none
    was tried."""
    eigenvalues: tuple[float, ...]
    """Of the summed second moments of the dense model's residual stream, falling."""
    energy_kept: float
    """Share of their sum inside the basis kept."""
    dtype: str
    """Of the weights written."""
    compute_dtype: str
    dense_weight_bytes: int
    weight_bytes: int
    seconds: float
    peak_memory_bytes: int
    """Of the host."""
    device_memory_bytes: int
    """Of the GPU; 0: there was none."""
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    mask: LearnedMask | None = None
    predictions: tuple[Prediction, ...] = ()
    """Of all candidates, where there was something to choose."""
    parameters: PartCounts
    files_copied: tuple[str, ...] = ()
    """From the dense model's folder."""
    vocabulary: Vocabulary | None = None
    """None: all of it stayed."""
    same_text: SameText | None = None
    """Where the vocabulary was cut: the held-out text in both. Perplexities are then of a dense
    token, for the compressed model too."""
    scores: Scores | None = None
    speed: tuple[Mapping[str, Any], ...] = ()
    """What `sp3llm bench` found (`report --add` of its --output): rows of a table, a text or number
    by the name of its column."""
    recoveries: tuple[RecoveryEntry, ...] = ()
    """The latest, the last, made the weights."""
    quantization: QuantizationEntry | None = None
    samples: Samples | None = None
    other: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_exported(self) -> bool:
        """Whether the compressed model is written as another class than the dense one's."""
        return self.dense_architecture not in (None, self.architecture)


@dataclass(frozen=True, kw_only=True)
class TunedRecord:
    """The record of a model that `sp3llm recover` tuned and `sp3llm compress` did not make."""

    schema_version: int = SCHEMA_VERSION
    recoveries: tuple[RecoveryEntry, ...] = ()
    other: Mapping[str, Any] = field(default_factory=dict)


AnyRecord = TypeVar("AnyRecord", Record, TunedRecord)


def without_measurements(record: Record) -> Record:
    """The record without what was measured on, or written by, weights that are no longer those."""
    return replace(record, scores=None, speed=(), samples=None)


# --------------------------------------------------------------------------- files


def read_record(folder: Path) -> Record:
    """The record in a folder that `sp3llm compress` wrote.

    Raises UserError if there is none, or it is damaged or of another version of sp3llm.
    """
    content = _content(folder)
    if content is None:
        raise UserError(
            f"Expected a folder that sp3llm wrote, found no {RECORD} in '{folder}': name the "
            "output folder of sp3llm compress."
        )
    return _typed(Record, content, folder / RECORD)


def read_any_record(folder: Path) -> Record | TunedRecord | None:
    """The record in a folder of any model; None: there is none.

    Raises UserError if it is damaged or of another version of sp3llm.
    """
    content = _content(folder)
    if content is None:
        return None
    if "plan" in content or "settings" in content:
        return _typed(Record, content, folder / RECORD)
    return _typed(TunedRecord, content, folder / RECORD)


def _content(folder: Path) -> dict[str, Any] | None:
    """The object in `sp3llm.json`, of a schema version that is known; None: there is no file."""
    path = folder / RECORD
    if not path.is_file():
        return None
    content = read_object(path, "it")
    version = content.get("schema_version", 1)
    if not isinstance(version, int) or version < 1:
        raise UserError(
            f"Expected a whole number as 'schema_version' in '{path}', found {version!r}: get an "
            "undamaged copy of it."
        )
    if version > SCHEMA_VERSION:
        raise UserError(
            f"Expected a record of schema version {SCHEMA_VERSION} at most in '{path}', found "
            f"{version}, of a newer sp3llm: install that."
        )
    return content


def _typed(kind: type[AnyRecord], content: dict[str, Any], path: Path) -> AnyRecord:
    """The record that JSON holds, in the present schema version."""
    is_first_version = "schema_version" not in content
    try:
        record = from_json(kind, {**content, "schema_version": SCHEMA_VERSION})
        for name in _SETTINGS_READ if kind is Record else ():
            if name not in record.settings:
                raise MismatchError(f"settings.{name}", "an entry")
    except MismatchError as error:
        if error.is_absence and is_first_version:
            raise UserError(
                f"Expected '{error.where}' in '{path}', found none: it was written by an earlier "
                "version of sp3llm, so compress the model again."
            ) from error
        raise UserError(
            f"Expected {error.expected} as '{error.where}' in '{path}', found {error.found}: get "
            "an undamaged copy of it, or compress the model again."
        ) from error
    return record


def write_record(folder: Path, record: Record | TunedRecord) -> None:
    """Write `sp3llm.json` into a folder, durably: it is whole, or what it was.

    Raises OSError if the folder cannot be written.
    """
    from sp3llm.runtime.files import write_durably, write_json

    content = to_json(record)
    for name in _LEFT_OUT_EMPTY:
        if not content.get(name):
            content.pop(name, None)
    write_durably(folder / RECORD, lambda path: write_json(path, content))


def add_to_record(folder: Path, **entries: Any) -> Record:
    """Set fields of the record in a folder, in one step; returns all of it.

    Raises UserError as `read_record` does, or if the folder cannot be written.
    """
    record = replace(read_record(folder), **entries)
    with unwritable_told(folder):
        write_record(folder, record)
    return record
