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


def test_a_stage_of_unknown_length_says_how_far_it_is_and_for_how_long(monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    file = io.StringIO()
    with progress_bars(Console(file=file, width=200)) as bars:
        bars.advance(bars.add_task("trials", total=None), 2)
    assert file.getvalue().splitlines() == ["trials: begins", "trials: 2 so far, 0 s"]


def test_a_quiet_console_gets_none():
    with progress_bars(Console(quiet=True)) as bars:
        assert len(list(tracked(bars, "layers", range(3), 0, 3))) == 3


def test_a_control_group_leaves_what_it_has_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CONTROL_GROUP_ROOT", tmp_path)
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "none")
    whole = memory.host_memory({})
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert memory.host_memory({}) == 600_000
    assert memory.host_memory({"cpu": 1000}) == 1000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.host_memory({}) > whole / 2


@pytest.mark.parametrize(
    ("lines", "limited", "files"),
    [
        ("0::/job.slice/job-7", "job.slice/job-7", ("memory.max", "memory.current")),
        ("0::/job.slice/job-7", "job.slice", ("memory.max", "memory.current")),
        (
            "9:name=systemd:/\n4:cpu,memory:/jobs/7\n0::/",
            "memory/jobs/7",
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ),
    ],
)
def test_a_limit_on_any_group_around_the_process_counts(
    lines, limited, files, tmp_path, monkeypatch
):
    """Slurm and systemd put it on a group of the job's own, below the outermost."""
    (tmp_path / "own").write_text(lines)
    monkeypatch.setattr(memory, "_CONTROL_GROUP_ROOT", tmp_path)
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "own")
    (tmp_path / limited).mkdir(parents=True)
    for file, size in zip(files, (1_000_000, 400_000), strict=True):
        (tmp_path / limited / file).write_text(f"{size}\n")
    assert memory.host_memory({}) == 600_000


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


def test_a_terminal_that_is_closed_ends_a_run_like_ctrl_c(monkeypatch, capsys):
    monkeypatch.setattr(cli.plan, "run", lambda _: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # not as under nohup
    try:
        with pytest.raises(SystemExit) as end:
            cli.main(["plan"])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert end.value.code == 128 + signal.SIGHUP
    assert capsys.readouterr().err == "sp3llm: terminated; start anew.\n"


def test_a_run_that_ignores_hangups_goes_on_ignoring_them():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit):
            cli.main(["plan", "no/such/folder/here"])
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("kind", ["pipe", "full"])
def test_output_that_goes_nowhere_is_no_reason_to_fail(kind):
    """A pager that is quit, a log on a full disk."""
    code = (
        "import sys; from sp3llm import cli; cli._print_what_the_terminal_can()\n"
        "for _ in range(3): print('x' * 100_000, flush=True)\n"
        "sys.stderr.write('done\\n')"
    )
    if kind == "full":
        if not os.path.exists("/dev/full"):
            pytest.skip("no /dev/full")
        stdout = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, stdout = os.pipe()
        os.close(reader)
    run = subprocess.run([sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE)
    os.close(stdout)
    why = "Broken pipe" if kind == "pipe" else "No space left on device"
    said = f"sp3llm: going on without output ({why}).\ndone\n"
    assert (run.returncode, run.stderr.decode()) == (0, said)


def test_a_working_folder_that_is_gone_is_told(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"rmdir {gone}; {sys.executable} -m sp3llm plan"
    found = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": found}
    run = subprocess.run(["sh", "-c", command], cwd=gone, env=environment, capture_output=True)
    assert run.returncode == 2
    assert run.stderr.decode().startswith("sp3llm: expected a folder to work in")


def test_output_in_ascii_is_no_reason_to_fail():
    code = "from sp3llm import cli; cli._print_what_the_terminal_can(); print('1 \\u00b1 2')"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert (run.returncode, run.stdout) == (0, b"1 ? 2\n")
