"""Several processes make what one makes, and fail together."""

import json
import os
import random
import socket
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sp3llm.errors import ResumableError
from sp3llm.options import CompressConfig
from sp3llm.runtime import journal
from sp3llm.runtime.devices import Execution
from sp3llm.runtime.folders import RECORD
from sp3llm.runtime.processes import Ranks
from tests.conftest import relative_error
from tests.helpers import weights
from tests.runtime.test_resume import FORKS, content, dense, learned, run, run_and_die, settings  # noqa: F401

REPOSITORY = Path(__file__).parents[2]


def as_rank(rank: int, count: int, port: int, writes: int | None, options: CompressConfig) -> None:
    """One process of a run, in the environment that a launcher sets."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ["OMP_NUM_THREADS"] = "1"  # else accelerate deals out the cores, as if two were one
    journal._SHARE_OF_TIME = 10.0  # what the first process finds worth keeping, all keep
    run(options) if writes is None else run_and_die(options, writes)


def free_port() -> int:
    with socket.socket() as at:
        at.bind(("localhost", 0))
        return at.getsockname()[1]


def together(count: int, options: CompressConfig, dies: tuple[int, int] | None = None) -> list[int]:
    """All processes of a run; `dies` is one that is killed, and at which of its writes."""
    port = free_port()
    processes = [
        FORKS.Process(
            target=as_rank,
            args=(rank, count, port, dies[1] if dies and rank == dies[0] else None, options),
        )
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    if dies:
        processes[dies[0]].join()
        for process in processes:  # a launcher's part
            process.kill()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def close(found: Path, expected: Path) -> bool:
    local_windows, theirs = weights(found), weights(expected)
    assert local_windows.keys() == theirs.keys()
    return all(relative_error(local_windows[n].double(), theirs[n].double()) < 1e-5 for n in theirs)


def options_for(dense: Path, out: Path, **changes: Any) -> CompressConfig:  # noqa: F811
    """Sixteen windows in batches of two, so that three processes have something to do, and one that
    tells how sure the model may be.
    """
    text = dense.with_name("fit.jsonl")
    drawn = random.Random(0)
    words = [drawn.choice(string.ascii_lowercase) * 3 for _ in range(2000)]
    documents = [" ".join(words[start : start + 100]) for start in range(0, 2000, 90)]
    text.write_text("".join(json.dumps({"text": words}) + "\n" for words in documents))
    changes = {"samples": 16, "batch_tokens": 64, "device": "cpu", "calib": str(text)} | changes
    return settings(dense, out, **changes)


@pytest.fixture(scope="module")
def alone(dense, tmp_path_factory) -> Path:  # noqa: F811
    out = tmp_path_factory.mktemp("alone") / "small"
    process = FORKS.Process(target=run, args=(options_for(dense, out),))
    process.start()
    process.join()
    assert process.exitcode == 0
    return out


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_make_what_one_makes(count, dense, alone, tmp_path):  # noqa: F811
    out = tmp_path / "small"
    assert together(count, options_for(dense, out)) == [0] * count
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["small"]
    assert close(out, alone)
    found, expected = (json.loads((at / RECORD).read_text()) for at in (out, alone))
    assert found["plan"] == expected["plan"]
    for local_windows, other in zip(found["trials"], expected["trials"], strict=True):
        assert local_windows.pop("trial_loss") == pytest.approx(other.pop("trial_loss"), rel=1e-9)
        assert local_windows == other
    assert found["logit_scale"] == pytest.approx(expected["logit_scale"], rel=1e-6)
    assert found["eigenvalues"] == pytest.approx(expected["eigenvalues"], rel=1e-9)
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)
    assert [fit["ridge"] for fit in found["fits"]] == [fit["ridge"] for fit in expected["fits"]]


def test_processes_that_no_device_is_named_to_search_as_one(dense, tmp_path):  # noqa: F811
    """On CPUs; of the windows that trials are scored on the second process has none."""
    device = "cpu" if torch.cuda.is_available() else "auto"
    changes = {"samples": 6, "device": device, "keep": 0.831}
    alone, shared = (options_for(dense, tmp_path / name, **changes) for name in ("alone", "shared"))
    process = FORKS.Process(target=run, args=(alone,))
    process.start()
    process.join()
    assert together(2, shared) == [0, 0]
    found, expected = (json.loads((one.out / RECORD).read_text()) for one in (shared, alone))
    assert found["plan"] == expected["plan"]
    losses = [[trial["trial_loss"] for trial in one["trials"]] for one in (found, expected)]
    assert len(losses[0]) > 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_processes_leave_out_the_layers_that_one_does(dense, tmp_path):  # noqa: F811
    changes = {"num_hidden_layers": 2, "keep": 0.9, "allocate": "width"}
    alone, shared = (options_for(dense, tmp_path / name, **changes) for name in ("alone", "shared"))
    process = FORKS.Process(target=run, args=(alone,))
    process.start()
    process.join()
    assert together(2, shared) == [0, 0]
    kept = [json.loads((one.out / RECORD).read_text())["layers"] for one in (alone, shared)]
    assert kept[0] == kept[1]
    assert close(shared.out, alone.out)


def test_processes_keep_the_tokens_that_one_keeps(dense, tmp_path):  # noqa: F811
    """Chosen by what the model expects of text, of which each has a share."""
    page = tmp_path / "page.txt"
    page.write_text((REPOSITORY / "docs" / "score.md").read_text())
    changes = {"keep": 0.4, "allocate": "width", "vocab_from": str(page), "vocab_size": 560}
    alone, shared = (options_for(dense, tmp_path / name, **changes) for name in ("alone", "shared"))
    assert [together(1, alone), together(2, shared)] == [[0], [0, 0]]
    kept = [(one.out / "tokenizer.json").read_bytes() for one in (alone, shared)]
    assert kept[0] == kept[1]
    assert close(shared.out, alone.out)


def test_processes_learn_the_mask_that_one_learns(dense, tmp_path):  # noqa: F811
    alone, out = tmp_path / "alone" / "small", tmp_path / "small"
    changes = learned(tmp_path, mask_steps=4, mask_batch=6)
    assert together(1, options_for(dense, alone, **changes)) == [0]
    assert together(2, options_for(dense, out, **changes)) == [0, 0]
    found, expected = (json.loads((at / RECORD).read_text()) for at in (out, alone))
    assert found["plan"] == expected["plan"]
    # A step moves a log-alpha by 10 here, and by what rounding leaves of a gradient near 0 too.
    for local_windows, other in zip(
        found["mask"]["history"], expected["mask"]["history"], strict=True
    ):
        assert local_windows == pytest.approx(other, rel=1e-3)
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-3)


@pytest.mark.parametrize(
    "dies",
    [(1, 19), *(pytest.param(d, marks=pytest.mark.slow) for d in ((0, 43), (1, 29), (0, 8)))],
)
def test_a_run_whose_process_was_killed_continues_to_the_same_bytes(dies, dense, tmp_path):  # noqa: F811
    whole, out = tmp_path / "whole" / "small", tmp_path / "killed" / "small"
    assert together(2, options_for(dense, whole)) == [0, 0]
    assert -9 in together(2, options_for(dense, out), dies)
    assert not out.exists()
    assert together(2, options_for(dense, out)) == [0, 0]
    assert content(out) == content(whole)


def test_other_batches_do_not_deal_windows_anew(dense, tmp_path):  # noqa: F811
    """Streams that were saved belong to the windows they were made of."""
    changes = {"basis": "pca", "allocate": "width", "samples": 16}
    whole, out = tmp_path / "whole" / "small", tmp_path / "killed" / "small"
    assert together(2, options_for(dense, whole, **changes)) == [0, 0]
    together(2, options_for(dense, out, **changes), (1, 22))
    assert not out.exists()
    assert together(2, options_for(dense, out, **changes, batch_tokens=32)) == [0, 0]
    assert close(out, whole)
    found, expected = (json.loads((at / RECORD).read_text()) for at in (out, whole))
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)
    assert found["dense_perplexity"] == pytest.approx(expected["dense_perplexity"], rel=1e-6)


@pytest.mark.parametrize("count", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_process_without_a_window_of_its_own_takes_part(count, dense, tmp_path):  # noqa: F811
    alone, out = tmp_path / "alone" / "small", tmp_path / "small"
    changes = {"basis": "pca", "samples": 4, "allocate": "width"}
    assert together(1, options_for(dense, alone, **changes)) == [0]
    assert together(count, options_for(dense, out, **changes)) == [0] * count
    found, expected = (json.loads((at / RECORD).read_text()) for at in (out, alone))
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)


def test_another_number_of_processes_is_refused(dense, tmp_path):  # noqa: F811
    out = tmp_path / "small"
    together(2, options_for(dense, out), (1, 19))
    with pytest.raises(ResumableError, match="begun with the number of processes 2, found 1"):
        run(options_for(dense, out))


def test_a_process_that_fails_ends_all_with_its_message(dense, tmp_path):  # noqa: F811
    """Under torch's own launcher, which is what accelerate launches with."""
    script = tmp_path / "fail.py"
    script.write_text(
        "import os, sys\n"
        "import sp3llm.compression.measuring\n"
        "from sp3llm.cli import main\n"
        "from sp3llm.errors import UserError\n"
        "if os.environ['RANK'] == '1':\n"
        "    def fail(*_, **__):\n"
        "        raise UserError('Expected a whole shard, found half of one: get another.')\n"
        "    sp3llm.compression.measuring.run_layer = fail\n"
        "main(['compress', *sys.argv[1:]])\n"
    )
    options = ["--samples", 12, "--seq-len", 32, "--calib", dense.with_name("fit.txt")]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), str(script), str(dense)]
    command += map(str, [*options, "--device", "cpu", "--out", tmp_path / "small"])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=240, check=False
    )
    assert done.returncode != 0
    assert "sp3llm (process 1): Expected a whole shard, found half of one" in done.stderr
    assert not (tmp_path / "small").exists()


