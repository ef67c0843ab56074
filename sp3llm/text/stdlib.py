"""The running Python's own documentation: text that needs no network."""

import ast
import functools
import importlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from sp3llm.text.split import content_hash

# Shorter docstrings say little more than the name they belong to.
_FEWEST_CHARS = 80
# Packages and folders that are no part of the library, or hold tests and an editor.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "ensurepip"}


@functools.cache
def stdlib_documents() -> tuple[str, ...]:
    """The running Python's own documentation: pydoc topics and every docstring of the standard
    library, in a fixed order, without duplicates.

    Python sources are parsed, not imported; extension modules are imported for theirs.
    """
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED.isdisjoint(path.relative_to(root).parts):
            texts.extend(_docstrings_of_source(path))
    for name in sorted(sys.stdlib_module_names):
        if "test" not in name and not (root / f"{name}.py").exists() and not (root / name).is_dir():
            texts.extend(_docstrings_of_extension(name))
    unique: dict[str, str] = {}
    for text in texts:
        if len(text) >= _FEWEST_CHARS:
            unique.setdefault(content_hash(text), text.strip())
    return tuple(unique.values())


def _docstrings_of_source(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # lib2to3 keeps files that are wrong on purpose
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def _docstrings_of_extension(name: str) -> Iterator[str]:
    try:
        module = importlib.import_module(name)
    except ImportError:  # not built on this machine
        return
    names = sorted(vars(module).keys() - {"_"})  # builtins._ is the last value of a session
    members = [module, *(vars(module)[name] for name in names)]
    for member in members:
        if not _is_stdlib(member):  # such as sys.stdout and sys.excepthook in a notebook
            continue
        owned = [vars(member)[key] for key in sorted(vars(member))] if _is_class(member) else []
        for item in (member, *owned):
            text = getattr(item, "__doc__", None)
            if isinstance(text, str):
                yield text


def _is_stdlib(value: object) -> bool:
    origin = getattr(value, "__module__", None)
    origin = origin if isinstance(origin, str) else type(value).__module__
    return origin.partition(".")[0] in sys.stdlib_module_names


def _is_class(value: object) -> bool:
    return isinstance(value, type) and value.__module__ != "collections.abc"
