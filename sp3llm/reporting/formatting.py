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


def human_count(count: int) -> str:
    """`7.9 M`: three digits, in thousands, millions or billions."""
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return str(count)


def figure(value: float | None, form: str = ".4f") -> str:
    """A number in a format of Python's; nothing where it is unknown."""
    return "" if value is None else f"{value:{form}}"


def plain(value: Any) -> str:
    """A setting as text: `yes` and `no`, and nothing for None."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def cell(value: Any) -> str:
    """A number or text in a table: thousands apart, four digits where it is no whole number."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
