"""Layers that go: which ones, what bridges the gap, and that the result is stock all the same."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from sp3llm.compression.basis_choice import choose_basis
from sp3llm.compression.building import refitted_groups, refitted_side_by_side
from sp3llm.compression.depth import kept_layers
from sp3llm.compression.measuring import measure_dense
from sp3llm.compression.refitter import Refitter
from sp3llm.compression.trials import losses_of, trials_of
from sp3llm.errors import UserError
from sp3llm.models.families import FAMILIES, count_parameters
from sp3llm.models.shapes import Shape, keeps_every_layer, resized_config
from sp3llm.options import CompressConfig
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
from tests.helpers import (
    EXECUTION,
    WRITERS,
    compress_tiny,
    cut_model,
    tolerance,
    weights,
)

DEPTH = 5
# Lists with an entry a layer, of a model that deep.
LISTS = {"no_rope_layers": [1, 0, 1, 1, 0]}


def deep_model(variant: str, silent: set[int] = frozenset(), **overrides):
    """A model of `DEPTH` layers, of which some write nothing."""
    lists = {key: LISTS[key] for key in TINY[variant] if key in LISTS}
    model = tiny_model(variant, num_hidden_layers=DEPTH, **lists, **overrides)
    prefixes = [family_of_model(model).layer_prefix.format(layer=layer) for layer in silent]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            writes = any(f".{writer}." in name for writer in WRITERS) or name.endswith(
                "experts.down_proj"
            )
            if writes and name.startswith(tuple(prefixes)):
                parameter.zero_()
    return model


def measured(model, tokens, folder, gaps="bridged"):
    """The model on disk, its family, and what was measured of it."""
    checkpoint, family = save_model(model, folder), family_of_model(model)
    arguments = (checkpoint, family, tokens, None, "normalised", "pca", EXECUTION)
    moments, _ = measure_dense(*arguments, gaps=gaps)
    return checkpoint, family, moments


def goes_shallow(variant: str) -> bool:
    config = tiny_model(variant).config.to_dict()
    return keeps_every_layer(FAMILIES[TINY[variant]["model_type"]], config) is None


# An OPT whose table stays tied cannot be as wide as the stream (docs/design.md 3.5).
SHALLOW = [name for name in TINY if goes_shallow(name) and name not in ("opt", "opt-no-biases")]


@pytest.mark.parametrize("refit", [False, True], ids=["plain", "refit"])
@pytest.mark.parametrize("variant", SHALLOW)
def test_layers_that_write_nothing_go_and_nothing_changes(variant, refit, tokens, tmp_path):
    silent = {0, 2, 3} if refit else {1, 4}
    model = deep_model(variant, silent)
    of_gaps = "bridged" if refit else "cut"
    checkpoint, family, moments = measured(model, tokens, tmp_path / "dense", of_gaps)
    dense = Shape.of(family, checkpoint.config)
    shape = replace(dense, num_hidden_layers=DEPTH - len(silent))
    layers = kept_layers(moments, shape)
    assert set(layers) == set(range(DEPTH)) - silent
    _, projection = choose_basis(checkpoint, family, moments, shape, tokens)
    cut = (checkpoint, family, shape, projection, tokens, tmp_path / "small", refit, layers)
    config, tensors = cut_model(*cut)
    for name in LISTS:
        if name in config:
            assert config[name] == [LISTS[name][layer] for layer in layers]
    small = stock_model(config, tensors, exact=True)
    whole = stock_model(checkpoint.config, disk_tensors(checkpoint, family), exact=True)
    unseen = (tokens + 31) % 96
    error = relative_error(logits_of(small, unseen), logits_of(whole, unseen))
    assert error < (tolerance(exact=False) if refit else 1e-10)


@given(st.sets(st.integers(0, DEPTH - 1), min_size=1, max_size=DEPTH - 1))
@settings(max_examples=10, deadline=None)
def test_whichever_write_nothing_are_the_first_to_go(tmp_path_factory, silent):
    folder = tmp_path_factory.mktemp("dense")
    tokens = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    _, _, moments = measured(deep_model("llama", silent), tokens, folder)
    shape = Shape(48, 40, 4, 2, 12)
    kept = [
        set(kept_layers(moments, replace(shape, num_hidden_layers=count)) or range(DEPTH))
        for count in range(1, DEPTH + 1)
    ]
    assert kept[DEPTH - len(silent) - 1] == set(range(DEPTH)) - silent
    assert all(fewer < more for fewer, more in itertools.pairwise(kept))


def _refitters(checkpoint, family, moments, tokens, kept, held_from=3, unseen_from=4):
    """One for each of several sets of layers to keep, at the dense widths."""
    dense = Shape.of(family, checkpoint.config)
    _, projection = choose_basis(checkpoint, family, moments, dense, tokens)
    bounds = (held_from, unseen_from)
    return [
        Refitter(
            *(checkpoint, family, replace(dense, num_hidden_layers=len(layers)), projection),
            *(torch.float64, EXECUTION, "obs", *bounds, [], layers),
        )
        for layers in kept
    ]


@pytest.mark.parametrize("variant", ["llama", "gpt-neox", "mixtral"])
def test_models_of_any_layers_are_refitted_beside_each_other_as_alone(variant, tokens, tmp_path):
    kept = [(0, 1, 2, 3, 4), (0, 1, 4), (2, 3), (0, 4)]
    refitters = _refitters(*measured(deep_model(variant), tokens, tmp_path), tokens, kept)
    together = list(refitted_side_by_side(refitters, tokens))
    for side, (refitter, layers) in enumerate(zip(refitters, kept, strict=True)):
        alone = list(refitted_groups(replace(refitter, log=[]), tokens))
        assert [one.index for one in alone] == list(range(len(layers) + 2))
        for found, one in zip((f for at, f in together if at == side), alone, strict=True):
            assert found.group == one.group
            assert found.tensors.keys() == one.tensors.keys()
            assert all(torch.equal(found.tensors[name], one.tensors[name]) for name in one.tensors)


@pytest.mark.parametrize("variant", ["llama-biases", "gpt-neox", "opt-untied", "qwen3-moe"])
def test_a_bridge_is_closer_to_the_dense_model_than_a_gap(variant, tokens, tmp_path):
    """On held-back text every fit is at least as good as none; and so is all of the model."""
    model = deep_model(variant)
    checkpoint, family, moments = measured(model, tokens, tmp_path / "dense")
    layers = (0, 1, 4)
    (refitter,) = _refitters(checkpoint, family, moments, tokens, [layers])
    refitted = list(refitted_groups(refitter, tokens))
    assert all(fit["error"] <= fit["plain_error"] + 1e-12 for fit in refitter.log)
    assert any(fit["error"] < fit["plain_error"] * 0.9 for fit in refitter.log)
    shape, projection = refitter.shape, refitter.projection
    cut = (checkpoint, family, shape, projection, tokens)
    plain = stock_model(*cut_model(*cut, tmp_path / "plain", False, layers), exact=False)
    config = resized_config(family, checkpoint.config, shape, layers)
    tensors = {name: tensor for one in refitted for name, tensor in one.tensors.items()}
    bridged = stock_model(config, tensors, exact=False)
    whole = stock_model(checkpoint.config, disk_tensors(checkpoint, family), exact=False)
    bridged_error, plain_error = (
        relative_error(logits_of(one, tokens), logits_of(whole, tokens)) for one in (bridged, plain)
    )
    assert bridged_error < plain_error


def test_trials_of_other_depths_are_scored_beside_one_dense_model(tokens, tmp_path):
    """The one that loses nothing more loses nothing."""
    found = measured(deep_model("llama", {1, 2}, rms_norm_eps=0.1), tokens, tmp_path)
    kept = [(0, 3, 4), (0, 3), (0, 1, 2, 3, 4)]
    exact, worse, whole = losses_of(trials_of(_refitters(*found, tokens, kept, 2, 3), tokens))
    assert exact == pytest.approx(0, abs=1e-6)
    assert whole == pytest.approx(0, abs=1e-6)
    assert worse > 0.01


@pytest.mark.parametrize("options", [{}, {"refit": False}], ids=["refit", "plain"])
@pytest.mark.parametrize("variant", ["llama-tied", "smollm3", "gpt-neox", "qwen3-moe"])
def test_the_result_is_stock_and_counts_what_the_plan_says(variant, options, tmp_path):
    result = compress_tiny(variant, tmp_path, num_hidden_layers=2, keep=0.95, **options)
    small, info = AutoModelForCausalLM.from_pretrained(result.out, output_loading_info=True)
    assert not any(info.values())
    assert small.config.num_hidden_layers == 2
    assert sum(p.numel() for p in small.parameters()) == result.plan.parameters
    layers = {
        name.split(".layers.")[1].split(".")[0]
        for name in weights(result.out)
        if ".layers." in name
    }
    assert layers == {"0", "1"}


@given(st.sampled_from(SHALLOW), st.integers(1, DEPTH))
@settings(max_examples=30, deadline=None)
def test_a_count_of_fewer_layers_is_that_of_the_stock_model(variant, depth):
    model = deep_model(variant)
    family, config = family_of_model(model), model.config.to_dict()
    shape = replace(Shape.of(family, config), num_hidden_layers=depth)
    resized = resized_config(family, config, shape)
    assert Shape.of(family, resized) == shape
    stock = type(model.config).from_dict(resized)
    small = AutoModelForCausalLM.from_config(stock)
    assert count_parameters(family, resized) == sum(p.numel() for p in small.parameters())


def test_lists_with_an_entry_a_layer_follow():
    types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = {"use_sliding_window": True, "sliding_window": 8, "num_hidden_layers": 4}
    config |= {"layer_types": types, "hidden_size": 48, "num_attention_heads": 4}
    family = FAMILIES["qwen2"]
    shape = replace(Shape.of(family, config), num_hidden_layers=2)
    assert keeps_every_layer(family, config) is None
    assert resized_config(family, config, shape, (1, 2))["layer_types"] == types[1:3]


@pytest.mark.parametrize(
    ("variant", "changes", "what"),
    [
        ("qwen2", {}, "use_sliding_window without layer_types"),
        ("smollm3", {"no_rope_layers": None}, "no_rope_layer_interval without no_rope_layers"),
        ("qwen2-moe-tied", {}, "some layers have experts and some have none"),
    ],
)
def test_rules_by_the_number_of_a_layer_are_refused(variant, changes, what, refused, tmp_path):
    config = {**TINY[variant], "hidden_size": 48, "num_attention_heads": 4, "vocab_size": 96}
    config |= {"num_hidden_layers": 4, **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert what in refused("plan", tmp_path, "--num-hidden-layers", 3)


def test_a_number_of_layers_that_cannot_be_is_refused(refused):
    assert "between 1 and the model's 8, found 9" in refused("plan", "--num-hidden-layers", 9)
    assert "between 1 and the model's 8, found 0" in refused("plan", "--num-hidden-layers", 0)
    with pytest.raises(UserError, match="gates are on every layer"):
        CompressConfig(mask="learned", num_hidden_layers=3)
