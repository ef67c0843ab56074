"""Where a model runs: devices, memory and processes. Processes are accelerate's.

Everything that is large and grows with the text lives in room that this module gives out: on the
GPU, on the host, or in files mapped into memory. What a process sums over its share of the windows
is summed over all processes here.
"""

import ctypes
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from sp3llm.errors import UserError, reason

Item = TypeVar("Item")
Value = TypeVar("Value")

# Tokens that go through a layer at once, where memory allows: more makes no matrix product faster.
_TOKENS_A_BATCH = 8192
# Bytes that the activations of those tokens may take: on a CPU, and as a share of a GPU.
_ACTIVATIONS = 64 * 2**20
_SHARE_OF_GPU = 1 / 16
# What stays free when streams are placed: other programs, fragments, the libraries' own buffers.
_MARGIN = 0.85


@dataclass(frozen=True)
class Ranks:
    """The processes that share a run."""

    index: int = 0
    count: int = 1
    device: torch.device | None = None
    """What tensors must be on to be sent; None: any."""

    @property
    def is_first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.index == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """The part of this process: every `count`-th item."""
        return items[self.index :: self.count]

    def add_(self, *tensors: Tensor) -> None:
        """Sum tensors over all processes, in place; every process gets the same bits."""
        self._each(tensors, torch.distributed.all_reduce)

    def copy_(self, *tensors: Tensor | None) -> None:
        """Replace tensors by the first process's, in place."""
        present = tuple(tensor for tensor in tensors if tensor is not None)
        self._each(present, lambda tensor: torch.distributed.broadcast(tensor, 0))

    def _each(self, tensors: tuple[Tensor, ...], act: Callable[[Tensor], Any]) -> None:
        if self.count == 1:
            return
        for tensor in tensors:
            sent = tensor.to(self.device or tensor.device).contiguous()
            act(sent)
            if sent.data_ptr() != tensor.data_ptr():
                tensor.copy_(sent)

    def gathered(self, value: Value) -> list[Value]:
        """Every process's value, in order."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What `make` returns on the first process; the others wait and get a copy.

        A UserError that it raises there is raised by all.
        """
        if self.count == 1:
            return make()
        made: list[Any] = [None, None]
        if self.is_first:
            try:
                made[0] = make()
            except UserError as error:
                made[1] = error
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(made)
        if made[1] is not None:
            made[1].of_all = True
            raise made[1]
        return made[0]

    def assembled(self, own: Tensor, mine: Tensor, count: int) -> Tensor:
        """Every process's rows, `(count, ...)`, from `own`, whose places are `mine`."""
        whole = own.new_zeros((count, *own.shape[1:]))
        whole[mine] = own
        self.add_(whole)
        return whole


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
    batch_tokens: int = _TOKENS_A_BATCH
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
            return _mapped(self.scratch, shape, dtype)
        device = self.device if self.streams == "gpu" else "cpu"
        return torch.empty(shape, dtype=dtype, device=device)


