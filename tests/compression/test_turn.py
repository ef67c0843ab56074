"""The turn of the kept basis: orthogonal, flat, and free wherever no tie fixes the rotation."""

import math

import pytest
import torch

from sp3llm.compression.basis_choice import choose_basis
from sp3llm.compression.measuring import measure_dense
from sp3llm.maths.basis import spread_mean_free_frame, spreading_rotation, stream_scale
from tests.conftest import (
    disk_tensors,
    family_of_model,
    logits_of,
    relative_error,
    save_model,
    stock_model,
    tiny_model,
)
from tests.helpers import CPU, EXECUTION, cut_model, shape_of_width, tolerance

# Untied, or with projections between table and stream.
FREE = ["llama", "qwen3", "gemma-untied", "opt-projected", "opt-untied", "gpt-neox", "stablelm"]


@pytest.mark.parametrize("width", [1, 2, 3, 24, 48, 63, 64, 176, 255, 320])
def test_turn_is_orthogonal_and_flat(width):
    turn = spreading_rotation(width, CPU)
    assert (turn.T @ turn - torch.eye(width)).abs().max() < 1e-14
    assert turn.abs().max() < math.sqrt(2 / width) * (1 + 1e-12)
    assert torch.equal(turn, spreading_rotation(width, CPU))


@pytest.mark.parametrize("width", [2, 3, 24, 48, 63, 64, 176, 255, 320])
def test_turned_frame_is_orthonormal_flat_and_free_of_a_mean(width):
    frame = spread_mean_free_frame(width, CPU)
    assert frame.shape == (width, width - 1)
    assert (frame.T @ frame - torch.eye(width - 1)).abs().max() < 1e-14
    assert frame.sum(0).abs().max() < 1e-13
    assert frame.abs().max() < math.sqrt(2 / width) * (1 + 1e-12)


def test_energy_in_few_coordinates_is_spread():
    """What quantizers see of a stream whose first coordinates hold nearly everything."""
    scales = torch.arange(1, 177).double().pow(-1.5)
    draws = torch.randn(1000, 176, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = (scales * draws) @ spreading_rotation(176, CPU)
    energy = turned.square().mean(0)
    assert energy.max() < 4 * energy.mean()
    assert (scales.square()).max() > 100 * scales.square().mean()


def compressed(model, checkpoint, tokens, turn, refit, width, folder):
    """The stock model of that width, its basis turned or not, and its projection."""
    family = family_of_model(model)
    moments, _ = measure_dense(checkpoint, family, tokens, None, "normalised", "pca", EXECUTION)
    shape = shape_of_width(family, checkpoint.config, width)
    _, projection = choose_basis(checkpoint, family, moments, shape, tokens, turn)
    small = cut_model(checkpoint, family, shape, projection, tokens, folder, refit)
    return stock_model(*small, exact=True), projection


@pytest.mark.parametrize("refit", [False, True], ids=["plain", "refit"])
@pytest.mark.parametrize("variant", FREE)
def test_turn_changes_no_logits(variant, refit, tokens, tmp_path):
    model = tiny_model(variant)
    checkpoint = save_model(model, tmp_path / "dense")
    models, bases = [], []
    width = model.config.hidden_size // 2
    for turn in ("none", "hadamard"):
        found = compressed(model, checkpoint, tokens, turn, refit, width, tmp_path / turn)
        models.append(found[0])
        bases.append(found[1].basis_DK)
    unseen = (tokens + 31) % 96
    straight, turned = (logits_of(found, unseen) for found in models)
    # The refit sees streams that went through Hugging Face's float32 norms.
    assert relative_error(turned, straight) < (tolerance(exact=False) if refit else 1e-10)
    assert (bases[0] - bases[1]).abs().max() > 0.1
    # The same subspace, and under LayerNorm still free of a mean.
    projectors = [basis @ basis.T for basis in bases]
    assert relative_error(*projectors) < 1e-12
    if family_of_model(model).centred:
        assert bases[1].sum(1).abs().max() < 1e-13
    assert stream_scale(bases[0]) == stream_scale(bases[1])


@pytest.mark.parametrize("variant", [name for name in FREE if not name.startswith("opt-untied")])
def test_turn_at_full_width_is_the_dense_model(variant, tokens, tmp_path):
    model = tiny_model(variant)
    checkpoint = save_model(model, tmp_path / "dense")
    tensors = disk_tensors(checkpoint, family_of_model(model))
    dense = logits_of(stock_model(checkpoint.config, tensors, exact=True), tokens)
    width = model.config.hidden_size
    turned, _ = compressed(model, checkpoint, tokens, "hadamard", False, width, tmp_path / "turned")
    assert relative_error(logits_of(turned, tokens), dense) < 1e-10


@pytest.mark.parametrize("words", [[], ["--tie", "keep"]])
def test_turn_is_refused_where_the_tie_fixes_the_rotation(words, tmp_path, refused):
    save_model(tiny_model("llama-tied", torch.float32, vocab_size=4096), tmp_path / "m", True)
    words = ["--out", tmp_path / "small", "--turn", "hadamard", *words]
    assert "--tie untie" in refused("compress", tmp_path / "m", *words)
    assert not (tmp_path / "small").exists()


def test_unknown_turn_is_refused(refused):
    assert "none, hadamard" in refused("compress", "--turn", "banana")
