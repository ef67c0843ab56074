"""Sizes fixed by hand: which a model cannot be cut to, and the shape that the others make."""

import math
from dataclasses import replace

from sp3llm.errors import UserError
from sp3llm.models.shapes import Shape, keeps_every_layer, keeps_heads_apart
from sp3llm.options.field import flag
from sp3llm.planning.limits import width_step
from sp3llm.planning.spending import Request


def start_shape(request: Request) -> Shape:
    """The dense shape with what is fixed by hand, but for the width and what follows from it.

    Raises UserError if a size fixed by hand is not one that the model can be cut to.
    """
    _check_bounds(request)
    _check_layers(request)
    _check_merging(request)
    _check_experts(request)
    _check_embedding_width(request)
    _check_tie(request)
    _check_head_dim(request)
    _check_multiple(request)
    limits, dense = request.limits, request.dense
    shape = request.with_groups(dense, limits.num_key_value_heads or dense.num_key_value_heads)
    shape = replace(
        shape,
        intermediate_size=limits.intermediate_size or dense.intermediate_size,
        num_hidden_layers=limits.num_hidden_layers or dense.num_hidden_layers,
        vocab_size=limits.vocab_rows or dense.vocab_size,
    )
    shape = shape.untied() if limits.tie == "untie" else shape
    _check_width_of_heads(request, shape)
    _check_tensor_parallel(request, shape)
    return shape


def _check_bounds(request: Request) -> None:
    for name in ("hidden_size", "intermediate_size", "num_key_value_heads", "num_hidden_layers"):
        asked, most = getattr(request.limits, name), getattr(request.dense, name)
        if asked is not None and not 0 < asked <= most:
            raise UserError(
                f"Expected {flag(name)} between 1 and the model's {most}, found "
                f"{asked}: give a smaller number."
            )


def _check_layers(request: Request) -> None:
    asked = request.limits.num_hidden_layers
    obstacle = keeps_every_layer(request.family, request.config)
    if obstacle is not None and asked not in (None, request.dense.num_hidden_layers):
        raise UserError(
            f"Expected a model whose layers can go for --num-hidden-layers, found a "
            f"{request.family.model_type} model {obstacle}: leave it out."
        )


def _check_merging(request: Request) -> None:
    if not request.merges_heads:
        return
    obstacle = keeps_heads_apart(request.family, request.config)
    if request.is_square and obstacle is None:
        obstacle = "that is to stay square"
    if obstacle is not None:
        raise UserError(
            f"Expected a model whose key-value heads can be merged for --kv-heads merge, found a "
            f"{request.family.model_type} model {obstacle}: use --kv-heads drop."
        )
    asked, most = request.limits.num_key_value_heads, request.dense.num_key_value_heads
    if asked is not None and most % asked:
        raise UserError(
            f"Expected --num-key-value-heads to divide the {most} there are, which are merged as "
            f"many to each, found {asked}: give a divisor, or use --kv-heads drop."
        )


def _check_experts(request: Request) -> None:
    asked = request.limits.intermediate_size
    if asked is not None and request.family.experts is not None:
        raise UserError(
            f"Expected no --intermediate-size for a {request.family.model_type} model, whose "
            f"experts keep their widths, found {asked}: leave it out."
        )


def _check_embedding_width(request: Request) -> None:
    asked, most = request.limits.word_embed_proj_dim, request.dense.word_embed_proj_dim
    if asked is None:
        return
    if request.family.projections is None or not request.keeps_tie:
        raise UserError(
            "Expected a tied model of a family whose embeddings have a width of their own for "
            "--word-embed-proj-dim (opt), found another: leave it out."
        )
    if not 0 < asked <= most:
        raise UserError(
            f"Expected --word-embed-proj-dim between 1 and the model's {most}, found {asked}: give "
            "a smaller number."
        )


def _check_tie(request: Request) -> None:
    family = request.family
    if request.keeps_tie and family.centred and not family.projections:
        raise UserError(
            f"A tied head cannot be kept in a {family.model_type} model, whose LayerNorm leaves no "
            "diagonal to tie through: use --tie untie."
        )
    if request.limits.tie == "untie" and not request.dense.tie_word_embeddings:
        raise UserError(
            "Expected a model with tied embeddings for --tie untie, found one whose head has a "
            "table of its own: leave it out."
        )


def _check_head_dim(request: Request) -> None:
    asked, dense = request.limits.head_dim, request.dense.head_dim
    if asked is None:
        return
    if request.limits.num_key_value_heads is not None:
        raise UserError(
            "Expected one of --head-dim, which keeps every head, and --num-key-value-heads, "
            "which keeps heads whole, found both: leave one out."
        )
    if not request.is_square or request.family.rotary:
        raise UserError(
            "Expected a model whose heads can shrink for --head-dim (opt), found rotary "
            "embedding, which forbids it: leave it out."
        )
    if not 0 < asked < dense:
        raise UserError(
            f"Expected --head-dim between 1 and {dense - 1}, below the model's "
            f"{dense}, found {asked}: give a smaller number."
        )


def _check_multiple(request: Request) -> None:
    multiple, heads = (
        width_step(request.limits, request.dense),
        request.dense.num_attention_heads,
    )
    if not request.is_square and multiple % heads:
        raise UserError(
            f"Expected --multiple-of to be a multiple of the {heads} attention "
            f"heads, which must divide the hidden size, found {multiple}: use "
            f"{math.lcm(multiple, heads)}."
        )


def _check_width_of_heads(request: Request, shape: Shape) -> None:
    asked, heads = request.limits.hidden_size, request.dense.num_attention_heads
    multiple = math.lcm(heads, shape.num_attention_heads)
    if not request.is_square and asked is not None and asked % multiple:
        raise UserError(
            f"Expected --hidden-size to be a multiple of the {heads} attention "
            f"heads (and of the {shape.num_attention_heads} that are kept), which Hugging Face "
            f"demands, found {asked}: use a multiple of {multiple}."
        )


def _check_tensor_parallel(request: Request, shape: Shape) -> None:
    devices = request.limits.tensor_parallel
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(shape, name) % devices:
            raise UserError(
                f"Expected {name} to be a multiple of --tensor-parallel {devices}, "
                f"found {getattr(shape, name)}: choose other sizes or fewer devices."
            )
