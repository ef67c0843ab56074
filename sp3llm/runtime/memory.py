"""Memory: what there is, what may be taken, and giving it back."""

import ctypes
import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from sp3llm.errors import UserError, reason


def trim_memory() -> None:
    """Return freed memory to the system: glibc keeps what a layer's activations took, several
    times what is in use, for whatever comes next.
    """
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:  # other systems' allocators give back by themselves
        trim(0)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


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
        limits = {str(key).strip(): convert_file_size_to_int(str(size)) for key, size in pairs}
    except (ValueError, AttributeError, OverflowError) as error:
        raise UserError(
            f"Expected --max-memory like 0=10GiB,cpu=30GiB, found '{text}' ({reason(error, 80)}): "
            "give a GPU's number, or cpu, and a size with its unit."
        ) from error
    for key in limits:
        gpus = torch.cuda.device_count()
        if key != "cpu" and not (key.isdecimal() and int(key) < gpus):
            raise UserError(
                f"Expected --max-memory to name cpu or one of {gpus} GPUs by its number from 0, "
                f"found '{key}': leave it out."
            )
    return limits


# How libraries that take memory of a GPU by themselves say that there was none: torch raises their
# errors as RuntimeError. cuBLAS and cuSOLVER are out of memory too where they cannot begin.
_NO_MEMORY = (
    *("out of memory", "cudaerrormemoryallocation", "status_alloc_failed"),
    *("cublas_status_not_initialized", "cublascreate(", "cusolverdncreate("),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU, or memory locked for it, has run out: torch's own, or a
    RuntimeError of what it calls.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(said in text for said in _NO_MEMORY)


def gpu_memory(device: torch.device, max_memory: Mapping[str, int]) -> int:
    """Bytes that can be had of a GPU, within what the user allows."""
    free, _ = torch.cuda.mem_get_info(device)
    return min(free, max_memory.get(str(device.index or 0), free))


# Where control groups lie and what holds what one may take and has taken, in both versions of the
# kernel's interface, by the controllers that `_OWN_GROUPS` names.
_CONTROL_GROUPS = {
    "": ("", "memory.max", "memory.current"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
}
_CONTROL_GROUP_ROOT = Path("/sys/fs/cgroup")
# Lines `number:controllers:path`: which groups this process is in.
_OWN_GROUPS = Path("/proc/self/cgroup")


def host_memory(max_memory: Mapping[str, int]) -> int:
    """Memory that can be had without swapping, by what the kernel and the control groups say: of
    the latter what is left, not what they may have in all.
    """
    import psutil

    free = psutil.virtual_memory().available
    for most, taken in _limits():
        try:
            limit, used = (int(path.read_text()) for path in (most, taken))
        except (OSError, ValueError):  # no such group, or no limit
            continue
        free = min(free, max(0, limit - used))
    return min(free, max_memory.get("cpu", free))


def _limits() -> Iterator[tuple[Path, Path]]:
    """Files of what each control group of this process, and each around it, may take and has taken:
    the limit of a batch job or a service is on one of them, seldom on the outermost.
    """
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        lines = []
    named = dict.fromkeys(_CONTROL_GROUPS, "/")  # what a container sees of its own
    for line in lines:
        _, controllers, path = line.split(":", 2)
        named |= dict.fromkeys(named.keys() & set(controllers.split(",")), path)
    for controller, path in named.items():
        below, most, taken = _CONTROL_GROUPS[controller]
        group = PurePosixPath(path.lstrip("/"))
        for around in (group, *group.parents):
            folder = _CONTROL_GROUP_ROOT / below / around
            yield folder / most, folder / taken


def mapped_tensor(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in a file that nobody else sees and that goes with its last user."""
    import tempfile

    count = torch.Size(shape).numel()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        # A hole in a mapped file that finds the disk full ends the process: take the blocks now.
        if hasattr(os, "posix_fallocate"):  # macOS has none
            os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
        return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)
