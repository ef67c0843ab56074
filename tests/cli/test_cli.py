"""The command line: quick to answer, the same under both names, readable by machines."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from sp3llm.cli import main

SCRIPTS = sorted(
    path
    for path in (Path(__file__).parents[2] / "eval").rglob("*.py")
    if "__main__" in path.read_text()
)

HEAVY = """
import runpy
import sys
from sp3llm.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "transformers", "datasets", "accelerate", "matplotlib", "jinja2", "lm_eval"}
heavy &= set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    "words",
    [
        ["compress", "--help"],
        ["score", "--help"],
        ["bench", "--help"],
        ["report", "--help"],
        ["recover", "--help"],
        ["quantize", "--help"],
        ["plan", "--keep", "0.5"],
        ["plan", "--recover", "--lora", "8"],
        ["--help"],
    ],
)
def test_help_and_plan_answer_without_importing_torch(words):
    run = subprocess.run([sys.executable, "-c", HEAVY, *words], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_module_and_command_offer_the_same_options(capsys):
    module = subprocess.run(
        [sys.executable, "-m", "sp3llm.compress", "--help"], capture_output=True, text=True
    )
    with pytest.raises(SystemExit) as end:
        main(["compress", "--help"])
    assert end.value.code == 0
    assert module.stdout == capsys.readouterr().out


def test_plan_prints_json_for_machines(capsys):
    main(["plan", "--keep", "0.6", "--json"])
    plan = json.loads(capsys.readouterr().out)
    dense = 7_901_440
    assert len(plan["shapes"]) > 3
    assert all(shape["params"] <= 0.6 * dense for shape in plan["shapes"])
    assert plan["needs"]["disk"] == 2 * plan["shapes"][0]["params"]


def test_plan_needs_no_weights(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "torch_dtype": "bfloat16"}')
    main(["plan", str(tmp_path), "--keep", "0.75", "--allocate", "width", "--json"])
    (shape,) = json.loads(capsys.readouterr().out)["shapes"]
    assert shape["hidden_size"] == 3072
    assert shape["params"] == 5_053_811_712


@pytest.mark.parametrize(
    "words",
    [
        ["--keep", "1.5"],
        ["--keep", "0.01"],
        ["--of", "banana"],
        ["--allocate", "banana"],
        ["--hidden-size", "999"],
        ["--tensor-parallel", "3"],
        ["no/such-model/here"],
    ],
)
def test_plan_refuses_in_one_sentence(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(["plan", *words])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("sp3llm: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["--no-refit", "--allocate", "search"],
        ["--no-refit", "--intermediate-size", "100"],
        ["--samples", "1"],
    ],
)
def test_options_that_contradict_each_other_are_refused(words, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        main(["compress", "--out", str(tmp_path / "small"), *words])
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_finds_what_it_imports(script, monkeypatch):
    """They are run by hand, months apart, while what they import moves."""
    monkeypatch.syspath_prepend(str(script.parent))
    runpy.run_path(str(script), run_name="imported")
