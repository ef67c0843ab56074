"""Frozen dataclasses made from JSON and turned into it, by their annotations.

A field without a default must be there; one with a default may be absent. Fields may be `bool`,
`int`, `float` (whole numbers included), `str`, `None`, `Any`, other dataclasses, `Mapping[str, X]`,
`tuple[X, ...]` and unions of them.

Keys that a dataclass does not name are kept where it has a field `other: Mapping[str, Any]`, and go
out again beside the fields. A dataclass without one hands them to the next dataclass around it,
which keeps them by the name of the field. What stands in a list, or is replaced as a whole, needs
an `other` of its own.
"""

import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import PurePath
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

Made = TypeVar("Made")

LATER = "later"
"""In the metadata of a field that earlier versions had not: where it is None it is left out."""

_OTHER = "other"
_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


class MismatchError(ValueError):
    """JSON that is not what a dataclass asks for."""

    def __init__(self, where: str, expected: str, value: Any = MISSING) -> None:
        found = "none" if value is MISSING else repr(value)
        found = found if len(found) <= 40 else f"{found[:37]}..."
        super().__init__(f"expected {expected} for '{where}', found {found}")
        self.where, self.expected, self.found = where, expected, found
        self.is_absence = value is MISSING


def from_json(kind: type[Made], value: Any) -> Made:
    """The dataclass `kind` from an object of JSON, as `json.loads` returns it.

    Raises MismatchError at the first entry that is absent or of another type.
    """
    return _read(kind, value, "")[0]


def _read(kind: Any, value: Any, where: str) -> tuple[Any, dict[str, Any]]:
    """The value as `kind` has it, and keys that no dataclass in it kept."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value, {}
    if origin is types.UnionType:
        return _read_union(arguments, value, where)
    if is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise MismatchError(where, "a list", value)
        items = enumerate(value)
        return tuple(_read(arguments[0], item, f"{where}[{at}]")[0] for at, item in items), {}
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise MismatchError(where, "an object", value)
        read = {key: _read(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
        unknown = {key: rest for key, (_, rest) in read.items() if rest}
        return {key: item for key, (item, _) in read.items()}, unknown
    wanted = (int, float) if kind is float else kind
    # To Python a bool is an int too.
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        raise MismatchError(where, _NAMES[kind], value)
    return value, {}


def _read_union(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, dict[str, Any]]:
    if value is None and types.NoneType in kinds:
        return None, {}
    *others, last = [kind for kind in kinds if kind is not types.NoneType]
    for kind in others:
        try:
            return _read(kind, value, where)
        except MismatchError:
            continue
    return _read(last, value, where)


def _read_dataclass(kind: Any, value: Any, where: str) -> tuple[Any, dict[str, Any]]:
    if not isinstance(value, Mapping):
        raise MismatchError(where, "an object", value)
    types_of, named = get_type_hints(kind), {f.name: f for f in fields(kind)}
    keeps = named.pop(_OTHER, None) is not None
    unknown = {key: item for key, item in value.items() if key not in named}
    read = {}
    for name, field in named.items():
        inside = f"{where}.{name}" if where else name
        if name in value:
            read[name], rest = _read(types_of[name], value[name], inside)
            if rest:
                unknown[name] = rest
        elif _is_required(field):
            raise MismatchError(inside, "an entry")
    return (kind(**read, other=unknown), {}) if keeps else (kind(**read), unknown)


def _is_required(field: Field) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def to_json(value: Any) -> Any:
    """A dataclass, or anything made of them, as what `json.dumps` takes; paths as text."""
    if is_dataclass(value):
        named = {f.name: getattr(value, f.name) for f in fields(value) if not _left_out(f, value)}
        other = named.pop(_OTHER, {})
        return _with_unknown({name: to_json(item) for name, item in named.items()}, other)
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return str(value) if isinstance(value, PurePath) else value


def _left_out(field: Field, value: Any) -> bool:
    """Whether a field is one that earlier versions had not, and holds nothing."""
    return bool(field.metadata.get(LATER)) and getattr(value, field.name) is None


def _with_unknown(known: dict[str, Any], unknown: Mapping[str, Any]) -> dict[str, Any]:
    """Both together; keys inside an entry that is known go into it."""
    added = {
        key: _with_unknown(known[key], item) if isinstance(known.get(key), dict) else item
        for key, item in unknown.items()
    }
    return {**known, **added}
