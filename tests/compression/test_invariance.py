"""Fold, rotate and cut change nothing where nothing may change.

At full width every orthogonal basis must leave the logits as they are. That alone does not catch
a wrong scale of the stream, so models whose stream truly lies in K dimensions are cut to K, with
a large epsilon, where the result must be exact too.
"""

import pytest
import torch

from sp3llm.compression.basis_choice import choose_basis
from sp3llm.compression.measuring import measure_dense
from sp3llm.compression.projection import Projection
from sp3llm.models.families import EMBEDDING, axis_sizes, is_square
from sp3llm.models.shapes import Shape, resized_config
from tests.conftest import (
    TINY,
    disk_tensors,
    family_of_model,
    full_width_projection,
    logits_of,
    project_checkpoint,
    random_orthogonal,
    relative_error,
    save_model,
    stock_model,
    tiny_model,
)
from tests.helpers import EXECUTION, confine_stream, cut_model, shape_of_width, tolerance

TIED = [name for name in TINY if tiny_model(name).config.tie_word_embeddings]


def padded(checkpoint, family, tensors):
    """Config and tensors of the same model with an embedding table one column of zeros wider: the
    class has projections only where that width is not the stream's.
    """
    config = {**checkpoint.config, "word_embed_proj_dim": axis_sizes(family, checkpoint.config)[
        EMBEDDING] + 1}  # fmt: skip
    table = tensors[family.embedding]
    return config, {**tensors, family.embedding: torch.nn.functional.pad(table, (0, 1))}


@pytest.mark.parametrize("exact", [True, False], ids=["float64-norms", "stock-norms"])
@pytest.mark.parametrize("rotate", [False, True], ids=["fold", "fold-rotate"])
@pytest.mark.parametrize("variant", list(TINY))
def test_full_width_leaves_logits_unchanged(variant, rotate, exact, tokens, tmp_path):
    model = tiny_model(variant)
    checkpoint = save_model(model, tmp_path)
    family = family_of_model(model)
    shape = Shape.of(family, checkpoint.config)
    dense = stock_model(checkpoint.config, disk_tensors(checkpoint, family), exact)
    projection = full_width_projection(checkpoint, family, shape, rotate)
    projected = project_checkpoint(checkpoint, family, projection)
    config = checkpoint.config
    if shape.tie_word_embeddings:
        assert f"{family.head}.weight" not in projected
        if shape.word_embed_proj_dim == shape.hidden_size:
            config, projected = padded(checkpoint, family, projected)
            for module in family.projections:
                name = f"{module}.weight"
                widths = (0, 1) if module == family.projections[0] else (0, 0, 0, 1)
                projected[name] = torch.nn.functional.pad(projected[name], widths)
    elif family.projections is not None:
        config = {**config, "word_embed_proj_dim": shape.hidden_size}
    turned = stock_model(config, projected, exact)
    error = relative_error(logits_of(turned, tokens), logits_of(dense, tokens))
    assert error < tolerance(exact)


@pytest.mark.parametrize("variant", TIED)
def test_untied_at_full_width_leaves_logits_unchanged(variant, tokens, tmp_path):
    model = tiny_model(variant)
    checkpoint = save_model(model, tmp_path)
    family = family_of_model(model)
    shape = Shape.of(family, checkpoint.config).untied()
    projection = full_width_projection(checkpoint, family, shape)
    projected = project_checkpoint(checkpoint, family, projection)
    dense = stock_model(checkpoint.config, disk_tensors(checkpoint, family), exact=True)
    config = resized_config(family, checkpoint.config, shape)
    turned = stock_model(config, projected, exact=True)
    assert not turned.config.tie_word_embeddings
    assert relative_error(logits_of(turned, tokens), logits_of(dense, tokens)) < 1e-12


