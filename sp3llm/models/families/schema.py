"""What a family is: which parameter lives on which axes, who reads and writes the stream.

Names are those on disk. A parameter's axes are given in the order of its shape.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RESIDUAL = "hidden_size"
FFN = "intermediate_size"
QUERY = "num_attention_heads * head_dim"
KEY_VALUE = "num_key_value_heads * head_dim"
INTERLEAVED = "num_attention_heads * 3 * head_dim"
HEAD_DIM = "head_dim"
VOCAB = "vocab_size"
EMBEDDING = "word_embed_proj_dim"
POSITIONS = "max_position_embeddings + offset"
EXPERTS = "num_experts"
EXPERT_FFN = "moe_intermediate_size"
SHARED_FFN = "shared_expert_intermediate_size"
TYPES = "type_vocab_size"
LABELS = "num_labels"
ONE = "1"

VLLM, LLAMA_CPP = SERVERS = ("vLLM", "llama.cpp")
"""What a model is served with, by the name to print."""

EACH = "{expert}"
"""Stands in a name for the number of an expert, which makes the name one of every expert."""

Axis = str | tuple[str, ...]
"""One axis of a parameter; a tuple: several one after the other, as fused matrices have them."""
Axes = tuple[Axis, ...]
Table = Mapping[str, Axes]


@dataclass(frozen=True)
class Site:
    """A place where the residual stream is normalised and read."""

    norm: str
    """Module, relative to the layer, whose input is the stream; in a post-norm family the one whose
    input is the stream with what the block has added, and whose output is the stream behind."""
    readers: tuple[str, ...]
    """Modules, relative to the layer, that read the normalised stream."""
    block: str
    """Module, relative to the layer, whose output is added to the stream; in a post-norm family
    the part of it in front of its writer."""


@dataclass(frozen=True)
class Experts:
    """The sparse layers of a family: experts, of which a router sends each token to a few.

    `EACH` in a name stands for every expert.
    """

    number: tuple[str, ...]
    """Config keys that may hold the number of experts; of two the class takes the first."""
    layer: Table
    """Parameters of a sparse layer, in place of `Family.layer`."""
    site: Site
    """Where a sparse layer reads the stream last, in place of the last of `Family.sites`."""
    writers: tuple[str, ...]
    """Modules of that block that add to the stream, weighed by router and gate, in place of the
    last of `Family.writers`. A single regression does not fit them: they stay projected."""
    fused: Mapping[str, tuple[str, ...]]
    """The class's name to those on disk, where they differ, relative to the layer: with `EACH` in
    them, all experts' tensors on a first axis, several names one after the other on the next."""
    active: str = "num_experts_per_tok"
    """Config key of the number of experts that a token goes through."""
    dense_layers: str | None = None
    """Config key of the list of layers that have no experts; None: the class has no such list."""
    sparse_step: str | None = None
    """Config key of `n` where only every `n`-th layer has experts; None: every layer may."""


@dataclass(frozen=True)
class ServedAs:
    """A family whose stock class computes the same from the same weights, beside some zeros, and
    which servers load at any width (docs/deploy.md).
    """

    model_type: str
    """Of that family."""
    config: Mapping[str, Any]
    """Config entries that make its class the same."""
    silent: Mapping[str, Any]
    """What the original's class takes where `config.json` is silent and `Family.defaults` does not
    say it, and the other class takes something else for."""
    dropped: tuple[str, ...]
    """Config keys that the other class does not know, or reads otherwise."""
    zeros: tuple[str, ...]
    """Parameters of a layer, relative to its prefix, that its class has in addition: zeros."""
    unlike: Mapping[str, str] = field(default_factory=dict)
    """Config key to what the original's class does where it is set, and the other does not."""


@dataclass(frozen=True)
class TaskHead:
    """What reads an encoder's stream behind the last layer, where a decoder scores a vocabulary."""

    units: str | None
    """Module, a matrix `(RESIDUAL, RESIDUAL)` and an activation, that reads the stream and that
    the answer is read from; None: the answer is read from the stream."""
    answer: str | None
    """Module that answers: a value a label; None: the units, or the stream, are the answer."""
    first_only: bool
    """Whether they read the first token of a row only, and not every one."""
    activation: str = "tanh"
    """Of the units, by torch's name."""

    @property
    def reader(self) -> str | None:
        """The module that reads the stream, if one does."""
        return self.units or self.answer


