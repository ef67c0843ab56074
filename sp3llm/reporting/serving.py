"""Which servers load a model that was written, and how to say so."""

from collections.abc import Sequence
from pathlib import Path

from sp3llm.models.families import FAMILIES, VLLM
from sp3llm.models.objectives.catalogue import objective_of
from sp3llm.models.served import refused_at
from sp3llm.models.shapes import Shape


def servers_refusing(architecture: str, shape: Shape) -> tuple[str, ...]:
    """The servers that do not load a stock class at that shape, since theirs takes the width over
    the heads for the head size. A class that no family has is taken to load.
    """
    query_size = shape.num_attention_heads * shape.head_dim
    refusing = (
        refused_at(family, shape.hidden_size, query_size)
        for family in FAMILIES.values()
        if family.architecture == architecture
    )
    return next(refusing, ())


def loading_lines(out: Path, architecture: str, refusing: Sequence[str]) -> str:
    """How to load what was written to `out`, a line each, and which servers do not, and why."""
    objective = objective_of(architecture)
    lines = [f"  {objective.auto_class}.from_pretrained({str(out)!r})   in transformers"]
    if objective.evaluation_windows is not None and VLLM not in refusing:
        lines.append(f"  vllm serve {out}")
    if refusing:
        lines.append(
            f"  not in {' and '.join(refusing)}, where {architecture} takes the width over the "
            "heads for the head size: compress with --square for that"
        )
    return "\n".join(lines)
