"""Compress over two hosts that share nothing, and see what comes out, and what is said.

sudo python eval/checks/two_hosts.py WORK [--only CASE ...] [--output PAGE.md]

Needs root: each host is a network namespace, a mount namespace and a host name, on one machine.
Both see their own folder under WORK at the same path, WORK/here, with a copy of the bundled model,
a text, a home, a cache and a folder for temporary files, and never each other's; what they have in
common is the installed software and a cable. Every case is a run of `torchrun --nnodes 2
--nproc-per-node 1` with few windows on both, compared byte by byte with two processes on one host,
and with one process.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "sp3llm" / "bundled" / "llama-8m"
RECORD, WEIGHTS = "sp3llm.json", "model.safetensors"
PORT, LONGEST = 29500, 900
HERE = "here"


@dataclass(frozen=True)
class Log:
    """What a launcher and its process said."""

    text: str

    def said(self) -> list[str]:
        """What sp3llm said when it ended, without the launcher's words."""
        return re.findall(r"^(?:\[[^\]]*\]:)?(sp3llm(?: \([^)]*\))?: .*)$", self.text, re.MULTILINE)

    def sentences(self) -> list[str]:
        """What it said, whichever process found it."""
        return [line.partition(": ")[2] for line in self.said()]

    def faults(self) -> int:
        """How many tracebacks there are, but for the launcher's own about a process that ended."""
        return self.text.count("Traceback (most") - self.text.count("errors.ChildFailedError:")

    def exit_codes(self) -> list[int]:
        """How processes ended, as the launcher tells."""
        return [int(code) for code in re.findall(r"exitcode *: (-?\d+)", self.text)]


@dataclass(frozen=True)
class Host:
    """A host of two: what it can reach is its own folder, and the other by a cable."""

    number: int
    work: Path

    @property
    def name(self) -> str:
        """As it calls itself, and the other does."""
        return f"host{self.number}"

    @property
    def namespace(self) -> str:
        """Of the network."""
        return f"sp3llm-{self.name}"

    @property
    def address(self) -> str:
        """Of its end of the cable."""
        return f"10.77.0.{self.number + 1}"

    @property
    def end(self) -> str:
        """Its end of the cable."""
        return f"sp3veth{self.number}"

    @property
    def disk(self) -> Path:
        """Its folder, as this script sees it."""
        return self.work / self.name

    def start(self, words: list[str], name: str, **environment: str) -> subprocess.Popen[bytes]:
        """Run a command in its folder; what it says goes to `<name>.log` beside that."""
        here, hidden = self.work / HERE, self.work / f"host{1 - self.number}"
        own_names = self.disk / "hosts"
        hosts = own_names if own_names.is_file() else self.work / "hosts"
        inside = (
            f"hostname {self.name} && mount --bind {self.disk} {here} && mount -t tmpfs none "
            f"{hidden} && mount --bind {hosts} /etc/hosts && cd {here} && exec {shlex.join(words)}"
        )
        own = {part: str(here / part) for part in ("home", "cache", "tmp")}
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{own['home']}:{ROOT}",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "HOME": own["home"],
            "HF_HOME": own["cache"],
            "TMPDIR": own["tmp"],
            **environment,
        }
        namespaces = ["ip", "netns", "exec", self.namespace, "unshare", "--mount", "--uts"]
        with (self.work / f"{name}-{self.name}.log").open("wb") as log:
            return subprocess.Popen(
                [*namespaces, "sh", "-c", inside],
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def log(self, name: str) -> Log:
        """Of the run of that name."""
        path = self.work / f"{name}-{self.name}.log"
        return Log(path.read_text(encoding="utf-8", errors="replace"))

    def processes(self) -> list[int]:
        """Of everything that runs on it."""
        found = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False
        )
        return [int(line) for line in found.stdout.split()]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def connect(hosts: list[Host]) -> None:
    """Two network namespaces and a cable."""
    for host in hosts:
        ip("netns", "add", host.namespace)
    near, far = (("netns", host.namespace) for host in hosts)
    ip("link", "add", hosts[0].end, *near, "type", "veth", "peer", "name", hosts[1].end, *far)
    for host in hosts:
        ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.end)
        for link in ("lo", host.end):
            ip("-n", host.namespace, "link", "set", link, "up")