@pytest.mark.parametrize("variant", list(TINY))
def test_norm_weights_are_exactly_one(variant, tmp_path):
    model = tiny_model(variant)
    checkpoint = save_model(model, tmp_path)
    family = family_of_model(model)
    shape = Shape.of(family, checkpoint.config)
    projection = full_width_projection(checkpoint, family, shape)
    projected = project_checkpoint(checkpoint, family, projection)
    norms = [name for name, value in projected.items() if value.ndim == 1 and "norm" in name]
    for name in norms:
        if name.endswith((".q_norm.weight", ".k_norm.weight")):
            continue
        if projection.tied_scale_K is not None and name.startswith(family.final_norm):
            continue
        values = {1 - family.norm_offset} if name.endswith("weight") else {0.0, 1.0}
        assert set(projected[name].tolist()) <= values, name


def square_heads_that_die(model) -> int:
    """Let half of the heads write nothing, and return the width that the other half makes."""
    config = model.config
    half = config.hidden_size // 2
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".o_proj.weight", ".out_proj.weight", ".attention.dense.weight")):
                parameter[:, half:] = 0
    return half


@pytest.mark.parametrize("refit", [False, True], ids=["plain", "refit"])
@pytest.mark.parametrize("variant", list(TINY))
def test_cut_is_exact_where_the_stream_is_confined(variant, refit, tokens, tmp_path):
    """Streamed moments, eigenbasis, projection and writing, all of it, at K < D."""
    model = tiny_model(variant, rms_norm_eps=0.1, layer_norm_eps=0.1)
    heads = model.config.num_attention_heads
    kept = (model.config.hidden_size // 2) // heads * heads
    if is_square(family_of_model(model), model.config.to_dict()):
        kept = square_heads_that_die(model)
    confine_stream(model, kept)
    checkpoint = save_model(model, tmp_path / "dense")
    family = family_of_model(model)
    moment, _ = measure_dense(checkpoint, family, tokens, None, "normalised", "pca", EXECUTION)
    shape = shape_of_width(family, checkpoint.config, kept)
    eigenvalues, projection = choose_basis(checkpoint, family, moment, shape, tokens)
    assert eigenvalues[kept - family.centred] < 1e-12 * eigenvalues[0]
    small = cut_model(checkpoint, family, shape, projection, tokens, tmp_path / "small", refit)
    dense_model = stock_model(checkpoint.config, disk_tensors(checkpoint, family), exact=True)
    small_model = stock_model(*small, exact=True)
    unseen = (tokens + 31) % 96
    error = relative_error(logits_of(small_model, unseen), logits_of(dense_model, unseen))
    # The refit sees streams that went through Hugging Face's float32 norms.
    assert error < (tolerance(exact=False) if refit else 1e-10)


def test_a_wrong_stream_scale_is_caught_only_by_the_confined_model(tokens, tmp_path, monkeypatch):
    """The reason for the second kind of test: with c = 1 full width still passes."""
    from sp3llm.compression import projection

    monkeypatch.setattr(projection, "stream_scale", lambda basis: 1.0)
    model = tiny_model("llama", rms_norm_eps=0.1)
    confine_stream(model, 24)
    checkpoint = save_model(model, tmp_path)
    family = family_of_model(model)
    dense = logits_of(
        stock_model(checkpoint.config, disk_tensors(checkpoint, family), exact=True), tokens
    )
    turned = project_checkpoint(checkpoint, family, Projection(random_orthogonal(48)))
    full = stock_model(checkpoint.config, turned, exact=True)
    assert relative_error(logits_of(full, tokens), dense) < 1e-12
    moment, _ = measure_dense(checkpoint, family, tokens, None, "normalised", "pca", EXECUTION)
    shape = Shape.of(family, checkpoint.config).with_width(24)
    _, projection = choose_basis(checkpoint, family, moment, shape)
    cut = project_checkpoint(checkpoint, family, projection)
    config = resized_config(family, checkpoint.config, shape)
    small = stock_model(config, cut, exact=True)
    assert relative_error(logits_of(small, tokens), dense) > 1e-3
