"""Where a model runs, and in which arithmetic.

Everything that is large and grows with the text lies where this module allocates it: on the GPU, on
the host, or in files mapped into memory.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
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
    ranks: Ranks = field(default_factory=Ranks)
    streams: str = "host"
    """Where residual streams lie: `gpu`, `host` or `disk`."""
    pinned: bool = False
    """Whether streams on the host are locked in memory, which a GPU copies from and to beside what
    it computes (`runtime.transfer`)."""
    scratch: Path | None = None
    """Folder for streams on disk; their files vanish with the process."""
    batch_tokens: int = TOKENS_PER_BATCH
    """Tokens that go through a layer at once, in whole windows (one at least)."""
    keeps_inputs: bool = False
    """What the last writer of a layer reads waits for its fit where streams lie, as what the others
    read does; else its block runs a second time."""
    keeps_dense: bool = False
    """What the dense layers leave of the calibration windows is kept in memory from the first pass
    for the refit, which computes the same otherwise."""
    share_tokens: int | None = None
    """Tokens that are dealt out to processes at once, for as long as a run lasts; None: a batch."""

    def windows_a_batch(self, seq_len: int) -> int:
        """Windows that go through a layer at once."""
        return max(1, self.batch_tokens // seq_len)

    def local_windows(self, windows: int, seq_len: int) -> Tensor:
        """Which windows are this process's, rising.

        Whole batches are dealt out: what is computed in one does not depend, to the last bit, on
        how many processes there are, only the order does in which batches are summed. Who has
        which windows never changes in a run, even where batches have to become smaller.
        """
        size = max(1, (self.share_tokens or self.batch_tokens) // seq_len)
        size = min(size, -(-windows // self.ranks.count))
        batch = torch.arange(windows) // size
        return (batch % self.ranks.count == self.ranks.index).nonzero()[:, 0]

    def empty_stream(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor where streams lie.

        Raises UserError if the disk has no room for it.
        """
        if self.streams == "disk" and torch.Size(shape).numel():
            return mapped_tensor(self.scratch, shape, dtype)
        if self.streams == "gpu":
            return torch.empty(shape, dtype=dtype, device=self.device)
        if self.pinned:
            try:
                return torch.empty(shape, dtype=dtype, pin_memory=True)
            except RuntimeError as error:  # only slower: the system limits how much is locked
                warnings.warn(
                    f"Streams are not locked in memory ({reason(error, 80)}); copies take longer.",
                    stacklevel=1,
                )
        return torch.empty(shape, dtype=dtype)


def arithmetic_of(dense: torch.dtype, small: torch.dtype) -> torch.dtype:
    """The dtype that both the dense model and the export are computed in on an accelerator: the
    wider of the two; of float16 and bfloat16, which torch would promote to float32, bfloat16.
    """
    if {dense, small} == {torch.float16, torch.bfloat16}:
        return torch.bfloat16
    return torch.promote_types(dense, small)


# What `torch.cpu.get_capabilities` calls units that multiply bfloat16 numbers: of Intel and AMD,
# and of Arm.
_BFLOAT16_UNITS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")


def has_bfloat16_units() -> bool:
    """Whether the CPU multiplies bfloat16 matrices faster than float32 ones, as torch has it; a
    torch before 2.10, which cannot tell, counts as no.
    """
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(unit) for unit in _BFLOAT16_UNITS)


def compute_dtype(asked: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Resolve `--compute-dtype` for weights of `dtype`, the wider of checkpoint's and export's.

    `auto`: on an accelerator that dtype; on a CPU bfloat16 for bfloat16 weights where it has units
    for it, float64 for float64 weights, and else float32.
    """
    if asked != "auto":
        return getattr(torch, asked)
    as_stored = torch.float64
    if device.type != "cpu" or (dtype == torch.bfloat16 and has_bfloat16_units()):
        as_stored = dtype
    return dtype if dtype == as_stored else torch.float32


def resolve_execution(
    device: str,
    dtype: torch.dtype,
    ranks: Ranks | None = None,
    max_memory: Mapping[str, int] | None = None,
    asked: str = "auto",
) -> Execution:
    """Resolve `--device` (`auto`: a GPU, if there is one) and the arithmetic that goes with it.

    `dtype` is the wider of the dense checkpoint's and the export's; see `compute_dtype`, whose
    `asked` it is. TF32 is never used. `max_memory` caps what torch may take of a GPU, in bytes;
    where it names some, the first of those is the one.

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
    if device == "cuda":
        resolved = torch.device("cuda", named[0] if named else torch.cuda.current_device())
    most = (max_memory or {}).get(str(resolved.index))
    if most is not None:
        total = torch.cuda.get_device_properties(resolved).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), resolved)
    return Execution(resolved, compute_dtype(asked, dtype, resolved), ranks or Ranks())


def idle_gpus_line(execution: Execution, module: str) -> str | None:
    """A line to print where one process leaves GPUs idle; `module` is the command's, for
    `accelerate launch -m`.
    """
    count = torch.cuda.device_count() if execution.device.type == "cuda" else 1
    if count < 2 or execution.ranks.count > 1:
        return None
    return (
        f"Using one of {count} GPUs, {execution.device}; `accelerate launch --num_processes "
        f"{count} -m {module} ...` uses all of them."
    )
