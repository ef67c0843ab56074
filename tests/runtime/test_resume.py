"""A killed run continues to the same bytes; whatever is torn is found; disk streams are streams."""

import errno
import io
import json
import multiprocessing
import os
import random
import re
import signal
import string
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from sp3llm.compression import head_fit, measuring
from sp3llm.compression.story import compress
from sp3llm.errors import ResumableError, UserError
from sp3llm.models import export, stream
from sp3llm.options import CompressConfig
from sp3llm.runtime import journal
from sp3llm.runtime.files import file_hash, read_tensors, write_tensors
from sp3llm.runtime.folders import RECORD
from sp3llm.runtime.journal import MANIFEST, Journal, _Clock, open_journal
from sp3llm.runtime.memory import is_out_of_memory
from sp3llm.runtime.processes import Ranks
from tests.conftest import save_model, tiny_model

# A server that has everything imported and computed nothing; its children are the runs.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["tests.runtime.test_resume", "transformers.models.llama.modeling_llama"]
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    model = tiny_model("llama", torch.float32, vocab_size=4096, num_hidden_layers=4)
    save_model(model, folder, tokenizer=True)
    return folder


def settings(dense: Path, out: Path, **changes: Any) -> CompressConfig:
    """A short run on texts that lie beside the model."""
    words = random.Random(0)
    calib, eval_text = (str(dense.with_name(name)) for name in ("fit.txt", "held-out.txt"))
    for name in (calib, eval_text):
        text = " ".join(words.choice(string.ascii_lowercase) * 3 for _ in range(2000))
        Path(name).write_text(text)
    base = {"keep": 0.6, "samples": 6, "seq_len": 32, "eval_samples": 4}
    base |= {"calib": calib, "eval_text": eval_text}
    return CompressConfig(model=str(dense), out=out, **{**base, **changes})


def run(options: CompressConfig, console: Console | None = None) -> None:
    """On one thread, since the last bits of sums depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        compress(options, console or Console(quiet=True))
    finally:
        torch.set_num_threads(threads)


def die_at(writes: int) -> None:
    """Let this process be killed before it renames for the `writes`-th time."""
    left = writes
    replaced = os.replace

    def count(*names: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replaced(*names)

    os.replace = count


def run_and_die(
    options: CompressConfig, writes: int | None, shard_bytes: int | None = None
) -> None:
    """The run, killed before it renames for the `writes`-th time: nothing is written after it."""
    if shard_bytes is not None:
        export._SHARD_BYTES = shard_bytes
    if writes is not None:
        die_at(writes)
    # Every layer is worth keeping, however fast.
    journal._SHARE_OF_TIME = 10.0
    run(options)


def start(target: Callable[..., None], *arguments: Any) -> multiprocessing.Process:
    process = FORKS.Process(target=target, args=arguments)
    process.start()
    return process


def content(folder: Path) -> dict[str, Any]:
    """Every file's bytes, but for what the record says of time and memory."""
    found: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".html"
    }
    card = found["README.md"].decode()
    found["README.md"] = re.sub(r" (--out|--streams|--max-memory|--batch-tokens) \S+", "", card)
    record = json.loads(found.pop(RECORD))
    for key in ("seconds", "peak_memory_bytes", "device_memory_bytes", "command", "settings"):
        del record[key]
    return {**found, RECORD: record}


