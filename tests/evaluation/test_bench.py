"""`sp3llm bench`: what is counted is what is run, and every figure is of the right thing."""

import json

import pytest
import torch
from rich.console import Console

from sp3llm.evaluation import speed, speed_run
from sp3llm.evaluation.speed import bench, work_of
from sp3llm.evaluation.speed_figures import Spread
from sp3llm.evaluation.speed_run import load, peak_memory, run_pass, runner_of
from sp3llm.models.families import FAMILIES
from sp3llm.options import BenchConfig
from tests.conftest import save_model, tiny_model
from tests.helpers import CPU


@pytest.fixture
def pair(tmp_path):
    """A tiny model and one of half its FFN, on disk."""
    for name, width in (("dense", 80), ("small", 40)):
        save_model(tiny_model("llama", torch.float32, intermediate_size=width), tmp_path / name)
    return str(tmp_path / "small"), str(tmp_path / "dense")


def bench_tiny(pair, **settings):
    chosen = {"batch_sizes": (2,), "prompt_lengths": (8,), "new_tokens": 3, "repeats": 2}
    return bench(BenchConfig(*pair, **{**chosen, **settings}), Console(quiet=True))


def test_record_holds_both_models_over_every_shape(pair, tmp_path):
    output = tmp_path / "new" / "bench.json"
    record = bench_tiny(pair, batch_sizes=(1, 2), prompt_lengths=(4, 8), output=output)
    assert json.loads(output.read_text()) == json.loads(json.dumps(record))
    shapes = [(cell["batch_size"], cell["prompt_length"]) for cell in record["cells"]]
    assert shapes == [(1, 4), (1, 8), (2, 4), (2, 8)]
    for cell in record["cells"]:
        for name in ("dense", "small"):
            figures = [v for v in cell[name].values() if isinstance(v, dict)]
            assert len(figures) == 3
            assert all(0 < f["low"] <= f["median"] <= f["high"] for f in figures)
        for name in ("prefill", "decode"):
            found = cell[name]
            assert found["promised"] > 1
            assert found["realised"] == found["measured"]["median"] / found["promised"]
    assert output.with_suffix(".md").read_text().count("prefill") == 4 + 1
    weights = record["weights"]
    assert weights["dense"]["parameters"] - weights["small"]["parameters"] == 3 * 3 * 40 * 48


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "qwen3", "opt", "gpt-neox"])
@torch.no_grad()
def test_flops_are_those_that_torch_counts(variant):
    model = tiny_model(variant, torch.float32, attn_implementation="eager")
    config = model.config.to_dict()
    batch, prompt = 2, 16
    ids = torch.randint(96, (batch, prompt))
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    family = FAMILIES[model.config.model_type]
    counted = work_of(family, config, batch, prompt, 4, 4).prefill_flops
    # Eager attention computes the half above the diagonal too.
    heads = model.config.num_attention_heads
    head_dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // heads
    layers = model.config.num_hidden_layers
    masked = batch * prompt * 4 * layers * heads * head_dim * (prompt - (prompt + 1) // 2)
    rotary = counter.get_total_flops() - counted - masked
    assert 0 <= rotary < 0.01 * counted  # the angles are a product of matrices too


def test_decoding_reads_matrices_once_and_the_cache_of_every_sequence():
    model = tiny_model("llama", torch.float32)
    family, config = FAMILIES["llama"], model.config.to_dict()
    one, three = (work_of(family, config, batch, 10, 4, 4).decode_bytes for batch in (1, 3))
    groups, head_dim, layers = 2, 12, 3
    cache = 2 * layers * groups * head_dim * 4 * (10 + 2)
    assert three - one == 2 * cache
    read = [p for n, p in model.named_parameters() if p.ndim > 1 and "embed_tokens" not in n]
    assert one == sum(p.nbytes for p in read) + cache


def test_peak_memory_grows_with_the_cache(pair):
    subject = load(pair[0], "float32", CPU)
    peaks = []
    for length in (16, 48):
        prompt = torch.randint(96, (4, length))
        peaks.append(peak_memory(runner_of(subject, prompt, 4, compiled=False)))
    assert subject.weight_bytes < peaks[0]
    cache_of_32_tokens = 2 * 3 * 2 * 12 * 4 * 4 * 32
    assert peaks[1] - peaks[0] >= cache_of_32_tokens


def test_generation_is_that_of_transformers(pair, monkeypatch):
    subject = load(pair[0], "float32", CPU)
    prompt = torch.randint(96, (2, 8), generator=torch.Generator().manual_seed(1))
    runner = runner_of(subject, prompt, 5, compiled=False)
    chosen = []
    step = speed_run.next_tokens
    monkeypatch.setattr(
        speed_run, "next_tokens", lambda *given: chosen.append(step(*given)) or chosen[-1]
    )
    run_pass(runner)
    expected = subject.model.generate(
        prompt, min_new_tokens=5, max_new_tokens=5, do_sample=False, pad_token_id=2,
        eos_token_id=None,
    )  # fmt: skip
    assert torch.equal(torch.cat(chosen, 1), expected[:, 8:])


def test_models_take_turns_and_neither_is_always_first(pair, monkeypatch):
    order = []
    monkeypatch.setattr(
        speed, "run_pass", lambda runner: order.append(runner.subject.name) or run_pass(runner)
    )
    bench_tiny(pair, repeats=4)
    assert order[2:10] == ["dense", "small", "small", "dense"] * 2  # after a warm-up of each


def test_spread_is_the_quartiles():
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_unknown_family_is_measured_without_a_promise(pair, monkeypatch):
    from sp3llm.errors import UserError
    from sp3llm.models import families

    def refuse(config):
        raise UserError("unknown")

    monkeypatch.setattr(families, "family_of", refuse)
    (cell,) = bench_tiny(pair)["cells"]
    assert cell["prefill"]["promised"] is None
    assert cell["prefill"]["realised"] is None
    assert cell["prefill"]["measured"]["median"] > 0


@pytest.mark.parametrize(
    "words",
    [
        ["--batch-sizes", "0"],
        ["--new-tokens", "1"],
        ["--prompt-lengths", "4000"],
        ["--dtype", "int3"],
        ["--device", "abacus"],
        ["--output", "table.txt"],
        ["--against", "no/such-model/here"],
    ],
)
def test_bad_input_gets_one_sentence(words, pair, refused):
    refused("bench", pair[0], "--against", pair[1], *words)


@pytest.mark.parametrize("name", ["config.json", "README.json", "folder.json", "x" * 300 + ".json"])
def test_figures_take_the_place_of_no_other_file(name, pair, refused, tmp_path):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / "config.json").write_text("{}")
    before = {path.name for path in tmp_path.iterdir()}
    refused("bench", pair[0], "--against", pair[1], "--output", tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert (tmp_path / "config.json").read_text() == "{}"


@pytest.mark.slow
def test_compiled_models_generate_the_same(pair, monkeypatch):
    subject = load(pair[0], "float32", CPU)
    prompt = torch.randint(96, (2, 8), generator=torch.Generator().manual_seed(1))
    chosen: list[torch.Tensor] = []
    step = speed_run.next_tokens
    monkeypatch.setattr(
        speed_run, "next_tokens", lambda *given: chosen.append(step(*given)) or chosen[-1]
    )
    generated = []
    for compiled in (False, True):
        runner = runner_of(subject, prompt, 5, compiled)
        run_pass(runner)
        run_pass(runner)
        generated.append(torch.cat(chosen[-5:], 1))
    assert torch.equal(*generated)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_gpu_is_measured_by_its_own_clock_and_memory(pair, compiled):
    record = bench_tiny(pair, device="cuda", compile=compiled)
    (cell,) = record["cells"]
    assert cell["prefill"]["measured"]["median"] > 0
    for name in ("dense", "small"):
        first, prefill = cell[name]["first_token_seconds"], cell[name]["prefill_tokens_per_second"]
        assert first["median"] >= 2 * 8 / prefill["high"]
        peak = cell[name]["peak_memory_bytes"]
        assert peak is None if compiled else peak > record["weights"][name]["memory_bytes"]
