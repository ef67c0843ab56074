"""Where the time of a compression goes: by stage, and within all of them by kind of work.

Functions are replaced by ones that are timed wherever the passes call them. Time counts once, for
the innermost that is running, so that the figures of either list add up to the whole.
"""

import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

STAGES = {
    "gradients": ("compression.measuring", "measure_gradients"),
    "dense pass": ("compression.measuring", "_forward"),
    "fewer tokens": ("compression.vocabulary_losses", "vocabulary_losses"),
    "search": ("compression.story", "choose_shape"),
    "basis": ("compression.story", "final_basis"),
    "refit, write": ("compression.story", "build"),
    "perplexity after": ("evaluation.perplexity", "measure_losses"),
}
KINDS = {
    "forward": (
        ("compression.measuring", "run_layer"),
        ("compression.gradients", "run_layer"),
        ("compression.gradients", "backward_layer"),
        ("compression.sequential", "run_layer"),
        ("compression.sequential", "add_to_stream"),
        ("compression.vocabulary_losses", "run_layer"),
        ("compression.writers", "run_layer"),
        ("evaluation.perplexity", "run_layer"),
    ),
    "Grams": (
        ("compression.refitter", "add_to_gram"),
        ("compression.statistics", "add_second_moment"),
        ("compression.gradients", "add_second_moment"),
        ("compression.curves", "add_second_moment"),
        ("compression.depth", "add_to_gram"),
    ),
    "what writers miss": (("compression.writers", "_missing"),),
    "solves": (
        ("compression.refitter", "ridge_errors"),
        ("compression.refitter", "ridge_fit"),
    ),
    "choice": (
        ("compression.writers", "select_units"),
        ("compression.curves", "drop_units"),
    ),
    "basis": (("compression.basis_choice", "metric_basis"),),
    "projection": (("compression.building", "_projected"),),
    "head": (("compression.building", "_suit_head"),),
    "input/output": (
        ("models.checkpoint", "_read_tensor"),
        ("runtime.journal", "write_tensors"),
    ),
}


class Clock:
    """Seconds by name; only the innermost name that is running counts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = time.perf_counter()

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Count for `name` what happens in the block."""
        self._switch()
        self._running.append(name)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counted for `name`; of a generator, the time between what it yields."""

        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return function(*arguments, **options)  # beside what is counted
            with self.running(name):
                made = function(*arguments, **options)
            return self._stepped(name, made) if isinstance(made, Iterator) else made

        return run

    def _stepped(self, name: str, items: Iterator[Any]) -> Iterator[Any]:
        while True:
            with self.running(name):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item


@contextmanager
def clocks() -> Iterator[tuple[Clock, Clock]]:
    """A clock of the stages and one of the kinds of work, for compressions in the block."""
    stages, kinds = Clock(), Clock()
    with ExitStack() as stack:
        for clock, places in (
            (stages, list(STAGES.items())),
            (kinds, [(name, place) for name, all_of in KINDS.items() for place in all_of]),
        ):
            for name, (module, function) in places:
                owner = import_module(f"sp3llm.{module}")
                timed = clock.timed(name, getattr(owner, function))
                stack.enter_context(mock.patch.object(owner, function, timed))
        yield stages, kinds
