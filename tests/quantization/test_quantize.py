"""Quantized: stock, honest about its numbers, and beside the dense model quantized alike."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sp3llm.cli import main
from sp3llm.compression.story import compress
from sp3llm.errors import UserError
from sp3llm.maths.paired import perplexity
from sp3llm.models.objectives.causal_lm import CAUSAL_LM
from sp3llm.options import CompressConfig, QuantizeConfig
from sp3llm.quantization import story
from sp3llm.quantization.bits import bits_config, take_any_width
from sp3llm.quantization.story import quantize
from sp3llm.recovery.teacher import load_teacher
from sp3llm.reporting.origins import held_out_tokens
from sp3llm.reporting.record import read_record
from sp3llm.runtime.folders import RECORD
from tests.conftest import logits_of, relative_error, save_model, tiny_model
from tests.helpers import QUIET, WITHOUT_SP3LLM

pytest.importorskip("bitsandbytes")

# In 64s, before and after.
WIDE = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 4096}
OPT = {"num_hidden_layers": 2, "vocab_size": 4096}
MODELS = {
    "llama": (WIDE, {"hidden_size": 64}),
    "qwen2-tied": (WIDE, {"hidden_size": 64, "tie": "keep"}),
    "opt-projected": (OPT, {"tie": "keep", "word_embed_proj_dim": 24}),
    "mixtral": ({"vocab_size": 4096}, {}),
}
QUANTIZED = [("llama", "int8"), ("llama", "nf4"), ("qwen2-tied", "nf4"), ("opt-projected", "int8"),
             ("mixtral", "int8")]  # fmt: skip
TEXT = {"calib": "stdlib", "samples": 4, "seq_len": 32, "eval_samples": 4}
NAMES = ("dense", "dense_quantized", "small", "small_quantized")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Folders with a dense and a compressed tiny model, and what it was quantized to; made once."""
    made: dict[str, Path] = {}

    def folder(variant: str, to: str | None = None) -> Path:
        if variant not in made:
            made[variant] = tmp_path_factory.mktemp(variant)
            sizes, settings = MODELS[variant]
            model = tiny_model(variant, torch.float32, **sizes)
            save_model(model, made[variant] / "dense", tokenizer=True)
            options = {"keep": 0.9, "allocate": "width", "report": False, **TEXT, **settings}
            dense, small = (made[variant] / name for name in ("dense", "small"))
            compress(CompressConfig(model=str(dense), out=small, **options), QUIET)
        if to is not None and not (made[variant] / f"small-{to}").exists():
            quantize(QuantizeConfig(str(made[variant] / "small"), to, device="cpu"), QUIET)
        return made[variant]

    return folder


def entry_of(folder: Path) -> dict:
    return json.loads((folder / RECORD).read_text())["quantization"]


def in_memory(folder: Path, to: str) -> torch.nn.Module:
    """A model quantized by plain transformers."""
    config = bits_config(to, torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map={"": "cpu"}
    ).eval()


def evaluation(folder: Path) -> torch.Tensor:
    return held_out_tokens(read_record(folder), folder)


def recounted(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Perplexity by the model's own loss, a window at a time."""
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss for row in tokens]
    return perplexity(torch.stack(losses))


# --------------------------------------------------------------------------- stock


LOAD_ELSEWHERE = (
    WITHOUT_SP3LLM
    + """
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

for folder, result in zip(sys.argv[1::2], sys.argv[2::2]):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    problems = {k: v for k, v in info.items() if v}
    assert not problems, (folder, problems)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 27)[None], use_cache=False).logits
    save_file({"logits": logits}, result)
"""
)


