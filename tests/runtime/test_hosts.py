"""Hosts that share no files make what one makes, or say in one sentence what is in the way.

Each is a process in a folder of its own, with a copy of everything under the same names.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import HashStore

from sp3llm.cli import main
from sp3llm.errors import UserError
from sp3llm.runtime import journal, presence
from sp3llm.runtime.heartbeat import watch
from tests.runtime.test_ranks import close, free_port
from tests.runtime.test_resume import FORKS, content, dense, die_at, settings  # noqa: F401

OPTIONS = ["dense", "--keep", "0.6", "--samples", "12", "--seq-len", "32", "--eval-samples", "4"]
OPTIONS += ["--calib", "fit.txt", "--eval-text", "held-out.txt", "--batch-tokens", "64"]
OPTIONS += ["--device", "cpu", "--out", "small"]


def as_host(number: int, home: Path, port: int, words: list[str], writes: int | None) -> None:
    """The process of a host, in the environment that a launcher sets there."""
    os.chdir(home)
    be_host(number, port)
    torch.set_num_threads(1)
    journal._SHARE_OF_TIME = 10.0
    for stream, name in ((1, "log"), (2, "said")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    if writes is not None:
        die_at(writes)
    main(["compress", *words])


def be_host(number: int, port: int) -> None:
    """Have the environment that a launcher sets on one of two hosts."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}


def run(hosts: list[Path], *more: str, host1: tuple[str, ...] = (), dies: int | None = None):
    """The same command on both, `host1` added on one; how both ended, and what they said.

    `dies` is the write at which the second is killed. There is no launcher to end the other.
    """
    port = free_port()
    each = [([*OPTIONS, *more], None), ([*OPTIONS, *more, *host1], dies)]
    processes = [
        FORKS.Process(target=as_host, args=(number, home, port, words, writes))
        for number, (home, (words, writes)) in enumerate(zip(hosts, each, strict=True))
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    said = ["".join(line for line in (home / "said").open() if "sp3llm" in line) for home in hosts]
    return [process.exitcode for process in processes], said


@pytest.fixture
def hosts(dense, tmp_path) -> list[Path]:  # noqa: F811
    settings(dense, tmp_path)  # writes the texts
    homes = [tmp_path / name for name in ("host0", "host1")]
    for home in homes:
        shutil.copytree(dense, home / "dense")
        for name in ("fit.txt", "held-out.txt"):
            shutil.copy(dense.with_name(name), home)
    return homes


@pytest.fixture(scope="module")
def expected(dense, tmp_path_factory) -> Path:  # noqa: F811
    """What one process makes."""
    home = tmp_path_factory.mktemp("alone")
    settings(dense, home)
    shutil.copytree(dense, home / "dense")
    for name in ("fit.txt", "held-out.txt"):
        shutil.copy(dense.with_name(name), home)
    process = FORKS.Process(target=alone, args=(home,))
    process.start()
    process.join()
    assert process.exitcode == 0
    return home / "small"


def alone(home: Path) -> None:
    os.chdir(home)
    torch.set_num_threads(1)
    main(["compress", *OPTIONS])


def test_hosts_that_share_nothing_make_what_one_makes(hosts, expected):
    for text in ("fit.txt", "held-out.txt"):  # which the first process reads
        (hosts[1] / text).unlink()
    codes, said = run(hosts)
    assert codes == [0, 0], said
    assert close(hosts[0] / "small", expected)
    assert sorted(path.name for path in hosts[1].iterdir()) == ["dense", "log", "said"]


def test_a_host_that_is_lost_ends_the_other_and_both_continue_to_the_same_bytes(hosts):
    codes, said = run(hosts, dies=19)
    assert codes == [2, -9]
    assert "Expected all 2 processes to stay until the run ends, found that one has gone" in said[0]
    assert not (hosts[0] / "small").exists()
    assert run(hosts)[0] == [0, 0]
    assert "Continuing the run" in (hosts[0] / "log").read_text()
    found = content(hosts[0] / "small")
    assert run(hosts, "--fresh")[0] == [0, 0]
    assert content(hosts[0] / "small") == found


def other_weights(home: Path) -> None:
    tensors = load_file(home / "dense" / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, home / "dense" / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "more", "host1", "told"),
    [
        (lambda home: shutil.rmtree(home / "dense"), (), (), "found 'dense', which is no folder"),
        (other_weights, (), (), "Expected the model's model.safetensors to be the same on every"),
        (lambda _: None, (), ("--keep", "0.5"), "--keep to be the same on every host, found 0.6"),
        (lambda home: (home / "x").touch(), ("--out", "x/small"), (), "Cannot write to"),
        (lambda _: None, ("--recover-steps", "1"), (), "Expected a file system that all hosts"),
    ],
    ids=["model", "weights", "settings", "out", "recovery"],
)
def test_what_one_host_lacks_or_has_otherwise_all_say(
    change: Callable[[Path], object], more, host1, told, hosts
):
    change(hosts[1])
    codes, said = run(hosts, *more, host1=host1)
    assert codes == [2, 2]
    for words in said:
        assert told in words
        assert words.count("\n") == 1
    assert not any(path.name.startswith("small") for home in hosts for path in home.iterdir())


