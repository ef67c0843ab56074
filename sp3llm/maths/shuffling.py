"""The order of training windows: it follows from seed and position alone."""

import torch
from torch import Tensor


def window_order(windows: int, seed: int, first: int, count: int) -> Tensor:
    """Numbers of the training windows at positions `first` to `first + count` of a run.

    Every epoch goes through all windows in an order of its own that follows from the seed.
    """
    orders, position = [], first
    while position < first + count:
        epoch, start = divmod(position, windows)
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        order = torch.randperm(windows, generator=generator)
        orders.append(order[start : start + first + count - position])
        position += len(orders[-1])
    return torch.cat(orders)
