"""Copies that are made late, as beside a GPU, change nothing; nobody looks before they are made."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sp3llm.compression.measuring import measure_dense
from sp3llm.runtime import devices, transfer
from sp3llm.runtime.devices import Execution
from sp3llm.runtime.placement import BytesNeeded, Known, place_streams
from tests.conftest import family_of_model, save_model, tiny_model
from tests.helpers import compress_tiny

EXECUTION = Execution(torch.device("cpu"), torch.float32)
NEVER = float("nan")


class LateCopies(transfer.Copies):
    """A CUDA stream for copies, on the CPU: nothing happens before someone waits for it, then all
    that was asked for up to there, in that order. Till then NaN is where a value will be.
    """

    def __init__(self) -> None:
        self.asked: list[Callable[[], None]] = []
        self.done = self.most = self.stored = 0

    def ask(self, copy: Callable[[], None]) -> int:
        self.asked.append(copy)
        self.most = max(self.most, len(self.asked) - self.done)
        return len(self.asked)

    def make(self, number: int) -> None:
        while self.done < number:
            self.asked[self.done]()
            self.done += 1

    def begin(self, rows: torch.Tensor, device: torch.device) -> Callable[[], torch.Tensor]:
        there = torch.full_like(rows, NEVER)
        number = self.ask(lambda: there.copy_(rows))

        def wait() -> torch.Tensor:
            self.make(number)
            return there

        return wait

    def store(self, rows: torch.Tensor, value: torch.Tensor) -> None:
        sent = value.detach().reshape(rows.shape).clone()
        self.stored += 1
        self.ask(lambda: rows.copy_(sent))
        # A fetch of other rows may be under way; these are written to by this copy alone.
        rows.fill_(NEVER)

    def settle(self) -> None:
        self.make(len(self.asked))


@pytest.fixture
def late(monkeypatch) -> LateCopies:
    copies = LateCopies()
    monkeypatch.setattr(transfer, "copies_of", lambda _: copies)
    return copies


def test_the_next_batch_is_on_its_way_when_one_comes(late):
    hidden = torch.arange(6.0).reshape(3, 2)
    batches = [slice(row, row + 1) for row in range(3)]
    seen = []
    for number, (rows, batch) in enumerate(transfer.fetched(hidden, batches, EXECUTION.device)):
        assert len(late.asked) == min(3, number + 2) + number
        seen.append(batch)
        transfer.store(hidden[rows], batch + 1, EXECUTION.device)
    assert torch.equal(torch.cat(seen), torch.arange(6.0).reshape(3, 2))
    assert torch.equal(transfer.fetch(hidden[2:], EXECUTION.device), torch.tensor([[5.0, 6.0]]))
    transfer.settle(EXECUTION.device)
    assert torch.equal(hidden, torch.arange(1.0, 7.0).reshape(3, 2))


def test_fetched_of_nothing_is_nothing():
    assert list(transfer.fetched(torch.empty(0, 2), [], EXECUTION.device)) == []


@pytest.mark.parametrize("variant", ["llama", "opt", "gpt-neox"])
@pytest.mark.parametrize("basis", ["readers", "gradient"])
def test_late_copies_measure_the_same(variant, basis, tokens, tmp_path, request):
    model = tiny_model(variant, torch.float32)
    checkpoint, family = save_model(model, tmp_path), family_of_model(model)
    execution = replace(EXECUTION, batch_tokens=2 * tokens.shape[1])

    def measured():
        return measure_dense(checkpoint, family, tokens, tokens, "normalised", basis, execution)

    expected = measured()
    late = request.getfixturevalue("late")
    found = measured()
    assert late.stored > 0
    assert torch.equal(found[1], expected[1])
    for name in ("sites_DD", "metrics_DD"):
        for one, other in zip(getattr(found[0], name), getattr(expected[0], name), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("variant", ["llama-biases", "opt", "gpt-neox", "qwen2-moe"])
def test_late_copies_make_the_same_model(variant, tmp_path, request):
    options = {"batch_tokens": 64, "basis": "readers"}
    compress_tiny(variant, tmp_path / "expected", **options)
    late = request.getfixturevalue("late")
    compress_tiny(variant, tmp_path / "found", **options)
    assert late.stored > 0
    found, expected = (
        tmp_path / name / "small/model.safetensors" for name in ("found", "expected")
    )
    assert found.read_bytes() == expected.read_bytes()


def test_a_host_that_locks_no_more_memory_is_said_once_and_copied_from_all_the_same(monkeypatch):
    empty = torch.empty

    def refusing(*shape, pin_memory=False, **options):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*shape, **options)

    monkeypatch.setattr(devices.torch, "empty", refusing)
    with pytest.warns(UserWarning, match="not locked in memory .CUDA error: out of memory"):
        stream = replace(EXECUTION, pinned=True).empty_stream((2, 3), torch.float32)
    assert stream.shape == (2, 3)


@pytest.mark.parametrize(("free", "pinned"), [(10**9, True), (10**7, False)])
def test_streams_are_locked_where_the_host_has_room_for_them_twice(
    free, pinned, tmp_path, monkeypatch
):
    monkeypatch.setattr("sp3llm.runtime.placement.host_memory", lambda _: free)
    monkeypatch.setattr("sp3llm.runtime.placement.gpu_memory", lambda *_: 10**9)
    on_gpu = replace(EXECUTION, device=SimpleNamespace(type="cuda", index=0))
    needed = BytesNeeded(streams=6 * 10**6, working=1, token=1)
    found = place_streams(on_gpu, "host", needed, Known(), tmp_path, {})
    assert found.pinned == pinned
    assert not place_streams(EXECUTION, "host", needed, Known(), tmp_path, {}).pinned


class FakeStream:
    """A CUDA stream, or an event on it, that tells what is asked of it."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def record_event(self) -> "FakeStream":
        return FakeStream(f"event of {self.name}", self.log)

    def wait_event(self, event: "FakeStream") -> None:
        self.log.append(f"{self.name} waits for {event.name}")

    wait_stream = wait_event

    def synchronize(self) -> None:
        self.log.append(f"host waits for {self.name}")


