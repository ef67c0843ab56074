"""A model is told from another one by its files, however large they are."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sp3llm.models import checkpoint
from sp3llm.models.checkpoint import identity, open_checkpoint, open_model
from tests.conftest import save_model, tiny_model

# Whether files are hashed whole, or their headers and pieces of their tensors.
HASHED_WHOLE = pytest.mark.parametrize("whole", [True, False])


@pytest.fixture
def limited(monkeypatch):
    def limit(whole: bool) -> None:
        monkeypatch.setattr(checkpoint, "_HASHED_WHOLE", 10**9 if whole else 0)

    return limit


@HASHED_WHOLE
def test_another_model_is_not_this_one(whole, limited, tmp_path):
    limited(whole)
    one = save_model(tiny_model("llama", torch.float32), tmp_path / "one")
    other = save_model(tiny_model("llama-biases", torch.float32), tmp_path / "other")
    again = save_model(tiny_model("llama", torch.float32), tmp_path / "again")
    assert identity(one) == identity(again)
    assert identity(one).keys() == {"config.json", "model.safetensors"}
    assert identity(one) != identity(other)


@HASHED_WHOLE
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_edit_of_any_one_tensor_is_noticed(kind, whole, limited, tmp_path):
    limited(whole)
    save_model(tiny_model("llama", torch.float32), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    if kind == "bin":
        path.unlink()

    def identity_of(edited: dict[str, torch.Tensor]) -> dict[str, str]:
        if kind == "safetensors":
            save_file(edited, path, metadata={"format": "pt"})
        else:
            torch.save(edited, tmp_path / "pytorch_model.bin")
            checkpoint._load_bin.cache_clear()
        return identity(open_checkpoint(tmp_path))

    before = identity_of(tensors)
    assert before == identity_of(tensors)
    for name, tensor in tensors.items():
        edited = tensor.clone()
        edited.view(-1)[edited.numel() // 3] += 1e-3
        assert identity_of({**tensors, name: edited}) != before, name


def test_large_tensors_are_sampled_from_end_to_end(limited):
    limited(False)
    pieces = checkpoint._pieces(100, 100 + 10**9)
    assert len(pieces) == checkpoint._PIECES
    assert pieces[0][0] == 100
    assert pieces[-1][1] == 100 + 10**9
    assert all(last - first == checkpoint._PIECE_BYTES for first, last in pieces)
    assert checkpoint._pieces(5, 5) == [(5, 5)]


def test_another_config_is_another_model(tmp_path):
    one = save_model(tiny_model("llama", torch.float32), tmp_path)
    before = identity(one)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-4}))
    after = identity(open_model(tmp_path)[0])
    assert {name for name in before if before[name] != after[name]} == {"config.json"}
