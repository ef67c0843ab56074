"""Checkpoints as people have them: the very weights that stock transformers loads, or a refusal."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sp3llm.errors import UserError
from sp3llm.models.checkpoint import open_model
from sp3llm.models.companions import copy_companions
from sp3llm.models.families import is_square
from sp3llm.models.objectives.causal_lm import CAUSAL_LM
from sp3llm.models.shapes import Shape, resized_config
from sp3llm.models.source import _HUB_PATTERNS, _NOT_FETCHED
from sp3llm.models.stock import empty_model
from sp3llm.runtime.devices import arithmetic_of
from tests.conftest import disk_tensors, family_of_model, tiny_model
from tests.helpers import compress_tiny

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def save(folder: Path, tensors: dict, name: str = "model.safetensors", **metadata: str) -> None:
    save_file(tensors, folder / name, {"format": "pt", **metadata})


def save_shards(folder: Path, tensors: dict, suffix: str = "safetensors") -> dict[str, str]:
    """Two shards and their index."""
    names, stem = sorted(tensors), "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {}
    for number, some in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-{number:05d}-of-00002.{suffix}"
        part = {name: tensors[name] for name in some}
        save(folder, part, file) if suffix == "safetensors" else torch.save(part, folder / file)
        weight_map |= dict.fromkeys(some, file)
    write_index(folder, weight_map, stem, suffix)
    return weight_map


def write_index(folder: Path, weight_map: dict, stem="model", suffix="safetensors") -> None:
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / f"{stem}.{suffix}.index.json").write_text(text)


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama", torch.float32).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def tied(tmp_path):
    tiny_model("llama-tied", torch.float32).save_pretrained(tmp_path)
    return tmp_path


def assert_as_stock(folder: Path) -> None:
    """What is read is what stock transformers has after loading."""
    checkpoint, family = open_model(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, tensor in disk_tensors(checkpoint, family).items():
        assert torch.equal(tensor, stock[name]), name


# --------------------------------------------------------------------------- which files


FILES = ("single", "index", "bin", "bin-index")


@pytest.mark.parametrize("present", [p for n in range(1, 16) for p in [
    tuple(file for bit, file in enumerate(FILES) if n >> bit & 1)]], ids="+".join)  # fmt: skip
def test_of_several_files_of_weights_those_are_read_that_stock_reads(present, folder):
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    for number, file in enumerate(present, 1):
        other = {name: tensor * number for name, tensor in tensors.items()}
        if file == "single":
            save(folder, other)
        elif file == "bin":
            torch.save(other, folder / "pytorch_model.bin")
        else:
            save_shards(folder, other, "bin" if file == "bin-index" else "safetensors")
    assert_as_stock(folder)


def test_a_tensor_that_the_index_forgets_is_read(folder):
    tensors = tensors_of(folder)
    weight_map = save_shards(folder, tensors)
    (folder / "model.safetensors").unlink()
    del weight_map["model.norm.weight"]
    write_index(folder, weight_map)
    assert_as_stock(folder)


def test_a_tensor_that_no_shard_holds_is_missed_by_name(folder):
    tensors = tensors_of(folder)
    weight_map = save_shards(folder, {n: t for n, t in tensors.items() if n != HEAD})
    (folder / "model.safetensors").unlink()
    write_index(folder, {**weight_map, HEAD: "model-00001-of-00002.safetensors"})
    with pytest.raises(UserError, match=f"'{HEAD}' in shard 'model-00001-of-00002.safetensors'"):
        open_model(folder)


# --------------------------------------------------------------------------- tied heads


def test_a_tied_head_that_only_the_index_names_is_none(tied):
    weight_map = save_shards(tied, tensors_of(tied))
    (tied / "model.safetensors").unlink()
    write_index(tied, {**weight_map, HEAD: "model-00002-of-00002.safetensors"})
    assert_as_stock(tied)


def test_a_tied_table_may_lie_under_the_heads_name(tied):
    tensors = tensors_of(tied)
    save(tied, {HEAD: tensors.pop(EMBEDDINGS), **tensors}, **{EMBEDDINGS: HEAD})
    assert_as_stock(tied)


def test_a_tied_head_on_disk_must_be_the_table(tied):
    tensors = tensors_of(tied)
    save(tied, {**tensors, HEAD: tensors[EMBEDDINGS].clone()})
    assert_as_stock(tied)
    save(tied, {**tensors, HEAD: tensors[EMBEDDINGS] + 1e-3})
    with pytest.raises(UserError, match=r"lm_head.weight.*tie_word_embeddings to false"):
        open_model(tied)


# --------------------------------------------------------------------------- not a model by itself


def test_an_adapter_is_refused_with_its_base(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    with pytest.raises(UserError, match=r"adapter for 'owner/base' .*merge it first"):
        open_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"adapter for 'owner/base', and no model: merge it first"):
        open_model(folder)


def test_what_a_checkpoint_is_instead_is_said(folder):
    config = (folder / "config.json").read_text()
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(UserError, match=r"take quantization_config out of config.json"):
        open_model(folder)
    (folder / "config.json").write_text(config)
    edit_config(folder, quantization={"group_size": 64, "bits": 4})
    with pytest.raises(UserError, match="MLX's format"):
        open_model(folder)
    (folder / "config.json").write_text(config)
    save(folder, {**tensors_of(folder), HEAD: torch.empty(0)})
    with pytest.raises(UserError, match=r"DeepSpeed ZeRO-3.*zero_to_fp32.py"):
        open_model(folder)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_a_pointer_of_git_lfs_is_told_from_damage(name, folder):
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(POINTER)
    with pytest.raises(UserError, match=rf"'{folder / name}', found a pointer .*git lfs pull"):
        open_model(folder)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model-00001-of-00002.safetensors", "which no index names"),
        ("model.fp16.safetensors", "which no index names"),
        ("adapter_model.safetensors", "an adapter"),
        ("tiny.Q4_K_M.gguf", "a GGUF file"),
        ("model.onnx", "an ONNX file"),
        ("tf_model.h5", "TensorFlow"),
        ("consolidated.00.pth", "another format"),
        ("global_step10", "DeepSpeed"),
        ("pytorch_model_fsdp_0", "FSDP"),
    ],
)
def test_what_lies_in_place_of_weights_is_named(name, said, folder):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(UserError, match=rf"found '{name}' \([^)]*{said}"):
        open_model(folder)


def test_weights_that_are_a_link_to_nowhere_are_told_as_such(folder):
    (folder / "model.safetensors").rename(folder / "training_args.bin")
    with pytest.raises(UserError, match="found none: name a folder"):
        open_model(folder)
    (folder / "model.safetensors").symlink_to(folder / "blobs" / "gone")
    with pytest.raises(UserError, match=r"'model.safetensors', a link that leads nowhere"):
        open_model(folder)


def test_a_folder_of_models_says_where_one_is(tmp_path):
    for name in ("run/checkpoint-5", "cache/snapshots/abc"):
        tiny_model("llama", torch.float32).save_pretrained(tmp_path / name)
    for folder, below in (("run", "run/checkpoint-5"), ("cache", "cache/snapshots/abc")):
        with pytest.raises(UserError, match=rf"found it in '{tmp_path / below}'"):
            open_model(tmp_path / folder)


def test_weights_of_an_adapter_alone_are_an_adapter(folder):
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"holds an adapter .*merge it first"):
        open_model(folder)


# --------------------------------------------------------------------------- config.json


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("hidden_size", value) for value in ("64", 64.0, -64, 0, [64], True)),
        *(("num_hidden_layers", value) for value in ("2", True, 1e9, 0)),
        *(("num_key_value_heads", value) for value in ("2", 0)),
        *(("max_position_embeddings", "64"), ("vocab_size", -1), ("head_dim", 0)),
    ],
)
def test_a_size_that_is_none_is_refused_by_its_key(key, value, folder):
    edit_config(folder, **{key: value})
    found = re.escape(json.dumps(value))
    with pytest.raises(UserError, match=rf"^Expected {key} in config.json .*found {found}:"):
        open_model(folder)


@pytest.mark.parametrize("value", [["llama"], 3, {"llama": 1}])
def test_a_model_type_that_is_no_name_is_refused(value, folder):
    edit_config(folder, model_type=value)
    with pytest.raises(UserError, match="supported family"):
        open_model(folder)


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_rope_that_is_no_object_is_refused(key, folder):
    edit_config(folder, **{"rope_parameters": None, key: "linear"})
    checkpoint, family = open_model(folder)
    assert not is_square(family, checkpoint.config)
    with pytest.raises(UserError, match=r"config.json that transformers accepts"):
        empty_model(checkpoint.config, CAUSAL_LM)


def test_an_empty_quantization_config_that_stock_stumbles_over_is_refused(folder):
    edit_config(folder, quantization_config={})
    with pytest.raises(ValueError, match="quant_method"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(UserError, match="take quantization_config out"):
        open_model(folder)


def test_json_too_deep_to_read_is_refused(folder):
    (folder / "config.json").write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(UserError, match="is not JSON"):
        open_model(folder)


# --------------------------------------------------------------------------- dtypes


def test_the_dtype_is_that_of_most_parameters(folder):
    tensors = {name: tensor.bfloat16() for name, tensor in tensors_of(folder).items()}
    save(folder, {**tensors, HEAD: tensors[HEAD].float()})
    checkpoint, _ = open_model(folder)
    assert checkpoint.dtype() == torch.bfloat16
    names = tensors.keys()
    assert checkpoint.stored_bytes(names) == sum(t.nbytes for t in tensors_of(folder).values())


def test_two_half_precisions_are_computed_in_one():
    assert arithmetic_of(torch.float16, torch.bfloat16) == torch.bfloat16
    assert arithmetic_of(torch.bfloat16, torch.float16) == torch.bfloat16
    assert arithmetic_of(torch.float32, torch.bfloat16) == torch.float32
    assert arithmetic_of(torch.float16, torch.float16) == torch.float16


# --------------------------------------------------------------------------- what goes along


@pytest.mark.parametrize("variant", ["llama-rope-scaling", "phi3-longrope"])
def test_an_empty_model_leaves_the_config_as_it_was(variant, tmp_path):
    tiny_model(variant, torch.float32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_scaling"] = config.pop("rope_parameters", None)
    before = json.dumps(config)
    empty_model(config, CAUSAL_LM)
    assert json.dumps(config) == before


def test_the_stock_class_is_named_and_no_code_beside_it(folder):
    edit_config(
        folder,
        architectures=["LLaMAForCausalLM"],
        auto_map={"AutoModelForCausalLM": "modeling_t.T"},
        some_limit=float("inf"),
    )
    checkpoint, family = open_model(folder)
    resized = resized_config(family, checkpoint.config, Shape.of(family, checkpoint.config))
    assert resized["architectures"] == ["LlamaForCausalLM"]
    assert "auto_map" not in resized
    assert resized["some_limit"] == float("inf")


@pytest.mark.parametrize("name", [3, "../other.safetensors", "/etc/hostname"])
def test_weights_that_a_config_names_elsewhere_are_refused(name, folder):
    edit_config(folder, transformers_weights=name)
    with pytest.raises(UserError, match=r"Expected transformers_weights in config.json to name"):
        open_model(folder)


def test_generation_settings_that_nothing_loads_beside_are_refused(folder):
    (folder / "generation_config.json").write_text("[1]")
    with pytest.raises(UserError, match="Expected an object in"):
        open_model(folder)
    (folder / "generation_config.json").write_text("[1")  # which stock classes leave alone
    open_model(folder)


@pytest.mark.parametrize(
    "tensor", [torch.empty(4, device="meta"), torch.eye(4).to_sparse()], ids=["meta", "sparse"]
)
def test_tensors_of_no_numbers_are_refused(tensor, folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**tensors, next(iter(tensors)): tensor}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds a tensor"):
        disk_tensors(*open_model(folder))


def test_weights_that_a_config_names_may_be_a_link_as_in_a_hub_cache(folder, tmp_path):
    edit_config(folder, transformers_weights="model.safetensors")
    blob = (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(blob)
    assert open_model(folder)[0].config["transformers_weights"] == "model.safetensors"
    edit_config(folder, transformers_weights="other.safetensors")
    with pytest.raises(UserError, match=r"found 'other\.safetensors'"):
        open_model(folder)


def test_companions_are_what_stock_classes_read(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    carried = {
        *("tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "special_tokens_map.json"),
        *("vocab.json", "merges.txt", "generation_config.json", "chat_template.jinja"),
    }
    others = {
        *("eval_results.json", "quantize_config.json", "params.json", "adapter_config.json"),
        *("trainer_state.json", "tokenization_t.py", "model.safetensors.index.json", "config.json"),
    }
    for name in carried | others:
        (source / name).write_text("{}")
    (source / "tokenizer_config.json").write_text('{"auto_map": {"x": "y"}, "kept": "é"}')
    copied = copy_companions(source, target)
    assert set(copied) == {path.name for path in target.iterdir()}
    assert set(copied) == {*carried, "tokenizer_config.json"}
    assert json.loads((target / "tokenizer_config.json").read_text("utf-8")) == {"kept": "é"}


def test_of_a_repository_weights_in_subfolders_are_not_fetched():
    from huggingface_hub.utils import filter_repo_objects

    names = [
        *("config.json", "model.safetensors", "tokenizer.model", "chat_templates/tool.jinja"),
        *("checkpoint-500/model.safetensors", "fp32/model.safetensors", "onnx/config.json"),
        *("original/consolidated.00.pth", "adapter/adapter_model.safetensors"),
    ]
    fetched = filter_repo_objects(names, allow_patterns=_HUB_PATTERNS, ignore_patterns=_NOT_FETCHED)
    assert list(fetched) == names[:4]


# --------------------------------------------------------------------------- input and output


def test_a_model_is_not_compressed_into_its_own_place(tmp_path, refused):
    compress_tiny("llama", tmp_path, allocate="width")
    small = tmp_path / "small"
    before = (small / "model.safetensors").read_bytes()
    words = ("--calib", "stdlib", "--samples", 4, "--seq-len", 32, "--keep", 0.9)
    for out in (small, tmp_path / "link"):
        if out != small:
            out.symlink_to(small)
        message = refused("compress", small, "--out", out, *words)
        assert "which would be replaced" in message
    message = refused("recover", tmp_path / "dense", "--teacher", small, "--out", small)
    assert "the teacher" in message
    message = refused("recover", small, "--teacher", tmp_path / "dense", "--out", small)
    assert "the model that is tuned" in message
    logits = ("--teacher-logits", tmp_path / "new" / "logits", "--out", tmp_path / "new")
    message = refused("recover", small, "--teacher", tmp_path / "dense", *logits)
    assert "the teacher's logits" in message
    assert not (tmp_path / "new").exists()
    assert (small / "model.safetensors").read_bytes() == before


def test_output_may_be_a_link_to_another_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "small").symlink_to(tmp_path / "disk" / "later")
    compress_tiny("llama", tmp_path, allocate="width")
    assert (tmp_path / "small").is_symlink()
    assert (tmp_path / "disk" / "later" / "config.json").is_file()
    assert sorted(os.listdir(tmp_path / "disk")) == ["later"]
    shutil.rmtree(tmp_path / "disk")


def test_every_family_names_its_class_as_transformers_does(folder):
    assert family_of_model(AutoModelForCausalLM.from_pretrained(folder)).architecture == (
        "LlamaForCausalLM"
    )
