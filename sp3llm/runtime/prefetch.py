"""Read what comes next while the caller works."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from sp3llm.runtime.memory import trim_memory
from sp3llm.runtime.processes import Item

# What activations of one layer took the next one takes again: giving it back in between costs a
# tenth of a run's time in page faults. Now and then what is in pieces has to go.
_ITEMS_A_TRIM = 8


def prefetch(
    items: Iterable[Item],
    load: Callable[[Item], Mapping[str, Tensor]],
    device: torch.device,
) -> Iterator[tuple[Item, Mapping[str, Tensor]]]:
    """Yield each item with what `load` reads for it, the next one read while the caller works.

    On a GPU the tensors are there when they come; elsewhere they are as `load` returns them. Now
    and then, before it yields, memory that is free goes back to the system.
    """
    with ThreadPoolExecutor(1) as pool:
        before = None
        for number, item in enumerate(items):
            after = item, pool.submit(_loaded, load, item, device)
            if before is not None:
                yield before[0], before[1].result()
                if number % _ITEMS_A_TRIM == 0:
                    trim_memory()
            before = after
        if before is not None:
            yield before[0], before[1].result()


@functools.cache
def _copying(device: torch.device) -> "torch.cuda.Stream":
    """One for all layers: torch keeps freed memory for the stream that it was taken on."""
    return torch.cuda.Stream(device)


def _loaded(
    load: Callable[[Item], Mapping[str, Tensor]], item: Item, device: torch.device
) -> Mapping[str, Tensor]:
    tensors = load(item)
    if device.type != "cuda":
        return tensors
    # A stream of its own, so that the copy does not wait for the layer that is computing.
    copying = _copying(device)
    with torch.cuda.stream(copying):
        moved = {
            name: tensor.pin_memory().to(device, non_blocking=True)
            for name, tensor in tensors.items()
        }
    copying.synchronize()
    for tensor in moved.values():
        tensor.record_stream(torch.cuda.default_stream(device))
    return moved
