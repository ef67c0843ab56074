"""Weights that memory keeps: read and checked once, no other bytes in the result, not too many."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sp3llm.compression.attempts import _shortage_line
from sp3llm.errors import UserError
from sp3llm.models import checkpoint as checkpoints
from sp3llm.models.families import family_of
from sp3llm.models.shapes import Shape
from sp3llm.planning.needs import Workload, needs_of
from sp3llm.runtime import memory, placement
from sp3llm.runtime.devices import Execution
from sp3llm.runtime.kept import ReadBefore
from sp3llm.runtime.placement import BytesNeeded, Known, place_streams, weights_kept
from tests.conftest import save_model, tiny_model
from tests.helpers import compress_tiny

ON_CPU = Execution(torch.device("cpu"), torch.float32)
ON_GPU = replace(ON_CPU, device=SimpleNamespace(type="cuda", index=0), streams="host")
NEEDED = BytesNeeded(streams=100, working=1, token=1)


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """Names of the tensors that are read from disk."""
    names, from_disk = [], checkpoints._read_tensor

    def counted(shard, name):
        names.append(name)
        return from_disk(shard, name)

    monkeypatch.setattr(checkpoints, "_read_tensor", counted)
    return names


def test_those_read_first_stay_as_far_as_there_is_room(read, tmp_path):
    checkpoint = save_model(tiny_model("llama", torch.float32), tmp_path)
    names = sorted(checkpoint.files)
    room = checkpoint.stored_bytes(names[:3])
    checkpoint = replace(checkpoint, before=ReadBefore(room))
    once, again = checkpoint.read(names), checkpoint.read(names)
    assert read == [*names, *names[3:]]
    for name in names:
        assert torch.equal(once[name], again[name])


def test_without_room_nothing_stays_and_all_is_checked_once(read, tmp_path, monkeypatch):
    checkpoint = save_model(tiny_model("llama", torch.float32), tmp_path)
    names, checked, isfinite = sorted(checkpoint.files), [], torch.isfinite
    monkeypatch.setattr(torch, "isfinite", lambda x: checked.append(x) or isfinite(x))
    for _ in range(2):
        checkpoint.read(names)
    assert read == [*names, *names]
    assert len(checked) == len(names)


def test_what_is_not_finite_never_counts_as_read(tmp_path):
    model = tiny_model("llama", torch.float32)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    checkpoint = replace(save_model(model, tmp_path), before=ReadBefore(10**9))
    for _ in range(2):
        with pytest.raises(UserError, match=r"'model\.norm\.weight' .* holds NaN or infinity"):
            checkpoint.read(["model.norm.weight"])


@pytest.mark.parametrize("variant", ["llama-biases", "qwen2-tied", "opt", "qwen2-moe"])
@pytest.mark.parametrize("room", [10**9, 50_000])
def test_kept_weights_make_the_same_model(variant, room, read, tmp_path, monkeypatch):
    compress_tiny(variant, tmp_path / "expected")
    plain = len(read)
    monkeypatch.setattr(placement, "weights_kept", lambda *_: ReadBefore(room))
    compress_tiny(variant, tmp_path / "found")
    assert len(read) < 2 * plain
    found, expected = (
        tmp_path / name / "small/model.safetensors" for name in ("found", "expected")
    )
    assert found.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(
    ("free", "pinned", "room"), [(1000, True, 325), (1000, False, 375), (100, True, 0)]
)
def test_room_is_half_of_what_the_streams_leave(free, pinned, room, monkeypatch):
    monkeypatch.setattr(placement, "host_memory", lambda _: free)
    assert weights_kept(replace(ON_GPU, pinned=pinned), NEEDED, {})._room == room
    assert weights_kept(ON_CPU, NEEDED, {})._room == 0


LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000,
    "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
    "num_key_value_heads": 32, "num_hidden_layers": 32, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize(("cap", "fits"), [("10GiB", True), ("8GiB", False)])
def test_ten_gibibytes_are_enough_at_7b_and_less_is_told(cap, fits, tmp_path, monkeypatch):
    """Nothing asked for goes beyond the cap: what is solved, nor a batch beside its Grams."""
    family = family_of(LLAMA_2_7B)
    shape = Shape.of(family, LLAMA_2_7B).with_width(3072)
    needs = needs_of(family, LLAMA_2_7B, shape, Workload(128, 8, 2048, 2, 2))
    needed = BytesNeeded(needs.streams, needs.working, needs.token, needs.inputs, needs.running)
    most = {"0": int(cap.removesuffix("GiB")) * 2**30}
    for module in (placement, memory):
        monkeypatch.setattr(module, "gpu_memory", lambda device, caps: caps["0"])
    placed = place_streams(ON_GPU, "host", needed, Known(), tmp_path, most)
    line = _shortage_line(placed, needed, 2048, most)
    assert (line is None) == fits
    if fits:
        tokens = max(2048, placed.batch_tokens)
        assert max(needs.working, needs.running + tokens * needs.token) <= most["0"]
    else:
        assert "take about 10 GB of a GPU, of which 8.59 GB can be had" in line
    assert _shortage_line(ON_CPU, needed, 2048, most) is None


def test_a_batch_takes_no_more_than_grams_leave(tmp_path, monkeypatch):
    monkeypatch.setattr(placement, "gpu_memory", lambda *_: 16_000)
    monkeypatch.setattr(placement, "host_memory", lambda _: 10**6)
    for running, tokens in ((0, 100), (15_500, 50), (20_000, 1)):
        needed = BytesNeeded(streams=10, working=10, token=10, running=running)
        placed = place_streams(ON_GPU, "host", needed, Known(), tmp_path, {})
        assert placed.batch_tokens == tokens


def test_locked_memory_counts_as_it_comes_and_ends_where_the_system_gives_none(monkeypatch):
    locked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: locked.append(x) or x)
    before = ReadBefore(room=192, locked=True)
    before.keep("one", torch.zeros(9, dtype=torch.float64))  # 72 bytes take 128
    before.keep("two", torch.zeros(9, dtype=torch.float64))
    before.keep("three", torch.zeros(8, dtype=torch.float64))  # 64 bytes
    assert [before.kept(name) is not None for name in ("one", "two", "three")] == [
        True,
        False,
        True,
    ]
    assert len(locked) == 2

    def refuse(_: torch.Tensor) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    before = ReadBefore(room=10**6, locked=True)
    tensor = torch.zeros(8)
    assert before.keep("one", tensor) is tensor
    assert before.kept("one") is None
    assert before.is_checked("one")
