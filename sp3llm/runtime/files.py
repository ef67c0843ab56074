"""Files that are whole or not there: durable writes, tensors a chunk at a time, hashes."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


def write_json(path: Path, value: Any) -> None:
    """Write JSON, indented, with a closing newline."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


_CHUNK = 2**24

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def durable(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` write under another name, bring that to the disk, and give it its own."""
    aside = path.with_name(f"{path.name}.new")
    write(aside)
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file, durably; returns its sha256.

    A chunk at a time: safetensors' own writer copies all tensors first, which for a stream or a
    shard is as much memory again. The tensors may be on any device, or mapped from files.
    """
    # The format wants no padding, and readers want every tensor aligned to its own item.
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()

    def write(aside: Path) -> None:
        with aside.open("wb") as file:
            for piece in (len(encoded).to_bytes(8, "little"), encoded):
                file.write(piece)
                digest.update(piece)
            for name in names:
                for piece in _chunks(tensors[name]):
                    file.write(piece)
                    digest.update(piece)

    durable(path, write)
    return digest.hexdigest()


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    rows = tensor.detach()
    if not rows.is_contiguous() and rows.ndim > 1:
        for row in rows:  # as a whole it would have to be copied
            yield from _chunks(row)
        return
    for piece in rows.reshape(-1).split(_CHUNK):
        yield memoryview(piece.contiguous().cpu().view(torch.uint8).numpy())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, mapped into memory."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def file_hash(path: Path) -> str | None:
    """sha256 of a file; None if there is none."""
    if not path.is_file():
        return None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()
