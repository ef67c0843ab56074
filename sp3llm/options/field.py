"""How a field of a settings dataclass describes its option on the command line."""

from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal

_KEY = "option"
# The largest seed that all generators of random numbers take, numpy's among them.
MOST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Option:
    """What an option is, beyond the name, the type and the default of its field."""

    help: str
    """What it does. The choices need no mention: they stand where the value does."""
    shown: str | None = None
    """The default in words, where its value does not say it; None: the value itself."""
    metavar: str | None = None
    """What stands for the value in `--help`; None: the choices, or a letter by the type."""
    choices: tuple[str, ...] = ()
    """The values it takes; empty: any of its type."""
    least: int | None = None
    """The smallest number it takes."""
    above: int | None = None
    """The number that its value must be larger than."""
    most: int | None = None
    """The largest number it takes."""
    positional: bool = False
    """Whether the value is given without the option's name."""
    recorded: Literal["changed", "always", "never"] = "changed"
    """When the recorded command line names it: where it is not at its default, always, or never."""


def option(
    help: str,
    *,
    default: Any = MISSING,
    shown: str | None = None,
    metavar: str | None = None,
    choices: tuple[str, ...] = (),
    least: int | None = None,
    above: int | None = None,
    most: int | None = None,
    positional: bool = False,
    recorded: Literal["changed", "always", "never"] = "changed",
) -> Any:
    """A dataclass field that is an option; without a default it must be given. See `Option`."""
    bounds = (least, above, most)
    description = Option(help, shown, metavar, choices, *bounds, positional, recorded)
    return field(default=default, metadata={_KEY: description})


def same_as(settings: type, name: str) -> Any:
    """A dataclass field with the default and the description of the field `name` of `settings`."""
    (original,) = (one for one in fields(settings) if one.name == name)
    return field(default=original.default, metadata=original.metadata)


def option_of(field: Field) -> Option:
    """The description of the option that a field made by `option` or `same_as` is."""
    return field.metadata[_KEY]


def flag(name: str) -> str:
    """What a field is called on the command line: `--seq-len` for `seq_len`."""
    return f"--{name.replace('_', '-')}"
