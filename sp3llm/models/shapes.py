"""The sizes that compression may change, and what a model of such sizes costs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sp3llm.models.companions import carried_config
from sp3llm.models.families import (
    EMBEDDING,
    FFN,
    HEAD_DIM,
    KEY_VALUE,
    POSITIONS,
    QUERY,
    RESIDUAL,
    VOCAB,
    Family,
    axis_sizes,
    count_layer_matrices,
    count_matrix_parameters,
    count_parameters,
    is_sparse,
    is_square,
    is_tied,
    key_value_heads,
    setting,
)
from sp3llm.models.served import export_of


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that compression may change, by their names in Llama's config.

    They are the same in every layer: stock configs hold one number of each.
    """

    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Neurons of the FFN; of Mixtral's experts, of each."""
    num_attention_heads: int
    """Query heads."""
    num_key_value_heads: int
    """Key-value heads, each shared by a group of query heads; the groups are of one size."""
    head_dim: int
    """Dimensions of a head."""
    word_embed_proj_dim: int | None = None
    """Width of the embedding table in families that may have projections between it and the
    stream (OPT); None in others, where it is the stream's."""
    tie_word_embeddings: bool = False
    """Whether the output head shares the embedding table."""
    # Records of before tokens could go have none (`reporting.typed_json.LATER`).
    vocab_size: int | None = field(default=None, metadata={"later": True})
    """Rows of the tables with one for every token; None: all that the dense model has."""
    # Records of before layers could go have none (`reporting.typed_json.LATER`).
    num_hidden_layers: int | None = field(default=None, metadata={"later": True})
    """Layers; None: all that the dense model has."""

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
            vocab_size=sizes[VOCAB],
            num_hidden_layers=setting(family, config, "num_hidden_layers"),
        )

    def vocabulary_parameters(self) -> int:
        """True parameters of the tables with a row for every token, a tied one once."""
        tables = 1 if self.tie_word_embeddings else 2
        return tables * (self.vocab_size or 0) * (self.word_embed_proj_dim or self.hidden_size)

    def with_width(self, hidden_size: int) -> "Shape":
        """The same with another hidden size."""
        return replace(self, hidden_size=hidden_size)

    def with_groups(self, num_key_value_heads: int) -> "Shape":
        """The same with another number of KV groups, each with as many query heads as before."""
        group = self.num_attention_heads // self.num_key_value_heads
        return replace(
            self,
            num_attention_heads=group * num_key_value_heads,
            num_key_value_heads=num_key_value_heads,
        )

    def with_merged_groups(self, num_key_value_heads: int) -> "Shape":
        """The same with another number of key-value heads, and as many query heads as before."""
        return replace(self, num_key_value_heads=num_key_value_heads)

    def merges_heads(self, dense: "Shape") -> bool:
        """Whether, cut from `dense`, it has fewer key-value heads for the same query heads."""
        return (
            self.num_attention_heads == dense.num_attention_heads
            and self.num_key_value_heads < dense.num_key_value_heads
        )

    def untied(self) -> "Shape":
        """The same with a head of its own, and embeddings as wide as the stream."""
        width = None if self.word_embed_proj_dim is None else self.hidden_size
        return replace(self, tie_word_embeddings=False, word_embed_proj_dim=width)

    def with_axis_of(self, other: "Shape", axis: str) -> "Shape":
        """The same with the sizes that `other` has along one axis of what writers read: `FFN`, or
        any other for the heads.
        """
        if axis == FFN:
            return replace(self, intermediate_size=other.intermediate_size)
        return self.with_groups(other.num_key_value_heads)


@dataclass(frozen=True)
class Cost:
    """What a model of a certain shape costs, by what a budget may be about (`options.COUNTS`)."""

    params: int
    """Number of parameters; tied weights count once."""
    bytes: int
    """Bytes of the weights."""
    flops: int
    """FLOPs for one token: two for each matrix parameter that it meets (the embedding lookup is
    free), and attention over the context. Of experts those count that a token goes through, shared
    ones included."""
    kv_cache: int
    """Bytes of KV cache for one token; an encoder has none."""
    encoder: int = 0
    """Parameters in the matrices of an encoder's layers; 0 for a decoder."""

    def of(self, what: str) -> int:
        """The count of that name: `params`, `bytes`, `flops`, `kv-cache` or `encoder`."""
        return getattr(self, what.replace("-", "_"))