@pytest.fixture(scope="module")
def expected(dense, tmp_path_factory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("whole") / "small"
    process = start(run, settings(dense, out))
    process.join()
    assert process.exitcode == 0
    assert [path.name for path in out.parent.iterdir()] == ["small"]
    return content(out)


def finish(options: CompressConfig, shard_bytes: int | None = None) -> dict[str, Any]:
    process = start(run_and_die, options, None, shard_bytes)
    process.join()
    assert process.exitcode == 0
    assert [path.name for path in options.out.parent.iterdir()] == [options.out.name]
    return content(options.out)


# Of 75 renames in a whole run: from the text over every pass and its layers, the basis,
# the weights, a shard and the perplexity to the final name.
@pytest.mark.parametrize(
    "writes",
    [
        *(16, 41, 61),
        *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 3, 5, 11, 21, 27, 34, 37, 49, 72)),
    ],
)
def test_killed_run_continues_to_the_same_bytes(writes, dense, expected, tmp_path):
    options = settings(dense, tmp_path / "small")
    process = start(run_and_die, options, writes)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not options.out.exists()
    assert finish(options) == expected


# Of 63 renames: in the refit between its two layers; in the gradients, and around those layers.
@pytest.mark.parametrize(
    "writes", [46, *(pytest.param(n, marks=pytest.mark.slow) for n in (17, 42, 50))]
)
def test_a_run_without_some_layers_killed_continues_to_the_same_bytes(writes, dense, tmp_path):
    changes = {"num_hidden_layers": 2, "keep": 0.9, "allocate": "width"}
    whole = settings(dense, tmp_path / "whole" / "small", **changes)
    killed = settings(dense, tmp_path / "killed" / "small", **changes)
    expected = finish(whole)
    assert len(expected[RECORD]["layers"]) == 2
    process = start(run_and_die, killed, writes)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert finish(killed) == expected


def learned(folder: Path, **changes: Any) -> dict[str, Any]:
    """Changes to `settings` for a learned mask, on documents enough to keep some apart."""
    words, path = random.Random(1), folder / "documents.txt"
    documents = (
        " ".join(words.choice(string.ascii_lowercase) * 3 for _ in range(100)) for _ in range(40)
    )
    path.write_text("\n\n".join(documents))
    return {"mask": "learned", "basis": "pca", "calib": str(path), **changes}


@pytest.mark.parametrize(
    "writes", [22, *(pytest.param(n, marks=pytest.mark.slow) for n in (19, 20, 24, 25, 26, 29))]
)
def test_learned_mask_killed_continues_to_the_same_bytes(writes, dense, tmp_path):
    changes = learned(tmp_path, mask_steps=5, mask_batch=2)
    whole = settings(dense, tmp_path / "whole" / "small", **changes)
    killed = settings(dense, tmp_path / "killed" / "small", **changes)
    expected = finish(whole)
    process = start(run_and_die, killed, writes)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert finish(killed) == expected


# Shards of one to three groups each; without the refit there are no streams to go back to.
@pytest.mark.parametrize(
    ("refit", "writes"),
    [
        *((False, 33), (True, 51)),
        *(pytest.param(False, n, marks=pytest.mark.slow) for n in (29, 35, 37, 41, 45, 49)),
        *(pytest.param(True, n, marks=pytest.mark.slow) for n in (49, 54, 56, 62, 67)),
    ],
)
def test_run_killed_while_it_writes_shards_arrives(refit, writes, dense, tmp_path):
    changes = {"refit": refit, "samples": 4, "allocate": "width"}
    whole = settings(dense, tmp_path / "whole" / "small", **changes)
    killed = settings(dense, tmp_path / "killed" / "small", **changes)
    expected = finish(whole, 120_000)
    assert len(list(whole.out.glob("model-*.safetensors"))) > 2
    process = start(run_and_die, killed, writes, 120_000)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert finish(killed, 120_000) == expected


def run_with_a_step_and_die(*arguments: Any) -> None:
    """`run_and_die`, with a step of the head that is taken, whatever it wins."""
    head_fit._LEAST_GAIN = float("-inf")
    run_and_die(*arguments)


