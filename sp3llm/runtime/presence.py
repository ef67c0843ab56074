"""That the processes which a launcher started begin, stay until the end, and part in peace."""

import contextlib
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch

from sp3llm.errors import ResumableError, UserError, of_all, reason
from sp3llm.runtime.heartbeat import watch
from sp3llm.runtime.interfaces import address_towards, gloo_uses, interface_towards

# How long processes wait for each other to begin: a cold file system takes its time to import from.
ARRIVAL = timedelta(minutes=10)
# What one says that has begun.
_HERE = "here"


def processes() -> int:
    """How many processes a launcher started, from its environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def all_begun() -> Iterator[None]:
    """Begin the block when all processes that a launcher started have come here; it is for torch
    to connect them in, over the interface that leads to the first one's host. From then on this
    process ends where nothing is heard of another host.

    Raises UserError where a process does not come, or torch does not get them connected.
    """
    if processes() == 1 or torch.distributed.is_initialized():
        yield
        return
    try:
        store, index, count = _announced(_HERE, ARRIVAL)
        store.wait([_key(process) for process in range(count)], ARRIVAL)
        words = [_word(store, process) for process in range(count)]
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"Expected {processes()} processes to begin within {ARRIVAL.seconds // 60} minutes, "
            f"found that not all did ({_why(error)}): what the others said says why, or else see "
            "to it that the hosts reach each other."
        ) from error
    names = [f"process {process} on {host}" for process, (_, host, _) in enumerate(words)]
    gone = [name for name, (word, *_) in zip(names, words, strict=True) if word != _HERE]
    if gone:
        raise of_all(
            UserError(
                f"Expected {processes()} processes to begin, found that {gone[0]} did not: what it "
                "said says why."
            )
        )
    interface, connected = None, threading.Event()
    if _on_several_hosts():
        # To the first process's host its own name may lead over loopback: to others it does not.
        ways = [os.environ["MASTER_ADDR"], *(address for *_, address in words)]
        interface = interface_towards(ways)
        _watch_others(store, index, names, connected.is_set)
    try:
        with gloo_uses(interface):
            yield
    except RuntimeError as error:
        raise _unreached(_why(error)) from error
    finally:
        connected.set()
        del store  # only now: what the first process serves it with, torch uses too


def _watch_others(
    store: torch.distributed.Store,
    index: int,
    names: Sequence[str],
    connected: Callable[[], bool],
) -> None:
    """End this process, number `index`, where nothing is heard of one of the others, by name, or
    one leaves before all are connected.
    """

    def end(message: str) -> None:
        if int(os.environ.get("LOCAL_RANK", index)) == 0:
            print(f"sp3llm: {message}", file=sys.stderr, flush=True)
        os._exit(2)  # what waits for the network hears of nothing else

    def has_left(other: int) -> bool:
        try:
            left = _word(store, other)[0] != _HERE
        except RuntimeError:  # the first one's host keeps the words for all
            if connected():
                raise
            other, left = 0, True
        if left and not connected():
            end(str(_unreached(f"{names[other]} has gone")))
        return left

    def silent(other: int, seconds: float) -> None:
        end(
            f"Expected all {len(names)} processes to stay until the run ends, heard nothing of "
            f"{names[other]} for {seconds / 60:g} minutes: see whether its host runs and can be "
            "reached; then give the same command again, on every host."
        )

    others = [other for other in range(len(names)) if other != index]
    watch(store, index, others, has_left, silent)


def leave() -> None:
    """Part from the other processes, or tell them, if they may still be waiting for this one to
    begin, that it will not.
    """
    if processes() == 1:
        return
    connected = torch.distributed.is_initialized()
    if not connected or _on_several_hosts():
        with contextlib.suppress(RuntimeError, ValueError):
            _announced("gone", timedelta(seconds=10))
    if connected and torch.distributed.get_backend() == "gloo":
        # Else one end in eight is an abort ("terminate called"), and its exit code that of one.
        torch.distributed.destroy_process_group()


def _on_several_hosts() -> bool:
    """Whether a launcher started processes on other hosts too."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes())) < processes()


def _announced(word: str, patience: timedelta) -> tuple[torch.distributed.Store, int, int]:
    """Say a word to all; where they look for it, this process's number, and how many there are."""
    from torch.distributed.rendezvous import rendezvous

    store, index, count = next(rendezvous("env://", timeout=patience))
    address = address_towards(os.environ["MASTER_ADDR"])
    store.set(_key(index), f"{word} {socket.gethostname()} {address}")
    return store, index, count


def _word(store: torch.distributed.Store, process: int) -> tuple[str, str, str]:
    """The word that a process left, its host, and the address that reaches the first one's."""
    word, host, address = store.get(_key(process)).decode().split(" ")
    return word, host, address


def _key(process: int) -> str:
    """Where a process leaves its word."""
    return f"sp3llm/{process}"


@contextlib.contextmanager
def lost_process_told() -> Iterator[None]:
    """Turn what torch raises when another process has gone into one sentence.

    Raises ResumableError.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)):
            raise
        raise of_all(
            ResumableError(
                f"Expected all {processes()} processes to stay until the run ends, found that one "
                f"has gone ({_why(error)}): what it said last says why; then give the same command "
                "again, on every host."
            )
        ) from error


def _unreached(why: str) -> UserError:
    """What to raise where torch does not get processes that have begun connected."""
    return UserError(
        f"Expected {processes()} processes to reach each other, found that not all did ({why}): "
        "see to it that hosts reach each other at every port, and name on each the network "
        "interface for it with GLOO_SOCKET_IFNAME (CPU) or NCCL_SOCKET_IFNAME (GPU)."
    )


def _why(error: Exception) -> str:
    """What torch's transport says, without the place in its source."""
    text = re.sub(r"^\[[^\]]*\] *|\[/[^\]]*:\d+\] *", "", reason(error, 400))
    return re.split(r"[.;] (?:This is typically|Exception raised)", text)[0][:200]
