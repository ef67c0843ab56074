"""The sizes that may change in a model, and what a shape costs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from sp3llm.models.families import (
    EMBEDDING,
    FFN,
    HEAD_DIM,
    POSITIONS,
    RESIDUAL,
    VOCAB,
    Family,
    axis_sizes,
    count_matrix_parameters,
    count_parameters,
    is_tied,
    key_value_heads,
    setting,
)


@dataclass(frozen=True)
class Shape:
    """The sizes that a plan may change, and those that follow from them."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    word_embed_proj_dim: int | None = None
    """Width of the embedding table, in families that have projections between it and the stream."""
    tie_word_embeddings: bool = False

    @staticmethod
    def of(family: Family, config: Mapping[str, Any]) -> "Shape":
        """The shape that a `config.json` describes."""
        sizes = axis_sizes(family, config)
        heads = setting(family, config, "num_attention_heads")
        return Shape(
            hidden_size=sizes[RESIDUAL],
            intermediate_size=sizes[FFN],
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads(family, config),
            head_dim=sizes[HEAD_DIM],
            word_embed_proj_dim=sizes[EMBEDDING] if family.projections else None,
            tie_word_embeddings=is_tied(family, config),
        )

    def with_width(self, hidden_size: int) -> "Shape":
        """The same with another hidden size."""
        return replace(self, hidden_size=hidden_size)

    def with_groups(self, num_key_value_heads: int) -> "Shape":
        """The same with fewer KV groups, each with its query heads."""
        group = self.num_attention_heads // self.num_key_value_heads
        return replace(
            self,
            num_attention_heads=group * num_key_value_heads,
            num_key_value_heads=num_key_value_heads,
        )

    def untied(self) -> "Shape":
        """The same with a head of its own, and embeddings as wide as the stream."""
        width = None if self.word_embed_proj_dim is None else self.hidden_size
        return replace(self, tie_word_embeddings=False, word_embed_proj_dim=width)

    def with_axis_of(self, other: "Shape", axis: str) -> "Shape":
        """The same with `other`'s size of the axis that a writer reads: FFN or heads."""
        if axis == FFN:
            return replace(self, intermediate_size=other.intermediate_size)
        return self.with_groups(other.num_key_value_heads)


@dataclass(frozen=True)
class Cost:
    """What a shape costs."""

    params: int
    """True parameters, tied weights once."""
    bytes: int
    """Of the weights."""
    flops: int
    """A token: two a matrix parameter (the embedding lookup is free), and attention. Of experts
    those count that a token goes through, shared ones included."""
    kv_cache: int
    """Bytes of KV cache a token."""

    def of(self, what: str) -> int:
        """The count that a budget is about."""
        return getattr(self, what.replace("-", "_"))


def resized_config(family: Family, config: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    """`config.json` of the compressed model: the dense one's own, with the new shape.

    The file is carried over key by key rather than written anew, so that RoPE scaling, sliding
    windows and whatever else a tool reads there stay as their author wrote them. `head_dim` is
    written out, as it is no longer the quotient of width and heads.
    """
    dense = asdict(Shape.of(family, config))
    written = ("head_dim", "word_embed_proj_dim")  # the classes would derive them from the width
    changed = {
        k: v for k, v in asdict(shape).items() if v != dense[k] or (k in written and v is not None)
    }
    named = {family.keys.get(k, k): v for k, v in changed.items()}
    return {**config, **{k: v for k, v in named.items() if k is not None}}


def cost_of(
    family: Family, config: Mapping[str, Any], shape: Shape, context: int = 2048, itemsize: int = 2
) -> Cost:
    """Count a shape of a model."""
    resized = resized_config(family, config, shape)
    layers = setting(family, config, "num_hidden_layers")
    params = count_parameters(family, resized)
    multiplied = count_matrix_parameters(family, resized)
    if not is_tied(family, resized):
        sizes = axis_sizes(family, resized)
        multiplied -= sizes[VOCAB] * sizes[EMBEDDING]
    if POSITIONS in (axes[0] for axes in family.embeddings.values()):
        multiplied -= axis_sizes(family, resized)[POSITIONS] * shape.hidden_size
    attention = 4 * layers * shape.num_attention_heads * shape.head_dim * context
    return Cost(
        params=params,
        bytes=params * itemsize,
        flops=2 * multiplied + attention,
        kv_cache=2 * layers * shape.num_key_value_heads * shape.head_dim * itemsize,
    )