def disconnect(hosts: list[Host]) -> None:
    """Nothing runs on the hosts then, and they are gone."""
    for host in hosts:
        for process in host.processes():  # of a run that was to end and did not
            os.kill(process, signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True, check=False)


def furnish(host: Host) -> None:
    """A disk as a user has it before the run: the model and the text."""
    shutil.rmtree(host.disk, ignore_errors=True)
    for folder in ("home", "cache", "tmp"):
        (host.disk / folder).mkdir(parents=True)
    shutil.copytree(MODEL, host.disk / "model")
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    for name, part in (("fit.txt", text[: len(text) // 2]), ("held.txt", text[len(text) // 2 :])):
        (host.disk / name).write_text(part, encoding="utf-8")


# --------------------------------------------------------------------------- runs

# A window a batch: how many processes there are then changes nothing but the order of sums.
OPTIONS = ["--keep", "0.75", "--samples", "32", "--seq-len", "128", "--eval-samples", "4"]
OPTIONS += ["--batch-tokens", "128"]
OPTIONS += ["--calib", "fit.txt", "--eval-text", "held.txt", "--device", "cpu", "--out", "small"]


def launch(command: str, *words: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *words, "-m", f"sp3llm.{command}"]


def both(hosts: list[Host], name: str, **changes: Any) -> list[subprocess.Popen[bytes]]:
    """The run on both hosts. `command` is another one, with `words`; `model` another model; `both`
    are further options, `host0` and `host1` those of one alone; `environment` is what users set.
    """
    launcher = ["--nnodes", "2", "--nproc-per-node", "1"]
    launcher += ["--master-addr", hosts[0].name, "--master-port", str(PORT)]
    words = changes.get("words", [*changes.get("model", ["model"]), *OPTIONS])
    started = []
    for host in hosts:
        start = launch(
            changes.get("command", "compress"), *launcher, "--node-rank", str(host.number)
        )
        more = [*changes.get("both", []), *changes.get(host.name, [])]
        environment = changes.get("environment", {})
        started.append(host.start([*start, *words, *more], name, **environment))
    return started


def wait(started: list[subprocess.Popen[bytes]]) -> tuple[list[int], float]:
    """How they ended, and the seconds between the first end and the last."""
    ends: dict[int, float] = {}
    for _ in range(10 * LONGEST):  # counted: while all of it is stopped nobody is late
        if len(ends) == len(started):
            break
        for number, process in enumerate(started):
            if number not in ends and process.poll() is not None:
                ends[number] = time.monotonic()
        time.sleep(0.1)
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    codes = [process.wait() for process in started]
    apart = max(ends.values()) - min(ends.values()) if len(ends) == len(started) else float("inf")
    return codes, apart


def content(folder: Path) -> dict[str, object]:
    """Every file's bytes, but for what the record says of time and memory."""
    found: dict[str, object] = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".html"
    }
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    for key in ("seconds", "peak_memory_bytes", "device_memory_bytes"):
        del record[key]
    return {**found, RECORD: record}


def distance(found: Path, expected: Path) -> float:
    """The largest relative difference of a weight matrix."""
    ours, theirs = load_file(found / WEIGHTS), load_file(expected / WEIGHTS)
    assert ours.keys() == theirs.keys()
    return max(
        ((ours[n].double() - theirs[n].double()).norm() / theirs[n].double().norm()).item()
        for n in theirs
    )


# --------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Bench:
    """Both hosts, and what two processes on one host and one process made."""

    hosts: list[Host]
    two: Path
    one: Path


def reference(hosts: list[Host], name: str, words: list[str]) -> Path:
    """What host 0 makes by itself, kept under that name."""
    kept = hosts[0].work / name
    if not (kept / RECORD).is_file():
        furnish(hosts[0])
        process = hosts[0].start([*words, "model", *OPTIONS], name)
        assert process.wait() == 0, f"see {name}-host0.log"
        shutil.copytree(hosts[0].disk / "small", kept)
    return kept


def told(bench: Bench, name: str, apart: float) -> str:
    """What the table has of a run that ended early: exit codes, and what was said."""
    cells, before = [], None
    for host in bench.hosts:
        log = host.log(name)
        codes = ", ".join(map(str, dict.fromkeys(log.exit_codes()))) or "killed"
        words = " ".join(log.said())
        shown = "the same" if words and log.sentences() == before else words
        before = log.sentences()
        shown += f" {log.faults()} TRACEBACKS" if log.faults() else ""
        cells.append(f"{codes}: {shown}" if shown else codes)
    return f"| {' | '.join(cells)} | {apart:.0f} |"


def same(bench: Bench, name: str, codes: list[int]) -> str:
    """What the table has of a run that was to end well."""
    if codes != [0, 0]:
        return told(bench, name, 0)
    out = bench.hosts[0].disk / "small"
    left = [path.name for path in bench.hosts[1].disk.glob("small*")]
    every = "all files" if content(out) == content(bench.two) else "NOT ALL FILES"
    off = distance(out, bench.one)
    weights = "weights" if off == 0 else f"weights but for {off:.0e}"
    words = f"{every} as of two processes, {weights} as of one"
    return f"| 0: {words} | 0: leaves {', '.join(left) or 'nothing'} | |"


def plain(bench: Bench, name: str, change: Callable[[], object], **changes: Any) -> list[str]:
    """A run from the beginning, `change` made to a disk before it."""
    for host in bench.hosts:
        furnish(host)
    change()
    codes, apart = wait(both(bench.hosts, name, **changes))
    return [same(bench, name, codes) if codes == [0, 0] else told(bench, name, apart)]


def cut(bench: Bench, name: str, number: int, how: str) -> list[str]:
    """A run of which one host is lost on the way, and the same command on both again."""
    for host in bench.hosts:
        furnish(host)
    lost = bench.hosts[number]
    started = both(bench.hosts, name)
    state = lost.disk / "small.partial" / f"state-{number}"
    while not any(state.glob("dense-*")) and not any(state.glob("moments-*")):
        assert all(process.poll() is None for process in started), f"see {name}-*.log"
        time.sleep(0.05)
    if how == "cable":
        ip("-n", lost.namespace, "link", "set", lost.end, "down")
    for process in lost.processes():
        if how == "host" or (how not in ("host", "cable") and is_worker(process)):
            os.kill(process, signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL)
    _, apart = wait(started)
    first = told(bench, name, apart)
    if how == "cable":
        ip("-n", lost.namespace, "link", "set", lost.end, "up")
    codes, _ = wait(both(bench.hosts, f"{name}-again"))
    goes_on = "Continuing the run" in bench.hosts[0].log(f"{name}-again").text
    assert goes_on or codes != [0, 0], "began anew"
    return [first, same(bench, f"{name}-again", codes)]


def is_worker(process: int) -> bool:
    """Whether a process is sp3llm's and not the launcher."""
    try:
        line = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"sp3llm.compress" in line and b"torch.distributed.run" not in line


def other_weights(folder: Path) -> None:
    """One value of one matrix differs."""
    tensors = load_file(folder / WEIGHTS)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][0, 0] += 1
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def other_release(host: Host) -> None:
    """sp3llm as another release installs it, by what Python is told of it."""
    about = host.disk / "home" / "sp3llm-99.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: sp3llm\nVersion: 99.0\n")


