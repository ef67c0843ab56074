"""The tables that reports, cards and terminals show, from a record."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from rich.table import Table
from rich.text import Text

from sp3llm.models.shapes import Shape
from sp3llm.reporting.formatting import cell, figure, human_bytes
from sp3llm.reporting.plans import changed_sizes
from sp3llm.reporting.record import (
    QuantizationEntry,
    Record,
    RecoveredFigure,
    RecoveryEntry,
    SameText,
    TaskFigure,
    TextSet,
)
from sp3llm.runtime.progress import human_time


@dataclass(frozen=True)
class Part:
    """Parameters of a part of the model: embeddings, attention, FFN, norms or head."""

    name: str
    dense: int
    small: int
    kept: str
    """Share kept, as text; `new` where the dense model has none."""


def rows(record: Record) -> list[Sequence[str]]:
    """The before/after table: name, dense, compressed."""
    plan = record.plan
    return [
        ("parameters", f"{plan.dense_parameters:,}", f"{plan.parameters:,}"),
        ("of the dense model", "100 %", f"{100 * plan.keep_params:.2f} %"),
        ("weights", human_bytes(record.dense_weight_bytes), human_bytes(record.weight_bytes)),
        *[
            (key, str(before), str(after))
            for key, before, after in changed_sizes(asdict(plan.dense_shape), asdict(plan.shape))
        ],
        *_vocabulary(record),
        *_tie(record),
        *(
            [("class", record.dense_architecture, record.architecture)]
            if record.is_exported
            else []
        ),
        *_figures(record),
    ]


def _figures(record: Record) -> list[Sequence[str]]:
    """What both models are worth: perplexities, or what they answer on a task."""
    if record.answers is not None:
        return [row for figure in record.answers for row in _answer_rows(figure)]
    return [
        (
            perplexity_of(record.same_text, record.evaluation),
            f"{record.dense_perplexity:.3f}",
            f"{record.perplexity:.3f}",
        ),
        *_bits_row(record.same_text, "dense", "small"),
        (excess_of(record.same_text), "", str(record.excess_log_perplexity)),
    ]


def _answer_rows(figure: TaskFigure) -> list[Sequence[str]]:
    """A figure on a task, and what it differs by."""
    error = figure.paired_standard_error
    difference = f"{figure.small - figure.dense:+.4f}"
    difference += "" if error is None else f" ± {error:.4f}"
    return [
        (f"{figure.task}, {figure.metric}", f"{figure.dense:.4f}", f"{figure.small:.4f}"),
        ("difference", "", difference),
    ]


def perplexity_of(same_text: SameText | None, text: TextSet | None = None) -> str:
    """What a perplexity is called: of which tokens, where models have different ones, and on which
    text, where that is to be said.
    """
    of = "perplexity" if same_text is None else "perplexity a dense token"
    return of if text is None else f"{of} ({', '.join(text.sources)})"


def excess_of(same_text: SameText | None) -> str:
    """What the excess is called, in nats a token."""
    return "excess log-perplexity" if same_text is None else "excess, nats a dense token"


def _bits_row(same_text: SameText | None, *models: str) -> list[Sequence[str]]:
    """The row of what the text costs each model by its bytes, which no tokenizer changes; none
    where there is one.
    """
    if same_text is None:
        return []
    return [("bits a byte", *(f"{same_text.bits_a_byte[model]:.4f}" for model in models))]


def vocabulary_share(record: Record) -> float:
    """How much of the dense model's true parameters went with its vocabulary."""
    vocabulary = record.vocabulary
    left = record.plan.dense_parameters if vocabulary is None else vocabulary.parameters
    return 1 - left / record.plan.dense_parameters


def _vocabulary(record: Record) -> list[tuple[str, str, str]]:
    """What became of the vocabulary."""
    if record.vocabulary is None:
        return []
    saved = f"saves {100 * vocabulary_share(record):.2f} %"
    tokens = record.vocabulary.tokens
    return [("tokens", f"{record.vocabulary.dense_tokens:,}", f"{tokens:,} ({saved})")]


def same_text_line(same_text: SameText | None) -> str:
    """What is compared where models have different tokens, as a sentence; empty where they have
    the same.
    """
    if same_text is None:
        return ""
    return (
        f"Both predict exactly the same text: {same_text.bytes:,} bytes, "
        f"{same_text.dense_tokens:,} of the dense model's tokens, {same_text.tokens:,} of the "
        "compressed one's; perplexity and excess are of one of the former."
    )


