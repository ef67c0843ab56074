"""BERT and its like: encoders whose norms sit behind the addition, on the stream."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sp3llm.models.families.schema import (
    FFN,
    KEY_VALUE,
    LABELS,
    POSITIONS,
    QUERY,
    RESIDUAL,
    TYPES,
    VOCAB,
    Axis,
    Family,
    Site,
    Table,
    TaskHead,
)

# A module's parameters by what it reads and gives.
_NORM = (RESIDUAL,)
_QUERY, _KEY, _WRITER = (QUERY, RESIDUAL), (KEY_VALUE, RESIDUAL), (RESIDUAL, QUERY)
_IN, _OUT = (FFN, RESIDUAL), (RESIDUAL, FFN)
_UNITS, _ANSWER = (RESIDUAL, RESIDUAL), (LABELS, RESIDUAL)

_BERT_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
_UNSUPPORTED = {
    "position_embedding_type": (
        "absolute",
        "positions relative to each other are not in its table",
    ),
    "is_decoder": (False, "a decoder of this class is not in its table"),
    "add_cross_attention": (False, "cross-attention is not in its table"),
}


def _with_biases(modules: Mapping[str, tuple[Axis, ...]]) -> dict[str, tuple[Axis, ...]]:
    """Weight and bias of each module; a bias lies on the first axis of its weight."""
    table: dict[str, tuple[Axis, ...]] = {}
    for name, axes in modules.items():
        table |= {f"{name}.weight": axes, f"{name}.bias": axes[:1]}
    return table


def _embeddings(prefix: str, types: bool = True) -> Table:
    modules = {"word_embeddings": VOCAB, "position_embeddings": POSITIONS}
    if types:
        modules["token_type_embeddings"] = TYPES
    table: dict[str, tuple[Axis, ...]] = {
        f"{prefix}embeddings.{name}.weight": (axis, RESIDUAL) for name, axis in modules.items()
    }
    return {**table, **_with_biases({f"{prefix}embeddings.LayerNorm": _NORM})}


_BERT_LAYER = _with_biases(
    {
        "attention.self.query": _QUERY,
        "attention.self.key": _KEY,
        "attention.self.value": _KEY,
        "attention.output.dense": _WRITER,
        "attention.output.LayerNorm": _NORM,
        "intermediate.dense": _IN,
        "output.dense": _OUT,
        "output.LayerNorm": _NORM,
    }
)
_BERT_SITES = (
    Site(
        "attention.output.LayerNorm",
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        "attention.self",
    ),
    Site("output.LayerNorm", ("intermediate.dense",), "intermediate"),
)


def _bert_like(
    model_type: str, name: str, defaults: Mapping[str, Any], offset: int, heads_above: str
) -> Family:
    """The stock model without a head, `BertModel` or the like, its pooler among its parameters."""
    return Family(
        model_type=model_type,
        architecture=f"{name}Model",
        defaults={**_BERT_DEFAULTS, **defaults},
        embeddings=_embeddings(""),
        layer=_BERT_LAYER,
        optional={},
        sites=_BERT_SITES,
        writers=("attention.output.dense", "output.dense"),
        layer_prefix="encoder.layer.{layer}.",
        ignored_suffixes=("position_ids",),
        keys={"num_key_value_heads": None, "head_dim": None},
        centred=True,
        norm_bias=True,
        post_norm=True,
        embedding_norm="embeddings.LayerNorm",
        eps="layer_norm_eps",
        square=True,
        rotary=False,
        position_offset=offset,
        task_head=TaskHead("pooler.dense", None, first_only=True),
        ending=_with_biases({"pooler.dense": _UNITS}),
        held_as=f"{model_type}.",
        heads_above=(heads_above,),
        unsupported=_UNSUPPORTED,
    )


def _under(base: Family, architecture: str, modules: Table, task_head: TaskHead) -> Family:
    """A stock class that holds the model of `base` under a name, with a head of its own."""
    prefix = base.held_as or ""
    return replace(
        base,
        architecture=architecture,
        embeddings={prefix + name: axes for name, axes in base.embeddings.items()},
        layer_prefix=prefix + base.layer_prefix,
        embedding_norm=f"{prefix}{base.embedding_norm}",
        task_head=task_head,
        ending=_with_biases(modules),
        held_as=None,
        heads_above=(),
    )


def _classes(
    base: Family,
    pretraining: tuple[str, ...],
    units: str,
    answer: str,
    activation: str = "tanh",
) -> Mapping[str, Family]:
    """The family of each stock class by its name: without a head, for what it was pretrained on,
    and one a task.

    A head that predicts masked words goes through a norm and an activation of its own to the table
    of embeddings, and is of no use behind pretraining: of such a class the model without a head is
    taken, as transformers' AutoModel does.
    """
    name = base.architecture.removesuffix("Model")
    heads: Mapping[str, tuple[dict[str, tuple[Axis, ...]], TaskHead]] = {
        "SequenceClassification": (
            {units: _UNITS, answer: _ANSWER},
            TaskHead(units, answer, first_only=True, activation=activation),
        ),
        "QuestionAnswering": (
            {"qa_outputs": _ANSWER},
            TaskHead(None, "qa_outputs", first_only=False),
        ),
    }
    classes = {
        f"{name}For{task}": _under(base, f"{name}For{task}", modules, task_head)
        for task, (modules, task_head) in heads.items()
    }
    pretrained = {f"{name}For{what}": base for what in pretraining}
    return {base.architecture: base, **pretrained, **classes}


_BERT = _bert_like("bert", "Bert", {}, offset=0, heads_above="cls.")
# Positions count from the padding's id on, 1; the table has its rows stated with them.
_ROBERTA = _bert_like(
    "roberta",
    "Roberta",
    {"vocab_size": 50265, "pad_token_id": 1},
    offset=0,
    heads_above="lm_head.",
)
_DISTILBERT = Family(
    model_type="distilbert",
    architecture="DistilBertModel",
    defaults={
        "dim": 768,
        "n_layers": 6,
        "hidden_dim": 3072,
        "n_heads": 12,
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "sinusoidal_pos_embds": False,
    },
    embeddings=_embeddings("", types=False),
    layer=_with_biases(
        {
            "attention.q_lin": _QUERY,
            "attention.k_lin": _KEY,
            "attention.v_lin": _KEY,
            "attention.out_lin": _WRITER,
            "sa_layer_norm": _NORM,
            "ffn.lin1": _IN,
            "ffn.lin2": _OUT,
            "output_layer_norm": _NORM,
        }
    ),
    optional={},
    sites=(
        Site(
            "sa_layer_norm",
            ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            "attention",
        ),
        Site("output_layer_norm", ("ffn.lin1",), "ffn"),
    ),
    writers=("attention.out_lin", "ffn.lin2"),
    layer_prefix="transformer.layer.{layer}.",
    ignored_suffixes=("position_ids",),
    keys={
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "hidden_dim",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": None,
        "head_dim": None,
    },
    centred=True,
    norm_bias=True,
    post_norm=True,
    embedding_norm="embeddings.LayerNorm",
    eps=1e-12,
    square=True,
    rotary=False,
    task_head=TaskHead(None, None, first_only=False),
    held_as="distilbert.",
    heads_above=("vocab_transform.", "vocab_layer_norm.", "vocab_projector."),
)

ENCODERS: Mapping[str, Mapping[str, Family]] = {
    "bert": _classes(_BERT, ("MaskedLM", "PreTraining"), "bert.pooler.dense", "classifier"),
    "roberta": _classes(_ROBERTA, ("MaskedLM",), "classifier.dense", "classifier.out_proj"),
    "distilbert": _classes(_DISTILBERT, ("MaskedLM",), "pre_classifier", "classifier", "relu"),
}
"""Families of encoders, by model type and by the stock class that `config.json` names; what is
written is the family's own class."""
