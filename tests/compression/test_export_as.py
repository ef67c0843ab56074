"""`--export-as`: a width-cut Qwen2 comes as a Llama that is the same model, to every command."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sp3llm.compression.mask_budget import budget_of
from sp3llm.compression.story import compress
from sp3llm.models import export
from sp3llm.models.families import FAMILIES
from sp3llm.models.shapes import cost_of
from sp3llm.options import CompressConfig, QuantizeConfig, RecoverConfig
from sp3llm.planning.candidates import candidates
from sp3llm.planning.limits import Limits, cost_within
from sp3llm.quantization.story import quantize
from sp3llm.recovery.story import recover
from sp3llm.reporting.card import model_card
from sp3llm.reporting.compression import next_steps
from sp3llm.reporting.origins import find_dense
from sp3llm.reporting.record import read_record
from sp3llm.reporting.tables import rows
from sp3llm.runtime import journal
from tests.conftest import logits_of, save_model, tiny_model
from tests.helpers import QUIET

NO_WINDOWS = {"use_sliding_window": False, "sliding_window": None}
# A width that four heads of 12 do not make, and nothing to search: the zeros count, and could leave
# less room for the rest.
BASE = {"samples": 4, "seq_len": 32, "eval_samples": 4, "keep": 0.85, "calib": "stdlib"}
SIZES = {"hidden_size": 40, "intermediate_size": 32, "num_key_value_heads": 2}
BASE |= {"report": False, "tie": "keep", **SIZES}
QWEN2, LLAMA = "Qwen2ForCausalLM", "LlamaForCausalLM"


def save_dense(folder, variant="qwen2", **overrides):
    model = tiny_model(variant, torch.float32, vocab_size=4096, **overrides)
    save_model(model, folder, tokenizer=True)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Folders of a compressed Qwen2, by whether it is tied and what it was exported as."""
    folders = {}
    for tied in (False, True):
        root = tmp_path_factory.mktemp(f"tied-{tied}")
        dense = save_dense(root / "dense", **NO_WINDOWS, tie_word_embeddings=tied)
        for export_as in ("auto", "same"):
            out = root / export_as
            compress(CompressConfig(str(dense), out=out, export_as=export_as, **BASE), QUIET)
            folders[tied, export_as] = out
    return folders