def resized_config(
    family: Family,
    config: Mapping[str, Any],
    shape: Shape,
    layers: Sequence[int] | None = None,
) -> dict[str, Any]:
    """`config.json` of the compressed model: the dense one's own, with the new shape.

    `layers` are the numbers of the dense model's layers that stay, rising, which lists with an
    entry a layer follow; None: which ones does not matter, as for a count, or all stay.

    The file is carried over key by key rather than written anew, so that RoPE scaling, sliding
    windows and whatever else a tool reads there stay as their author wrote them. Sizes that the
    class would derive from the width where they are not stated are always stated. The stock class
    is named as transformers spells it, and what names files that are not carried along goes.
    """
    dense = asdict(Shape.of(family, config))
    derived = ("head_dim", "word_embed_proj_dim")
    resized = carried_config(config)
    if "architectures" in config:
        resized["architectures"] = [family.architecture]
    depth = shape.num_hidden_layers or dense["num_hidden_layers"]
    rows = shape.vocab_size or dense["vocab_size"]
    whole = replace(shape, vocab_size=rows, num_hidden_layers=depth)
    for name, size in asdict(whole).items():
        key = family.keys.get(name, name)
        stated = size != dense[name] or (name in derived and size is not None)
        if stated and key is not None:
            resized[key] = size
    kept = range(depth) if layers is None else layers
    for name in family.layer_lists:
        if depth < dense["num_hidden_layers"] and resized.get(name) is not None:
            resized[name] = [resized[name][layer] for layer in kept]
    return resized


def keeps_every_layer(family: Family, config: Mapping[str, Any]) -> str | None:
    """Why no layer of a model can go, as a relative clause; None: any can.

    A rule by the layers' numbers would take the layers behind a gap for others, and which of two
    kinds of layers go would be a part of what a shape costs.
    """
    for name, rule in family.layer_lists.items():
        if rule is not None and config.get(name) is None and setting(family, config, rule):
            return f"whose layers differ by their numbers ({rule} without {name} in config.json)"
    depth = setting(family, config, "num_hidden_layers")
    if len({is_sparse(family, config, layer) for layer in range(depth)}) > 1:
        return "of which some layers have experts and some have none"
    return None


def keeps_heads_apart(family: Family, config: Mapping[str, Any]) -> str | None:
    """Why the key-value heads of a model cannot be merged (`maths.merging`), as a relative clause;
    None: they can.
    """
    readers = family.sites[0].readers
    axes = [family.layer.get(f"{reader}.weight", ("",))[0] for reader in readers]
    if is_square(family, config) or axes != [QUERY, KEY_VALUE, KEY_VALUE]:
        return "whose queries, keys and values are no three matrices with grouped heads"
    if any("k_norm" in name for name in family.layer):
        return "whose keys are normalised head by head"
    return None


def cost_of(
    family: Family,
    config: Mapping[str, Any],
    shape: Shape,
    context: int = 2048,
    itemsize: int = 2,
    export_as: str = "same",
) -> Cost:
    """What the model of that `config.json` costs once it is cut to `shape`.

    `context` is how many tokens a token attends to, `itemsize` the bytes of a weight and of a
    number in the KV cache, `export_as` the class it is written as (`models.served.export_of`).
    """
    export = export_of(family, resized_config(family, config, shape), export_as)
    family, resized = export.family, export.config
    layers = setting(family, resized, "num_hidden_layers")
    params = count_parameters(family, resized)
    multiplied = count_matrix_parameters(family, resized) - _looked_up(family, resized)
    heads, groups = (
        count * shape.head_dim for count in (shape.num_attention_heads, shape.num_key_value_heads)
    )
    # Two products with the context, of queries with keys and of weights with values.
    attention = 2 * 2 * layers * heads * context
    return Cost(
        params=params,
        bytes=params * itemsize,
        flops=2 * multiplied + attention,
        kv_cache=0 if family.task_head else 2 * layers * groups * itemsize,  # keys and values
        encoder=count_layer_matrices(family, resized) if family.task_head else 0,
    )


def _looked_up(family: Family, config: Mapping[str, Any]) -> int:
    """Parameters in tables that no token is multiplied by: learned positions, and the embeddings
    where the head has a table of its own.
    """
    sizes = axis_sizes(family, config)
    tables = 0
    if not is_tied(family, config):
        tables += sizes[VOCAB] * sizes[EMBEDDING]
    if POSITIONS in (axes[0] for axes in family.embeddings.values()):
        tables += sizes[POSITIONS] * sizes[RESIDUAL]
    return tables