def _tie(record: Record) -> list[tuple[str, str, str]]:
    """What became of tied embeddings, and what the other choice would have lost in the trials."""
    if not record.plan.dense_shape.tie_word_embeddings:
        return []
    is_tied = record.plan.shape.tie_word_embeddings
    chosen, other = ("tied", "untied") if is_tied else ("untied", "tied")
    found = [(shape.tie_word_embeddings, loss) for shape, loss in considered(record)]
    tied, untied = ([loss for is_one, loss in found if is_one == side] for side in (True, False))
    if tied and untied:
        difference = abs(min(tied) - min(untied))
        chosen += f" ({other} would lose {difference:.4f} more in the search)"
    return [("embeddings and head", "tied", chosen)]


def considered(record: Record) -> list[tuple[Shape, float]]:
    """Every shape that the search considered, with what it loses as far as is known: as tried, or
    as predicted; best first.
    """
    found = {sizes_of(prediction): prediction.predicted_loss for prediction in record.predictions}
    found |= {sizes_of(trial): trial.trial_loss for trial in record.trials}
    return sorted(found.items(), key=lambda pair: pair[1])


def sizes_of(shape: Shape) -> Shape:
    """A shape alone, without what was found out about it."""
    return Shape(**{field.name: getattr(shape, field.name) for field in fields(Shape)})


def part_rows(record: Record) -> list[Part]:
    """Parameters by part, of the parts that either model has."""
    small = record.parameters.small
    return [
        Part(name, count, small[name], f"{100 * small[name] / count:.1f} %" if count else "new")
        for name, count in record.parameters.dense.items()
        if count or small[name]
    ]


def score_rows(record: Record) -> list[list[str]]:
    """The table of `scores`, its head first; nothing where there are none."""
    if record.scores is None or not record.scores.rows:
        return []
    return [
        ["task", "metric", "samples", "dense", "compressed", "difference", "standard error"],
        *[
            [
                row.task,
                row.metric.removesuffix(",none"),
                f"{row.samples:,}",
                figure(row.dense),
                figure(row.small),
                figure(row.difference, "+.4f"),
                figure(row.paired_standard_error),
            ]
            for row in record.scores.rows
        ],
    ]


def recovery_rows(entry: RecoveryEntry) -> list[Sequence[str]]:
    """The table of a recovery, its head first."""
    head = ["", "dense", "before", "recovered"]
    if entry.scores is not None:
        return [head, *(row for score in entry.scores for row in _score_rows(score))]
    return [
        head,
        [
            perplexity_of(entry.same_text, entry.evaluation),
            f"{entry.dense_perplexity:.3f}",
            f"{entry.perplexity_before:.3f}",
            f"{entry.perplexity:.3f}",
        ],
        *_bits_row(entry.same_text, "dense", "before", "small"),
        [
            excess_of(entry.same_text),
            "",
            str(entry.excess_log_perplexity_before),
            str(entry.excess_log_perplexity),
        ],
    ]


def _score_rows(score: RecoveredFigure) -> list[Sequence[str]]:
    """A figure of three models on a task, and what two of them differ from the dense one by."""
    differences = (
        (score.before - score.dense, score.paired_standard_error_before),
        (score.small - score.dense, score.paired_standard_error),
    )
    shown = [
        f"{value:+.4f}" + ("" if error is None else f" ± {error:.4f}")
        for value, error in differences
    ]
    name = f"{score.task}, {score.metric}"
    return [
        [name, *(f"{value:.4f}" for value in (score.dense, score.before, score.small))],
        ["difference from the dense model", "", *shown],
    ]


def quantization_rows(entry: QuantizationEntry) -> list[Sequence[str]]:
    """The table of a quantization, its head first."""
    bits, of = entry.bits, entry.models
    models = [of.dense, of.dense_quantized, of.small, of.small_quantized]
    excesses = [str(model.excess_log_perplexity) for model in models[1:]]
    return [
        ["", "dense", f"dense {bits}", "compressed", f"compressed {bits}"],
        [perplexity_of(entry.same_text), *(f"{model.perplexity:.3f}" for model in models)],
        *_bits_row(entry.same_text, "dense", "dense_quantized", "small", "small_quantized"),
        [excess_of(entry.same_text), "", *excesses],
        [f"cost of {bits}", "", str(entry.cost.dense), "", str(entry.cost.small)],
        ["weights", *(human_bytes(model.weight_bytes) for model in models)],
        ["linear layers alone", *(human_bytes(model.linear_bytes) for model in models)],
    ]


