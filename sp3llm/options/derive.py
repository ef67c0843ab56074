"""What follows from a settings dataclass: its parser, a command line, a table of its options."""

import argparse
import shlex
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from sp3llm.options.field import flag, option_of


def add_options(parser: argparse.ArgumentParser, settings: type) -> None:
    """Adds an option for every field of the dataclass. What is not given is not in the namespace,
    so that the dataclass alone knows the defaults.
    """
    hints = get_type_hints(settings)
    for field in fields(settings):
        name = field.name if option_of(field).positional else flag(field.name)
        parser.add_argument(name, **_arguments(field, hints[field.name]))


def settings_from(settings: type, given: dict[str, Any]) -> Any:
    """The dataclass with what the parser found, by field; it raises `UserError` as it does."""
    values = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
    }
    return settings(**values)


def command_line(settings: Any) -> str:
    """The command line that gives these settings, quoted for a shell. What has its default is left
    out, but for options that are recorded always; those that never are do not come back.
    """
    first, words = [], []
    for field in fields(settings):
        option, value = option_of(field), getattr(settings, field.name)
        usual = value == field.default and option.recorded != "always"
        if usual or option.recorded == "never":
            continue
        if option.positional:
            first.append(str(value))
        else:
            words += _words(flag(field.name), value)
    return shlex.join(["sp3llm", settings.command, *first, *words])


def help_text(field: Field) -> str:
    """What `--help` says of an option: what it does, its choices, its default."""
    default = default_text(field)
    return f"{meaning(field)} (default: {default})" if default else meaning(field)


def meaning(field: Field) -> str:
    """What an option does, with its choices."""
    option = option_of(field)
    joint = " or " if len(option.choices) == 2 else ", "
    choices = joint.join(option.choices)
    if choices and "{choices}" not in option.help:
        return f"{option.help}: {choices}"
    return option.help.replace("{choices}", choices)


def default_text(field: Field) -> str:
    """What an option is without being given; empty where that is nothing."""
    if option_of(field).shown is not None:
        return option_of(field).shown
    if field.default in (MISSING, None, ()) or field.default is False:
        return ""
    if field.default is True:
        return "yes"
    return " ".join(_values(field.default))


def markdown_table(settings: type) -> str:
    """The options of a dataclass as a table: how each is written, its default, what it does."""
    hints = get_type_hints(settings)
    rows = ["| option | default | what it does |", "|---|---|---|"]
    for field in fields(settings):
        default = "required" if field.default is MISSING else default_text(field)
        if default == str(field.default) or (isinstance(field.default, tuple) and default):
            default = f"`{default}`"  # as it would be written
        written = f"`{_usage(field, hints[field.name])}`"
        rows.append(f"| {written} | {_cell(default)} | {_cell(meaning(field))} |")
    return "\n".join(rows)


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [name if value else f"--no-{name.removeprefix('--')}"]
    if isinstance(value, str | Path) and str(value).startswith("-"):
        return [f"{name}={value}"]
    return [name, *_values(value)]


def _values(value: Any) -> list[str]:
    return [str(one) for one in (value if isinstance(value, tuple) else (value,))]


def _arguments(field: Field, hint: Any) -> dict[str, Any]:
    """What argparse is told about a field."""
    kind, nargs = _value_type(hint)
    said = {"help": help_text(field).replace("%", "%%"), "default": argparse.SUPPRESS}
    if kind is bool:
        action = argparse.BooleanOptionalAction if field.default else "store_true"
        return {**said, "action": action}
    said |= {"type": _number if kind is float else kind, "metavar": _metavar(field, kind)}
    if nargs is not None:
        said["nargs"] = nargs
    if nargs == "?":
        said["const"] = True
    if not option_of(field).positional:
        said["required"] = field.default is MISSING
    elif field.default is not MISSING:
        said["nargs"] = "?"
    return said


def _value_type(hint: Any) -> tuple[type, str | None]:
    """What a word becomes, and how many words there are, as argparse's `nargs`."""
    if get_origin(hint) is tuple:
        return get_args(hint)[0], "+"
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not NoneType]
    if len(kinds) == 2:  # bool | str: the option alone, or with a value
        kinds.remove(bool)
        return kinds[0], "?"
    return kinds[0], None


def _metavar(field: Field, kind: type) -> str:
    option = option_of(field)
    if option.metavar is not None:
        return option.metavar
    if option.positional:
        return field.name
    return {int: "N", float: "X"}.get(kind, field.name.upper())


def _usage(field: Field, hint: Any) -> str:
    kind, nargs = _value_type(hint)
    name = flag(field.name)
    if kind is bool:
        return f"{name}, --no-{name.removeprefix('--')}" if field.default else name
    value = _metavar(field, kind)
    if option_of(field).positional:
        return value
    return f"{name} " + {None: value, "+": f"{value} ...", "?": f"[{value}]"}[nargs]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected a number such as 0.75, found '{text}'"
        ) from error