def in_hub_cache(host: Host) -> None:
    """The model as the hub's `owner/small-model` was downloaded before."""
    cached = host.disk / "cache" / "hub" / "models--owner--small-model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(MODEL, cached / "snapshots" / ("0" * 40))


def cases(bench: Bench) -> dict[str, tuple[str, Callable[[str], list[str]]]]:
    """By name: what is special about it, and the run."""
    first, second = bench.hosts
    disk = second.disk

    def when(change: Callable[[], object], **changes: Any) -> Callable[[str], list[str]]:
        return lambda name: plain(bench, name, change, **changes)

    def lost(number: int, how: str) -> Callable[[str], list[str]]:
        return lambda name: cut(bench, name, number, how)

    def nothing() -> None:
        return

    def without_texts() -> None:
        for name in ("fit.txt", "held.txt"):
            (disk / name).unlink()

    def blank_in_tokenizer() -> None:
        with (disk / "model" / "tokenizer.json").open("a") as file:
            file.write("\n")

    def a_file_there() -> None:
        (disk / "sub").write_text("")

    def own_names_lead_to(address: str) -> None:
        lines = (bench.hosts[0].work / "hosts").read_text()
        for host in bench.hosts:
            (host.disk / "hosts").write_text(lines.replace(host.address, address))

    hub = ["owner/small-model"]
    recover = ["--recover-steps", "2"]
    tuned = ["small", "--teacher", "model", "--train", "fit.txt", "--eval-text", "held.txt"]
    tuned += ["--steps", "2", "--seq-len", "64", "--eval-samples", "4", "--device", "cpu"]

    def with_small() -> None:
        for host in bench.hosts:
            shutil.copytree(bench.one, host.disk / "small")

    return {
        "alike": ("the same folders on both", when(nothing)),
        "no-text": ("no text on host1", when(without_texts)),
        "no-model": ("no model on host1", when(lambda: shutil.rmtree(disk / "model"))),
        "hub": ("model in host0's hub cache alone", when(lambda: in_hub_cache(first), model=hub)),
        "weights": ("host1: one value differs", when(lambda: other_weights(disk / "model"))),
        "tokenizer": ("host1: a blank in the tokenizer", when(blank_in_tokenizer)),
        "release": ("host1: another release", when(lambda: other_release(second))),
        "settings": ("host1: `--keep 0.6`", when(nothing, host1=["--keep", "0.6"])),
        "option": ("host1: `--kep 0.6`", when(nothing, host1=["--kep", "0.6"])),
        "out": ("host1: `--out` below a file", when(a_file_there, both=["--out", "sub/small"])),
        "then": ("`--recover-steps 2`", when(nothing, both=recover)),
        "recover": ("`sp3llm.recover` itself", when(with_small, command="recover", words=tuned)),
        "names": (
            "each host's own name leads to 127.0.0.1",
            when(lambda: own_names_lead_to("127.0.0.1")),
        ),
        "debian": ("to 127.0.1.1", when(lambda: own_names_lead_to("127.0.1.1"))),
        "interface": (
            "`GLOO_SOCKET_IFNAME=lo` on both",
            when(nothing, environment={"GLOO_SOCKET_IFNAME": "lo"}),
        ),
        "killed": ("host1's process killed", lost(1, "process")),
        "host1": ("everything on host1 killed", lost(1, "host")),
        "host0": ("everything on host0 killed", lost(0, "host")),
        "sigterm": ("SIGTERM on host1", lost(1, "SIGTERM")),
        "cable": ("the cable pulled", lost(1, "cable")),
    }


