"""What `sp3llm plan` shows: the shapes within a budget, and what a run will need."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from sp3llm.reporting.formatting import human_bytes

if TYPE_CHECKING:
    from sp3llm.models.families import Family
    from sp3llm.models.shapes import Shape
    from sp3llm.options import CompressConfig, RecoverConfig
    from sp3llm.planning.limits import Limits, Plan
    from sp3llm.planning.needs import Needs
    from sp3llm.planning.recovery_needs import RecoveryNeeds


# Of a model's parameters, the share from which on a vocabulary is worth a line.
_LARGE_VOCABULARY = 0.15


def changed_sizes(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Sizes of two shapes: the main ones, and any other that changes."""
    main = ("hidden_size", "intermediate_size", "num_key_value_heads")
    changed = [key for key in after if before[key] != after[key] and key != "tie_word_embeddings"]
    return [(key, before[key], after[key]) for key in after if key in (*main, *changed)]


def plan_line(name: str, plan: "Plan") -> str:
    """One line: what becomes what."""
    changes = [
        f"{key} {before} -> {after}"
        for key, before, after in changed_sizes(asdict(plan.dense_shape), asdict(plan.shape))
        if before != after
    ]
    return (
        f"{name}: {plan.dense_parameters:,} -> {plan.parameters:,} parameters "
        f"({100 * plan.keep_params:.2f} %), {', '.join(changes)}"
    )


def plan_table(
    name: str, family: "Family", config: dict[str, Any], limits: "Limits", shapes: list["Shape"]
) -> Table:
    """Candidate shapes beside the dense one, and what each costs."""
    from sp3llm.models.shapes import Shape
    from sp3llm.planning.limits import cost_within

    title = Text(f"{name}: shapes that keep {limits.keep:g} of the {limits.of}")
    table = Table(title=title, collapse_padding=True)
    dense = Shape.of(family, config)
    columns = ["width", "FFN", "heads/KV", "layers", "params", "kept", "weights", "FLOPs", "cache"]
    is_encoder = family.task_head is not None
    if is_encoder:
        columns[-1] = "encoder"
    if dense.tie_word_embeddings:
        # In 80 columns there is room for one of the two.
        columns[columns.index("weights")] = "table"
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    table.caption = "FLOPs and KV cache are those of one token"
    if is_encoder:
        table.caption = "FLOPs are those of one token; the encoder is its layers' matrices"
    whole = cost_within(family, config, limits, dense)
    for shape in [dense, *shapes]:
        cost = cost_within(family, config, limits, shape)
        tie = "tied" if shape.tie_word_embeddings else "untied"
        width = shape.word_embed_proj_dim if shape.tie_word_embeddings else None
        table.add_row(
            str(shape.hidden_size),
            str(shape.intermediate_size),
            f"{shape.num_attention_heads}/{shape.num_key_value_heads}",
            str(shape.num_hidden_layers),
            f"{cost.params / 1e6:,.1f} M",
            f"{100 * cost.of(limits.of) / whole.of(limits.of):.1f} %",
            f"{tie} {width or ''}".strip()
            if dense.tie_word_embeddings
            else human_bytes(cost.bytes),
            f"{cost.flops / 1e9:.2g}G" if cost.flops < 1e9 else f"{cost.flops / 1e9:.1f}G",
            f"{cost.encoder / 1e6:,.1f} M" if is_encoder else human_bytes(cost.kv_cache),
            end_section=shape == dense,
        )
    return table


def vocabulary_line(whose: str, shape: "Shape", parameters: int) -> str | None:
    """How much of a model of that shape its vocabulary is; None: not much."""
    share = shape.vocabulary_parameters() / parameters
    if share < _LARGE_VOCABULARY:
        return None
    return (
        f"{100 * share:.0f} % of {whose} parameters are the vocabulary; --vocab-from TEXT keeps "
        "what your text uses."
    )


def needs_line(settings: "CompressConfig", family: "Family", seq_len: int, needs: "Needs") -> str:
    """What a run of these settings will need."""
    windows = f"{settings.calibrated} + {settings.eval_samples} windows of {seq_len} tokens"
    if family.task_head is not None:
        windows = f"{settings.calibrated_with(rows=True)} rows of at most {seq_len} tokens"
    return (
        f"A run with {windows} "
        f"needs about {human_bytes(needs.streams)} for the streams (on the GPU, the host or the "
        f"disk: --streams) and {human_bytes(needs.working)} of memory for a layer and its Gram "
        "matrices, in float32 arithmetic; on a GPU the streams take half. On disk the result takes "
        f"{human_bytes(needs.disk)}, and the run {human_bytes(needs.kept)} until it is done."
    )


def recovery_line(settings: "RecoverConfig", seq_len: int, needs: "RecoveryNeeds") -> str:
    """What a recovery will need of the device that trains."""
    from sp3llm.planning.recovery_needs import micro_batch_of

    what = "all weights" if settings.lora is None else f"adapters of rank {settings.lora}"
    return (
        f"Recovery of {what}, {micro_batch_of(settings, seq_len)} windows at once, needs about "
        f"{human_bytes(needs.total)} of device memory: teacher {human_bytes(needs.teacher)}, model "
        f"{human_bytes(needs.weights)}, gradients and moments {human_bytes(needs.optimizer)}, "
        f"activations {human_bytes(needs.activations)}, logits {human_bytes(needs.logits)}."
    )
