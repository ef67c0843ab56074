"""sp3llm as a library: the README's own lines, typed results, one exception."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sp3llm
from sp3llm import UserError, compress, plan, recover
from sp3llm.cli import main

README = Path(__file__).parents[1] / "README.md"


def test_the_lines_of_the_readme_run(tmp_path):
    (lines,) = re.findall(r"```python\n(from sp3llm import .*?)```", README.read_text(), re.DOTALL)
    # A second import gives the functions too, not the modules that `python -m` runs.
    again = "from sp3llm import compress, recover\nassert callable(compress), callable(recover)\n"
    run = subprocess.run(
        [sys.executable, "-c", lines + again], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    count, parameters, *_ = run.stdout.split()
    assert int(count) > 1
    assert int(parameters) <= 0.75 * 7_901_440
    assert (tmp_path / "small" / "config.json").is_file()
    assert (tmp_path / "small-recovered" / "config.json").is_file()


def test_a_plan_is_the_commands(capsys):
    main(["plan", "--keep", "0.6", "--json"])
    assert json.loads(capsys.readouterr().out) == plan(keep=0.6).describe()


def test_a_result_says_what_its_record_says(tmp_path, capsys):
    out = str(tmp_path / "small")
    result = compress(
        keep=0.75, out=out, allocate="width", samples=4, seq_len=64, eval_samples=4, report=False
    )
    assert result.out == Path(out)
    assert result.plan.keep_params <= 0.75
    assert result.excess.mean == pytest.approx(
        math.log(result.perplexity / result.dense_perplexity)
    )
    printed = capsys.readouterr()
    assert printed.out == ""


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compress(kep=0.5), "did you mean keep"),
        (lambda: compress(keep=2.0), "--keep between 0 and 1"),
        (lambda: plan(hidden_size=10**6), "--hidden-size"),
        (lambda: recover("no/such-model/here"), "no folder here"),
    ],
)
def test_what_a_user_can_mend_is_a_user_error(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_importing_sp3llm_imports_nothing_heavy():
    code = (
        "import sys, sp3llm; sys.exit(bool({'torch', 'rich', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert set(sp3llm.__all__) >= {"compress", "plan", "recover", "UserError"}
