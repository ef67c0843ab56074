"""The tables say what the real classes have: every parameter, every name on disk, every shape."""

import pytest
import torch
from safetensors import safe_open
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sp3llm.errors import UserError
from sp3llm.models.checkpoint import check_tensors, open_checkpoint
from sp3llm.models.families import (
    FAMILIES,
    REFUSED,
    count_parameters,
    family_of,
    groups,
    is_tied,
    parameter_shapes,
    setting,
)
from sp3llm.models.stock import fuse_experts
from tests.conftest import TINY, family_of_model, head_module, save_model, tiny_model


@pytest.mark.parametrize("variant", list(TINY))
def test_table_predicts_every_parameter_and_shape_of_the_class(variant):
    model = tiny_model(variant)
    family = family_of_model(model)
    config = model.config.to_dict()
    real = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    stored, module = f"{family.head}.weight", f"{head_module(model)}.weight"
    found = {n: torch.empty(s, device="meta") for n, s in parameter_shapes(family, config).items()}
    for index in range(config["num_hidden_layers"]):
        found = fuse_experts(family, index, found)
    found = {name: tuple(tensor.shape) for name, tensor in found.items()}
    assert {module if name == stored else name: found[name] for name in found} == real
    assert count_parameters(family, config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("variant", list(TINY))
def test_table_predicts_every_name_on_disk(variant, tmp_path):
    model = tiny_model(variant)
    family = family_of_model(model)
    checkpoint = save_model(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        on_disk = set(file.keys())
    assert set(parameter_shapes(family, checkpoint.config)) == on_disk
    check_tensors(checkpoint, family)


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_defaults_are_those_of_the_config_class(model_type):
    family = FAMILIES[model_type]
    stock = CONFIG_MAPPING[model_type]()
    for key, value in family.defaults.items():
        real = getattr(stock, key, None)
        if key == "head_dim":
            real = real or stock.hidden_size // stock.num_attention_heads
            value = value or stock.hidden_size // stock.num_attention_heads
        if key == "num_key_value_heads":
            value = value or stock.num_attention_heads
        if key == "word_embed_proj_dim":
            value = value or stock.hidden_size
        if key in ("attention_bias", "mlp_bias") and real is None:
            continue  # the class has no such flag
        assert value == real, key


@pytest.mark.parametrize("variant", list(TINY))
def test_sites_and_writers_cover_every_matrix_on_the_stream(variant):
    """Each matrix that takes from the stream belongs to one site, each that adds is a writer."""
    model = tiny_model(variant)
    family = family_of_model(model)
    for layer in groups(family, model.config.to_dict())[1:-1]:
        readers = [reader for site in layer.sites for reader in site.readers]
        assert len(readers) == len(set(readers))
        for name, axes in layer.parameters.items():
            module, _, kind = name.removeprefix(layer.prefix).rpartition(".")
            if kind == "weight" and len(axes) == 2:
                assert (axes[1] == "hidden_size") == (module in readers), name
                assert (axes[0] == "hidden_size") == (module in layer.writers), name


def test_buffers_of_old_checkpoints_are_ignored(tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny_model("llama")
    save_model(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check_tensors(open_checkpoint(tmp_path), family_of_model(model))


def test_a_tied_checkpoint_may_hold_its_head_twice(tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny_model("llama-tied")
    save_model(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check_tensors(open_checkpoint(tmp_path), family_of_model(model))


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "bloom", None])
def test_other_families_are_refused_by_name_with_the_list(model_type):
    with pytest.raises(UserError) as caught:
        family_of({"model_type": model_type})
    assert str(model_type) in str(caught.value)
    assert all(name in str(caught.value) for name in FAMILIES)
    if model_type in REFUSED:
        assert REFUSED[model_type] in str(caught.value)


def test_null_in_the_config_means_the_default():
    family = FAMILIES["llama"]
    assert setting(family, {"rms_norm_eps": None}, "rms_norm_eps") == 1e-6
    assert not is_tied(family, {"tie_word_embeddings": None})
