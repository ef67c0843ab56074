"""Where the streams of all windows lie, and how many tokens go through a layer at once."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from sp3llm.errors import UserError
from sp3llm.runtime.devices import TOKENS_PER_BATCH, Execution
from sp3llm.runtime.memory import gpu_memory, host_memory

# Bytes that the activations of those tokens may take: on a CPU, and as a share of a GPU.
_ACTIVATIONS = 64 * 2**20
_SHARE_OF_GPU = 1 / 16
# What stays free when streams are placed: other programs, fragments, the libraries' own buffers.
_MARGIN = 0.85


def place_streams(
    execution: Execution,
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
    on_gpu = execution.device.type == "cuda"
    if streams == "gpu" and not on_gpu:
        raise UserError("Expected a GPU for --streams gpu, found none: use host, disk or auto.")
    budget = _ACTIVATIONS
    if on_gpu:
        memory = gpu_memory(execution.device, max_memory)
        budget = int(_SHARE_OF_GPU * memory)
    own = -(-stream_bytes // execution.ranks.count)
    if streams == "auto":
        host = host_memory(max_memory) // execution.ranks.count
        choice = "host" if own + (0 if on_gpu else working_bytes) < _MARGIN * host else "disk"
        if on_gpu and own + working_bytes + budget < _MARGIN * memory:
            choice = "gpu"
        order = ("gpu", "host", "disk")
        streams = max(execution.ranks.all_gather(choice), key=order.index)
    batch, share = tokens
    batch = min(
        execution.ranks.all_gather(batch or min(TOKENS_PER_BATCH, max(1, budget // token_bytes)))
    )
    return replace(
        execution, streams=streams, scratch=scratch, batch_tokens=batch, share_tokens=share or batch
    )


def free_memory(execution: Execution, max_memory: Mapping[str, int]) -> int:
    """Bytes that can be had of the device that computes, by every process on a host."""
    if execution.device.type == "cuda":
        return gpu_memory(execution.device, max_memory)
    return host_memory(max_memory) // execution.ranks.count