def test_a_fresh_process_without_sp3llm_gives_the_logits_of_the_model_in_memory(
    folder_of, tmp_path
):
    words = []
    for number, (variant, to) in enumerate(QUANTIZED):
        words += [folder_of(variant, to) / f"small-{to}", tmp_path / f"{number}.safetensors"]
    run = subprocess.run(
        [sys.executable, "-c", LOAD_ELSEWHERE, *map(str, words)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    ids = torch.arange(3, 27)[None]
    for number, (variant, to) in enumerate(QUANTIZED):
        found = load_file(tmp_path / f"{number}.safetensors")["logits"]
        expected = logits_of(in_memory(folder_of(variant) / "small", to), ids)
        assert torch.equal(found, expected), (variant, to)
        full = logits_of(AutoModelForCausalLM.from_pretrained(folder_of(variant) / "small"), ids)
        assert relative_error(found, full) > 0, (variant, to)


@pytest.mark.parametrize(("variant", "to"), [("llama", "int8"), ("opt-projected", "int8")])
def test_config_and_companions_are_those_of_the_compressed_model(variant, to, folder_of):
    folder = folder_of(variant, to)
    small, quantized = (
        json.loads((folder / name / "config.json").read_text()) for name in ("small", f"small-{to}")
    )
    assert quantized.pop("quantization_config")["load_in_8bit"]
    assert quantized == small
    names = {path.name for path in (folder / "small").iterdir()} - {"sp3llm.basis"}
    assert {path.name for path in (folder / f"small-{to}").iterdir()} == names
    assert "## Quantized" in (folder / f"small-{to}" / "README.md").read_text()


# --------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(("variant", "to"), QUANTIZED)
def test_recorded_numbers_are_what_a_recount_gives(variant, to, folder_of):
    folder = folder_of(variant, to)
    small, quantized = folder / "small", folder / f"small-{to}"
    record, models = json.loads((small / RECORD).read_text()), entry_of(quantized)["models"]
    tokens = evaluation(small)
    counts = {
        "dense": record["dense_perplexity"],
        "small": record["perplexity"],
        "small_quantized": recounted(AutoModelForCausalLM.from_pretrained(quantized), tokens),
    }
    for name, expected in counts.items():
        assert models[name]["perplexity"] == pytest.approx(expected, rel=1e-5), name
    for name, of in (("dense", "dense"), ("small", "small"), ("small_quantized", f"small-{to}")):
        size = (folder / of / "model.safetensors").stat().st_size
        assert models[name]["weight_bytes"] == size, name
    for name in NAMES:
        means = torch.tensor(models[name]["window_losses"], dtype=torch.float64)
        assert models[name]["perplexity"] == pytest.approx(perplexity(means), rel=1e-12)
        base = torch.tensor(models["dense"]["window_losses"], dtype=torch.float64)
        excess = models[name]["excess_log_perplexity"]
        assert excess["mean"] == pytest.approx((means - base).mean().item(), abs=1e-12)
        error = (means - base).std().item() / len(base) ** 0.5
        assert excess["paired_standard_error"] == pytest.approx(error, abs=1e-12)


@pytest.mark.parametrize("to", ["int8", "nf4"])
def test_the_dense_model_is_quantized_alike(to, folder_of, tmp_path):
    folder = folder_of("llama", to)
    models = entry_of(folder / f"small-{to}")["models"]
    dense = in_memory(folder / "dense", to)
    dense.save_pretrained(tmp_path / "dense")
    size = (tmp_path / "dense" / "model.safetensors").stat().st_size
    assert models["dense_quantized"]["weight_bytes"] == size
    expected = recounted(dense, evaluation(folder / "small"))
    assert models["dense_quantized"]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert models["dense_quantized"]["perplexity"] != models["dense"]["perplexity"]
    assert {path.name for path in folder.iterdir()} <= {
        "dense", "small", "small-int8", "small-nf4",
    }  # fmt: skip


def test_linear_bytes_are_those_of_what_is_quantized(folder_of):
    """Bits and scales: 8 and a float32 a row, 4 and a float32 for 64."""
    rows, weights = 128 + 2 * 64 + 64 + 2 * 128 + 64, 64 * (128 + 2 * 64 + 128 + 3 * 128)
    for to, expected in (("int8", weights + 4 * rows), ("nf4", weights * 0.5625)):
        found = entry_of(folder_of("llama", to) / f"small-{to}")["models"]
        assert found["small"]["linear_bytes"] == 2 * 4 * weights
        # nf4 keeps its table and a little JSON with every matrix.
        assert 0 <= found["small_quantized"]["linear_bytes"] - 2 * expected < 14 * 256


def test_what_was_measured_on_other_weights_is_dropped(folder_of, tmp_path):
    folder = tmp_path / "small"
    shutil.copytree(folder_of("llama") / "small", folder)
    record = json.loads((folder / RECORD).read_text())
    record |= {"speed": [{"batch": 1}], "samples": {"new_tokens": 4, "texts": []}}
    (folder / RECORD).write_text(json.dumps(record))
    quantize(QuantizeConfig(str(folder), "int8", device="cpu"), QUIET)
    found = json.loads((tmp_path / "small-int8" / RECORD).read_text())
    assert not {"speed", "samples", "scores"} & set(found)
    assert found["perplexity"] == record["perplexity"]


def test_report_shows_a_quantized_model_with_samples(folder_of, tmp_path):
    folder = tmp_path / "small-int8"
    shutil.copytree(folder_of("llama", "int8") / "small-int8", folder)
    main(["report", str(folder), "--device", "cpu"])
    page = (folder / "report.html").read_text()
    assert "dense int8" in page
    assert "samples" in json.loads((folder / RECORD).read_text())
    assert "## Quantized" in (folder / "README.md").read_text()


# --------------------------------------------------------------------------- any width


def rounded_to_nf4(weight: torch.Tensor) -> torch.Tensor:
    """Every 64 neighbours on the sixteen values of nf4, scaled by their largest."""
    from bitsandbytes.functional import get_4bit_type

    values = get_4bit_type("nf4", device="cpu")
    flat = weight.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % 64)).reshape(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / scales - values[:, None, None]).abs().argmin(0)
    return (values[nearest] * scales).flatten()[: len(flat)].reshape(weight.shape)


