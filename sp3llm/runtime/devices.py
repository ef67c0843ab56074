"""Where a model runs, and in which arithmetic.

Everything that is large and grows with the text lies where this module allocates it: on the GPU, on
the host, or in files mapped into memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from sp3llm.errors import UserError, reason
from sp3llm.runtime.memory import mapped_tensor
from sp3llm.runtime.processes import Ranks

# Tokens that go through a layer at once, where memory allows: more makes no matrix product faster.
TOKENS_PER_BATCH = 8192


@dataclass(frozen=True)
class Execution:
    """Where and in which arithmetic a model runs."""

    device: torch.device
    dtype: torch.dtype
    devices: tuple[torch.device, ...] = ()
    """Those that take layers in turn; empty: `device` alone."""
    ranks: Ranks = field(default_factory=Ranks)
    streams: str = "host"
    """Where residual streams lie: `gpu`, `host` or `disk`."""
    scratch: Path | None = None
    """Folder for streams on disk; their files vanish with the process."""
    batch_tokens: int = TOKENS_PER_BATCH
    """Tokens that go through a layer at once, in whole windows (one at least)."""
    share_tokens: int | None = None
    """Tokens that are dealt out to processes at once, for as long as a run lasts; None: a batch."""

    def turn(self, layer: int) -> "Execution":
        """The same, on the device whose turn `layer` is."""
        if len(self.devices) < 2:
            return self
        return replace(self, device=self.devices[layer % len(self.devices)])

    def windows_a_batch(self, seq_len: int) -> int:
        """Windows that go through a layer at once."""
        return max(1, self.batch_tokens // seq_len)

    def mine(self, windows: int, seq_len: int) -> Tensor:
        """Which windows are this process's, rising.

        Whole batches are dealt out: what is computed in one does not depend, to the last bit, on
        how many processes there are, only the order does in which batches are summed. Who has
        which windows never changes in a run, even where batches have to become smaller.
        """
        size = max(1, (self.share_tokens or self.batch_tokens) // seq_len)
        size = min(size, -(-windows // self.ranks.count))
        batch = torch.arange(windows) // size
        return (batch % self.ranks.count == self.ranks.index).nonzero()[:, 0]

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor where streams lie.

        Raises UserError if the disk has no room for it.
        """
        if self.streams == "disk" and torch.Size(shape).numel():
            return mapped_tensor(self.scratch, shape, dtype)
        device = self.device if self.streams == "gpu" else "cpu"
        return torch.empty(shape, dtype=dtype, device=device)


def execution(
    device: str,
    dtype: torch.dtype,
    ranks: Ranks | None = None,
    max_memory: Mapping[str, int] | None = None,
) -> Execution:
    """Resolve `--device` (`auto`: all GPUs, if there is one) and the arithmetic that goes with it.

    `dtype` is the wider of the dense checkpoint's and the export's. On a CPU everything runs in
    float32 (float64 for float64 weights), on an accelerator in that dtype. TF32 is never used.
    `max_memory` caps what torch may take of each GPU, in bytes; where it names some, the others
    are left alone.

    Raises UserError if there is no such device.
    """
    named = [int(key) for key in max_memory or {} if key != "cpu"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
        torch.zeros(1, dtype=torch.float64, device=resolved).item()
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        raise UserError(
            f"Expected a device on which torch can use float64, found '{device}' "
            f"({reason(error, 120)}): use --device cpu or auto."
        ) from error
    devices: tuple[torch.device, ...] = ()
    if device == "cuda":
        found = named or range(torch.cuda.device_count())
        devices = tuple(torch.device("cuda", index) for index in found)
        resolved = devices[0]
    for index in (d.index for d in devices or (resolved,) if str(d.index) in (max_memory or {})):
        total = torch.cuda.get_device_properties(index).total_memory
        share = min(1.0, max_memory[str(index)] / total)
        torch.cuda.set_per_process_memory_fraction(share, index)
    on_cpu = resolved.type == "cpu" and dtype != torch.float64
    return Execution(resolved, torch.float32 if on_cpu else dtype, devices, ranks or Ranks())