def give_back() -> None:
    """Return freed memory to the system: glibc keeps what a layer's activations took, several
    times what is in use, for whatever comes next.
    """
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:  # other systems' allocators give back by themselves
        trim(0)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def processes() -> int:
    """How many processes a launcher started, from its environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def joined(device: str) -> tuple[Ranks, str]:
    """The place of this process among those that `accelerate launch` started, and its device.

    With one process `device` is what was asked for.
    """
    if processes() == 1:
        return Ranks(), device
    from datetime import timedelta

    from accelerate import PartialState

    # The others wait while the first one downloads a model; who fails is ended by the launcher.
    state = PartialState(cpu=device == "cpu", timeout=timedelta(days=7))
    ranks = Ranks(state.process_index, state.num_processes)
    if state.device.type == "cpu":  # it has an index, which no tensor's device has
        return ranks, "cpu"
    return replace(ranks, device=state.device), str(state.device)


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


def memory_limits(text: str | None) -> dict[str, int]:
    """`--max-memory`, in bytes: `0=10GiB,cpu=30GiB`, or JSON, as accelerate writes sizes.

    Raises UserError if it is neither, or names a GPU that is not there.
    """
    if text is None:
        return {}
    from accelerate.utils import convert_file_size_to_int

    try:
        if text.lstrip().startswith("{"):
            pairs = json.loads(text).items()
        else:
            pairs = [part.split("=") for part in text.split(",")]
        found = {str(key).strip(): convert_file_size_to_int(str(size)) for key, size in pairs}
    except (ValueError, AttributeError, OverflowError) as error:
        raise UserError(
            f"Expected --max-memory like 0=10GiB,cpu=30GiB, found '{text}' ({reason(error, 80)}): "
            "give a GPU's number, or cpu, and a size with its unit."
        ) from error
    for key in found:
        gpus = torch.cuda.device_count()
        if key != "cpu" and not (key.isdecimal() and int(key) < gpus):
            raise UserError(
                f"Expected --max-memory to name cpu or one of {gpus} GPUs by its number from 0, "
                f"found '{key}': leave it out."
            )
    return found


def placed(
    on: Execution,
    streams: str,
    stream_bytes: int,
    working_bytes: int,
    token_bytes: int,
    tokens: tuple[int | None, int | None],
    scratch: Path,
    max_memory: Mapping[str, int],
) -> Execution:
    """Decide where streams lie and how many tokens go through a layer at once.

    `stream_bytes` are those of all streams together, `working_bytes` those of layers and Gram
    matrices, `token_bytes` what the activations of one token take in a layer; `tokens` are those of
    a batch, at most, and of a share, where they are known. With `auto` streams go where there is
    room: the GPU, the host, the disk. Several processes are placed as the one with least room.

    Raises UserError for streams on a GPU where there is none.
    """
    on_gpu = on.device.type == "cuda"
    if streams == "gpu" and not on_gpu:
        raise UserError("Expected a GPU for --streams gpu, found none: use host, disk or auto.")
    budget = _ACTIVATIONS
    if on_gpu:
        memory = _gpu_memory(on.device, max_memory)
        budget = int(_SHARE_OF_GPU * memory)
    own = -(-stream_bytes // on.ranks.count)
    if streams == "auto":
        host = _host_memory(max_memory) // on.ranks.count
        choice = "host" if own + (0 if on_gpu else working_bytes) < _MARGIN * host else "disk"
        if on_gpu and own + working_bytes + budget < _MARGIN * memory:
            choice = "gpu"
        order = ("gpu", "host", "disk")
        streams = max(on.ranks.gathered(choice), key=order.index)
    batch, share = tokens
    batch = min(on.ranks.gathered(batch or min(_TOKENS_A_BATCH, max(1, budget // token_bytes))))
    return replace(
        on, streams=streams, scratch=scratch, batch_tokens=batch, share_tokens=share or batch
    )


def free_memory(on: Execution, max_memory: Mapping[str, int]) -> int:
    """Bytes that can be had of the device that computes, by every process on a host."""
    if on.device.type == "cuda":
        return _gpu_memory(on.device, max_memory)
    return _host_memory(max_memory) // on.ranks.count


def _gpu_memory(device: torch.device, max_memory: Mapping[str, int]) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    return min(free, max_memory.get(str(device.index or 0), free))


def _host_memory(max_memory: Mapping[str, int]) -> int:
    """Memory that can be had without swapping, by what the kernel and the control group say."""
    import psutil

    free = psutil.virtual_memory().available
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            free = min(free, int(Path(limit).read_text()))
        except (OSError, ValueError):  # no such group, or no limit
            continue
    return min(free, max_memory.get("cpu", free))


def _mapped(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in a file that nobody else sees and that goes with its last user."""
    import tempfile

    count = torch.Size(shape).numel()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        # A hole in a mapped file that finds the disk full ends the process: take the blocks now.
        if hasattr(os, "posix_fallocate"):  # macOS has none
            os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
        return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)


def ahead(
    items: Iterable[Item],
    load: Callable[[Item], Mapping[str, Tensor]],
    on: Execution,
    first: int = 0,
) -> Iterator[tuple[Item, Mapping[str, Tensor]]]:
    """Each item with what `load` reads for it, the next one read while the caller works.

    Where there are GPUs the tensors go to the one whose turn it is; the first item has number
    `first`.
    """
    with ThreadPoolExecutor(1) as pool:
        before = None
        for turn, item in enumerate(items, first):
            after = item, pool.submit(_loaded, load, item, on.turn(turn).device)
            if before is not None:
                yield before[0], before[1].result()
            before = after
        if before is not None:
            yield before[0], before[1].result()


@functools.cache
def _copying(device: torch.device) -> "torch.cuda.Stream":
    """One for all layers: torch keeps freed memory for the stream that it was taken on."""
    return torch.cuda.Stream(device)


def _loaded(
    load: Callable[[Item], Mapping[str, Tensor]], item: Item, device: torch.device
) -> Mapping[str, Tensor]:
    tensors = load(item)
    if device.type != "cuda":
        return tensors
    # A stream of its own, so that the copy does not wait for the layer that is computing.
    copying = _copying(device)
    with torch.cuda.stream(copying):
        moved = {
            name: tensor.pin_memory().to(device, non_blocking=True)
            for name, tensor in tensors.items()
        }
    copying.synchronize()
    for tensor in moved.values():
        tensor.record_stream(torch.cuda.default_stream(device))
    return moved
