"""Encoders as they were pretrained: compressed as what `AutoModel` makes of them, whatever names
their files have.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from sp3llm.errors import UserError
from sp3llm.models.checkpoint import open_model
from sp3llm.models.shapes import Shape, resized_config
from tests.compression.test_encoders import compressed_folder
from tests.conftest import disk_tensors, relative_error, save_model
from tests.encoders import answers_of, encoder_config, encoder_of, padded_rows

PRETRAINED = [
    ("bert", "ForMaskedLM"),
    ("bert", "ForPreTraining"),
    ("roberta", "ForMaskedLM"),
    ("distilbert", "ForMaskedLM"),
]

of_every_class = pytest.mark.parametrize(("model_type", "task"), PRETRAINED)


def saved(model_type, task, folder):
    """A tiny model of that class, saved by itself, and its config."""
    config = encoder_config(model_type, task)
    model = encoder_of(config)
    save_model(model, folder)
    return config, model


def loaded(folder, config=None):
    """What stock transformers makes of a folder, and the parameters that it drew at random."""
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    model, info = AutoModel.from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
    return model.eval(), sorted(info["missing_keys"])


def respelled(folder, to, names=None, extra=None):
    """A copy of a folder in which what `names` have in them is spelled otherwise."""
    to.mkdir()
    (to / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    for before, after in (names or {}).items():
        tensors = {name.replace(before, after): tensor for name, tensor in tensors.items()}
    save_file({**tensors, **(extra or {})}, to / "model.safetensors", metadata={"format": "pt"})
    return to


# As the first conversions of BERT spelled norms.
OLD = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


@of_every_class
def test_full_width_leaves_the_hidden_states_unchanged(model_type, task, tmp_path):
    config, model = saved(model_type, task, tmp_path / "dense")
    small_config, tensors = compressed_folder(lambda dense: dense, tmp_path, True, "pca")
    small, drawn = loaded(tmp_path / "small", small_config)
    assert small_config["architectures"] == [type(small).__name__]
    assert set(drawn) == {name for name in small.state_dict() if name not in tensors}
    assert all(name.startswith("pooler.") for name in drawn)
    unseen = padded_rows(config, seed=1)
    assert relative_error(answers_of(small, unseen), answers_of(model.base_model, unseen)) < 1e-9


@of_every_class
def test_it_is_the_same_model_as_the_encoder_saved_by_itself(model_type, task, tmp_path):
    """Without a pooler where the file has none."""
    _, model = saved(model_type, task, tmp_path / "one")
    save_model(model.base_model, tmp_path / "other")
    (one, family), (other, other_family) = (open_model(tmp_path / n) for n in ("one", "other"))
    assert family == other_family
    configs = [resized_config(family, c.config, Shape.of(family, c.config)) for c in (one, other)]
    assert configs[0] == configs[1]
    tensors, expected = disk_tensors(one, family), disk_tensors(other, family)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
    assert any("pooler" in name for name in tensors) == (task == "ForPreTraining")


@pytest.mark.parametrize("names", [OLD, {}], ids=["old", "present"])
@of_every_class
def test_what_is_read_is_what_stock_reads(model_type, task, names, tmp_path):
    _, model = saved(model_type, task, tmp_path / "dense")
    ids = torch.arange(40)[None]
    extra = {f"{model_type}.embeddings.position_ids": ids}
    folder = respelled(tmp_path / "dense", tmp_path / "respelled", names, extra)
    stock, drawn = loaded(folder)
    expected = {name: t for name, t in stock.state_dict().items() if name not in drawn}
    read = disk_tensors(*open_model(folder))
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in read)
    in_memory = model.base_model.state_dict()
    assert all(torch.equal(read[name], in_memory[name]) for name in read)


def test_two_spellings_of_one_tensor_are_refused(tmp_path):
    saved("bert", "ForMaskedLM", tmp_path / "dense")
    twice = {"bert.embeddings.LayerNorm.gamma": torch.ones(24, dtype=torch.float64)}
    folder = respelled(tmp_path / "dense", tmp_path / "twice", extra=twice)
    with pytest.raises(UserError, match=r"one tensor for '.*LayerNorm.weight'.*LayerNorm.gamma'"):
        open_model(folder)


def test_half_a_pooler_and_half_an_encoder_are_refused(tmp_path):
    saved("bert", "ForPreTraining", tmp_path / "dense")
    for number, lost in enumerate(("pooler.dense.bias", "embeddings.LayerNorm.bias")):
        folder = tmp_path / f"{number}"
        respelled(tmp_path / "dense", folder, {f"bert.{lost}": "cls.lost"})
        with pytest.raises(UserError, match=f"'{lost}', which config.json"):
            open_model(folder)


def test_a_classifier_without_its_pooler_is_refused(tmp_path):
    config, _ = saved("bert", "ForMaskedLM", tmp_path)
    task = {**config, "architectures": ["BertForSequenceClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(task))
    with pytest.raises(UserError, match="a BertForSequenceClassification of this config"):
        open_model(tmp_path)
