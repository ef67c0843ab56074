"""The machine and the versions that a number was measured with."""

import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def versions() -> dict[str, str]:
    """Versions of everything that a result depends on."""
    installed = {"python": platform.python_version()}
    for package in ("sp3llm", "torch", "transformers", "tokenizers", "safetensors", "accelerate"):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "not installed"
    return installed


def machine(device: str) -> dict[str, Any]:
    """The machine a number was measured on."""
    about = {"processor": platform.machine(), "cpus": os.cpu_count(), "device": device}
    if device.startswith("cuda"):
        import torch

        about["device_name"] = torch.cuda.get_device_name(device)
    return about


def peak_memory() -> int:
    """Largest resident set of this process so far, bytes.

    Linux hands what `getrusage` says on to programs that a process starts: a small one would have
    the peak of the large one that called it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_memory(device: str) -> int:
    """Most memory that torch ever held on an accelerator, bytes; 0 on a CPU."""
    if not device.startswith("cuda"):
        return 0
    import torch

    return torch.cuda.max_memory_allocated(device)
