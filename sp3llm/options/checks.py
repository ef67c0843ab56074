"""Checks that several commands share. Each raises `UserError` in one sentence."""

import math
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from sp3llm.errors import UserError
from sp3llm.options.choices import BITS
from sp3llm.options.field import Option, flag, option_of


def check_fields(settings: Any) -> None:
    """Refuses the values that the options' own descriptions exclude: bounds and choices."""
    for field in fields(settings):
        option, value = option_of(field), getattr(settings, field.name)
        if value is None and field.default is None:
            continue
        _check_bounds(flag(field.name), option, value)
        if option.choices and value not in option.choices:
            raise UserError(
                f"Expected {flag(field.name)} to be one of {', '.join(option.choices)}, found "
                f"'{value}': choose one of them."
            )


def _check_bounds(name: str, option: Option, value: Any) -> None:
    if (option.least, option.above, option.most) == (None, None, None):
        return
    values = value if isinstance(value, tuple) else (value,)
    finite = all(map(math.isfinite, values))
    found = ", ".join(f"{one:g}" if isinstance(one, float) else str(one) for one in values)
    if option.above is not None and not (finite and min(values) > option.above):
        raise UserError(
            f"Expected {name} above {option.above}, found {found}: give a positive number."
        )
    if option.least is not None and not (values and finite and min(values) >= option.least):
        instead = "give a larger number" if option.least else "give 0 or more"
        raise UserError(
            f"Expected {name} of at least {option.least}, found {found or 'none'}: {instead}."
        )
    if option.most is not None and max(values) > option.most:
        raise UserError(
            f"Expected {name} of at most {option.most}, found {found}: give a smaller number."
        )


def check_bits(name: str, bits: str) -> None:
    """Refuses what bitsandbytes does not have; `name` is the field's."""
    if bits not in BITS:
        raise UserError(
            f"Expected {flag(name)} to be {' or '.join(BITS)}, found '{bits}': choose one of them."
        )


def check_out(out: Path | None) -> None:
    """Refuses the root folder, beside which nothing can be written."""
    if out is not None and not Path(os.path.abspath(out)).name:
        raise UserError(f"Expected --out to name a folder of its own, found '{out}': name another.")


def check_recovery_device(device: str) -> None:
    """Refuses a device that accelerate would not be asked for by name."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"Expected --device auto, cuda or cpu for recovery, found '{device}': choose GPUs with "
            "CUDA_VISIBLE_DEVICES or accelerate launch."
        )
