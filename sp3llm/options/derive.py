"""What is made from a settings dataclass: parser, recorded command line, page of options."""

import argparse
import shlex
from dataclasses import MISSING, Field, asdict, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from sp3llm.options.field import flag, option_of


def add_options(parser: argparse.ArgumentParser, settings: type) -> None:
    """Adds an option for every field of the dataclass `settings`.

    argparse is told no defaults: what is not given is not in the namespace, so that the dataclass
    alone knows them.
    """
    hints = get_type_hints(settings)
    for field in fields(settings):
        name = field.name if option_of(field).positional else flag(field.name)
        parser.add_argument(name, **_arguments(field, hints[field.name]))


def settings_from(settings: type, given: dict[str, Any]) -> Any:
    """An instance of the dataclass `settings` from what the parser found, by field.

    Raises UserError where the dataclass refuses a value.
    """
    values = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
    }
    return settings(**values)


def command_line(settings: Any) -> str:
    """The command line that gives these settings, quoted for a shell, as it goes on record.

    Options at their defaults are left out, as `Option.recorded` says.
    """
    positional, options = [], []
    for field in fields(settings):
        option, value = option_of(field), getattr(settings, field.name)
        is_default = value == field.default
        if option.recorded == "never" or (is_default and option.recorded == "changed"):
            continue
        if option.positional:
            positional.append(str(value))
        else:
            options += _words(flag(field.name), value)
    return shlex.join(["sp3llm", settings.command, *positional, *options])


def plain_values(settings: Any) -> dict[str, Any]:
    """The settings by field, for JSON: paths as text."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(settings).items()
    }


def help_text(field: Field) -> str:
    """What `--help` says of an option: what it does, and its default."""
    does, default = option_of(field).help, default_text(field)
    return f"{does} (default: {default})" if default else does


def default_text(field: Field) -> str:
    """What holds where an option is not given, in words; empty where there is nothing to say."""
    if option_of(field).shown is not None:
        return option_of(field).shown
    if field.default in (MISSING, None, ()) or field.default is False:
        return ""
    if field.default is True:
        return "yes"
    return " ".join(_values(field.default))


def markdown_table(settings: type) -> str:
    """The options of a dataclass as a Markdown table: how each is written, its default, and what
    it does.
    """
    hints = get_type_hints(settings)
    rows = ["| option | default | what it does |", "|---|---|---|"]
    for field in fields(settings):
        default = "required" if field.default is MISSING else default_text(field)
        if default == str(field.default) or (isinstance(field.default, tuple) and default):
            default = f"`{default}`"  # as it would be written
        written = f"`{_usage(field, hints[field.name])}`"
        rows.append(f"| {written} | {_cell(default)} | {_cell(option_of(field).help)} |")
    return "\n".join(rows)


def _words(name: str, value: Any) -> list[str]:
    """The words on a command line that give an option this value."""
    if isinstance(value, bool):
        return [name if value else f"--no-{name.removeprefix('--')}"]
    if isinstance(value, str | Path) and str(value).startswith("-"):
        return [f"{name}={value}"]  # as a word of its own it would be taken for an option
    return [name, *_values(value)]


def _values(value: Any) -> list[str]:
    return [str(one) for one in (value if isinstance(value, tuple) else (value,))]


def _arguments(field: Field, hint: Any) -> dict[str, Any]:
    """What `ArgumentParser.add_argument` is told about a field, as keyword arguments."""
    kind, nargs = _value_type(hint)
    arguments = {"help": help_text(field).replace("%", "%%"), "default": argparse.SUPPRESS}
    if kind is bool:
        action = argparse.BooleanOptionalAction if field.default else "store_true"
        return {**arguments, "action": action}
    arguments |= {"type": _number if kind is float else kind, "metavar": _metavar(field, kind)}
    if nargs is not None:
        arguments["nargs"] = nargs
    if nargs == "?":
        arguments["const"] = True
    if not option_of(field).positional:
        arguments["required"] = field.default is MISSING
    elif field.default is not MISSING:
        arguments["nargs"] = "?"
    return arguments


def _value_type(hint: Any) -> tuple[type, str | None]:
    """The type that a word on the command line is turned into, and argparse's `nargs`: None for one
    word, `+` for one or more, `?` for one or none.
    """
    if get_origin(hint) is tuple:
        return get_args(hint)[0], "+"
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not NoneType]
    if len(kinds) == 2:  # bool | str: the option alone, or with a value
        kinds.remove(bool)
        return kinds[0], "?"
    return kinds[0], None


def _metavar(field: Field, kind: type) -> str:
    """What stands for the value in `--help`: its choices, or a name for it."""
    option = option_of(field)
    if option.choices:
        return f"{{{','.join(option.choices)}}}"
    if option.metavar is not None:
        return option.metavar
    if option.positional:
        return field.name
    return {int: "N", float: "X"}.get(kind, field.name.upper())


def _usage(field: Field, hint: Any) -> str:
    """How an option is written, with what stands for its value."""
    kind, nargs = _value_type(hint)
    name = flag(field.name)
    if kind is bool:
        return f"{name}, --no-{name.removeprefix('--')}" if field.default else name
    value = _metavar(field, kind)
    if option_of(field).positional:
        return value
    return f"{name} " + {None: value, "+": f"{value} ...", "?": f"[{value}]"}[nargs]


def _cell(text: str) -> str:
    """Text that is safe in a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "\\<")


def _number(text: str) -> float:
    """`float`, with an error that says what was expected."""
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected a number such as 0.75, found '{text}'"
        ) from error
