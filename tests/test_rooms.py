"""The package is a house: imports go from later rooms to earlier ones, and there is no circle."""

import ast
import importlib
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sp3llm"
# Each may import from itself and from those before it, at the top of a file, inside a function and
# for typing alike.
ROOMS = [
    "errors", "options", "maths", "runtime", "text", "models", "vocabulary", "planning",
    "reporting", "evaluation", "quantization", "recovery", "compression", "api", "cli",
]  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(path: Path) -> set[str]:
    """Modules of ours that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where things come from"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in MODULES else node.module)
    return {name for name in names if name in MODULES}


IMPORTS = {name: imports_of(path) for name, path in MODULES.items()}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_folder_is_a_room_of_the_order():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert folders <= set(ROOMS)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_from_later_rooms_to_earlier_ones(module):
    here = room_of(module)
    if here not in ROOMS:  # the package itself, and what `python -m` runs
        return
    for other in IMPORTS[module]:
        if room_of(other) in ROOMS:
            assert ROOMS.index(room_of(other)) <= ROOMS.index(here), f"{module} imports {other}"


def test_no_circle_of_imports():
    # A package imports what it offers from its own modules, which may name it: not a circle of two.
    graph = {name: others - {name} for name, others in IMPORTS.items()}
    TopologicalSorter(graph).prepare()


def test_tensor_mathematics_imports_nothing_of_ours():
    for module, others in IMPORTS.items():
        if room_of(module) == "maths":
            assert all(room_of(other) == "maths" for other in others), (module, others)


@pytest.mark.parametrize("room", ["options", "planning", "models.families", "models.shapes", "cli"])
def test_what_help_and_plan_need_imports_no_torch(room):
    modules = [name for name in MODULES if f"{name}.".startswith(f"sp3llm.{room}.")]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_import_names_something_that_is_there(module):
    """Imports inside functions fail only when they are reached, hours into a run."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("sp3llm"):
            continue
        for alias in node.names:
            if f"{node.module}.{alias.name}" not in MODULES:
                assert hasattr(importlib.import_module(node.module), alias.name), alias.name