# The head comes with a table that is on the disk already, in the first of two shards or among the
# groups of the only one: before that is renamed, before the journal knows, and behind.
@pytest.mark.parametrize(
    ("shard_bytes", "writes"),
    [
        *((120_000, 54), (None, 51)),
        *(pytest.param(120_000, n, marks=pytest.mark.slow) for n in (51, 52, 53, 55, 56, 57, 58)),
        *(pytest.param(None, n, marks=pytest.mark.slow) for n in (48, 49, 50, 52, 53, 54, 55)),
    ],
)
def test_run_killed_while_a_table_is_written_anew_arrives(shard_bytes, writes, tmp_path):
    folder = tmp_path / "dense"
    save_model(tiny_model("llama-tied", torch.float32, vocab_size=4096), folder, tokenizer=True)
    words = random.Random(0)
    documents = [
        " ".join(words.choice(string.ascii_lowercase) * 3 for _ in range(90)) for _ in range(20)
    ]
    text = tmp_path / "documents.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    changes = {"samples": 16, "allocate": "width", "calib": str(text)}
    found = []
    for name, dies_at in (("whole", None), ("killed", writes), ("killed", None)):
        options = settings(folder, tmp_path / name / "small", **changes)
        process = start(run_with_a_step_and_die, options, dies_at, shard_bytes)
        process.join()
        assert process.exitcode == (0 if dies_at is None else -signal.SIGKILL)
        if dies_at is None:
            found.append(content(options.out))
    assert found[0] == found[1]
    assert json.loads((tmp_path / "whole" / "small" / RECORD).read_text())["head_step_gain"] != 0


