"""The whole pipeline in bfloat16, on a GPU and on the CPU.

Every test runs on both: what a GPU computes in, a CPU computes in too, so that only kernels and
where things lie are left to be found on a GPU (`eval/gpu.sh`, `make slow`). What comes out is held
against a run in float32 on the CPU of the same weights.
"""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import AutoModelForCausalLM

from sp3llm.compression.measuring import measure_dense
from sp3llm.maths.losses import divergence
from sp3llm.options import QuantizeConfig, RecoverConfig
from sp3llm.quantization.story import quantize
from sp3llm.recovery.story import recover
from sp3llm.reporting.origins import held_out_tokens
from sp3llm.reporting.record import read_record
from sp3llm.runtime.devices import Execution
from sp3llm.runtime.folders import RECORD
from sp3llm.text.tokenizer import load_tokenizer
from tests.conftest import family_of_model, logits_of, relative_error, save_model, tiny_model
from tests.helpers import QUIET, weights
from tests.recovery.test_recover import write_texts
from tests.runtime.test_ranks import together
from tests.runtime.test_resume import content, finish, learned, run, run_and_die, settings, start

# Whoever asks whether there is a GPU must not wake the driver: what is forked later could not use
# it any more.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# All attention heads and neurons in multiples of what kernels want; tame, as trained models are.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 4096}
# Where they may lie on a device, but for where they lie by themselves on a CPU.
STREAMS = {"cpu": ["disk"], "cuda": ["gpu", "host", "disk"]}
# How much worse a run in bfloat16 may be than one in float32: of the divergence from the dense
# model. Of two shapes that are equally good either may be chosen.
WORSE = 1.05


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A model of bfloat16 weights."""
    folder = tmp_path_factory.mktemp("dense")
    model = tiny_model("llama", torch.float32, **SIZES)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(0.4)
    save_model(model.bfloat16(), folder, tokenizer=True)
    return folder


def options_for(dense: Path, out: Path, device: str, **changes: Any):
    """A short run with the default basis and a search, in bfloat16; on text enough that what is
    fitted hangs on the text, not on how its numbers are rounded, and among shapes so close that
    some are tried.
    """
    changes = {"device": device, "compute_dtype": "bfloat16", "multiple_of": 4, **changes}
    changes = {"samples": 96, "eval_samples": 32, "batch_tokens": 1024, **changes}
    return settings(dense, out, **changes)


@pytest.fixture(scope="module")
def small(dense, device, tmp_path_factory) -> Path:
    """What a run in bfloat16 on the device makes."""
    out = tmp_path_factory.mktemp(f"small-{device}") / "small"
    finish(options_for(dense, out, device))
    return out


@pytest.fixture(scope="module")
def reference(dense, tmp_path_factory) -> Path:
    """What a run in float32 on the CPU makes, written in bfloat16 as the others."""
    out = tmp_path_factory.mktemp("reference") / "small"
    run(options_for(dense, out, "cpu", compute_dtype="float32"))
    return out


def loaded(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    """A model as plain transformers has it, which finds every weight and none too many."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not {key: value for key, value in info.items() if value}
    return model.to(device).eval()


def windows_of(folder: Path) -> Tensor:
    """The text that a run was not fitted on."""
    return held_out_tokens(read_record(folder), folder)


def apart(folder: Path, dense: Path, tokens: Tensor) -> float:
    """How far a model is from the dense one on some text: divergence in float32, nats a token."""
    small, whole = (logits_of(loaded(model), tokens) for model in (folder, dense))
    return divergence(small, whole, 1.0).mean().item()


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RECORD).read_text())


def test_moments_are_those_of_the_cpu_in_float32(dense, device, tokens, tmp_path):
    model = tiny_model("llama", torch.float32)
    checkpoint, family = save_model(model, tmp_path), family_of_model(model)

    def moments(device: str, dtype: torch.dtype) -> Tensor:
        execution = Execution(torch.device(device), dtype)
        measured, _ = measure_dense(
            checkpoint, family, tokens, None, "normalised", "pca", execution
        )
        return measured.total().cpu()

    expected = moments("cpu", torch.float32)
    # A GPU multiplies float32 numbers as sums of two of bfloat16, which keep sixteen bits.
    assert relative_error(moments(device, torch.float32), expected) < 2**-16
    assert relative_error(moments(device, torch.bfloat16), expected) < 2e-2


def test_a_run_is_in_bfloat16_by_the_default_basis_and_searches(small, device):
    record = record_of(small)
    assert record["compute_dtype"] == record["dtype"] == "bfloat16"
    assert record["settings"]["device"].startswith(device)
    assert (record["settings"]["basis"], record["settings"]["allocate"]) == ("gradient", "search")
    assert sum(trial["trial_loss"] is not None for trial in record["trials"]) >= 2
    assert record["plan"]["keep"] <= 0.6
    assert {tensor.dtype for tensor in weights(small).values()} == {torch.bfloat16}


def test_it_is_as_near_to_the_dense_model_as_one_in_float32(small, reference, dense):
    tokens = windows_of(reference)
    assert torch.equal(windows_of(small), tokens)
    found, expected = (apart(folder, dense, tokens) for folder in (small, reference))
    assert 0 < found < WORSE * expected
    records = [record_of(folder) for folder in (small, reference)]
    assert records[0]["dense_perplexity"] == pytest.approx(records[1]["dense_perplexity"], rel=1e-2)
    (found, error), (expected, _) = (
        (excess["mean"], excess["paired_standard_error"])
        for excess in (record["excess_log_perplexity"] for record in records)
    )
    assert abs(found - expected) < 2 * error