@dataclass(frozen=True)
class Family:
    """Everything sp3llm knows about one `model_type`."""

    model_type: str
    """The `model_type` of `config.json`."""
    architecture: str
    """The stock class, as `architectures` names it."""
    defaults: Mapping[str, Any]
    """Values that the stock config class supplies where `config.json` is silent."""
    embeddings: Table
    """Parameters before the layers."""
    layer: Table
    """Parameters of one layer without experts, relative to `layer_prefix`."""
    optional: Mapping[str, Table]
    """Further parameters of a layer, present where the config's flag is true."""
    sites: tuple[Site, ...]
    """Where a layer reads the stream, in order."""
    writers: tuple[str, ...]
    """Modules of a layer that add to the stream, in order."""
    final_norm: str = "model.norm"
    """The norm after the last layer, read by the head."""
    head: str = "lm_head"
    """The output head; with tied embeddings it has no parameter of its own."""
    layer_prefix: str = "model.layers.{layer}."
    """Prefix of layer parameters."""
    ignored_suffixes: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Buffers that old checkpoints carry and the class recomputes."""
    keys: Mapping[str, str | None] = field(default_factory=dict)
    """Where the config names a size otherwise than Llama's: the key, or None if it has none."""
    centred: bool = False
    """The norms are LayerNorms: they remove the mean over channels first (docs/design.md 3.4)."""
    norm_bias: bool = False
    """The norms have biases."""
    post_norm: bool = False
    """The norms sit behind the addition, on the stream, where their weights stay (docs/design.md
    3.15); `Site.norm` is the one behind the site's block."""
    embedding_norm: str | None = None
    """The norm between the embeddings and the first layer, in a post-norm family."""
    task_head: TaskHead | None = None
    """Of an encoder; None: `head` scores a vocabulary."""
    ending: Table = field(default_factory=dict)
    """Parameters behind the layers of a family with a `task_head`."""
    held_as: str | None = None
    """Of a stock class without a head: what parameters' names begin with in files of classes that
    hold it, which it loads all the same."""
    heads_above: tuple[str, ...] = ()
    """What names begin with, in those files, of heads that it leaves out."""
    norm_offset: float = 0.0
    """What the class adds to a norm's stored weight."""
    eps: str | float = "rms_norm_eps"
    """The norms' epsilon, or the config key that holds it."""
    residual_multiplier: str | None = None
    """Config key of the factor on everything that is added to the stream."""
    logit_divisor: str | None = None
    """Config key of what the class divides its logits by."""
    scales_embeddings: bool = False
    """The class multiplies embeddings by the square root of the hidden size."""
    square: bool = False
    """The class demands `hidden_size = num_attention_heads * head_dim` (docs/design.md 3.6)."""
    square_rope_types: tuple[str, ...] = ()
    """RoPE types under which the class demands that too, since it derives the head size, and with
    it the length of the factors it expects, from width and heads."""
    square_in: tuple[str, ...] = ()
    """Servers of `SERVERS` whose class for it demands that, though the stock class does not
    (eval/results/served-classes.md)."""
    gguf: bool = True
    """llama.cpp has the class."""
    served_as: ServedAs | None = None
    """What is written instead where servers could not load the class; None: there is nothing."""
    rotary: bool = True
    """Positions are rotated into queries and keys, which cannot be projected then."""
    projections: tuple[str, str] | None = None
    """Modules from the embedding width into the stream, and from the stream to it before the head;
    the class has them where the two widths differ (docs/design.md 3.5)."""
    position_offset: int = 0
    """Rows of the table of learned positions before the first position's."""
    parallel: str | None = None
    """Config key that says whether a layer's blocks read the same stream and are added together."""
    experts: Experts | None = None
    """What sparse layers have instead; with it no FFN width is cut, nor the number of experts."""
    layer_lists: Mapping[str, str | None] = field(default_factory=lambda: {"layer_types": None})
    """Config key of a list with an entry a layer to the key that, where it is set, has the class
    make the list from the layers' numbers if it is not stated; None: nothing does."""
    unsupported: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    """Config key to the only value that is supported, and why no other is."""

    @property
    def layers_module(self) -> str:
        """Module path of the list of layers."""
        return self.layer_prefix.partition(".{")[0]

    @property
    def embedding(self) -> str:
        """Name of the token embedding table."""
        return next(iter(self.embeddings))

    @property
    def embeddings_module(self) -> str:
        """Module path of everything in front of the layers, in a post-norm family."""
        return self.embedding.removesuffix(".word_embeddings.weight")


@dataclass(frozen=True)
class Group:
    """Parameters that are read, transformed and written together."""

    name: str
    """`embeddings`, `layer 0`, ..., `head`."""
    parameters: Table = field(default_factory=dict)
    """Full name on disk to axes."""
    prefix: str = ""
    """What a full name begins with."""
    layer: int = -1
    """Which layer it is, if it is one."""
    sparse: bool = False
    """Whether it is a layer whose last block is one of experts."""
    sites: tuple[Site, ...] = ()
    """Where the layer reads the stream, in order."""
    writers: tuple[str, ...] = ()
    """Modules of the layer that add to the stream, in order; one a site, but for experts."""