def test_what_was_done_survives_a_mistaken_command(dense, expected, tmp_path):
    out = tmp_path / "small"
    state = stopped(dense, out, 43)
    before = sorted(path.name for path in state.iterdir())
    with pytest.raises(UserError, match="Expected a GPU for --streams gpu"):
        run(settings(dense, out, streams="gpu"))
    assert sorted(path.name for path in state.iterdir()) == before
    assert finish(settings(dense, out)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_run_killed_again_and_again_at_any_moment_arrives(seed, dense, expected, tmp_path):
    options = settings(dense, tmp_path / "small")
    moments = random.Random(seed)
    for _ in range(4):
        process = start(run_and_die, options, None)
        process.join(moments.uniform(0.2, 3.0))
        if process.exitcode is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    arrived = (options.out / "report.html").exists()  # it comes last, when the weights stand
    assert (content(options.out) if arrived else finish(options)) == expected


def test_run_killed_while_it_clears_up_arrives(dense, expected, tmp_path, monkeypatch):
    """The result has its name already, what it was made from is not gone yet."""
    options = settings(dense, tmp_path / "small")

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("sp3llm.runtime.folders.remove_folder", die)
        with pytest.raises(KeyboardInterrupt):
            run(options)
    assert options.out.exists()
    assert options.out.with_name("small.partial").exists()
    assert finish(options) == expected


def stopped(dense: Path, out: Path, writes: int) -> Path:
    """A run killed on the way; its journal."""
    process = start(run_and_die, settings(dense, out), writes)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return out.with_name(f"{out.name}.partial") / "state-0"


def torn(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def test_torn_files_and_a_torn_manifest_are_found_and_redone(dense, expected, tmp_path):
    for which in ("*.safetensors", MANIFEST):
        out = tmp_path / which.strip("*.") / "small"
        state = stopped(dense, out, 54)
        files = [path for path in state.glob(which) if path.stat().st_size]
        assert files
        for path in files:
            torn(path)
        assert finish(settings(dense, out)) == expected


def test_torn_shard_of_a_nearly_finished_run_is_redone(dense, expected, tmp_path):
    out = tmp_path / "small"
    options = settings(dense, out)
    process = start(run_and_die, options, 67)
    process.join()
    shards = list((tmp_path / "small.partial" / "model").glob("*.safetensors"))
    assert shards
    torn(shards[0])
    assert finish(options) == expected


@pytest.mark.parametrize(
    ("changes", "told"), [({"keep": 0.5}, "--keep 0.6, found 0.5"), ({"seed": 3}, "--seed 0")]
)
def test_other_settings_are_refused_and_what_was_done_stays(changes, told, dense, tmp_path):
    out = tmp_path / "small"
    state = stopped(dense, out, 23)
    before = {path.name: path.read_bytes() for path in state.iterdir()}
    with pytest.raises(ResumableError, match=told) as caught:
        run(settings(dense, out, **changes))
    assert "--fresh" in str(caught.value)
    assert {path.name: path.read_bytes() for path in state.iterdir()} == before
    run(settings(dense, out, fresh=True, **changes))
    assert (out / "config.json").is_file()


def test_other_weights_are_refused(dense, tmp_path):
    out = tmp_path / "small"
    model = tmp_path / "model"
    save_model(tiny_model("llama", torch.float32, vocab_size=4096), model, tokenizer=True)
    with pytest.raises(RuntimeError, match="midway"):
        fail_midway(settings(model, out))
    save_model(tiny_model("llama", torch.float32, vocab_size=4096), model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] *= 1.01
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ResumableError, match=r"the model's model\.safetensors"):
        run(settings(model, out))


def fail_midway(options: CompressConfig) -> None:
    with pytest.MonkeyPatch.context() as patched:

        def fail(*_: Any) -> None:
            raise RuntimeError("midway")

        patched.setattr("sp3llm.models.companions.copy_companions", fail)
        run(options)


def test_where_things_lie_may_change_between_runs(dense, expected, tmp_path):
    """Nothing that was done depends on where streams lie, so a run that met its limits goes on."""
    out = tmp_path / "small"
    stopped(dense, out, 23)
    assert finish(settings(dense, out, streams="disk", max_memory="cpu=1GiB")) == expected


def test_disk_streams_equal_memory_streams(dense, expected, tmp_path):
    assert finish(settings(dense, tmp_path / "small", streams="disk")) == expected


def test_full_disk_ends_in_one_sentence_and_the_run_goes_on(dense, expected, tmp_path, monkeypatch):
    options = settings(dense, tmp_path / "small")
    written = write_tensors
    left = 12

    def full(path: Path, tensors: Any) -> str:
        nonlocal left
        left -= 1
        if left < 0:
            path.with_name(f"{path.name}.new").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(path, tensors)

    with monkeypatch.context() as patched:
        patched.setattr(journal, "write_tensors", full)
        with pytest.raises(ResumableError, match="No space left on device") as caught:
            run(options)
    assert "same command" in str(caught.value)
    assert finish(options) == expected


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory.")


def short_of_memory(monkeypatch, windows: int, error: Exception = OUT_OF_MEMORY) -> None:
    """A GPU that runs out of memory with more than so many windows at once."""
    run_layer = stream.run_layer

    def limited(*arguments: Any, **kwargs: Any) -> None:
        if arguments[0].execution.windows_a_batch(32) > windows:
            raise error
        run_layer(*arguments, **kwargs)

    monkeypatch.setattr(measuring, "run_layer", limited)


def test_out_of_memory_halves_the_batch_says_so_and_goes_on(dense, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "small"
    run(settings(dense, whole, batch_tokens=64, samples=8))
    short_of_memory(monkeypatch, 2)
    console = Console(record=True, width=200, file=io.StringIO())
    run(settings(dense, out, batch_tokens=256, samples=8), console)
    said = console.export_text()
    assert "going on with 4 windows at once, not 8" in said
    assert "going on with 2 windows at once, not 4" in said
    assert content(out) == content(whole)


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnDsyevd(...)`",
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    ],
)
def test_libraries_that_are_out_of_memory_are_understood(said):
    assert is_out_of_memory(RuntimeError(said))
    assert not is_out_of_memory(UserError(said))


@pytest.mark.parametrize(
    "said",
    [
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnDsyevd(...)`",
        "CUDA error: device-side assert triggered",
        "mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)",
    ],
)
def test_other_errors_stay_what_they_are(said):
    assert not is_out_of_memory(RuntimeError(said))


