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
    quiet = dict.fromkeys(others, 0)
    """By process: beats since the last sign. Counted, so that time in which this process itself was
    stopped does not count."""

    def give_and_take() -> None:
        number, before = 0, {}
        while True:
            # What cannot be reached now may be in a while; a silence is told by the other thread.
            with contextlib.suppress(RuntimeError):
                number += 1
                store.set(_key(index), str(number))
                for other in list(quiet):
                    if has_left(other):
                        del quiet[other]
                    elif store.check([_key(other)]):
                        sign = store.get(_key(other))
                        if sign != before.get(other):
                            before[other], quiet[other] = sign, 0
            time.sleep(beat)

    def count() -> None:
        while True:
            time.sleep(beat)
            for other in list(quiet):
                quiet[other] = quiet.get(other, 0) + 1
                if quiet[other] * beat > silence:
                    silent(other, silence)

    for work in (give_and_take, count):
        threading.Thread(target=work, daemon=True).start()


def _key(process: int) -> str:
    return f"sp3llm/beat/{process}"