def speed_rows(record: Record) -> list[list[str]]:
    """The table of `speed`, its head first; nothing where there is none."""
    if not record.speed:
        return []
    columns = list(dict.fromkeys(column for row in record.speed for column in row))
    return [columns, *([cell(row.get(name)) for name in columns] for row in record.speed)]


def what_was_done(record: Record) -> str:
    """The steps of the compression, in words, separated by commas."""
    dense, small = record.plan.dense_shape, record.plan.shape
    settings = record.settings
    basis = {
        "pca": "principal components",
        "readers": "directions that its readers need",
        "gradient": "directions that the loss depends on",
    }[settings["basis"]]
    steps = []
    if record.vocabulary is not None:
        of, sources = record.vocabulary, ", ".join(record.vocabulary.sources)
        steps.append(f"{of.tokens:,} of {of.dense_tokens:,} tokens kept, by {sources}")
    if small.hidden_size < dense.hidden_size:
        steps.append(
            f"the residual stream was projected onto {small.hidden_size} of "
            f"{dense.hidden_size} {basis}"
        )
    for key, what in (
        ("intermediate_size", "{} of {} FFN neurons kept"),
        ("num_key_value_heads", "{} of {} KV groups kept"),
        ("head_dim", "heads projected onto {} of {} dimensions"),
    ):
        before, after = getattr(dense, key), getattr(small, key)
        if key == "num_key_value_heads" and small.merges_heads(dense):
            steps.append(f"{before} key-value heads merged into {after}")
        elif after < before:
            steps.append(what.format(after, before))
    if record.layers:
        gone = sorted(set(range(dense.num_hidden_layers)) - set(record.layers))
        numbers = " and ".join(filter(None, [", ".join(map(str, gone[:-1])), str(gone[-1])]))
        steps.append(f"layer{'s' * (len(gone) > 1)} {numbers} (from 0) left out")
    if dense.tie_word_embeddings and not small.tie_word_embeddings:
        steps.append("the head untied from the embeddings")
    if record.mask is not None:
        drawn, training = settings["mask_steps"] * settings["mask_batch"], record.mask.training
        on = (
            f"{drawn * training.seq_len:,} tokens"
            if settings.get("task") is None
            else f"{drawn:,} rows"
        )
        steps.append(f"by a mask learned on {on}")
    if settings.get("turn") == "hadamard":
        steps.append("the kept basis turned by a Hadamard matrix")
    if settings["refit"] and record.fits:
        steps.append("what is left refitted in closed form")
    if record.head_step_gain:
        steps.append("the head brought one step nearer to what the dense model says")
    if record.logit_scale is not None:
        steps.append(f"logits times {record.logit_scale:.3f}, as text that no fit saw asks for")
    return ", ".join(steps)


# --------------------------------------------------------------------------- other forms


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = [f"| {' | '.join(text.replace('|', '&#124;') for text in row)} |" for row in rows]
    return "\n".join([head, f"|{'---|' * len(rows[0])}", *body])


def terminal_table(title: str, rows: Sequence[Sequence[str]], caption: str) -> Table:
    """A table for the terminal; the first row is its head."""
    head, *body = rows
    table = Table(title=Text(title), caption=caption)
    for column in head:
        table.add_column(column, justify="left" if column == "" else "right")
    for row in body:
        table.add_row(*map(Text, row))
    return table


def held_out_line(text: TextSet) -> str:
    """How much text both models were scored on."""
    if text.real_tokens is not None:
        return f"{text.samples:,} held-out rows of {', '.join(text.sources)}"
    return f"{text.tokens:,} held-out tokens in {text.samples} windows"


def resources_line(run: Record | RecoveryEntry | QuantizationEntry) -> str:
    """How long a run took, and the most memory it held."""
    gpu = f", GPU {human_bytes(run.device_memory_bytes)}" if run.device_memory_bytes else ""
    return f"time {human_time(run.seconds)}, peak memory {human_bytes(run.peak_memory_bytes)}" + gpu