@pytest.fixture
def cuda_log(monkeypatch) -> list[str]:
    """What `CudaCopies` asks of a GPU, which is the CPU."""
    log: list[str] = []
    computing, copying = FakeStream("computing", log), FakeStream("copying", log)
    held = "memory is held for {0.name}".format
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: copying)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: computing)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: True)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, s: log.append(held(s)))
    return log


def test_a_gpu_waits_for_what_it_is_sent_and_holds_what_it_sends(cuda_log):
    copies = transfer.CudaCopies(EXECUTION.device)
    hidden = torch.arange(6.0).reshape(3, 2)
    arrive = copies.begin(hidden[:1], EXECUTION.device)
    assert cuda_log == []  # nobody waits before the rows are wanted
    assert torch.equal(arrive(), hidden[:1])
    assert cuda_log == [
        "computing waits for event of copying", "memory is held for computing",
    ]  # fmt: skip
    cuda_log.clear()
    copies.store(hidden[:1], torch.ones(2))
    assert cuda_log == ["copying waits for computing", "memory is held for copying"]
    copies.settle()
    assert cuda_log[-1] == "host waits for copying"
    assert torch.equal(hidden, torch.tensor([[1.0, 1], [2, 3], [4, 5]]))


def test_the_host_does_not_run_ahead_of_the_gpu_without_a_bound(cuda_log):
    copies = transfer.CudaCopies(EXECUTION.device)
    for _ in range(20):
        copies.begin(torch.zeros(1, 2), EXECUTION.device)()
    waited = cuda_log.count("host waits for event of computing")
    assert waited == 20 - transfer._UNDER_WAY


def test_rows_that_are_not_locked_go_the_plain_way(cuda_log, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: False)
    copies, hidden = transfer.CudaCopies(EXECUTION.device), torch.zeros(2, 2)
    copies.store(hidden[1:], torch.ones(2))
    assert torch.equal(copies.begin(hidden, EXECUTION.device)(), torch.tensor([[0.0, 0], [1, 1]]))
    assert cuda_log == []
