"""A teacher's largest logits: computed once, kept on disk, and taught with from then on.

A store is a folder of three arrays over all windows and positions, and an index that says whose
they are. It is filled under another name, which becomes its own when it is whole.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sp3llm.errors import UserError, reason
from sp3llm.maths.losses import TopLogits, top_divergence, top_logits
from sp3llm.recovery.teacher import LiveTeacher
from sp3llm.runtime.files import rename_durably, write_json

_INDEX = "teacher.json"
# The arrays of a store and their dtypes: token ids and log-probabilities of the largest logits, and
# the logarithm of the probability of all other tokens (`maths.losses.TopLogits`).
_ARRAYS = {"ids": np.int32, "log_probs": np.float32, "log_rest": np.float32}


@dataclass(frozen=True)
class StoredTeacher:
    """A teacher's largest logits, read from disk by the number of the window."""

    ids: np.ndarray
    """`(windows, seq_len - 1, top_k)`, mapped from disk, like the others."""
    log_probs: np.ndarray
    """`(windows, seq_len - 1, top_k)`, at the temperature of the run."""
    log_rest: np.ndarray
    """`(windows, seq_len - 1)`."""
    device: torch.device
    """Where its answers are wanted."""

    def divergence(
        self, logits: Tensor, rows: Tensor, tokens: Tensor, temperature: float
    ) -> tuple[Tensor, list[Tensor]]:
        """Divergence of the logits `(B, S - 1, V)` of the windows `rows` from the stored ones."""
        numbers = rows.numpy()
        largest = TopLogits(
            torch.from_numpy(self.ids[numbers]).to(self.device, torch.int64),
            torch.from_numpy(self.log_probs[numbers]).to(self.device),
            torch.from_numpy(self.log_rest[numbers]).to(self.device),
        )
        return top_divergence(logits, largest, temperature), []


def stored_logits(
    folder: Path, identity: dict[str, Any], device: torch.device
) -> StoredTeacher | None:
    """The teacher stored in `folder`, or None if there is nothing.

    Raises UserError if it is another teacher's, of other text or at another temperature.
    """
    if not folder.exists():
        return None
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"Expected a teacher's logits in '{folder}', found something else "
            f"({reason(error)}): choose another --teacher-logits."
        ) from error
    for key, value in identity.items():
        if index.get(key) != value:
            raise UserError(
                f"The logits in '{folder}' are of another run ({key} {index.get(key)} there, "
                f"{value} here): choose another --teacher-logits, or remove that folder."
            )
    arrays = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS)
    return StoredTeacher(*arrays, device)


def create_store(folder: Path, identity: dict[str, Any], windows: int, seq_len: int) -> Path:
    """Empty arrays for the logits of so many windows, in a folder beside `folder`."""
    partial = _partial(folder)
    shutil.rmtree(partial, ignore_errors=True)
    shape = (windows, seq_len - 1, identity["top_k"])
    try:
        partial.mkdir(parents=True)
        for name, dtype in _ARRAYS.items():
            sizes = shape[:2] if name == "log_rest" else shape
            np.lib.format.open_memmap(partial / f"{name}.npy", "w+", dtype, sizes).flush()
        write_json(partial / _INDEX, identity)
    except OSError as error:
        raise UserError(
            f"Cannot write to '{partial}' ({error.strerror}): choose another --teacher-logits."
        ) from error
    return partial


def fill_store(
    folder: Path,
    teacher: LiveTeacher,
    tokens: Tensor,
    rows: Iterable[Tensor],
    temperature: float,
) -> Iterator[int]:
    """Compute and store the logits of the windows numbered in each of `rows`; yields how many
    those were, as they are done.
    """
    arrays = {name: np.load(_partial(folder) / f"{name}.npy", mmap_mode="r+") for name in _ARRAYS}
    count = arrays["ids"].shape[-1]
    for numbers in rows:
        logits, _ = teacher.answers(tokens[numbers].to(teacher.device))
        top = top_logits(logits[:, :-1], count, temperature)
        arrays["ids"][numbers] = top.ids_BSJ.cpu().numpy()
        arrays["log_probs"][numbers] = top.log_probs_BSJ.cpu().numpy()
        arrays["log_rest"][numbers] = top.log_rest_BS.cpu().numpy()
        yield len(numbers)
    for array in arrays.values():
        array.flush()


def close_store(folder: Path) -> None:
    """Give the filled store its name."""
    rename_durably(_partial(folder), folder)


def _partial(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.partial")