def test_bad_input_is_told_once(dense, tmp_path):  # noqa: F811
    """Every process finds the same fault; the first one speaks."""
    command = [sys.executable, "-m", "sp3llm.compress", str(dense), "--keep", "2"]
    for rank, spoken in ((0, True), (1, False)):
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"}
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
        )
        assert done.returncode == 2
        assert bool(done.stderr) == spoken


@pytest.mark.parametrize("windows", [1, 5, 12, 13])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_window_is_some_processs_and_batches_stay_whole(windows, count):
    batches = []
    for index in range(count):
        execution = Execution(
            torch.device("cpu"), torch.float32, ranks=Ranks(index, count), batch_tokens=64
        )
        local_windows = execution.local_windows(windows, 32)
        assert local_windows.tolist() == sorted(local_windows.tolist())
        batches += [
            tuple(b.tolist()) for b in local_windows.split(execution.windows_a_batch(32)) if len(b)
        ]
    assert sorted(w for batch in batches for w in batch) == list(range(windows))
    if windows >= 2 * count:
        execution = Execution(torch.device("cpu"), torch.float32, batch_tokens=64)
        alone = execution.local_windows(windows, 32).split(execution.windows_a_batch(32))
        assert sorted(batches) == [tuple(b.tolist()) for b in alone]