@pytest.mark.parametrize("inputs", [30, 48, 172, 192])
def test_nf4_of_any_width_is_dequantized_right(inputs):
    """bitsandbytes' own kernels for CPUs get rows that are not whole blocks wrong."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = torch.randn(64, inputs, generator=torch.Generator().manual_seed(0))
    layer = Linear4bit(inputs, 64, quant_type="nf4", compute_dtype=torch.float32).eval()
    layer.weight = Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=False
    ).to("cpu")
    layer.bias.data.fill_(0.5)
    take_any_width(layer)
    found = layer(torch.eye(inputs)).T - 0.5
    assert relative_error(found, rounded_to_nf4(weight)) < 1e-6
    assert 0.08 < relative_error(found, weight) < 0.1


def test_a_teacher_in_nf4_has_the_weights_of_nf4_whatever_its_widths(tmp_path):
    tokens = torch.arange(3, 27)[None]
    model = tiny_model("llama", torch.float32, intermediate_size=172)
    save_model(model, tmp_path)
    found = logits_of(
        load_teacher(tmp_path, CAUSAL_LM, "nf4", torch.device("cpu"), None, tmp_path), tokens
    )
    with torch.no_grad():
        for module in model.model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(rounded_to_nf4(module.weight))
    assert relative_error(found, logits_of(model, tokens)) < 1e-5


# --------------------------------------------------------------------------- the commands


def test_compress_and_quantize_give_the_same_bytes(folder_of, tmp_path, capsys):
    folder = folder_of("llama", "int8")
    main([
        "compress", str(folder / "dense"), "--out", str(tmp_path / "small"), "--keep", "0.9",
        "--allocate", "width", "--no-report", "--calib", "stdlib", "--samples", "4", "--seq-len",
        "32", "--eval-samples", "4", "--hidden-size", "64", "--quantize", "int8",
    ])  # fmt: skip
    told = capsys.readouterr().out
    assert "dense int8" in told
    for name in ("small", "small-int8"):
        one, other = (path / name / "model.safetensors" for path in (folder, tmp_path))
        assert one.read_bytes() == other.read_bytes()
    command = ["quantize", str(tmp_path / "small"), "--to", "int8", "--out", str(tmp_path / "own")]
    main(command)
    assert (tmp_path / "own" / "model.safetensors").read_bytes() == one.read_bytes()
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"small", "small-int8", "own"}
    same = ("models", "cost", "over_dense_quantized")
    entries = [entry_of(tmp_path / name) for name in ("small-int8", "own")]
    assert all(entries[0][key] == entries[1][key] for key in same)
    assert entries[1]["command"].split()[:2] == ["sp3llm", "quantize"]


def test_quantizing_is_no_part_of_a_run_but_the_turn_is():
    plain = CompressConfig().of_result()
    assert CompressConfig(quantize="int8").of_result() == plain
    assert CompressConfig(turn="hadamard").of_result() != plain


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("stage", ["load_quantized", "losses_of", "_finish"])
def test_an_interrupted_run_leaves_nothing(stage, error, folder_of, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise error

    monkeypatch.setattr(story, stage, stopped)
    out = tmp_path / "out"
    with pytest.raises(error):
        quantize(
            QuantizeConfig(str(folder_of("llama") / "small"), "int8", out=out, device="cpu"), QUIET
        )
    assert list(tmp_path.iterdir()) == []


def test_a_quantization_that_fails_leaves_what_was_compressed(
    folder_of, tmp_path, refused, monkeypatch
):
    monkeypatch.setattr(story, "losses_of", lambda *_, **__: (_ for _ in ()).throw(UserError("no")))
    message = refused(
        "compress", folder_of("llama") / "dense", "--out", tmp_path / "small", "--keep", 0.9,
        "--allocate", "width", "--no-report", "--calib", "stdlib", "--samples", 4, "--seq-len",
        32, "--eval-samples", 4, "--hidden-size", 64, "--quantize", "int8", "--device", "cpu",
    )  # fmt: skip
    assert "sp3llm quantize" in message
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


# --------------------------------------------------------------------------- refusals


def too_late(*_, **__):
    raise AssertionError("work started")


def test_nf4_that_a_cpu_cannot_run_is_refused_before_any_work(
    folder_of, tmp_path, refused, monkeypatch
):
    small = folder_of("opt-projected") / "small"
    monkeypatch.setattr("sp3llm.text.windows.calibration_windows", too_late)
    message = refused("compress", "--quantize", "nf4", "--device", "cpu", "--out", tmp_path / "s")
    for word in ("multiples of 64", "--hidden-size", "int8", "intermediate_size"):
        assert word in message
    message = refused("quantize", small, "--to", "nf4", "--out", tmp_path / "s")
    assert "multiples of 64" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["compress", "quantize"])
def test_missing_bitsandbytes_is_named_before_any_work(
    command, folder_of, tmp_path, refused, monkeypatch
):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec",
        lambda name, *rest: None if name == "bitsandbytes" else find_spec(name, *rest),
    )  # fmt: skip
    monkeypatch.setattr("sp3llm.text.windows.calibration_windows", too_late)
    option = ["--quantize" if command == "compress" else "--to", "int8"]
    message = refused(command, folder_of("llama") / "small", *option, "--out", tmp_path / "s")
    assert "pip install 'sp3llm[quantize]'" in message


def test_a_quantized_model_is_refused(folder_of, refused, tmp_path):
    model = folder_of("llama", "int8") / "small-int8"
    message = refused("quantize", model, "--to", "nf4", "--out", tmp_path / "s")
    assert "quantized already" in message


def test_a_folder_without_a_record_is_refused(folder_of, refused, tmp_path):
    message = refused("quantize", folder_of("llama") / "dense", "--to", "int8")
    assert RECORD in message


@pytest.mark.parametrize("command", ["compress", "quantize"])
def test_a_folder_of_the_user_is_left_alone(command, folder_of, refused, tmp_path, monkeypatch):
    monkeypatch.setattr("sp3llm.text.windows.calibration_windows", too_late)
    mine = tmp_path / "small-int8"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    folder = folder_of("llama")
    if command == "compress":
        words = ["compress", folder / "dense", "--out", tmp_path / "small", "--quantize", "int8"]
    else:
        words = ["quantize", folder / "small", "--to", "int8", "--out", mine]
    assert str(mine) in refused(*words)
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("which", ["small", "dense"])
def test_the_model_itself_is_not_replaced(which, folder_of, refused):
    folder = folder_of("llama")
    before = (folder / which / "model.safetensors").read_bytes()
    message = refused("quantize", folder / "small", "--to", "int8", "--out", folder / which)
    assert "--out" in message
    assert (folder / which / "model.safetensors").read_bytes() == before


def test_another_dense_model_is_refused(folder_of, refused, tmp_path):
    folder = folder_of("llama")
    message = refused("quantize", folder / "small", "--to", "int8", "--out", tmp_path / "s",
                      "--dense", folder_of("opt-projected") / "dense")  # fmt: skip
    assert "--dense" in message


@pytest.mark.parametrize("words", [["quantize", "here", "--to"], ["compress", "--quantize"]])
def test_unknown_bits_are_refused(words, refused):
    assert "int8 or nf4" in refused(*words, "int4")