def test_a_solver_without_memory_halves_the_batch_and_other_errors_end_the_run(
    dense, tmp_path, monkeypatch
):
    whole, out = tmp_path / "whole", tmp_path / "small"
    run(settings(dense, whole, batch_tokens=64, samples=8))
    solver = RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `x`")
    with monkeypatch.context() as patched:
        short_of_memory(patched, 2, solver)
        run(settings(dense, out, batch_tokens=128, samples=8))
    assert content(out) == content(whole)
    short_of_memory(monkeypatch, 2, RuntimeError("device-side assert"))
    with pytest.raises(RuntimeError, match="device-side assert"):
        run(settings(dense, tmp_path / "other", batch_tokens=128, samples=8))


def test_out_of_memory_with_one_window_ends_in_a_sentence(dense, tmp_path, monkeypatch):
    short_of_memory(monkeypatch, 0)
    with pytest.raises(ResumableError, match="ran out of memory with a single window"):
        run(settings(dense, tmp_path / "small", batch_tokens=32))
    assert (tmp_path / "small.partial").exists()


def test_bad_input_found_on_the_way_leaves_nothing(dense, tmp_path):
    model = tmp_path / "model"
    broken = tiny_model("llama", torch.float32, vocab_size=4096)
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    save_model(broken, model, tokenizer=True)
    out = tmp_path / "out" / "small"
    with pytest.raises(UserError, match="NaN"):
        run(settings(model, out))
    assert list(out.parent.iterdir()) == []


# --------------------------------------------------------------------------- the parts


def test_tensors_are_written_as_safetensors(tmp_path):
    tensors = {
        "half": torch.randn(3, 5).bfloat16(),
        "wide": torch.randn(7, dtype=torch.float64),
        "turned": torch.randn(4, 6).T,
        "strided": torch.randn(9, 2, 3)[::2],
        "scalar": torch.tensor(3.0),
        "none": torch.zeros(0, 4),
        "ids": torch.arange(6).reshape(2, 3),
    }
    path = tmp_path / "x.safetensors"
    digest = write_tensors(path, tensors)
    assert digest == file_hash(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]
    for found in (load_file(path), read_tensors(path)):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_stage_goes_back_to_the_step_before_a_damaged_one(tmp_path):
    said: list[str] = []
    journal = open_journal(tmp_path, {"a": 1}, Ranks(), said.append)
    for step in range(4):
        journal.save("stage", step, {"x": torch.full((3,), float(step))}, {"step": step})
    assert journal.steps("stage") == [2, 3]
    again = open_journal(tmp_path, {"a": 1}, Ranks(), said.append)
    assert again.latest("stage").facts == {"step": 3}
    assert again.latest("stage", most=2).tensors["x"].tolist() == [2.0] * 3
    torn(tmp_path / "stage-00003.safetensors")
    again = open_journal(tmp_path, {"a": 1}, Ranks(), said.append)
    assert again.latest("stage").step == 2
    assert any("damaged" in line for line in said)
    torn(tmp_path / "stage-00002.safetensors")
    again = open_journal(tmp_path, {"a": 1}, Ranks(), said.append)
    assert again.latest("stage") is None


def test_a_journal_without_a_folder_keeps_nothing():
    journal = Journal()
    x = torch.ones(3)
    kept = journal.keep("stage", 0, x)
    x += 1
    assert kept.tolist() == [1.0] * 3
    journal.save("stage", 1, {"x": x})
    assert journal.latest("stage") is None
    assert not journal.due()


def test_saving_takes_a_sixtieth_of_the_time_at_most():
    now = time.monotonic()
    clock = _Clock(started=now - 300.0, saving=4.0)
    assert Journal(Path(), clock=clock).due()
    clock.saving = 6.0
    assert not Journal(Path(), clock=clock).due()