def test_stock_transformers_gives_the_perplexity_on_record(small, device):
    tokens = windows_of(small)
    model = loaded(small, torch.bfloat16, device)
    logits = logits_of(model, tokens.to(device)).float()
    assert torch.isfinite(logits).all()
    exact = logits_of(loaded(small), tokens)
    assert relative_error(logits.cpu(), exact) < 2e-2
    losses = torch.nn.functional.cross_entropy(exact[:, :-1].mT, tokens[:, 1:])
    assert losses.exp().item() == pytest.approx(record_of(small)["perplexity"], rel=1e-2)


def test_a_killed_run_continues_to_the_same_bytes(dense, small, device, tmp_path):
    options = options_for(dense, tmp_path / "small", device)
    process = start(run_and_die, options, 41)  # in the refit, which loads what both passes left
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not options.out.exists()
    assert finish(options) == content(small)


def test_where_streams_lie_changes_no_byte(dense, small, device, tmp_path):
    for streams in STREAMS[device]:
        options = options_for(dense, tmp_path / streams / "small", device, streams=streams)
        assert finish(options) == content(small), streams


def test_two_processes_make_as_good_a_model_as_one(dense, device, tmp_path):
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    # A batch of another size is rounded otherwise, by which one of two equal shapes can win.
    shape = {"hidden_size": 40, "intermediate_size": 80, "num_key_value_heads": 2}
    one, two = (
        options_for(dense, tmp_path / name / "small", device, **shape) for name in ("one", "two")
    )
    run(one)
    assert together(2, two) == [0, 0]
    assert record_of(one.out)["plan"] == record_of(two.out)["plan"]
    tokens = windows_of(one.out)
    assert apart(two.out, dense, tokens) == pytest.approx(apart(one.out, dense, tokens), rel=0.02)
    found, expected = (record_of(at.out)["perplexity"] for at in (two, one))
    assert found == pytest.approx(expected, rel=0.02)


def test_a_learned_mask_keeps_to_the_budget_and_beats_a_plain_cut(dense, device, tmp_path):
    changes = learned(tmp_path, mask_steps=20, mask_batch=4, keep=0.8)
    masked, plain = (tmp_path / name / "small" for name in ("masked", "plain"))
    run(options_for(dense, masked, device, **changes))
    cut = {"mask": "closed-form", "refit": False, "allocate": "width"}
    run(options_for(dense, plain, device, **changes | cut))
    record = record_of(masked)
    assert record["mask"]["history"][-1]["step"] == 20
    assert record["plan"]["keep"] <= 0.8
    tokens = windows_of(masked)
    assert apart(masked, dense, tokens) < apart(plain, dense, tokens)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """What accelerate keeps for as long as a process lasts, device and arithmetic, forgotten."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("lora", [None, 4])
def test_a_few_steps_of_recovery_bring_it_nearer(lora, dense, small, device, tmp_path):
    eval_text = write_texts(tmp_path / "eval.jsonl", 20, 2)
    settings = RecoverConfig(
        model=str(small), teacher=str(dense), out=tmp_path / "out",
        train=write_texts(tmp_path / "train.jsonl", 120, 1), eval_text=eval_text,
        steps=8, batch=8, seq_len=32, stop_windows=4, eval_samples=8, lr=3e-3, warmup=0.0,
        check_every=4, lora=lora, teacher_dtype="bfloat16", precision="bfloat16", device=device,
    )  # fmt: skip
    recover(settings, QUIET)
    (entry,) = record_of(tmp_path / "out")["recoveries"]
    assert entry["settings"]["device"].startswith(device)
    assert entry["steps"] == 8
    ids = load_tokenizer(dense).encode(Path(eval_text).read_text())
    tokens = torch.tensor(ids[:256]).view(8, 32)
    assert apart(tmp_path / "out", dense, tokens) < 0.95 * apart(small, dense, tokens)


@pytest.mark.parametrize(("bits", "rounding"), [("int8", 0.02), ("nf4", 0.12)])
def test_few_bits_compute_with_the_weights_nearest_to_all(bits, rounding, dense, device, tmp_path):
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "small"
    # In 64s, which nf4 needs.
    run(options_for(dense, out, device, keep=0.95, hidden_size=64, intermediate_size=64))
    quantize(QuantizeConfig(str(out), bits, out=tmp_path / bits, device=device), QUIET)
    few = AutoModelForCausalLM.from_pretrained(tmp_path / bits, device_map={"": device})
    model, tokens, count = loaded(out), windows_of(out), 0
    for name, module in few.named_modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__.startswith(("Linear4bit", "Linear8bit")):
            rounded = dequantized(weight).float().cpu()
            linear = model.get_submodule(name)
            assert relative_error(rounded, linear.weight.detach()) < rounding, name
            linear.weight = torch.nn.Parameter(rounded)
            count += 1
    assert count == 7 * SIZES["num_hidden_layers"]
    found = logits_of(few, tokens.to(device)).float().cpu()
    # int8 rounds what comes in too.
    assert relative_error(found, logits_of(model, tokens)) < {"int8": 0.05, "nf4": 0.02}[bits]


def dequantized(weight: Any) -> Tensor:
    """The numbers that few bits stand for, by bitsandbytes' definition of them."""
    from bitsandbytes.functional import dequantize_4bit

    if hasattr(weight, "quant_state"):
        return dequantize_4bit(weight.data, weight.quant_state)
    return weight.CB.float() * weight.SCB[:, None].float() / 127
