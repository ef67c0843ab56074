"""The command line: quick to answer, the same under both names, readable by machines."""

import json
import runpy
import shlex
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from sp3llm import cli, options
from sp3llm.cli import main
from sp3llm.errors import UserError
from sp3llm.models.source import bundled_model
from sp3llm.options import (
    BenchConfig,
    CompressConfig,
    PlanConfig,
    QuantizeConfig,
    RecoverConfig,
    ReportConfig,
    ScoreConfig,
    command_line,
)
from sp3llm.options.derive import settings_from
from sp3llm.options.field import flag, option_of
from sp3llm.options.reference import page

ROOT = Path(__file__).parents[2]
SETTINGS = [kind for kind in vars(options).values() if is_dataclass(kind)]
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


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
@pytest.mark.parametrize("value", ["abc", "", "-1"])
def test_what_no_launcher_sets_is_refused(name, value, capsys, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        main(["plan", "--keep", "0.6"])
    assert end.value.code == 2
    assert f"Expected a number in the environment's {name}" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "num_hidden_layers"])
def test_sizes_that_no_model_has_are_refused_at_once(key, capsys, tmp_path):
    config = json.loads((bundled_model() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: 10**30}))
    with pytest.raises(SystemExit) as end:
        main(["plan", str(tmp_path), "--keep", "0.6"])
    assert end.value.code == 2
    assert f"Expected {key} in config.json" in capsys.readouterr().err


