"""Numbers as people read them."""

from collections.abc import Mapping
from typing import Any


def provenance(record: Mapping[str, Any]) -> str:
    """One line: the machine and the versions that a record names."""
    hardware = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    software = ", ".join(f"{key} {value}" for key, value in record["versions"].items())
    return f"Machine: {hardware}; {software}."


def human_bytes(count: float) -> str:
    """`15.8 MB`: decimal units, as disks and model hubs count."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} TB"


def human_time(seconds: float) -> str:
    """`42 s`, `3 min 5 s`, `2 h 10 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"
