"""Recovery: exact when resumed, the same on two processes, stock in the end, honest about text."""

import errno
import json
import math
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from sp3llm.cli import main
from sp3llm.compression.projection import Projection
from sp3llm.compression.story import compress
from sp3llm.errors import UserError
from sp3llm.maths.basis import stream_scale
from sp3llm.maths.losses import divergence, stream_error, top_divergence, top_logits
from sp3llm.maths.shuffling import window_order
from sp3llm.models import families
from sp3llm.models.basis_file import BASIS, read_basis, write_basis
from sp3llm.models.checkpoint import check_tensors, open_checkpoint
from sp3llm.models.families import family_of
from sp3llm.models.objectives.causal_lm import CAUSAL_LM
from sp3llm.models.shapes import Shape
from sp3llm.options import CompressConfig, RecoverConfig
from sp3llm.planning.recovery_needs import adapter_parameters, teacher_bytes
from sp3llm.recovery import training
from sp3llm.recovery.checkpoints import locked, work_folder
from sp3llm.recovery.inputs import Pair, open_pair, resolved
from sp3llm.recovery.result import export
from sp3llm.recovery.stored_logits import create_store
from sp3llm.recovery.story import recover
from sp3llm.recovery.student import load_student, peak_lr
from sp3llm.recovery.teacher import StreamTap, load_teacher, offloads_on_cpu
from sp3llm.recovery.texts import draw_texts
from sp3llm.recovery.training import _step
from sp3llm.reporting.record import read_record
from sp3llm.runtime import files
from sp3llm.runtime.folders import RECORD
from sp3llm.text.sources import read_documents, resolve_source
from sp3llm.text.split import content_hash, is_for_stopping, part_of
from sp3llm.text.stdlib import stdlib_documents
from sp3llm.text.tokenizer import load_tokenizer
from sp3llm.vocabulary import same_text
from tests.conftest import (
    family_of_model,
    full_width_projection,
    logits_of,
    project_checkpoint,
    save_model,
    stock_model,
    tiny_model,
)
from tests.helpers import QUIET, weights

STEPS = 6