def test_a_host_that_refuses_before_the_others_know_of_it_is_not_waited_for(hosts):
    codes, said = run(hosts, host1=("--keep", "2"))
    assert codes == [2, 2]
    assert "Expected 2 processes to begin, found that process 1 on" in said[0]
    assert "Expected --keep between 0 and 1" in said[1]


def connect_or_not(number: int, home: Path, port: int, fails: int) -> None:
    """The process of a host that begins; on one of two torch fails to connect it."""
    be_host(number, port)
    os.dup2(os.open(home / f"said{number}", os.O_WRONLY | os.O_CREAT), 2)
    presence.watch = partial(presence.watch, beat=0.1)
    begun = home / "begun"
    try:
        with presence.all_begun():
            if number == fails:
                while not begun.exists():  # the other has yet to read that both are here
                    time.sleep(0.02)
                raise RuntimeError("[/a/place.cc:1] connection refused")
            begun.touch()
            time.sleep(60)  # as torch would wait
    except UserError as error:
        sys.exit(str(error))
    finally:
        presence.leave()


@pytest.mark.parametrize("fails", [0, 1])  # the first one keeps the store
def test_a_host_that_cannot_be_connected_is_not_waited_for(fails, tmp_path):
    port = free_port()
    processes = [
        FORKS.Process(target=connect_or_not, args=(number, tmp_path, port, fails))
        for number in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == ([1, 2] if fails == 0 else [2, 1])
    for number in (0, 1):
        said = [line for line in (tmp_path / f"said{number}").open() if "Expected" in line]
        why = "connection refused" if number == fails else f"process {fails} on"
        assert len(said) == 1
        assert f"2 processes to reach each other, found that not all did ({why}" in said[0]


@pytest.mark.slow
def test_where_one_host_has_lost_what_it_kept_all_begin_anew(hosts, expected):
    run(hosts, dies=19)
    shutil.rmtree(hosts[1] / "small.partial")
    assert run(hosts)[0] == [0, 0]
    assert "starting over" in (hosts[0] / "log").read_text()
    assert close(hosts[0] / "small", expected)


@pytest.mark.parametrize(("ends", "told"), [(None, [1]), ("beats", []), ("leaves", [])])
def test_a_host_of_which_nothing_is_heard_is_told(ends, told):
    """One whose network is gone closes no connection."""
    store, found, left = HashStore(), [], set()
    if ends == "leaves":
        left.add(1)
    if ends == "beats":
        watch(store, 1, [], lambda _: False, lambda *_: None, 0.01, 1.0)
    watch(store, 0, [1], left.__contains__, lambda other, _: found.append(other), 0.02, 0.5)
    until = time.monotonic() + (10 if told else 1.5)
    while not found and time.monotonic() < until:
        time.sleep(0.02)
    assert found[:1] == told


def test_a_host_that_has_left_stays_left_while_another_is_told_and_the_store_goes():
    store, told, asked, left = HashStore(), [], [], set()

    def has_left(other: int) -> bool:
        if "store" in left:
            raise RuntimeError("the first host has gone, and the store with it")
        asked.append(other)
        return other in left

    def silent(other: int, seconds: float) -> None:
        """While one is told the other leaves, is seen to, and the store goes."""
        if not told:
            left.add(2)
            del asked[:]
            while asked.count(1) < 3:
                time.sleep(0.01)
            left.add("store")
        told.append(other)

    watch(store, 2, [], lambda _: False, lambda *_: None, 0.01, 1.0)
    watch(store, 0, [1, 2], has_left, silent, 0.02, 0.4)
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        time.sleep(0.02)
    assert set(told) == {1}
