"""The processes that share a run; they are accelerate's."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from sp3llm.errors import UserError

Item = TypeVar("Item")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """The processes that share a run."""

    index: int = 0
    count: int = 1
    device: torch.device | None = None
    """What tensors must be on to be sent; None: any."""

    @property
    def is_first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.index == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """The part of this process: every `count`-th item."""
        return items[self.index :: self.count]

    def all_reduce_(self, *tensors: Tensor) -> None:
        """Sum tensors over all processes, in place; every process gets the same bits."""
        self._each(tensors, torch.distributed.all_reduce)

    def broadcast_(self, *tensors: Tensor | None) -> None:
        """Replace tensors by the first process's, in place."""
        present = tuple(tensor for tensor in tensors if tensor is not None)
        self._each(present, lambda tensor: torch.distributed.broadcast(tensor, 0))

    def _each(self, tensors: tuple[Tensor, ...], act: Callable[[Tensor], Any]) -> None:
        if self.count == 1:
            return
        for tensor in tensors:
            sent = tensor.to(self.device or tensor.device).contiguous()
            act(sent)
            if sent.data_ptr() != tensor.data_ptr():
                tensor.copy_(sent)

    def all_gather(self, value: Value) -> list[Value]:
        """Every process's value, in order."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What `make` returns on the first process; the others wait and get a copy.

        A UserError that it raises there is raised by all.
        """
        if self.count == 1:
            return make()
        made: list[Any] = [None, None]
        if self.is_first:
            try:
                made[0] = make()
            except UserError as error:
                made[1] = error
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(made)
        if made[1] is not None:
            made[1].of_all = True
            raise made[1]
        return made[0]

    def all_gather_rows(self, own: Tensor, local_windows: Tensor, count: int) -> Tensor:
        """Every process's rows, `(count, ...)`, from `own`, whose places are `local_windows`."""
        whole = own.new_zeros((count, *own.shape[1:]))
        whole[local_windows] = own
        self.all_reduce_(whole)
        return whole


def processes() -> int:
    """How many processes a launcher started, from its environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def init_distributed(device: str) -> tuple[Ranks, str]:
    """The place of this process among those that `accelerate launch` started, and its device.

    With one process `device` is what was asked for.
    """
    if processes() == 1:
        return Ranks(), device
    from datetime import timedelta

    from accelerate import PartialState

    # The others wait while the first one downloads a model; who fails is ended by the launcher.
    state = PartialState(cpu=device == "cpu", timeout=timedelta(days=7))
    ranks = Ranks(state.process_index, state.num_processes)
    if state.device.type == "cpu":  # it has an index, which no tensor's device has
        return ranks, "cpu"
    return replace(ranks, device=state.device), str(state.device)
