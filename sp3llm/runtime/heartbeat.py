"""Whether the processes on other hosts are still there, for as long as a run lasts.

A process that ends closes its connections, and its peers are told at once. A host that loses its
power or its network closes none: whoever waits for it would wait for days.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence

from torch.distributed import Store

BEAT = 10.0
"""Seconds between two signs of life."""
_SILENCE = 300.0


def watch(
    store: Store,
    index: int,
    others: Sequence[int],
    has_left: Callable[[int], bool],
    silent: Callable[[int, float], None],
    beat: float = BEAT,
    silence: float = _SILENCE,
) -> None:
    """Give signs of life through `store` as process `index`, and see those of `others`, in threads
    that end with the process.

    `silent` is called, in one of them, with a process of which nothing was heard for `silence`
    seconds and with those; one that `has_left` need not be heard.
    """
    # Each is changed by one thread alone, or a change of the other could be undone.
    beats = 0
    """Counted, so that time in which this process itself was stopped does not count."""
    heard = dict.fromkeys(others, 0)
    """At which beat each that has not left was last heard."""

    def give_and_take() -> None:
        number, before = 0, {}
        while True:
            # What cannot be reached now may be in a while; a silence is told by the other thread.
            with contextlib.suppress(RuntimeError):
                for other in list(heard):
                    if has_left(other):
                        del heard[other]
                    elif store.check([_key(other)]):
                        sign = store.get(_key(other))
                        if sign != before.get(other):
                            before[other], heard[other] = sign, beats
                number += 1
                store.set(_key(index), str(number))
            time.sleep(beat)

    def count() -> None:
        nonlocal beats
        while True:
            time.sleep(beat)
            beats += 1
            for other, last in list(heard.items()):
                if (beats - last) * beat > silence:
                    silent(other, silence)

    for work in (give_and_take, count):
        threading.Thread(target=work, daemon=True).start()


def _key(process: int) -> str:
    return f"sp3llm/beat/{process}"
