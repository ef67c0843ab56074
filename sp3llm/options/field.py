"""What a field of a settings dataclass says about its option."""

from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal

_KEY = "option"


@dataclass(frozen=True)
class Option:
    """What the type, the name and the default of a field leave open about its option."""

    help: str
    """What it does. `{choices}` stands for the choices, which otherwise come last."""
    shown: str | None = None
    """What the default is called; None: as it is written on the command line."""
    metavar: str | None = None
    """What the value is called; None: by its type."""
    choices: tuple[str, ...] = ()
    """The values it takes; empty: any."""
    least: int | None = None
    """The smallest number it takes."""
    above: int | None = None
    """The number that it must be larger than."""
    positional: bool = False
    """Given without its name."""
    recorded: Literal["changed", "always", "never"] = "changed"
    """When the recorded command line names it."""


def option(
    help: str,
    *,
    default: Any = MISSING,
    shown: str | None = None,
    metavar: str | None = None,
    choices: tuple[str, ...] = (),
    least: int | None = None,
    above: int | None = None,
    positional: bool = False,
    recorded: Literal["changed", "always", "never"] = "changed",
) -> Any:
    """A dataclass field that is an option; without a default it must be given. See `Option`."""
    said = Option(help, shown, metavar, choices, least, above, positional, recorded)
    return field(default=default, metadata={_KEY: said})


def same_as(settings: type, name: str) -> Any:
    """A dataclass field with the default and the description of another dataclass's."""
    (found,) = (found for found in fields(settings) if found.name == name)
    return field(default=found.default, metadata=found.metadata)


def option_of(field: Field) -> Option:
    """What a field that `option` or `same_as` made says."""
    return field.metadata[_KEY]


def flag(name: str) -> str:
    """What a field is called on the command line: `--seq-len` for `seq_len`."""
    return f"--{name.replace('_', '-')}"
