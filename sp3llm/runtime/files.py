"""Files that are whole or not there: durable writes, tensors a chunk at a time, hashes."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

# Bytes read, or items written, at once: enough for a disk to run at full speed, and little memory.
_CHUNK = 2**24

# torch's dtypes by the names of safetensors' format.
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


def write_json(path: Path, value: Any, allow_nan: bool = False) -> None:
    """Write JSON, indented, with a closing newline.

    With `allow_nan` infinities are written as Python and transformers write and read them, which
    JSON itself does not know.
    """
    path.write_text(json.dumps(value, indent=2, allow_nan=allow_nan) + "\n", encoding="utf-8")


def flush(path: Path) -> None:
    """Wait until what was written to a file, or which files a folder holds, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename_durably(aside: Path, path: Path) -> None:
    """Give a file, or a folder with all that is in it, its final name, once it is on the disk.

    At `path` there may be a file, which is replaced, or an empty folder.
    """
    inside = aside.rglob("*") if aside.is_dir() else ()
    for written in (*inside, aside):
        flush(written)
    os.replace(aside, path)
    flush(path.parent)


def write_durably(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file that is whole, or as it was before, whenever the machine stops.

    `write` is called with the path to write to, another name in the same folder.
    """
    aside = path.with_name(f"{path.name}.new")
    write(aside)
    rename_durably(aside, path)


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

    def pieces() -> Iterator[bytes | memoryview]:
        yield len(encoded).to_bytes(8, "little")
        yield encoded
        for name in names:
            yield from _chunks(tensors[name])

    def write(aside: Path) -> None:
        # Hashing takes longer than writing: it goes on beside, one piece behind.
        with aside.open("wb") as file, ThreadPoolExecutor(1) as beside:
            hashed = beside.submit(digest.update, b"")
            for piece in pieces():
                file.write(piece)
                hashed.result()
                hashed = beside.submit(digest.update, piece)

    write_durably(path, write)
    return digest.hexdigest()


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, row-major, in pieces."""
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
