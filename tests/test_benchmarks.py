"""Benchmarks time what is there: they name functions of the passes, which move."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import save_model, tiny_model

BENCHMARKS = Path(__file__).parents[1] / "eval" / "benchmarks"


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch):
    """They import each other by their own names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def module_of(name: str):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules.pop(name, None)
    return module


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_every_benchmark_is_imported(name):
    module_of(name)


def test_every_function_that_is_timed_by_kind_of_work_is_there():
    clocks = module_of("stage_clock").clocks
    with clocks() as (stages, kinds):
        assert not stages.seconds
        assert not kinds.seconds


def test_every_function_whose_time_a_compression_shows_is_there(monkeypatch):
    module = module_of("bench_compress")
    text = (BENCHMARKS / "bench_compress.py").read_text()
    install = next(
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name == "install_clocks"
    )
    pairs = [
        (pair.elts[0].id, pair.elts[1].value)
        for node in ast.walk(install)
        if isinstance(node, ast.For)
        for pair in node.iter.elts
    ]
    assert pairs
    for owner, function in pairs:
        assert hasattr(getattr(module, owner), function), f"{owner}.{function}"


def test_a_compression_is_timed_stage_by_stage(tmp_path):
    """The whole of it, as `eval/gpu.sh` calls it where there is a GPU: nothing else notices that
    stages want other arguments than before.
    """
    of_model = ("--shape", "tiny", "--layers", "1", "2", "--samples", "24", "--seq-len", "64")
    of_run = ("--only", "gradient, search (the default)", "--device", "cpu")
    places = ("--results", tmp_path / "results", "--work", tmp_path, "--name", "cost")
    words = [sys.executable, BENCHMARKS / "bench_compress.py", *of_model, *of_run, *places]
    subprocess.run(words, check=True, cwd=BENCHMARKS.parents[1], capture_output=True)
    rows = json.loads((tmp_path / "results" / "cost.json").read_text())["runs"]
    assert any("EXTRAPOLATED" in label for label in rows)
    stages = {"plain forward", "moments", "search", "basis", "refit, write"}
    assert all(stages <= row.keys() for row in rows.values())  # a slope may be below zero


def test_a_search_is_compared_with_all_candidates(tmp_path, monkeypatch):
    tiny = tiny_model("llama", dtype=torch.float32, vocab_size=4096)
    model = save_model(tiny, tmp_path / "tiny", tokenizer=True)
    of_model = ("--model", model.folder)
    of_text = ("--samples", "24", "--seq-len", "32", "--eval-samples", "8")
    of_run = ("--keep", "0.75", "--within", "1.01")
    places = ("--results", tmp_path / "results", "--name", "search")
    words = map(str, ("exhaustive.py", *of_model, *of_text, *of_run, *places))
    monkeypatch.setattr(sys, "argv", list(words))
    module_of("exhaustive").main()
    (run,) = json.loads((tmp_path / "results" / "search.json").read_text())["runs"]
    assert run["chosen above best"] >= 0
    assert sum(row["chosen"] for row in run["rows"]) == 1
    assert run["refitted"] == len(run["rows"]) <= run["candidates"]


def test_what_is_imported_before_memory_counts_is_there():
    child = module_of("bench_memory").CHILD
    for line in child.splitlines():
        if line.startswith("import "):
            for name in line.removeprefix("import ").split(", "):
                assert importlib.util.find_spec(name), name
