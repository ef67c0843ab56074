"""What the steps of `encoders.py` start from, beside the command as it is."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import finished, record_of
from magnitude_cut import cut_by_magnitude
from rich.console import Console
from torch import Tensor

from sp3llm.compression.story import compress
from sp3llm.options import CompressConfig
from sp3llm.runtime.files import write_tensors

# Shapes of their own, or the one that the command chose with other weights, or with another basis.
SEARCHED, MASKED = ("compressed", "without-layers"), ("mask", "mask-shape")
DRAWN, POLICIES = ("random", "magnitude"), ("no-turn", "channels")
STARTS = (*SEARCHED, *DRAWN, *POLICIES, *MASKED)
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers")


def started_from(
    start: str, settings: dict[str, Any], found: Path, console: Console
) -> tuple[Path, Path]:
    """The folder of a compressed encoder whose record says what it is, and that of what the steps
    begin with: another one where weights are others. `settings` are those of the command, `found`
    is where it wrote what it chose. What is finished is not made again.
    """
    if start in SEARCHED:
        return _compressed(settings, found, console), found
    if start in DRAWN:
        _compressed(settings, found, console)
        saves = {
            "random": partial(_save_drawn, found, settings["seed"]),
            "magnitude": partial(_save_cut, Path(settings["model"]), found),
        }
        return found, _with_weights(found, found.with_name(f"{found.name}-{start}"), saves[start])
    out = found.with_name(f"{found.name}-{start}")
    if start in POLICIES:
        _compressed(settings, found, console)
        with _policy(start):
            _compressed({**settings, **_sizes(found)}, out, console)
    else:
        masked = found.with_name(f"{found.name}-mask")
        _compressed({**settings, "mask": "learned"}, masked, console)
        if start == "mask-shape":
            _compressed({**settings, **_sizes(masked)}, out, console)
    return out, out


def _compressed(settings: dict[str, Any], out: Path, console: Console) -> Path:
    if not finished(out):
        compress(CompressConfig(out=out, report=False, **settings), console)
    return out


def _sizes(folder: Path) -> dict[str, int]:
    """The shape of a model, as the command is given it by hand."""
    plan = record_of(folder)["plan"]
    shape, dense = plan["shape"], plan["dense_shape"]
    shrinks = shape["head_dim"] != dense["head_dim"]  # else heads go whole
    heads = "head_dim" if shrinks else "num_key_value_heads"
    return {name: shape[name] for name in (*_SIZES, heads)}


@contextmanager
def _policy(name: str) -> Iterator[None]:
    """Runs in which the basis of the stream is not turned so that norms stay diagonal: principal
    as it is, or the channels of most energy, along which they are diagonal at once.
    """

    def along(setting: Any, basis_DK: Tensor) -> Tensor:
        if name == "no-turn":
            return basis_DK
        kept_K = setting.moments.total().diagonal().topk(basis_DK.shape[1]).indices.sort().values
        return torch.eye(len(basis_DK)).to(basis_DK)[:, kept_K]

    with mock.patch("sp3llm.compression.basis_choice._turned", along):
        yield


def _with_weights(small: Path, out: Path, save: Callable[[Path], Any]) -> Path:
    """The model with other weights in place of its own, which `save` writes to a folder, all else
    beside them; made once, and whole if it is there.
    """
    if not out.is_dir():
        aside = out.with_name(f"{out.name}.new")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(small, aside)
        save(aside)
        aside.rename(out)
    return out


def _save_drawn(small: Path, seed: int, folder: Path) -> None:
    """Write the weights that the class of the model in `small` draws."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(small))
    model.save_pretrained(folder)


def _save_cut(dense: Path, small: Path, folder: Path) -> None:
    """Write the weights of `dense`, cut by magnitude to the shape of `small`."""
    write_tensors(folder / "model.safetensors", cut_by_magnitude(dense, small))
