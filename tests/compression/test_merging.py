"""Key-value heads merged into others: exact where they can be, and stock all the same."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from sp3llm.compression.basis_choice import choose_basis
from sp3llm.compression.building import refitted_groups, refitted_side_by_side
from sp3llm.compression.measuring import measure_dense
from sp3llm.compression.refitter import Refitter
from sp3llm.errors import UserError
from sp3llm.models.families import FAMILIES, count_parameters
from sp3llm.models.shapes import Shape, keeps_heads_apart, resized_config
from sp3llm.options import CompressConfig
from sp3llm.planning.candidates import candidates
from sp3llm.planning.limits import Limits
from tests.conftest import (
    TINY,
    disk_tensors,
    family_of_model,
    logits_of,
    relative_error,
    save_model,
    stock_model,
    tiny_model,
)
from tests.helpers import EXECUTION, compress_tiny, cut_model, tolerance


def merges(variant: str) -> bool:
    config = tiny_model(variant).config.to_dict()
    family = FAMILIES[TINY[variant]["model_type"]]
    is_apart = keeps_heads_apart(family, config) is not None
    return not is_apart and Shape.of(family, config).num_key_value_heads > 1


MERGING = [name for name in TINY if merges(name)]


def model_of_copies(variant: str):
    """A model whose key-value heads are one, turned in its planes, and mixed."""
    model = tiny_model(variant)
    config, generator = model.config, torch.Generator().manual_seed(7)
    groups = config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            factors, mixing = random(groups, 2, size // 2, 1), random(groups, size, size)
            for part in ("weight", "bias"):
                key, value = (
                    getattr(getattr(attention, f"{name}_proj"), part) for name in ("k", "v")
                )
                if key is None:
                    continue
                first = key[:size].reshape(size, -1)
                re, im = first.unflatten(0, (2, size // 2))
                copies = [
                    torch.cat([f[0] * re - f[1] * im, f[1] * re + f[0] * im]) for f in factors
                ]
                key.copy_(torch.cat(copies).reshape(key.shape))
                mixed = [mix @ value[:size].reshape(size, -1) for mix in mixing]
                value.copy_(torch.cat(mixed).reshape(value.shape))
    return model


@pytest.mark.parametrize("variant", MERGING)
def test_heads_that_are_copies_merge_and_nothing_changes(variant, tokens, tmp_path):
    checkpoint = save_model(model_of_copies(variant), tmp_path / "dense")
    family = family_of_model(tiny_model(variant))
    moments, _ = measure_dense(checkpoint, family, tokens, None, "normalised", "pca", EXECUTION)
    shape = Shape.of(family, checkpoint.config).with_merged_groups(1)
    _, projection = choose_basis(checkpoint, family, moments, shape, tokens)
    cut = (checkpoint, family, shape, projection, tokens, tmp_path / "small")
    config, tensors = cut_model(*cut, refit=True)
    assert config["num_key_value_heads"] == 1
    small = stock_model(config, tensors, exact=True)
    whole = stock_model(checkpoint.config, disk_tensors(checkpoint, family), exact=True)
    unseen = (tokens + 31) % 96
    assert relative_error(logits_of(small, unseen), logits_of(whole, unseen)) < tolerance(False)


def test_shapes_that_merge_are_refitted_beside_others_as_alone(tokens, tmp_path):
    """All candidates of a search share one dense stream."""
    model = tiny_model("qwen2")
    checkpoint, family = save_model(model, tmp_path), family_of_model(model)
    moments, _ = measure_dense(checkpoint, family, tokens, None, "normalised", "pca", EXECUTION)
    dense = Shape.of(family, checkpoint.config)
    shapes = [dense.with_merged_groups(1), dense.with_groups(1), replace(dense, hidden_size=40)]
    made = []
    for shape in shapes:
        _, projection = choose_basis(checkpoint, family, moments, shape, tokens)
        made.append(
            Refitter(
                *(checkpoint, family, shape, projection, torch.float64, EXECUTION, "obs", 3, 4, [])
            )
        )
    beside = list(refitted_side_by_side(made, tokens))
    for place, refitter in enumerate(made):
        alone = list(refitted_groups(replace(refitter, log=[]), tokens))
        mine = [finished for index, finished in beside if index == place]
        for one, other in zip(alone, mine, strict=True):
            assert one.tensors.keys() == other.tensors.keys()
            assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


@pytest.mark.parametrize("variant", ["llama-tied", "qwen2", "mixtral"])
def test_the_result_is_stock_and_counts_what_the_plan_says(variant, tmp_path):
    result = compress_tiny(variant, tmp_path, of="kv-cache", keep=0.5, kv_heads="merge")
    small, info = AutoModelForCausalLM.from_pretrained(result.out, output_loading_info=True)
    assert not any(info.values())
    assert small.config.num_key_value_heads == 1
    assert small.config.num_attention_heads == 4
    assert sum(p.numel() for p in small.parameters()) == result.plan.parameters


@given(
    groups=st.sampled_from([4, 6, 8]),
    keep=st.sampled_from([0.2, 0.3, 0.5]),
    devices=st.sampled_from([1, 2]),
)
@settings(max_examples=30, deadline=None)
def test_a_cache_within_the_budget_keeps_all_query_heads(groups, keep, devices):
    config = {"hidden_size": 96, "num_attention_heads": 24, "num_key_value_heads": groups}
    config |= {"intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 96, "head_dim": 8}
    family = FAMILIES["llama"]
    limits = Limits(keep, of="kv-cache", kv_heads="merge", tensor_parallel=devices)
    if 3 * devices > keep * 4 * groups:  # the fewest layers, with a head on each device
        with pytest.raises(UserError, match="No shape keeps"):
            candidates(family, config, limits)
        return
    for shape in candidates(family, config, limits):
        assert shape.num_attention_heads == 24
        assert groups % shape.num_key_value_heads == 0
        assert shape.num_key_value_heads % devices == 0
        cache = shape.num_key_value_heads * shape.num_hidden_layers
        assert cache <= keep * groups * 4
        small = resized_config(family, config, shape)
        assert count_parameters(family, small) < count_parameters(family, config)


@pytest.mark.parametrize(
    ("variant", "what"),
    [
        ("qwen3", "normalised head by head"),
        ("phi3", "no three matrices"),
        ("opt", "no three matrices"),
    ],
)
def test_models_whose_heads_cannot_be_merged_are_refused(variant, what, refused, tmp_path):
    save_model(tiny_model(variant), tmp_path)
    words = ("--num-key-value-heads", 1, "--kv-heads", "merge")
    assert what in refused("plan", tmp_path, *words)


def test_heads_that_do_not_go_into_others_evenly_are_refused(refused, tmp_path):
    model = tiny_model("llama-9-heads")
    save_model(model, tmp_path)
    words = ("--num-key-value-heads", 2, "--kv-heads", "merge")
    assert "to divide the 3 there are" in refused("plan", tmp_path, *words)
    with pytest.raises(UserError, match="found --no-refit"):
        CompressConfig(kv_heads="merge", refit=False)
    with pytest.raises(UserError, match="found --mask learned"):
        CompressConfig(kv_heads="merge", mask="learned")
