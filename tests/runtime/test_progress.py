"""Progress where there is no terminal, memory and signals as batch systems have them."""

import io
import os
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from sp3llm import cli
from sp3llm.runtime import memory, progress
from sp3llm.runtime.progress import progress_bars, tracked


def lines_of(seconds_between: float, monkeypatch) -> list[str]:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", seconds_between)
    file = io.StringIO()
    with progress_bars(Console(file=file, width=200)) as bars:
        assert list(tracked(bars, "layers", range(1, 5), 1, 5)) == [1, 2, 3, 4]
        seen_before_the_end = file.getvalue()
    assert seen_before_the_end == file.getvalue()
    return file.getvalue().splitlines()


def test_a_log_gets_a_line_a_stage_and_lines_in_between(monkeypatch):
    begin, *between, end = lines_of(0.0, monkeypatch)
    assert begin == "layers: goes on"
    assert between[0].startswith("layers: 2 of 5, 0 s, about 0 s left")
    assert end.startswith("layers: done in")
    assert len(between) == 3
    assert len(lines_of(1e9, monkeypatch)) == 2


def test_a_quiet_console_gets_none():
    with progress_bars(Console(quiet=True)) as bars:
        assert len(list(tracked(bars, "layers", range(3), 0, 3))) == 3


def test_a_control_group_leaves_what_it_has_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CONTROL_GROUP_ROOT", tmp_path)
    whole = memory.host_memory({})
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert memory.host_memory({}) == 600_000
    assert memory.host_memory({"cpu": 1000}) == 1000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.host_memory({}) > whole / 2


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_terminated_run_says_that_it_can_be_continued(tmp_path):
    command = [sys.executable, "-m", "sp3llm.compress", "--samples", "64", "--seq-len", "256"]
    command += ["--out", str(tmp_path / "out"), "--no-report"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert "begins" in run.stdout.readline()
        time.sleep(1)
        run.send_signal(signal.SIGTERM)
        _, error = run.communicate(timeout=120)
    assert run.returncode == 143
    assert error == "sp3llm: terminated; the same command continues where it was.\n"


def test_other_systems_than_posix_are_told(capsys):
    with pytest.raises(SystemExit) as end:
        cli._check_system("nt")
    assert end.value.code == 2
    assert "WSL" in capsys.readouterr().err


def test_output_in_ascii_is_no_reason_to_fail():
    code = "from sp3llm import cli; cli._print_what_the_terminal_can(); print('1 \\u00b1 2')"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert (run.returncode, run.stdout) == (0, b"1 ? 2\n")
