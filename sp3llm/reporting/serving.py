"""Whether servers load a model that was written, and how to say so."""

from pathlib import Path

from sp3llm.models.families import FAMILIES
from sp3llm.models.served import is_served_at
from sp3llm.models.shapes import Shape


def loads_in_servers(architecture: str, shape: Shape) -> bool:
    """Whether servers (vLLM) load a stock class at that shape: some take the width over the heads
    for the head size. A class that no family has is taken to load.
    """
    query_size = shape.num_attention_heads * shape.head_dim
    return all(
        is_served_at(family, shape.hidden_size, query_size)
        for family in FAMILIES.values()
        if family.architecture == architecture
    )


def loading_lines(out: Path, is_served: bool) -> str:
    """How to load what was written to `out`, two lines, or one where servers do not load it."""
    line = f"  AutoModelForCausalLM.from_pretrained({str(out)!r})   in transformers"
    return f"{line}\n  vllm serve {out}" if is_served else line
