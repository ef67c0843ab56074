"""Where the streams of all windows lie, and how many tokens go through a layer at once."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sp3llm.errors import UserError
from sp3llm.runtime.devices import TOKENS_PER_BATCH, Execution
from sp3llm.runtime.kept import ReadBefore
from sp3llm.runtime.memory import gpu_memory, host_memory

# Bytes that the activations of the tokens in a layer may take: on a CPU, where more than its caches
# hold makes nothing faster, and as a share of a GPU, most of which is for weights and streams.
_ACTIVATIONS = 256 * 2**20
_SHARE_OF_GPU = 1 / 16
# The share of free memory that is counted on: the rest is for other programs, fragments, and the
# libraries' own buffers.
_USABLE = 0.85
# Locked memory comes in powers of two, so that a stream may take this many times its bytes.
_PINNED_ROUNDING = 2


@dataclass(frozen=True)
class BytesNeeded:
    """What a run needs of memory."""

    streams: int
    """The residual streams of all windows, over all processes."""
    working: int
    """Layers and Gram matrices, in every process."""
    token: int
    """The activations of one token in a layer."""
    inputs: int = 0
    """What the widest writer reads, of all windows, over all processes."""
    running: int = 0
    """Of `working`, what is there while tokens go through a layer; the rest is for solves."""
    dense: int = 0
    """What the dense layers leave of all windows, over all processes."""


@dataclass(frozen=True)
class Known:
    """What a run before has found out, and holds for as long as the run lasts."""

    batch_tokens: int | None = None
    """The most tokens that may go through a layer at once."""
    share_tokens: int | None = None
    """See `Execution`."""
    keeps_inputs: bool | None = None
    """See `Execution`: sums may depend on it in their last bits."""


def place_streams(
    execution: Execution,
    streams: str,
    needed: BytesNeeded,
    known: Known,
    scratch: Path,
    max_memory: Mapping[str, int],
) -> Execution:
    """Decide where streams lie and how many tokens go through a layer at once.

    `streams` is `gpu`, `host`, `disk` or `auto`: where there is room, in this order. What is
    `known` stays; streams on disk go to `scratch`; `max_memory` is what may be taken
    (`memory_limits`). Several processes are placed as the one with least room.

    Raises UserError for streams on a GPU where there is none.
    """
    on_gpu = execution.device.type == "cuda"
    if streams == "gpu" and not on_gpu:
        raise UserError("Expected a GPU for --streams gpu, found none: use host, disk or auto.")
    budget = _ACTIVATIONS
    if on_gpu:
        memory = gpu_memory(execution.device, max_memory)
        budget = min(int(_SHARE_OF_GPU * memory), max(0, memory - needed.running))
    own, inputs = (_share(execution, whole) for whole in (needed.streams, needed.inputs))
    host = host_memory(max_memory) // execution.ranks.local_count
    beside = 0 if on_gpu else needed.working
    if streams == "auto":
        choice = "host" if own + beside < _USABLE * host else "disk"
        if on_gpu and own + needed.working + budget < _USABLE * memory:
            choice = "gpu"
        order = ("gpu", "host", "disk")
        streams = max(execution.ranks.all_gather(choice), key=order.index)
    keeps = known.keeps_inputs
    if keeps is None:
        room = {"host": _USABLE * host - beside, "disk": 0}
        if on_gpu:
            room["gpu"] = _USABLE * memory - needed.working - budget
        keeps = all(execution.ranks.all_gather(own + inputs < room[streams]))
    held = own + (inputs if keeps else 0)
    # On a GPU running a layer again is as fast as to fetch what it has left.
    left = 0 if on_gpu or streams != "host" else int(_USABLE * host - beside - held)
    keeps_dense = _share(execution, needed.dense) < left // 2
    pinned = on_gpu and streams == "host" and _PINNED_ROUNDING * held < _USABLE * host
    batch = known.batch_tokens
    most = min(TOKENS_PER_BATCH, max(1, budget // needed.token))
    batch = min(execution.ranks.all_gather(batch or most))
    return replace(
        execution,
        streams=streams,
        pinned=pinned,
        scratch=scratch,
        batch_tokens=batch,
        share_tokens=known.share_tokens or batch,
        keeps_inputs=keeps,
        keeps_dense=keeps_dense,
    )


def least_memory(execution: Execution, needed: BytesNeeded, seq_len: int) -> int:
    """Bytes of a GPU that a run takes with one window of `seq_len` tokens at once, its streams
    where they were placed: what is solved for a layer, or what its tokens take, which are never
    there together.
    """
    own = _held(execution, needed) if execution.streams == "gpu" else 0
    return own + max(needed.working, needed.running + seq_len * needed.token)


def weights_kept(
    execution: Execution, needed: BytesNeeded, max_memory: Mapping[str, int]
) -> ReadBefore:
    """Room for a checkpoint's weights in the memory of the host of a GPU, beside the streams as
    they are placed: half of what is left.

    A model on a CPU is mapped from its files, and the system keeps of them what it has room for.
    """
    if execution.device.type != "cuda":
        return ReadBefore()
    left = int(_USABLE * (host_memory(max_memory) // execution.ranks.local_count))
    if execution.streams == "host":
        own = _held(execution, needed)
        left -= _PINNED_ROUNDING * own if execution.pinned else own
    return ReadBefore(max(0, left // 2), locked=True)


def _held(execution: Execution, needed: BytesNeeded) -> int:
    """Bytes of streams, and of inputs that wait with them, that a process holds as it is placed."""
    return _share(execution, needed.streams + (needed.inputs if execution.keeps_inputs else 0))


def _share(execution: Execution, whole: int) -> int:
    """Of bytes that all processes hold together those of one, rounded up."""
    return -(-whole // execution.ranks.count)


def free_memory(execution: Execution, max_memory: Mapping[str, int]) -> int:
    """Bytes that can be had of the device that computes, by every process on a host."""
    if execution.device.type == "cuda":
        return gpu_memory(execution.device, max_memory)
    return host_memory(max_memory) // execution.ranks.local_count