def write_texts(path: Path, documents: int, seed: int) -> str:
    """A file of nonsense that a model can learn something about: few words, often repeated."""
    draw = random.Random(seed)
    words = [
        "the",
        "stream",
        "holds",
        "what",
        "layers",
        "read",
        "and",
        "write",
        "while",
        "norms",
        "keep",
        "scale",
    ]
    rows = [
        {"text": " ".join(draw.choices(words, k=30)) + f" {seed} {n}."} for n in range(documents)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("text")
    return {
        "train": write_texts(folder / "train.jsonl", 120, 1),
        "eval_text": write_texts(folder / "eval.jsonl", 20, 2),
    }


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, texts):
    """Dense and compressed tiny models by variant, made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def pair(variant: str) -> tuple[Path, Path]:
        if variant not in made:
            folder = tmp_path_factory.mktemp(variant)
            settings = {"vocab_size": 4096, "num_hidden_layers": 2}
            model = tiny_model(variant, torch.float32, **settings)
            with torch.no_grad():  # tame: what a test trains should have something to win
                for parameter in model.parameters():
                    if parameter.ndim >= 2:
                        parameter.mul_(0.3)
            save_model(model, folder / "dense", tokenizer=True)
            keep = {"tie": "keep"} if model.config.tie_word_embeddings else {}
            if variant == "opt":
                keep |= {"head_dim": 8, "word_embed_proj_dim": 40}
            config = CompressConfig(
                model=str(folder / "dense"),
                keep=0.85,
                out=folder / "small",
                calib=texts["train"],
                eval_text=texts["eval_text"],
                samples=8,
                seq_len=32,
                allocate="width",
                **keep,
            )
            compress(config, QUIET)
            made[variant] = folder / "dense", folder / "small"
        return made[variant]

    return pair


@pytest.fixture
def run(pairs, texts, tmp_path):
    """Recover a tiny model; returns what came out."""

    def recovered(variant: str = "llama", out: str = "out", **changes):
        dense, small = pairs(variant)
        settings = RecoverConfig(
            **{
                "model": str(small),
                "teacher": str(dense),
                "out": tmp_path / out,
                **texts,
                "steps": STEPS,
                "batch": 4,
                "micro_batch": 2,
                "seq_len": 16,
                "stop_windows": 4,
                "eval_samples": 2,
                "lr": 1e-2,
                # These models are next to their teachers already: six steps find text to learn.
                "lm_weight": 0.1,
                "warmup": 0.0,
                "check_every": 2,
                "checkpoint_every": 2,
                "device": "cpu",
                **changes,
            }
        )
        return recover(settings, QUIET)

    return recovered


def assert_moved_alike(before, one, other) -> None:
    """What two runs changed is the same, up to what Adam makes of rounding."""
    moved = math.sqrt(sum((one[name] - before[name]).square().sum().item() for name in one))
    apart = math.sqrt(sum((one[name] - other[name]).square().sum().item() for name in one))
    assert moved > 0.1
    assert apart < 1e-2 * moved


# --------------------------------------------------------------------------- exact


@pytest.mark.parametrize(
    "changes",
    [{}, {"lora": 4}, {"lr": None, "lm_weight": 0.0, "warmup": 0.5}],
    ids=["all", "adapters", "default rate"],
)
def test_a_killed_run_continues_and_gives_the_same_bytes(changes, run, tmp_path, monkeypatch):
    whole = run(out="whole", **changes)
    step = _step

    def killed(setup, number):
        if number == 5:  # one step after the checkpoint, which is lost
            raise KeyboardInterrupt
        return step(setup, number)

    monkeypatch.setattr(training, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(out="killed", **changes)
    assert not (tmp_path / "killed").exists()
    work = work_folder(tmp_path / "killed")
    assert (work / "step-000004").is_dir()
    (work / "step-000006.partial").mkdir()  # as a kill while writing would leave it
    taken = []
    monkeypatch.setattr(training, "_step", lambda setup, n: taken.append(n) or step(setup, n))
    again = run(out="killed", **changes)
    assert taken == [4, 5]
    assert not work.exists()
    name = "model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    assert again.state.held_out == whole.state.held_out
    assert again.state.trained == whole.state.trained


def test_checkpoints_of_another_run_are_not_continued(run, monkeypatch, tmp_path):
    step = _step

    def killed(setup, number):
        if number == 3:
            raise KeyboardInterrupt
        return step(setup, number)

    monkeypatch.setattr(training, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run()
    with pytest.raises(UserError, match=r"of another run \(lr 0.01 there, 0.02 here\)"):
        run(lr=2e-2)


def test_two_runs_do_not_share_checkpoints(run, tmp_path):
    with (
        locked(work_folder(tmp_path / "out")),
        pytest.raises(UserError, match="Another sp3llm run holds"),
    ):
        run()


def test_a_full_disk_is_said_in_one_sentence(run, pairs, tmp_path, monkeypatch):
    pairs("llama")  # made on a disk with room

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "flush", full)
    with pytest.raises(UserError, match="free some disk space"):
        run()
    assert not (tmp_path / "out").exists()


def test_a_run_can_be_followed(run, tmp_path):
    pytest.importorskip("tensorboard")
    run(track="tensorboard", steps=2)
    assert list((tmp_path / "out.logs").rglob("events.*"))


def in_two_processes(pairs, texts, out, **options):
    """`sp3llm recover` under torchrun; the finished process."""
    dense, small = pairs("llama")
    words = ["--out", out, "--train", texts["train"], "--eval-text", texts["eval_text"]]
    settings = {
        "batch": 4,
        "micro-batch": 2,
        "seq-len": 16,
        "eval-samples": 2,
        "lr": 3e-3,
        "warmup": 0,
        "check-every": 2,
        "checkpoint-every": 2,
        "device": "cpu",
        **options,
    }
    for name, value in settings.items():
        words += [f"--{name}", value]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "sp3llm.recover"]
    launch += [str(small), "--teacher", str(dense), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        launch, capture_output=True, text=True, env=environment, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads((out / RECORD).read_text())["recoveries"][-1]


def test_two_processes_train_what_one_does_with_twice_as_many_windows(run, pairs, texts, tmp_path):
    run(out="one", steps=3, lr=3e-3)
    _, small = pairs("llama")
    options = {"steps": 3, "stop-windows": 4, "lm-weight": 0.1}
    record = in_two_processes(pairs, texts, tmp_path / "two", **options)
    assert record["processes"] == 2
    assert_moved_alike(weights(small), weights(tmp_path / "one"), weights(tmp_path / "two"))


@pytest.mark.parametrize("stop_windows", [1, 3])
def test_windows_that_do_not_divide_among_processes_hang_none(stop_windows, pairs, texts, tmp_path):
    """A process without a window to be judged on takes part in every reduction all the same."""
    options = {"steps": 2, "stop-windows": stop_windows, "micro-batch": 1}
    record = in_two_processes(pairs, texts, tmp_path / "out", **options)
    assert record["stopping"]["samples"] == stop_windows
    assert len(record["held_out_losses"]) == 2


@pytest.mark.parametrize("windows", [5, 16])
def test_every_epoch_goes_through_all_windows_whatever_the_batch(windows):
    whole = window_order(windows, 3, 0, 3 * windows)
    for epoch in whole.chunk(3):
        assert epoch.sort().values.tolist() == list(range(windows))
    pieces = [window_order(windows, 3, first, 3) for first in range(0, 3 * windows, 3)]
    assert torch.equal(torch.cat(pieces), whole)
    assert not torch.equal(window_order(windows, 4, 0, windows), whole[:windows])


def test_gradient_checkpointing_changes_nothing(run, tmp_path):
    run(out="kept", steps=2, hidden_weight=0.5)
    run(out="again", steps=2, hidden_weight=0.5, gradient_checkpointing=True)
    kept, again = weights(tmp_path / "kept"), weights(tmp_path / "again")
    assert all(torch.allclose(kept[name], again[name], atol=1e-6) for name in kept)


# --------------------------------------------------------------------------- stock, and better


@pytest.mark.parametrize("lora", [None, 4])
@pytest.mark.parametrize("variant", ["llama", "llama-tied", "opt", "gpt-neox", "mixtral"])
def test_output_is_stock_and_nearer_to_the_teacher(variant, lora, run, pairs, tmp_path):
    result = run(variant, lora=lora)
    out, small = tmp_path / "out", pairs(variant)[1]
    assert result.state.best_step > 0
    assert result.state.best_loss < result.state.held_out[0][1]
    found = open_checkpoint(out)
    check_tensors(found, family_of(found.config))
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (small / "config.json").read_text()
    )
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    if model.config.tie_word_embeddings:
        assert "lm_head.weight" not in found.files
    changed = [
        name for name, tensor in weights(out).items() if not tensor.equal(weights(small)[name])
    ]
    assert changed
    record = json.loads((out / RECORD).read_text())
    assert record["plan"] == json.loads((small / RECORD).read_text())["plan"]
    (entry,) = record["recoveries"]
    assert entry["excess_log_perplexity"]["mean"] == result.excess.mean
    assert (out / BASIS).read_bytes() == (small / BASIS).read_bytes()
    card = ModelCard.load(out / "README.md")
    assert "## Recovered" in card.text
    assert [result.metric_value for result in card.data.eval_results] == [entry["perplexity"]]


def test_a_model_that_was_not_compressed_gets_a_card_too(pairs, run, tmp_path):
    model = shutil.copytree(pairs("llama")[1], tmp_path / "model")
    (model / RECORD).unlink()
    (model / "README.md").write_text("---\nlicense: mit\n---\n# mine\n")
    first = run(model=str(model), steps=2)
    second = run(model=str(tmp_path / "out"), out="again", steps=2)
    for folder, result, sections in (("out", first, 1), ("again", second, 2)):
        card = ModelCard.load(tmp_path / folder / "README.md")
        assert card.text.count("## Recovered") == sections
        assert card.data.license == "mit"
        assert "base_model" not in card.data.to_dict()  # a folder is no hub id
        assert [r.metric_value for r in card.data.eval_results] == [result.perplexity]


def test_merged_adapters_compute_what_unmerged_ones_did(pairs, run, tmp_path, tokens):
    dense, small = pairs("llama-tied")
    settings = RecoverConfig(str(small), str(dense), lora=4)
    pair = open_pair(settings, QUIET)
    model, names = load_student(settings, pair, torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.normal_(std=0.2)
    best = {name: t.clone() for name, t in model.state_dict().items() if name in names}
    written = export(settings, pair, best, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(dict(written.config)))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = logits_of(AutoModelForCausalLM.from_pretrained(small), tokens)
    assert (logits_of(model, tokens) - before).abs().max() > 0.1
    assert torch.allclose(logits_of(merged, tokens), logits_of(model, tokens), atol=1e-4)


def test_weights_stay_where_no_step_is_better(run, pairs, tmp_path):
    result = run(lr=3.0, patience=1)
    assert result.state.stopped
    assert result.state.step < STEPS
    assert result.state.best_step == 0
    before, after = weights(pairs("llama")[1]), weights(tmp_path / "out")
    assert all(tensor.equal(before[name]) for name, tensor in after.items())


def test_bfloat16_autocast_trains_float32_weights(run, tmp_path):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    try:
        result = run(precision="bfloat16")
    finally:
        AcceleratorState._reset_state()
    assert result.state.best_loss < result.state.held_out[0][1]


def test_compress_can_recover_right_away(pairs, texts, tmp_path, capsys):
    dense, _ = pairs("llama")
    out = tmp_path / "small"
    words = [str(dense), "--keep", "0.85", "--out", str(out), "--calib", texts["train"]]
    words += ["--eval-text", texts["eval_text"], "--samples", "8", "--seq-len", "32"]
    words += ["--allocate", "width", "--recover-steps", "1", "--device", "cpu"]
    main(["compress", *words])
    record = json.loads((out / RECORD).read_text())
    assert record["settings"]["recover_steps"] == 1
    assert record["recoveries"][0]["steps"] == 1
    assert not work_folder(out).exists()


def test_a_kill_while_compress_recovers_costs_the_recovery_only(
    pairs, texts, tmp_path, monkeypatch, capsys
):
    dense, _ = pairs("llama")

    def words(out):
        found = [str(dense), "--keep", "0.85", "--out", str(out), "--calib", texts["train"]]
        found += ["--eval-text", texts["eval_text"], "--samples", "8", "--seq-len", "32"]
        return ["compress", *found, "--allocate", "width", "--recover-steps", "4"]

    main(words(tmp_path / "whole"))
    step = _step

    def killed(setup, number):
        if number == 2:
            raise KeyboardInterrupt
        return step(setup, number)

    with monkeypatch.context() as patched:
        patched.setattr(training, "_step", killed)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            main(words(tmp_path / "killed"))
    capsys.readouterr()
    main(words(tmp_path / "killed"))
    said = " ".join(capsys.readouterr().out.split())
    assert "is compressed; going on with its recovery. " in said
    assert "second moments" not in said
    for name in ("model.safetensors", "config.json"):
        expected = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "killed" / name).read_bytes() == expected
    assert json.loads((tmp_path / "killed" / RECORD).read_text())["recoveries"][0]["steps"] == 4


def test_a_recovery_that_fails_leaves_what_was_compressed(pairs, tmp_path, capsys):
    dense, _ = pairs("llama")
    text = write_texts(tmp_path / "short.jsonl", 4, 5)  # none of it is kept for stopping
    words = [str(dense), "--keep", "0.85", "--out", str(tmp_path / "small"), "--calib", text]
    words += ["--eval-text", write_texts(tmp_path / "eval.jsonl", 4, 6), "--samples", "2"]
    words += ["--seq-len", "32", "--allocate", "width", "--recover-steps", "1"]
    with pytest.raises(SystemExit) as end:
        main(["compress", *words])
    assert end.value.code == 2
    assert "stands, but its recovery" in capsys.readouterr().err
    AutoModelForCausalLM.from_pretrained(tmp_path / "small")


# --------------------------------------------------------------------------- teachers


def test_all_logits_kept_teach_what_the_whole_teacher_does():
    student, teacher = torch.randn(2, 3, 7, 50, generator=torch.Generator().manual_seed(0))
    for temperature in (1.0, 2.5):
        whole = divergence(student, teacher, temperature)
        every = top_divergence(student, top_logits(teacher, 50, temperature), temperature)
        assert torch.allclose(every, whole, atol=1e-6)
        some = [
            top_divergence(student, top_logits(teacher, k, temperature), temperature)
            for k in (1, 5, 20, 49)
        ]
        assert some == sorted(some)
        assert some[-1] <= whole + 1e-6


def test_stored_logits_of_all_tokens_train_like_the_teacher(run, pairs, tmp_path, monkeypatch):
    run(out="live")
    run(out="stored", teacher_logits=tmp_path / "logits", top_k=4096)
    live, stored = weights(tmp_path / "live"), weights(tmp_path / "stored")
    assert_moved_alike(weights(pairs("llama")[1]), live, stored)
    monkeypatch.setattr(
        "sp3llm.recovery.teacher.load_teacher", lambda *_: pytest.fail("loaded again")
    )
    run(out="again", teacher_logits=tmp_path / "logits", top_k=4096)
    again = weights(tmp_path / "again")
    assert all(tensor.equal(stored[name]) for name, tensor in again.items())
    with pytest.raises(UserError, match="of another run"):
        run(out="other", teacher_logits=tmp_path / "logits", top_k=8)
    (tmp_path / "logits" / "ids.npy").write_bytes(b"torn")
    with pytest.raises(UserError, match="are damaged"):
        run(out="torn", teacher_logits=tmp_path / "logits", top_k=4096)


def test_where_stored_logits_go_first_nothing_else_is_removed(tmp_path):
    folder = tmp_path / "logits.partial"
    folder.mkdir()
    (folder / "precious").touch()
    with pytest.raises(UserError, match="found something else"):
        create_store(tmp_path / "logits", {"top_k": 2}, 3, 8)
    assert (folder / "precious").exists()
    (folder / "precious").rename(folder / "ids.npy")  # as a run before has left it
    create_store(tmp_path / "logits", {"top_k": 2}, 3, 8)
    assert (folder / "log_rest.npy").exists()


def test_a_disk_without_room_for_stored_logits_is_told_at_once(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"Cannot write to .*No space left"):
        create_store(tmp_path / "logits", {"top_k": 2}, 3, 8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "nf4"])
def test_a_teacher_in_fewer_bits_teaches_too(dtype, run):
    if dtype != "bfloat16":
        pytest.importorskip("bitsandbytes")
    result = run(teacher_dtype=dtype)
    assert result.state.best_loss < result.state.held_out[0][1]


def test_an_offload_that_these_libraries_cannot_do_is_refused(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr("sp3llm.recovery.teacher.offloads_on_cpu", lambda: False)
    with pytest.raises(UserError, match=r"needs accelerate 1\.15 and transformers 5\.14"):
        load_teacher(pairs("llama")[0], CAUSAL_LM, "auto", torch.device("cpu"), 1.0, tmp_path)


@pytest.mark.skipif(not offloads_on_cpu(), reason="accelerate or transformers is too old")
def test_an_offloaded_teacher_says_the_same(pairs, tokens, tmp_path):
    dense, _ = pairs("llama")
    cpu = torch.device("cpu")
    here = load_teacher(dense, CAUSAL_LM, "auto", cpu, None, tmp_path / "none")
    size = sum(p.numel() * p.element_size() for p in here.parameters())
    away = load_teacher(dense, CAUSAL_LM, "auto", cpu, 0.6 * size / 1e9, tmp_path / "offload")
    assert any(parameter.device.type == "meta" for parameter in away.parameters())
    assert torch.equal(logits_of(here, tokens), logits_of(away, tokens))


@pytest.mark.parametrize("variant", ["llama", "gemma-untied", "granite", "opt", "gpt-neox"])
def test_at_full_width_the_stream_is_the_dense_one_through_the_basis(variant, tmp_path, tokens):
    dense = tiny_model(variant)
    checkpoint = save_model(dense, tmp_path)
    family = family_of_model(dense)
    projection = full_width_projection(
        checkpoint, family, Shape.of(family, checkpoint.config), rotate=True
    )
    if projection.embedding_EJ is not None:  # a table as wide as the stream has no projections
        projection = Projection(projection.basis_DK)
    tensors = project_checkpoint(checkpoint, family, projection)
    config = dict(checkpoint.config) | {"tie_word_embeddings": False}
    if "lm_head.weight" not in tensors and "embed_out.weight" not in tensors:
        tensors["lm_head.weight"] = torch.zeros(96, 48).double()
    small = stock_model(config, tensors, exact=False)
    taps = [StreamTap(m, family.layers_module, family.final_norm) for m in (small, dense)]
    for model in (small, dense):
        logits_of(model, tokens)
    streams = [tap.take() for tap in taps]
    assert len(streams[0]) == 4
    target = (stream_scale(projection.basis_DK) * projection.basis_DK).float()
    assert stream_error(*streams, target) < 1e-8


def test_hidden_states_alone_can_teach(run, pairs, tmp_path):
    model = shutil.copytree(pairs("llama")[1], tmp_path / "model")
    off = {name: 1.1 * tensor for name, tensor in weights(model).items()}
    save_file(off, model / "model.safetensors", metadata={"format": "pt"})
    result = run(model=str(model), kl_weight=0.0, lm_weight=0.0, hidden_weight=1.0, lr=3e-3)
    assert result.state.best_loss < 0.9 * result.state.held_out[0][1]


# --------------------------------------------------------------------------- text


def test_the_three_texts_share_no_document(run, texts):
    result = run(train=f"{texts['train']},{texts['eval_text']}", steps=60, patience=1, lr=3.0)
    training_set, stopping, evaluation = result.training, result.stopping, result.held_out.windows
    assert not training_set.documents & stopping.documents
    assert not training_set.documents & evaluation.documents
    assert not stopping.documents & evaluation.documents
    assert training_set.dropped_documents == len(evaluation.documents)


def test_what_was_calibrated_on_is_not_reported_on(run, texts):
    result = run(eval_text=texts["train"], steps=1, eval_samples=90)
    assert result.held_out.windows.dropped_documents > 0
    assert not result.training.documents & result.held_out.windows.documents


def test_documents_of_the_calibration_text_are_left_out_of_another_file_too(run, texts, tmp_path):
    both = tmp_path / "both.jsonl"
    both.write_text("".join(Path(texts[name]).read_text() for name in ("train", "eval_text")))
    result = run(eval_text=str(both), steps=1, eval_samples=90)
    calibrated = run(eval_text=texts["train"], steps=1, eval_samples=90, out="same")
    assert result.held_out.windows.dropped_documents > 0
    dropped = calibrated.held_out.windows.dropped_documents
    assert result.held_out.windows.dropped_documents == dropped


def drawn(pairs, texts):
    """The three texts of a recovery of the tiny Llama, and the documents it was calibrated on."""
    dense, small = pairs("llama")
    settings = RecoverConfig(str(small), str(dense), seq_len=16, **texts)
    pair = open_pair(settings, QUIET)
    windows = CAUSAL_LM.calibration_windows(
        *(texts["train"], load_tokenizer(small), 8, 32, pair.compression.settings["seed"])
    )
    return draw_texts(resolved(settings, pair.objective), pair), windows.documents


def calibrate_on_all(monkeypatch, texts) -> None:
    """Make believe that every training document was calibrated on."""
    documents = read_documents(resolve_source(texts["train"]), "train")
    every = frozenset(map(content_hash, documents))
    monkeypatch.setattr(same_text, "calibrated_documents", lambda *_, **__: every)


def test_what_decides_when_to_stop_was_not_calibrated_on_where_there_is_enough(
    pairs, texts, monkeypatch
):
    found, calibrated = drawn(pairs, texts)
    stopping = found.stopping.documents
    assert stopping.isdisjoint(calibrated)
    assert not found.stopping_is_fitted
    # Of a set whose every document was calibrated on there is nothing else.
    calibrate_on_all(monkeypatch, texts)
    fitted, _ = drawn(pairs, texts)
    assert fitted.stopping_is_fitted
    assert len(fitted.stopping.tokens) >= len(found.stopping.tokens)
    assert fitted.stopping.documents.isdisjoint(fitted.training.documents)


def test_a_start_that_was_fitted_to_the_text_is_not_the_best(run, texts, monkeypatch):
    harmful = {"lr": 1.0, "patience": 9}
    assert run(**harmful, out="fair").state.best_step == 0
    calibrate_on_all(monkeypatch, texts)
    state = run(**harmful).state
    later = [loss for step, loss in state.held_out if step > 0]
    assert state.held_out[0][0] == 0
    assert state.held_out[0][1] < state.best_loss == min(later)
    assert state.best_step > 0


def test_a_calibration_text_that_is_gone_is_told(pairs, texts, tmp_path):
    dense, small = pairs("llama")
    copied = shutil.copytree(small, tmp_path / "small")
    record = json.loads((copied / RECORD).read_text())
    record["calibration"]["sources"] = [str(tmp_path / "gone.txt")]
    (copied / RECORD).write_text(json.dumps(record))
    settings = RecoverConfig(str(copied), str(dense), train=texts["train"], out=tmp_path / "out")
    pair = open_pair(settings, QUIET)
    found = draw_texts(replace(resolved(settings, pair.objective), seq_len=16), pair)
    assert "gone.txt) is not at hand" in found.note
    assert found.held_out.windows.dropped_documents == 0


def test_stdlib_is_trained_on_its_training_part_only():
    documents = stdlib_documents()
    source = resolve_source("stdlib")
    trained = set(read_documents(source, "train"))
    assert all(part_of(document) == "train" for document in trained)
    kept = sum(map(is_for_stopping, documents)) / len(documents)
    assert abs(kept - 1 / 16) < 0.02


# --------------------------------------------------------------------------- needs


@pytest.mark.parametrize("variant", ["llama", "opt-projected", "phi3", "gpt-neox", "mixtral"])
def test_adapters_are_counted_as_peft_makes_them(variant, tmp_path):
    model = tiny_model(variant, torch.float32)
    checkpoint = save_model(model, tmp_path)
    family = family_of_model(model)
    pair = Pair(checkpoint, family, "", None, checkpoint, family, "")
    settings = RecoverConfig(str(tmp_path), lora=4)
    adapted, names = load_student(settings, pair, torch.float32)
    trained = sum(p.numel() for name, p in adapted.named_parameters() if name in names)
    assert trained == adapter_parameters(family, checkpoint.config, 4)


def test_a_teacher_in_four_bits_weighs_what_was_said(tmp_path):
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 256, "intermediate_size": 512}
    model = tiny_model("llama", torch.bfloat16, **sizes)
    checkpoint = save_model(model, tmp_path)
    found = load_teacher(tmp_path, CAUSAL_LM, "nf4", torch.device("cpu"), None, tmp_path)
    layer = found.model.layers[0].mlp.up_proj.weight
    state = layer.quant_state
    size = layer.numel() + state.absmax.numel() * state.absmax.element_size()
    assert size == pytest.approx(256 * 512 * 0.5625, rel=1e-3)
    whole = teacher_bytes(family_of_model(model), checkpoint.config, "auto", 2)
    low = teacher_bytes(family_of_model(model), checkpoint.config, "nf4", 2)
    assert whole / 4 < low < whole / 3


LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
}


def test_llama_2_7b_recovers_on_one_card_of_24_gb(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))
    words = ["plan", str(tmp_path), "--keep", "0.75", "--json", "--recover", "--lora", "16"]
    main([*words, "--teacher-dtype", "nf4", "--gradient-checkpointing"])
    needs = json.loads(capsys.readouterr().out)["recovery_needs"]
    parts = sum(value for key, value in needs.items() if key != "total")
    assert parts < needs["total"] < 24e9
    main([*words[:-2], "--teacher-dtype", "bfloat16"])
    assert json.loads(capsys.readouterr().out)["recovery_needs"]["total"] > 100e9


# --------------------------------------------------------------------------- refusals


@pytest.fixture
def recovery_refused(pairs, texts, tmp_path, refused):
    """Run the command, expect one sentence and no output; returns it."""

    def refuse(*options, model=None, teacher=True) -> str:
        dense, small = pairs("llama")
        words = ["recover", str(model or small), "--out", str(tmp_path / "out"), "--device", "cpu"]
        words += ["--seq-len", "16", "--steps", "2", "--batch", "4", "--stop-windows", "2"]
        words += ["--train", texts["train"], "--eval-text", texts["eval_text"]]
        words += ["--teacher", str(dense)] if teacher else []
        error = refused(*words, *options)
        assert not (tmp_path / "out").exists()
        assert not work_folder(tmp_path / "out").exists()
        return error

    return refuse


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--steps", "0"], "--steps of at least 1"),
        (["--lr", "-1"], "--lr above 0"),
        (["--lr", "1e300"], "--lr of at most 1000"),
        (["--temperature", "1e300"], "--temperature of at most 10000"),
        (["--teacher-memory", "1e300"], "--teacher-memory of at most 1000000"),
        (["--seed", "-1"], "--seed of at least 0"),
        (["--warmup", "1"], "--warmup between 0 and 1"),
        (["--teacher-dtype", "int3"], "--teacher-dtype to be one of auto"),
        (["--kl-weight", "0", "--lm-weight", "0"], "something to learn from"),
        (["--lora-alpha", "8"], "--lora with --lora-alpha"),
        (["--hidden-weight", "1", "--teacher-logits", "x"], "holds no hidden states"),
        (["--device", "tpu"], "--device auto, cuda or cpu"),
        (["--device", "cuda"], "Expected a GPU"),
        (["--track", "banana"], "--track to be one of tensorboard, wandb"),
        (["--micro-batch", "3"], "--micro-batch to divide"),
        (["--seq-len", "5000"], "--seq-len of at most"),
        (["--teacher-logits", "x", "--top-k", "5000"], "--top-k of at most the vocabulary's 4096"),
        (["--teacher", "no-such-folder"], "no folder here"),
        (["--train", "no-such.jsonl"], "does not exist"),
    ],
)
def test_bad_settings_get_one_sentence(options, expected, recovery_refused, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if options == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is one")
    assert expected in recovery_refused(*options)


def test_a_loss_that_is_no_number_is_refused(recovery_refused, monkeypatch):
    monkeypatch.setattr(training, "_loss", lambda *_: torch.tensor(math.nan))
    assert "Expected a finite loss at step 0" in recovery_refused()


def test_a_teacher_of_another_vocabulary_is_refused(recovery_refused, tmp_path):
    save_model(tiny_model("llama"), tmp_path / "other", tokenizer=True)
    assert "a teacher with the vocabulary of" in recovery_refused("--teacher", tmp_path / "other")


def test_without_a_record_the_teacher_must_be_named(recovery_refused, pairs, tmp_path):
    model = shutil.copytree(pairs("llama")[1], tmp_path / "model")
    (model / RECORD).unlink()
    assert "Expected --teacher for 'model'" in recovery_refused(model=model, teacher=False)


def test_hidden_states_need_the_basis_of_this_model(recovery_refused, pairs, tmp_path):
    model = shutil.copytree(pairs("llama")[1], tmp_path / "model")
    write_basis(model, read_basis(model)[:, 1:])
    assert "Expected a basis of" in recovery_refused("--hidden-weight", 1, model=model)
    (model / BASIS).unlink()
    assert "compress the model again" in recovery_refused("--hidden-weight", 1, model=model)


def test_hidden_states_need_as_many_layers_as_the_teacher(recovery_refused, tmp_path):
    deeper = tiny_model("llama", vocab_size=4096)
    save_model(deeper, tmp_path / "other", tokenizer=True)
    options = ("--hidden-weight", 1, "--teacher", tmp_path / "other")
    assert "as many layers as the teacher's 3" in recovery_refused(*options)


def test_text_too_short_to_stop_by_is_refused(recovery_refused, tmp_path):
    text = write_texts(tmp_path / "short.jsonl", 3, 5)
    assert "--stop-text" in recovery_refused("--train", text)


def test_too_short_a_text_to_stop_by_is_the_one_that_is_named(recovery_refused, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("a few words")
    said = recovery_refused("--stop-text", text)
    assert f"in the text of --stop-text '{text}'" in said
    assert "of the evaluation and the training text were dropped" in said


def test_an_output_that_is_not_ours_is_left_alone(pairs, texts, tmp_path, run):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="was not written by sp3llm"):
        run()
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_options_of_a_recovery_without_one_are_refused(refused):
    assert "Expected --recover" in refused("plan", "--lora", "4")


@pytest.mark.parametrize(
    ("changes", "start", "share"),
    [
        ({}, 0.5, 1.0),
        ({}, 0.03, 0.15),
        ({}, 0.15, 0.25),
        ({"kl_weight": 2.0}, 0.3, 0.25),
        ({}, 0.0, 0.15),
        ({"lora": 2}, 0.15, 1.25),
        ({"lm_weight": 0.1}, 0.03, 1.0),
        ({"hidden_weight": 0.1}, 0.03, 1.0),
    ],
)
def test_the_rate_follows_how_far_the_model_is_from_its_teacher(changes, start, share, pairs):
    dense, small = pairs("llama")
    config = RecoverConfig(str(small), str(dense), **changes)
    pair, settings = open_pair(config, QUIET), resolved(config, CAUSAL_LM)
    width = families.axis_sizes(pair.family, pair.small.config)[families.RESIDUAL]
    assert peak_lr(settings, pair, start, 2048) == pytest.approx(share * 0.06 / width)
    assert peak_lr(settings, pair, start / 16, 16 * 2048) == pytest.approx(share * 0.06 / width)
    assert peak_lr(replace(settings, lr=0.07), pair, start, 2048) == 0.07


def test_a_run_takes_the_rate_that_its_record_names(run, tmp_path, monkeypatch):
    rates, step = [], _step

    def taken(setup, number):
        rates.append(setup.optimizer.param_groups[0]["lr"])
        return step(setup, number)

    monkeypatch.setattr(training, "_step", taken)
    found = run(lr=None, lm_weight=0.0, warmup=0.5)
    entry = read_record(tmp_path / "out").recoveries[-1]
    assert max(rates) == rates[3] == entry.settings["lr"]
    assert rates[0] == pytest.approx(entry.settings["lr"] / 4)
    assert 0 < found.state.held_out[0][1] < 0.3