def page(rows: list[str]) -> str:
    """What is written to `--output`."""
    return f"""# Two hosts that share nothing

Two network and mount namespaces on one machine, the bundled Llama, 32 windows of 128 tokens,
torch {torch.__version__}; exit codes are those of sp3llm's processes, "apart" is how many seconds
after the first the last of both launchers ended:

    sudo python eval/checks/two_hosts.py WORK --output eval/results/two-hosts.md

| what is special | host0 | host1 | apart, s |
|---|---|---|---|
""" + "".join(f"{row}\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="a folder for everything")
    parser.add_argument("--only", nargs="*", default=[], help="cases to run; none: all")
    parser.add_argument("--output", type=Path, help="the page with the table goes there")
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("Expected root, which may make network and mount namespaces: use sudo.")
    work = options.work.resolve()
    (work / HERE).mkdir(parents=True, exist_ok=True)
    hosts = [Host(number, work) for number in (0, 1)]
    lines = ["127.0.0.1 localhost", *(f"{host.address} {host.name}" for host in hosts)]
    (work / "hosts").write_text("\n".join(lines) + "\n")
    for host in hosts:
        host.disk.mkdir(exist_ok=True)
    disconnect(hosts)
    connect(hosts)
    rows = []
    try:
        one = reference(hosts, "one", [sys.executable, "-m", "sp3llm.compress"])
        pair = ["--nproc-per-node", "2", "--master-port", str(PORT)]
        bench = Bench(hosts, reference(hosts, "two", launch("compress", *pair)), one)
        for name, (what, run) in cases(bench).items():
            if options.only and name not in options.only:
                continue
            for number, cells in enumerate(run(name)):
                row = f"| {'the same command again' if number else what} {cells}"
                rows.append(row.replace(str(work), "WORK"))
                print(rows[-1], flush=True)
    finally:
        disconnect(hosts)
    if options.output:
        options.output.write_text(page(rows))


if __name__ == "__main__":
    main()