def loaded(folder):
    """The stock model in a folder, which must have every tensor of it and no other."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not {key: value for key, value in info.items() if value}
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_the_llama_is_the_qwen2(tied, outputs, tokens):
    models = {name: loaded(outputs[tied, name]) for name in ("auto", "same")}
    assert type(models["auto"]).__name__ == LLAMA
    assert type(models["same"]).__name__ == QWEN2
    auto, same = (logits_of(models[name], tokens) for name in ("auto", "same"))
    assert (auto - same).abs().max() < 1e-6 * same.abs().max()
    assert models["auto"].config.eos_token_id == models["same"].config.eos_token_id
    weights = {name: load_file(outputs[tied, name] / "model.safetensors") for name in models}
    added = {
        name: weights["auto"].pop(name) for name in set(weights["auto"]) - set(weights["same"])
    }
    assert all(name.endswith("self_attn.o_proj.bias") for name in added)
    assert len(added) == 3
    assert not any(tensor.any() for tensor in added.values())
    assert all(torch.equal(weights["auto"][name], t) for name, t in weights["same"].items())


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_counted_and_measured_is_the_model_written(tied, outputs):
    folder = outputs[tied, "auto"]
    record, same = read_record(folder), read_record(outputs[tied, "same"])
    real = sum(parameter.numel() for parameter in loaded(folder).parameters())
    assert real == record.plan.parameters == same.plan.parameters + 3 * 40
    assert real <= record.plan.keep_asked * record.plan.dense_parameters
    assert real == sum(record.parameters.small.values())
    assert record.plan.dense_parameters == same.plan.dense_parameters
    assert record.perplexity == pytest.approx(same.perplexity, rel=1e-6)


def test_it_is_said_in_every_place(outputs):
    record, same = (read_record(outputs[False, name]) for name in ("auto", "same"))
    assert (record.dense_architecture, record.architecture) == (QWEN2, LLAMA)
    assert (same.dense_architecture, same.architecture) == (QWEN2, QWEN2)
    assert ("class", QWEN2, LLAMA) in rows(record)
    assert not any(row[0] == "class" for row in rows(same))
    assert f"`{LLAMA}`" in model_card(record, {})
    assert QWEN2 in model_card(record, {})
    folder = outputs[False, "auto"]
    assert f"vllm serve {folder}" in next_steps(folder, record, has_page=False)
    assert "not in vLLM" not in next_steps(folder, record, has_page=False)
    steps = next_steps(folder, same, has_page=False)
    assert "vllm serve" not in steps
    assert f"not in vLLM and llama.cpp, where {QWEN2} takes the width over the heads" in steps
    assert "not with\nvLLM and llama.cpp" in model_card(same, {})


def test_tokenizer_and_chat_template_stay(outputs):
    folder = outputs[False, "auto"]
    dense, auto = (AutoTokenizer.from_pretrained(f) for f in (folder.with_name("dense"), folder))
    assert type(dense) is type(auto)
    text = "  def f(x):\n\treturn 1234567 + naïve — 数\r\n"
    assert dense(text)["input_ids"] == auto(text)["input_ids"]
    assert auto.chat_template == "{{ messages }}"


def test_later_commands_take_it(outputs, tmp_path):
    folder = outputs[True, "auto"]
    assert find_dense(read_record(folder)) == folder.with_name("dense")
    settings = RecoverConfig(
        model=str(folder), out=tmp_path / "recovered", steps=2, batch=2, seq_len=32,
        stop_windows=2, eval_samples=2, device="cpu", lora=2,
    )  # fmt: skip
    recover(settings, QUIET)
    assert type(loaded(tmp_path / "recovered")).__name__ == LLAMA
    quantize(QuantizeConfig(str(folder), to="int8", out=tmp_path / "int8", device="cpu"), QUIET)
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    assert config["architectures"] == [LLAMA]


def test_layers_with_windows_keep_their_class(tmp_path, refused):
    dense = save_dense(tmp_path / "dense")
    compress(CompressConfig(str(dense), out=tmp_path / "auto", **BASE), QUIET)
    assert type(loaded(tmp_path / "auto")).__name__ == QWEN2
    words = ("--samples", 4, "--seq-len", 32, "--export-as", "llama")
    for command in ("compress", "plan"):
        error = refused(command, dense, *words)
        assert "layers that attend to a sliding window" in error


def test_a_llama_of_a_mixtral_is_refused(tmp_path, refused):
    dense = save_dense(tmp_path / "dense", "mixtral")
    error = refused("compress", dense, "--out", tmp_path / "small", "--export-as", "llama")
    assert "found a mixtral model" in error
    assert not (tmp_path / "small").exists()


def test_a_killed_run_goes_on_to_the_same_bytes(outputs, tmp_path, monkeypatch):
    """Killed before its last two groups are written, which are then all that is left to write."""
    dense = outputs[False, "auto"].with_name("dense")
    settings = CompressConfig(str(dense), out=tmp_path / "small", **BASE)
    write_group, numbers = export._write_group, []
    monkeypatch.setattr(journal, "_SHARE_OF_TIME", 10.0)  # every layer is worth keeping

    def write_some(*arguments):
        numbers.append(arguments[3])
        if len(numbers) == 4:
            raise KeyboardInterrupt
        write_group(*arguments)

    monkeypatch.setattr(export, "_write_group", write_some)
    with pytest.raises(KeyboardInterrupt):
        compress(settings, QUIET)
    compress(settings, QUIET)
    assert numbers == [0, 1, 2, 3, 3, 4]
    for name in ("model.safetensors", "config.json", "tokenizer_config.json"):
        first, second = (folder / name for folder in (outputs[False, "auto"], tmp_path / "small"))
        assert first.read_bytes() == second.read_bytes()


def test_a_mask_expects_the_count_of_the_class_written():
    config = tiny_model("qwen2", **NO_WINDOWS).config.to_dict()
    family = FAMILIES["qwen2"]
    limits = Limits(keep=0.85, export_as="auto", hidden_size=40)
    shapes = candidates(family, config, limits)
    budget = budget_of(family, config, limits, shapes)
    whole = cost_within(family, config, limits, budget.dense).params
    for shape in budget.shapes:
        names = ("hidden_size", "intermediate_size", "num_key_value_heads")
        sizes = {name: torch.tensor(float(getattr(shape, name))).double() for name in names}
        counted = cost_within(family, config, limits, shape).params
        assert counted == cost_of(family, config, shape).params + 3 * 40
        assert budget.cost(sizes).item() == pytest.approx(counted / whole, abs=1e-12)


def test_a_learned_mask_is_exported_too(tmp_path):
    dense = save_dense(tmp_path / "dense", **NO_WINDOWS)
    base = {**BASE, "mask": "learned", "mask_steps": 4, "mask_batch": 2, **dict.fromkeys(SIZES)}
    out = tmp_path / "llama"
    compress(CompressConfig(str(dense), out=out, export_as="llama", **base), QUIET)
    record = read_record(tmp_path / "llama")
    model = loaded(tmp_path / "llama")
    assert type(model).__name__ == LLAMA
    assert sum(parameter.numel() for parameter in model.parameters()) == record.plan.parameters
    assert record.plan.keep <= record.plan.keep_asked


def test_the_class_is_part_of_what_a_run_is(tmp_path):
    settings = [CompressConfig(export_as=name).of_result() for name in ("auto", "same")]
    assert settings[0] != settings[1]
