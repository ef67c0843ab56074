"""Where things run and lie: room for streams, reading ahead, limits, products on tensor cores."""

import errno
import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from sp3llm.compression.measuring import measure_dense
from sp3llm.errors import UserError
from sp3llm.maths.products import split_product, symmetric_product
from sp3llm.runtime.devices import Execution, compute_dtype, idle_gpus_line
from sp3llm.runtime.memory import memory_limits
from sp3llm.runtime.placement import BytesNeeded, Known, place_streams
from sp3llm.runtime.prefetch import prefetch
from sp3llm.runtime.processes import Ranks
from tests.conftest import family_of_model, relative_error, save_model, tiny_model

EXECUTION = Execution(torch.device("cpu"), torch.float32)


def test_room_on_disk_takes_no_name_and_holds_what_it_is_given(tmp_path):
    execution = Execution(
        torch.device("cpu"), torch.float32, streams="disk", scratch=tmp_path / "scratch"
    )
    empty_stream = execution.empty_stream((4, 3, 5), torch.bfloat16)
    values = torch.randn(4, 3, 5).bfloat16()
    empty_stream.copy_(values)
    assert torch.equal(empty_stream, values)
    assert list((tmp_path / "scratch").iterdir()) == []
    assert execution.empty_stream((0, 3), torch.float32).shape == (0, 3)