def test_plan_shows_what_shapes_weigh_in_each_format(capsys):
    main(["plan", "--keep", "0.75"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("bf16", "int8", "nf4", "Q8_0", "Q4_K_M"))
    main(["plan", "--keep", "0.75", "--json"])
    (shape, *_) = json.loads(capsys.readouterr().out)["shapes"]
    assert shape["bytes_by_format"]["bf16"] == shape["bytes"]


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
def test_plan_refuses_in_one_sentence(words, refused):
    refused("plan", *words)


@pytest.mark.parametrize(
    "words",
    [
        ["--no-refit", "--allocate", "search"],
        ["--no-refit", "--intermediate-size", "100"],
        ["--samples", "1"],
    ],
)
def test_options_that_contradict_each_other_are_refused(words, refused, tmp_path):
    refused("compress", "--out", tmp_path / "small", *words)
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_finds_what_it_imports(script, monkeypatch):
    """They are run by hand, months apart, while what they import moves."""
    monkeypatch.syspath_prepend(str(script.parent))
    runpy.run_path(str(script), run_name="imported")


# --------------------------------------------------------------------------- options

# No option's value is a lone "--", and a model that begins with a dash is given as ./-model.
WORDS = st.text(min_size=1).filter(lambda word: word[0] != "-")
DASHED = st.builds("-{}".format, WORDS)
# What a check allows that the type and the bounds do not tell.
SPECIAL = {
    "keep": st.floats(0, 1, exclude_min=True, exclude_max=True),
    "warmup": st.floats(0, 1, exclude_max=True),
    "limit": st.floats(0, 1e6, exclude_min=True),
    "batch_size": st.just("auto") | st.integers(1, 99).map(str),
    "device": st.sampled_from(["auto", "cpu", "cuda"]),
    "recover_steps": st.integers(0, 9),
}


def values(field, hint):
    """Values that an option of this field takes."""
    option = option_of(field)
    if field.name in SPECIAL:
        return SPECIAL[field.name]
    if option.choices:
        return st.sampled_from(option.choices)
    kinds = set(get_args(hint) or (hint,)) - {type(None), Ellipsis}
    least = option.least if option.least is not None else option.above
    numbers = st.floats(least, 1e9, exclude_min=option.above is not None)
    texts = WORDS if option.positional or option.metavar == "FILE" else WORDS | DASHED
    of_kind = {
        int: st.integers(-99 if least is None else least, 10**6),
        float: numbers,
        bool: st.booleans(),
        str: texts,
        Path: texts.map(Path),
    }
    one = st.one_of(*(of_kind[kind] for kind in sorted(kinds, key=str)))
    if Ellipsis in get_args(hint):
        return st.lists(one, min_size=1, max_size=3).map(tuple)
    return one


@st.composite
def any_settings(draw):
    kind = draw(st.sampled_from(SETTINGS))
    hints = get_type_hints(kind)
    must, may = {}, {}
    for field in fields(kind):
        required = field.name in ("model", "folder", "to", "tasks", "against")
        (must if required else may)[field.name] = values(field, hints[field.name])
    try:
        return kind(**draw(st.fixed_dictionaries(must, optional=may)))
    except UserError:
        reject()


def parsed(words):
    """The settings that a command line gives."""
    given = vars(cli.parser().parse_args(words))
    command = given.pop("command")
    (kind,) = (kind for kind in SETTINGS if kind.command == command)
    return settings_from(kind, given)


@settings(deadline=None, max_examples=300)
@given(any_settings())
def test_command_line_gives_the_settings_back(wanted):
    if isinstance(wanted, CompressConfig):
        wanted = replace(wanted, fresh=False)  # a record does not tell to start over
    program, *words = shlex.split(command_line(wanted))
    assert program == "sp3llm"
    assert parsed(words) == wanted


@pytest.mark.parametrize(
    ("wanted", "line"),
    [
        (CompressConfig(), "compress --keep 0.75"),
        (CompressConfig("a b", fresh=True, keep=0.5), "compress 'a b' --keep 0.5"),
        (
            CompressConfig(refit=False, report=False, square=False, seed=3),
            "compress --keep 0.75 --no-refit --no-report --seed 3",
        ),
        (CompressConfig(square=True, out=Path("x")), "compress --keep 0.75 --out x --square"),
        (
            RecoverConfig("small", "dense", lora=4, lr=0.1, gradient_checkpointing=True),
            "recover small --teacher dense --lr 0.1 --lora 4 --gradient-checkpointing",
        ),
        (QuantizeConfig("small", "int8"), "quantize small --to int8"),
        (
            ScoreConfig("a", tasks="x,y", limit=0.5, apply_chat_template=True, seed=3),
            "score a --tasks x,y --limit 0.5 --apply-chat-template --seed 3",
        ),
        (
            BenchConfig("a", "b", batch_sizes=(1, 3), compile=True),
            "bench a --against b --batch-sizes 1 3 --compile",
        ),
        (PlanConfig(recover=True, lora=8), "plan --keep 0.75 --recover --lora 8"),
        (ReportConfig(Path("a"), add=(Path("b"), Path("c"))), "report a --add b c"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_recorded_command_line_is_short_and_stays_the_same(wanted, line):
    assert command_line(wanted) == f"sp3llm {line}"


@pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.command)
def test_every_option_is_described_once_and_shown(kind, capsys):
    with pytest.raises(SystemExit):
        main([kind.command, "--help"])
    shown = capsys.readouterr().out
    for field in fields(kind):
        option = option_of(field)
        assert option.help.strip(), field.name
        assert option.positional or flag(field.name) in shown
        assert "(default" not in option.help, f"{field.name}: say it with shown="


def test_what_commands_share_has_one_type():
    types = {}
    for kind in SETTINGS:
        for name, hint in get_type_hints(kind).items():
            if name != "command":
                said = next(option_of(field) for field in fields(kind) if field.name == name)
                types.setdefault((name, id(said)), set()).add(hint)
    assert all(len(found) == 1 for found in types.values())


def test_the_page_of_options_is_current():
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == page(), "run make docs"


def test_options_import_only_the_standard_library():
    code = (
        "import sys; import sp3llm.options; mine = {m.split('.')[0] for m in sys.modules}"
        "; more = mine - set(sys.stdlib_module_names) - BEFORE - {'sp3llm'}; assert not more, more"
    )
    code = f"import sys; BEFORE = {{m.split('.')[0] for m in sys.modules}}; {code}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
