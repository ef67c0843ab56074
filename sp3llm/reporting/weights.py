"""What shapes weigh in the formats that models are served in."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from sp3llm.reporting.formatting import human_bytes

if TYPE_CHECKING:
    from sp3llm.models.families import Family
    from sp3llm.models.shapes import Shape
    from sp3llm.planning.limits import Limits, Plan

# The part of a format's bytes that may stay beyond that of the parameters without a line.
_LOST_TO_BLOCKS = 0.1


def weights_table(
    family: "Family", config: Mapping[str, Any], limits: "Limits", shapes: "Sequence[Shape]"
) -> Table:
    """What the dense model and each of the shapes weigh in each format."""
    from sp3llm.models.formats import formats_of
    from sp3llm.models.shapes import Shape

    dense = Shape.of(family, config)
    before = formats_of(family, config, dense)
    table = Table(title="What they weigh in the formats of servers", collapse_padding=True)
    for column in ("width", "FFN", "heads/KV", "layers", *before):
        table.add_column(column, justify="right", no_wrap=True)
    if "Q8_0" in before:
        table.caption = (
            "Q8_0 and Q4_K_M, of llama.cpp, are blocks of 32 and 256 weights of a row;\n"
            "rows that are no whole blocks stay in more bits"
        )
    for shape in (dense, *shapes):
        weights = before if shape == dense else formats_of(family, config, shape, limits.export_as)
        table.add_row(
            str(shape.hidden_size),
            str(shape.intermediate_size),
            f"{shape.num_attention_heads}/{shape.num_key_value_heads}",
            str(shape.num_hidden_layers),
            *map(human_bytes, weights.values()),
            end_section=shape == dense,
        )
    return table


def blocks_line(
    family: "Family", config: Mapping[str, Any], limits: "Limits", plan: "Plan"
) -> str | None:
    """What llama.cpp's formats keep of the dense model's bytes, where sizes that make no whole
    blocks cost much of what went; None: they do not.
    """
    from sp3llm.models.formats import formats_of

    before = formats_of(family, config, plan.dense_shape)
    after = formats_of(family, config, plan.shape, limits.export_as)
    kept = {name: after[name] / before[name] for name in ("Q8_0", "Q4_K_M") if name in after}
    if max(kept.values(), default=0.0) <= plan.keep_params + _LOST_TO_BLOCKS:
        return None
    shares = " and ".join(
        f"{100 * share:.0f} % of the bytes in {name}" for name, share in kept.items()
    )
    return (
        f"llama.cpp keeps {shares}: rows that are no whole blocks of 32 or 256 weights stay in "
        "more bits. `sp3llm plan` shows what every shape weighs."
    )
