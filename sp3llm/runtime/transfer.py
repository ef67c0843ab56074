"""Move batches of the streams between where they lie and the device that computes.

On a GPU whose streams lie in pinned host memory copies run beside the layer: the next batch comes
while the present one is computed, and what was computed goes back meanwhile. All copies, in both
directions, are made on one CUDA stream in the order in which they were asked for: rows that were
stored and are fetched again come as they were stored, without any more bookkeeping. Only who looks
at rows on the host has to call `settle` before.

Everywhere else (on a CPU, from streams on the GPU itself, from memory that is not pinned) it is
plain `to` and `copy_`, and `settle` has nothing to wait for.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

# Rows that may be on their way to a GPU, or computed with, at once. The host runs ahead of the GPU,
# and without a bound it would ask for the memory of a whole stream.
_UNDER_WAY = 6


class Copies:
    """Copies that are made when they are asked for."""

    def begin(self, rows: Tensor, device: torch.device) -> Callable[[], Tensor]:
        """Have rows of a stream sent to `device`; what is returned waits for them and gives them:
        what lies there already as it is, not a copy.
        """
        return lambda: rows.to(device)

    def store(self, rows: Tensor, value: Tensor) -> None:
        """Put a value where rows of a stream lie."""
        rows.copy_(value.reshape(rows.shape))

    def settle(self) -> None:
        """Wait for all copies to be made."""


class CudaCopies(Copies):
    """Copies between a GPU and pinned host memory, beside what it computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._asked: deque[torch.cuda.Event] = deque()
        """How far the GPU had been asked to compute when the latest rows were."""

    def begin(self, rows: Tensor, device: torch.device) -> Callable[[], Tensor]:
        """Have rows sent; what computes will wait for them, the host does not."""
        if not rows.is_pinned():
            return super().begin(rows, device)
        self._asked.append(torch.cuda.current_stream(self._device).record_event())
        if len(self._asked) > _UNDER_WAY:
            self._asked.popleft().synchronize()
        with torch.cuda.stream(self._stream):
            sent = rows.to(device, non_blocking=True)
            arrived = self._stream.record_event()

        def wait() -> Tensor:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_event(arrived)
            # Its memory is the copies': freed, it is theirs again only after what computes now.
            sent.record_stream(computing)
            return sent

        return wait

    def store(self, rows: Tensor, value: Tensor) -> None:
        """Have a value sent to the host, as soon as all that was asked for so far is computed."""
        if not rows.is_pinned():
            super().store(rows, value)
            return
        # A copy of its own, in one piece: the value may be changed in place before it is sent.
        sent = torch.empty(rows.shape, dtype=rows.dtype, device=self._device)
        sent.copy_(value.detach().reshape(rows.shape))
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            rows.copy_(sent, non_blocking=True)
        # Freed, its memory is what computes' again only when it has been sent.
        sent.record_stream(self._stream)

    def settle(self) -> None:
        """Wait until the host has all that was stored."""
        self._asked.clear()
        self._stream.synchronize()


_PLAIN = Copies()


@functools.cache
def _of_gpu(device: torch.device) -> CudaCopies:
    """One for all layers: torch keeps freed memory for the CUDA stream that it was taken on."""
    return CudaCopies(device)


def copies_of(device: torch.device) -> Copies:
    """How copies to and from a device are made."""
    return _of_gpu(device) if device.type == "cuda" else _PLAIN


def fetch(rows: Tensor, device: torch.device) -> Tensor:
    """Rows of a stream on the device that computes, to be read only."""
    return copies_of(device).begin(rows, device)()


def fetched(
    hidden: Tensor, batches: Iterable[slice], device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """Batches of a stream, each with its rows on the device that computes, the next one on its way
    when one comes: what is stored meanwhile must not be rows that are yet to come.
    """
    copies, before = copies_of(device), None
    for rows in batches:
        after = rows, copies.begin(hidden[rows], device)
        if before is not None:
            yield before[0], before[1]()
        before = after
    if before is not None:
        yield before[0], before[1]()


def store(rows: Tensor, value: Tensor, device: torch.device) -> None:
    """Put what `device` has computed where rows of a stream lie, before the next `settle` at the
    latest, and before anything that is fetched from now on.
    """
    copies_of(device).store(rows, value)


def settle(device: torch.device) -> None:
    """Wait for all that was stored to be there, for the host to look at it."""
    copies_of(device).settle()
