"""Fold, rotate and cut change nothing where nothing may change.

At full width every orthogonal basis must leave the logits as they are. That alone does not catch
a wrong scale of the stream, so models whose stream truly lies in K dimensions are cut to K, with
a large epsilon, where the result must be exact too.
"""

import pytest
import torch

from sp3llm import families
from sp3llm.compress import write_model
from sp3llm.families import RESIDUAL, axis_sizes, is_tied
from sp3llm.measure import choose_basis, measure_dense
from sp3llm.moments import tied_rotation
from sp3llm.plan import Shape, resized_config
from sp3llm.rebuild import Refitter, plain_groups, refitted_groups
from sp3llm.stream import Execution

from .conftest import (
    TINY,
    disk_tensors,
    family_of_model,
    logits_of,
    project_checkpoint,
    random_orthogonal,
    relative_error,
    save_model,
    stock_model,
    tiny_model,
)

ON = Execution(torch.device("cpu"), torch.float64)
UNTIED = [name for name, settings in TINY.items() if not settings.get("tie_word_embeddings")]
TIED = [name for name in TINY if name not in UNTIED]


def tolerance(exact: bool) -> float:
    """Hugging Face's norms round to float32 in the middle of the model."""
    return 1e-12 if exact else 2e-6


@pytest.mark.parametrize("exact", [True, False], ids=["float64-norms", "stock-norms"])
@pytest.mark.parametrize("rotate", [False, True], ids=["fold", "fold-rotate"])
@pytest.mark.parametrize("variant", UNTIED)
def test_full_width_leaves_logits_unchanged(variant, rotate, exact, tokens, tmp_path):
    model = tiny_model(variant)
    checkpoint = save_model(model, tmp_path)
    family = family_of_model(model)
    width = axis_sizes(family, checkpoint.config)[RESIDUAL]
    basis = random_orthogonal(width) if rotate else torch.eye(width, dtype=torch.float64)
    projected = project_checkpoint(checkpoint, family, basis)
    dense = stock_model(checkpoint.config, disk_tensors(checkpoint, family), exact)
    turned = stock_model(checkpoint.config, projected, exact)
    error = relative_error(logits_of(turned, tokens), logits_of(dense, tokens))
    assert error < tolerance(exact)


@pytest.mark.parametrize("exact", [True, False], ids=["float64-norms", "stock-norms"])
@pytest.mark.parametrize("variant", TIED)
def test_full_width_leaves_a_tied_model_unchanged_and_tied(variant, exact, tokens, tmp_path):
    model = tiny_model(variant)
    checkpoint = save_model(model, tmp_path)
    family = family_of_model(model)
    width = axis_sizes(family, checkpoint.config)[RESIDUAL]
    norm = checkpoint.read(["model.norm.weight"])["model.norm.weight"]
    basis, scale = tied_rotation(random_orthogonal(width), norm)
    projected = project_checkpoint(checkpoint, family, basis, scale)
    assert "lm_head.weight" not in projected
    dense = stock_model(checkpoint.config, disk_tensors(checkpoint, family), exact)
    turned = stock_model(checkpoint.config, projected, exact)
    error = relative_error(logits_of(turned, tokens), logits_of(dense, tokens))
    assert error < tolerance(exact)


@pytest.mark.parametrize("variant", list(TINY))
def test_norm_weights_are_exactly_one(variant, tmp_path):
    model = tiny_model(variant)
    checkpoint = save_model(model, tmp_path)
    family = family_of_model(model)
    width = axis_sizes(family, checkpoint.config)[RESIDUAL]
    basis = random_orthogonal(width)[:, : width // 2]
    scale = torch.ones(width // 2, dtype=torch.float64)
    tied = is_tied(family, checkpoint.config)
    projected = project_checkpoint(checkpoint, family, basis, scale if tied else None)
    for name, value in projected.items():
        if name.endswith("layernorm.weight") or (name == "model.norm.weight" and not tied):
            assert (value == 1).all(), name


def confine_stream(model, kept: int) -> None:
    """Make embeddings and writers write into `kept` dimensions only, along no coordinate axis."""
    width = model.config.hidden_size
    frame = random_orthogonal(width, seed=5)[:, :kept]
    projector = frame @ frame.T
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("embed_tokens.weight"):
                parameter.copy_(parameter @ projector)
            elif ".o_proj." in name or ".down_proj." in name:
                parameter.copy_(projector @ parameter)


@pytest.mark.parametrize("refit", [False, True], ids=["plain", "refit"])
@pytest.mark.parametrize("variant", list(TINY))
def test_cut_is_exact_where_the_stream_is_confined(variant, refit, tokens, tmp_path):
    """Streamed moments, eigenbasis, projection and writing, all of it, at K < D."""
    model = tiny_model(variant, rms_norm_eps=0.1)
    heads = model.config.num_attention_heads
    kept = (model.config.hidden_size // 2) // heads * heads
    confine_stream(model, kept)
    checkpoint = save_model(model, tmp_path / "dense")
    family = family_of_model(model)
    moment, _ = measure_dense(checkpoint, family, tokens, None, "normalised", "pca", ON)
    eigenvalues, projection = choose_basis(checkpoint, family, moment, kept)
    assert eigenvalues[kept] < 1e-12 * eigenvalues[0]
    shape = Shape.of(family, checkpoint.config).with_width(kept)
    config = resized_config(family, checkpoint.config, shape)
    (tmp_path / "small").mkdir()
    groups = iter(families.groups(family, checkpoint.config))
    if refit:
        refitter = Refitter(
            checkpoint, family, shape, projection, torch.float64, ON, "obs", 3, 4, []
        )
        compressed = refitted_groups(refitter, tokens, groups)
    else:
        compressed = plain_groups(checkpoint, family, projection, torch.float64, ON, groups)
    small = write_model(family, config, compressed, torch.float64, tmp_path / "small")
    dense_model = stock_model(checkpoint.config, disk_tensors(checkpoint, family), exact=True)
    small_model = stock_model(config, disk_tensors(small, family), exact=True)
    unseen = (tokens + 31) % 96
    error = relative_error(logits_of(small_model, unseen), logits_of(dense_model, unseen))
    # The refit sees streams that went through Hugging Face's float32 norms.
    assert error < (tolerance(exact=False) if refit else 1e-10)


def test_a_wrong_stream_scale_is_caught_only_by_the_confined_model(tokens, tmp_path, monkeypatch):
    """The reason for the second kind of test: with c = 1 full width still passes."""
    import sp3llm.project

    monkeypatch.setattr(sp3llm.project, "stream_scale", lambda basis: 1.0)
    model = tiny_model("llama", rms_norm_eps=0.1)
    confine_stream(model, 24)
    checkpoint = save_model(model, tmp_path)
    family = family_of_model(model)
    dense = logits_of(
        stock_model(checkpoint.config, disk_tensors(checkpoint, family), exact=True), tokens
    )
    turned = project_checkpoint(checkpoint, family, random_orthogonal(48))
    full = stock_model(checkpoint.config, turned, exact=True)
    assert relative_error(logits_of(full, tokens), dense) < 1e-12
    moment, _ = measure_dense(checkpoint, family, tokens, None, "normalised", "pca", ON)
    _, projection = choose_basis(checkpoint, family, moment, 24)
    cut = project_checkpoint(checkpoint, family, projection.basis_DK)
    shape = Shape.of(family, checkpoint.config).with_width(24)
    config = resized_config(family, checkpoint.config, shape)
    small = stock_model(config, cut, exact=True)
    assert relative_error(logits_of(small, tokens), dense) > 1e-3