def test_a_disk_without_room_is_told_before_it_is_written_to(tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    execution = Execution(torch.device("cpu"), torch.float32, streams="disk", scratch=tmp_path)
    with pytest.raises(OSError, match="No space"):
        execution.empty_stream((4, 4), torch.float32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("cap", "streams"), [(2**40, "host"), (3 * 2**20, "disk"), (2**20, "disk")]
)
def test_streams_go_where_there_is_room(cap, streams, tmp_path, monkeypatch):
    monkeypatch.setattr("sp3llm.runtime.placement.host_memory", lambda most: most["cpu"])
    execution = Execution(torch.device("cpu"), torch.float32)
    found = place_streams(
        execution,
        "auto",
        BytesNeeded(2 * 2**20, 2**20, 1000),
        Known(),
        tmp_path,
        {"cpu": cap},
    )
    assert found.streams == streams
    assert found.scratch == tmp_path


def test_reading_ahead_gives_every_item_in_order_and_an_error_where_it_belongs():
    execution = Execution(torch.device("cpu"), torch.float32)

    def load(item: int) -> dict[str, torch.Tensor]:
        if item == 3:
            raise UserError("three")
        return {"x": torch.tensor(item)}

    seen = []

    def consume() -> None:
        for item, tensors in prefetch(range(5), load, execution.device):
            seen.append((item, tensors["x"].item()))

    with pytest.raises(UserError, match="three"):
        consume()
    assert seen == [(0, 0), (1, 1), (2, 2)]


def test_batches_are_as_large_as_activations_allow(tmp_path):
    def tokens(token_bytes: int, asked: int | None = None) -> int:
        return place_streams(
            EXECUTION, "host", BytesNeeded(1, 1, token_bytes), Known(asked), tmp_path, {}
        ).batch_tokens

    assert tokens(1) == 8192
    assert tokens(2**20) == 256
    assert tokens(2**40) == 1
    assert tokens(1, asked=96) == 96
    assert replace(EXECUTION, batch_tokens=1).windows_a_batch(64) == 1


def test_streams_on_a_gpu_need_one(tmp_path):
    with pytest.raises(UserError, match="Expected a GPU for --streams gpu"):
        place_streams(EXECUTION, "gpu", BytesNeeded(1, 1, 1), Known(), tmp_path, {})


def test_memory_limits_are_read_as_accelerate_writes_them():
    assert memory_limits(None) == {}
    assert memory_limits("cpu=3GiB") == {"cpu": 3 * 2**30}
    assert memory_limits('{"cpu": "200MB"}') == {"cpu": 200 * 10**6}


@pytest.mark.parametrize(
    "text",
    ["cpu", "cpu=much", "{cpu: 3}", "cpu=3GiB,,", "99=1GiB", "x=1GiB", "²=1GiB", "cpu=infGB"],
)
def test_other_memory_limits_are_refused(text):
    with pytest.raises(UserError, match="--max-memory"):
        memory_limits(text)


def test_idle_gpus_are_told_with_the_command_that_uses_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    execution = Execution(torch.device("cuda", 0), torch.bfloat16)
    line = idle_gpus_line(execution, "sp3llm.compress")
    assert "one of 8 GPUs" in line
    assert "accelerate launch --num_processes 8 -m sp3llm.compress" in line
    assert idle_gpus_line(replace(execution, ranks=Ranks(0, 8)), "sp3llm.compress") is None
    assert idle_gpus_line(EXECUTION, "sp3llm.compress") is None


def emulated(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """What a tensor core makes of bfloat16 operands: exact products, summed in float32."""
    assert left.dtype == right.dtype == torch.bfloat16
    return left.float() @ right.float()


@pytest.mark.parametrize("dtypes", ["wide", "left", "both"])
def test_products_split_into_bfloat16_are_float32_products(dtypes):
    """Gram matrices of activations with a few loud channels, as language models have them: as
    exact as float32 within an order of magnitude, where plain bfloat16 is far off.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 96, generator=generator) * torch.logspace(-2, 2, 96)
    y = x @ torch.randn(96, 64, generator=generator) + torch.randn(4096, 64, generator=generator)
    x = x.bfloat16() if dtypes in ("left", "both") else x
    y = y.bfloat16() if dtypes == "both" else y
    exact = x.double().T @ y.double()
    float32 = relative_error((x.float().T @ y.float()).double(), exact)
    split = relative_error(split_product(x, y, emulated).double(), exact)
    assert split < 10 * float32 + 1e-6
    if dtypes != "both":
        plain = relative_error(emulated(x.bfloat16().T, y.bfloat16()).double(), exact)
        assert split < plain / 100


def test_symmetric_products_take_half_precision():
    x = torch.randn(50, 9).bfloat16()
    found = symmetric_product(x, x)
    assert found.dtype == torch.float32
    assert relative_error(found.double(), x.double().T @ x.double()) < 1e-6


@pytest.mark.parametrize("variant", ["llama", "opt", "qwen2-moe"])
def test_disk_streams_give_the_same_bits(variant, tokens, tmp_path):
    checkpoint = save_model(tiny_model(variant, torch.float32), tmp_path / "dense")
    family = family_of_model(tiny_model(variant))
    on_disk = replace(EXECUTION, streams="disk", scratch=tmp_path / "scratch")
    found, expected = (
        measure_dense(checkpoint, family, tokens, tokens, "normalised", "gradient", execution)
        for execution in (on_disk, EXECUTION)
    )
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0].total(), expected[0].total())
    for local_windows, other in zip(found[0].metrics_DD, expected[0].metrics_DD, strict=True):
        assert torch.equal(local_windows, other)


@pytest.mark.parametrize(
    ("asked", "weights", "device", "has_units", "expected"),
    [
        ("auto", torch.bfloat16, "cpu", True, torch.bfloat16),
        ("auto", torch.bfloat16, "cpu", False, torch.float32),
        ("auto", torch.float16, "cpu", True, torch.float32),
        ("auto", torch.float32, "cpu", True, torch.float32),
        ("auto", torch.float64, "cpu", True, torch.float64),
        ("auto", torch.bfloat16, "cuda", False, torch.bfloat16),
        ("auto", torch.float16, "cuda", False, torch.float16),
        ("float32", torch.bfloat16, "cuda", True, torch.float32),
        ("float32", torch.bfloat16, "cpu", True, torch.float32),
        ("bfloat16", torch.float32, "cpu", False, torch.bfloat16),
    ],
)
def test_the_arithmetic_is_what_weights_and_device_make_fast(
    asked, weights, device, has_units, expected, monkeypatch
):
    units = {"avx512_bf16": has_units, "avx512_f": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)
    assert compute_dtype(asked, weights, torch.device(device)) == expected


def test_a_torch_that_cannot_tell_what_the_cpu_has_gets_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert compute_dtype("auto", torch.bfloat16, torch.device("cpu")) == torch.float32


@pytest.mark.parametrize(("room", "keeps"), [(2**30, True), (4 * 2**20, False)])
def test_what_writers_read_waits_where_there_is_room(room, keeps, tmp_path, monkeypatch):
    monkeypatch.setattr("sp3llm.runtime.placement.host_memory", lambda most: room)
    needed = BytesNeeded(2**20, 2**20, 1000, inputs=8 * 2**20)
    found = place_streams(EXECUTION, "host", needed, Known(), tmp_path, {})
    assert found.keeps_inputs == keeps
    # A run that goes on does as it began.
    known = Known(keeps_inputs=not keeps)
    assert place_streams(EXECUTION, "host", needed, known, tmp_path, {}).keeps_inputs != keeps
    assert not place_streams(EXECUTION, "disk", needed, Known(), tmp_path, {}).keeps_inputs


@pytest.mark.parametrize(("room", "keeps"), [(2**30, True), (24 * 2**20, False)])
def test_what_dense_layers_leave_is_kept_where_half_of_the_room_left_is_enough(
    room, keeps, tmp_path, monkeypatch
):
    monkeypatch.setattr("sp3llm.runtime.placement.host_memory", lambda most: room)
    needed = BytesNeeded(2**20, 2**20, 1000, dense=10 * 2**20)
    assert place_streams(EXECUTION, "host", needed, Known(), tmp_path, {}).keeps_dense == keeps
    assert not place_streams(EXECUTION, "disk", needed, Known(), tmp_path, {}).keeps_dense
