"""The output is stock: plain transformers loads it where sp3llm cannot even be imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sp3llm.compression.story import compress
from sp3llm.models import export
from sp3llm.models.families import count_parameters, family_of
from sp3llm.models.source import bundled_model
from sp3llm.options import CompressConfig
from tests.conftest import save_model, tiny_model
from tests.helpers import LOAD_ELSEWHERE, QUIET, compress_tiny

EVALUATION = Path(__file__).parents[2] / "eval"
VARIANTS = [
    "llama-biases",
    "llama-9-heads",
    "mistral-12-heads",
    "qwen2-tied",
    "qwen3",
    "gemma",
    "granite",
    "smollm3",
    "phi3",
    "phi3-longrope",
    "stablelm",
    "gpt-neox",
    "opt",
    "opt-projected",
    "opt-untied",
    "mixtral",
    "qwen2-moe",
    "qwen3-moe",
    "llama-biases learned",
    "qwen2-tied learned",
    "stablelm learned",
    "opt-projected learned",
    "qwen2-moe learned",
]
# Small OPTs with a vocabulary like this keep little else: heads of 12 do not shrink by eights.
SETTINGS = {
    "opt": {"keep": 0.8, "tie": "keep", "word_embed_proj_dim": 40, "head_dim": 8},
    "opt-projected": {"keep": 0.8, "tie": "keep", "word_embed_proj_dim": 24},
    "gemma": {"tie": "keep"},
    "smollm3": {"tie": "untie"},
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Compressed models, each loaded and run in one fresh process that cannot import sp3llm."""
    folders = {variant: tmp_path_factory.mktemp(variant) for variant in VARIANTS}
    for variant, folder in folders.items():
        compress_tiny(variant, folder, **SETTINGS.get(variant.split()[0], {}))
    small = [str(folder / "small") for folder in folders.values()]
    run = subprocess.run(
        [sys.executable, "-c", LOAD_ELSEWHERE, *small], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return {variant: folder / "small" for variant, folder in folders.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fresh_process_without_sp3llm_gives_the_same_logits(variant, outputs):
    model = AutoModelForCausalLM.from_pretrained(outputs[variant])
    elsewhere = load_file(outputs[variant] / "elsewhere.safetensors")
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 27)[None], use_cache=False).logits
    assert torch.equal(logits, elsewhere["logits"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_output_is_the_same_class_smaller_and_counts_what_it_says(variant, outputs):
    model = AutoModelForCausalLM.from_pretrained(outputs[variant])
    record = json.loads((outputs[variant] / "sp3llm.json").read_text())
    real = sum(p.numel() for p in model.parameters())
    assert real == record["plan"]["parameters"]
    assert real <= record["plan"]["keep_asked"] * record["plan"]["dense_parameters"]
    config = json.loads((outputs[variant] / "config.json").read_text())
    assert type(model).__name__ == config["architectures"][0]
    assert count_parameters(family_of(config), config) == real
    assert model.config.hidden_size % model.config.num_attention_heads == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_reload_is_the_identity(variant, outputs, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(outputs[variant])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("variant", VARIANTS)
def test_perplexity_reported_is_that_of_the_written_model(variant, outputs):
    """The streamed score of the record equals a plain forward of the folder on the same text."""
    from sp3llm.text.windows import evaluation_windows

    record = json.loads((outputs[variant] / "sp3llm.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(outputs[variant])
    windows = evaluation_windows("stdlib", tokenizer, 4, 32)
    assert windows.sha256 == record["evaluation"]["sha256"]
    model = AutoModelForCausalLM.from_pretrained(outputs[variant])
    with torch.no_grad():
        loss = model(input_ids=windows.tokens, labels=windows.tokens).loss
    assert loss.exp().item() == pytest.approx(record["perplexity"], rel=1e-4)


def test_config_keeps_what_its_author_wrote(tmp_path):
    """RoPE scaling, sliding windows and unknown keys are carried over; only the width changes."""
    model = tiny_model("llama-rope-scaling", torch.float32, vocab_size=4096)
    save_model(model, tmp_path / "dense", tokenizer=True)
    path = tmp_path / "dense" / "config.json"
    config = json.loads(path.read_text())
    config["a_key_of_somebody_else"] = {"kept": True}
    path.write_text(json.dumps(config))
    settings = CompressConfig(
        model=str(tmp_path / "dense"), out=tmp_path / "small", calib="stdlib",
        samples=2, seq_len=32, eval_samples=2, allocate="width",
    )  # fmt: skip
    compress(settings, QUIET)
    small = json.loads((tmp_path / "small" / "config.json").read_text())
    assert small.pop("hidden_size") < config.pop("hidden_size")
    assert small.pop("head_dim") == 12
    config.pop("head_dim", None)
    assert small == config


def test_every_companion_file_comes_along(tmp_path):
    model = tiny_model("llama", torch.float32, vocab_size=4096)
    save_model(model, tmp_path / "dense", tokenizer=True)
    (tmp_path / "dense" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "dense" / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    (tmp_path / "dense" / "training_args.bin").write_bytes(b"not a weight")
    (tmp_path / "dense" / "README.md").write_text("the original's card")
    settings = CompressConfig(
        model=str(tmp_path / "dense"), out=tmp_path / "small", calib="stdlib",
        samples=2, seq_len=32, eval_samples=2, allocate="width",
    )  # fmt: skip
    compress(settings, QUIET)
    found = {path.name for path in (tmp_path / "small").iterdir()}
    expected = {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json",
        "model.safetensors", "report.html", "sp3llm.basis", "sp3llm.json",
        "special_tokens_map.json",
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    }  # fmt: skip
    assert found == expected
    assert "compressed to" in (tmp_path / "small" / "README.md").read_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_asked_for_is_written_and_stated(dtype, tmp_path):
    compress_tiny("llama", tmp_path, dtype=dtype)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert {p.dtype for p in small.parameters()} == {getattr(torch, dtype)}


def test_same_command_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        compress_tiny("qwen2-tied", tmp_path / name)
    one, two = (tmp_path / n / "small" / "model.safetensors" for n in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_many_shards_load_like_one(tmp_path, monkeypatch):
    compress_tiny("llama", tmp_path / "one")
    monkeypatch.setattr(export, "_SHARD_BYTES", 20_000)
    compress_tiny("llama", tmp_path / "many")
    folder = tmp_path / "many" / "small"
    assert len(list(folder.glob("model-*.safetensors"))) == 5
    assert not (folder / "model.safetensors").exists()
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "small").state_dict()
    many = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    total = sum(tensor.numel() * tensor.element_size() for tensor in many.values())
    assert index["metadata"]["total_size"] == total


def test_bundled_model_is_what_its_card_says():
    folder = bundled_model()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert 6_000_000 <= model.num_parameters() <= 8_000_000
    assert (folder / "model.safetensors").stat().st_size <= 16_000_000
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert f"{model.num_parameters():,}" in (folder / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Fäden, naïve — 数 \n\tand 42 bytes: \x07."
    decoded = tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
    assert decoded.strip() == text


def test_bundled_model_compresses_and_loses_little(tmp_path):
    """Three quarters of the parameters of a real trained model: far from broken."""
    settings = CompressConfig(
        out=tmp_path / "small", samples=24, seq_len=256, eval_samples=16, allocate="width"
    )
    result = compress(settings, QUIET)
    assert result.plan.keep_params <= 0.75
    assert 0 < result.excess.mean < 0.2
    assert result.excess.mean > 2 * result.excess.standard_error


@pytest.mark.parametrize(
    ("name", "refit"), [("opt-4m", True), ("opt-4m", False), ("llama-tied-4m", True)]
)
def test_trained_tied_models_stay_tied_and_stock(name, refit, tmp_path):
    """The trained models at 75 % of their tied count: one table, and logits as elsewhere."""
    out = tmp_path / "small"
    result = compress(
        CompressConfig(
            model=str(EVALUATION / "models" / name), out=out, calib="stdlib", samples=4,
            eval_samples=2, seq_len=128, keep=0.75, tie="keep", refit=refit, allocate="width",
            head_dim=40 if name == "opt-4m" else None,
        ),
        QUIET,
    )  # fmt: skip
    assert result.plan.keep_params <= 0.75
    tensors = load_file(out / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert sum(t.numel() for t in tensors.values()) == result.plan.parameters
    run = subprocess.run(
        [sys.executable, "-c", LOAD_ELSEWHERE, str(out)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.num_parameters() == result.plan.parameters
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 27)[None], use_cache=False).logits
    assert torch.equal(load_file(out / "elsewhere.safetensors")["logits"], logits)
