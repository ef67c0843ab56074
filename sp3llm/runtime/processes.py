"""The processes that share a run, on one host or several; they are accelerate's."""

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from sp3llm.errors import UserError, of_all
from sp3llm.runtime.presence import ARRIVAL, all_begun, processes

Item = TypeVar("Item")
Value = TypeVar("Value")

# How long processes wait for each other once all have begun, as while the first one downloads a
# model; one that fails ends the connection, or is ended by the launcher.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """The processes that share a run."""

    index: int = 0
    count: int = 1
    device: torch.device | None = None
    """What tensors must be on to be sent; None: any."""
    local_index: int = 0
    """The number of this process on its host, which may share no file with the others."""
    local_count: int = 1
    """How many of the processes its host has."""

    @property
    def is_first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.index == 0

    @property
    def is_first_on_host(self) -> bool:
        """Whether this process looks after what lies on its host."""
        return self.local_index == 0

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
                made[1] = self._signed(error)
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(made)
        self._raise_for_all(made[1:])
        return made[0]

    def in_all(self, make: Callable[[], Value]) -> Value:
        """What `make`, in which processes do not wait for each other, returns here, when it has
        returned in all of them.

        A UserError that it raises in one is raised by all.
        """
        if self.count == 1:
            return make()
        made = failed = None
        try:
            made = make()
        except UserError as error:
            failed = self._signed(error)
        self._raise_for_all(self.all_gather(failed))
        return made

    def same_on_hosts(self, make: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """What `make`, called once a host, finds to be the same on every one, by what it is called.

        Raises UserError, in all processes, where something differs, or where `make` does on one.
        """
        made = self.in_all(lambda: make() if self.is_first_on_host else None)
        found = [each for each in self.all_gather((socket.gethostname(), made)) if each[1]]
        name, first = found[0]
        for other_name, other in found[1:]:
            for key in (*first, *other):
                ours, theirs = (facts.get(key, "nothing") for facts in (first, other))
                if ours != theirs:
                    raise of_all(
                        UserError(
                            f"Expected {key} to be the same on every host, found {ours} on {name} "
                            f"and {theirs} on {other_name}: make them alike."
                        )
                    )
        return first

    def _signed(self, error: UserError) -> tuple[int, str, UserError]:
        """An error for other processes to raise."""
        return self.index, f"process {self.index} on {socket.gethostname()}", error

    def _raise_for_all(self, found: Sequence[tuple[int, str, UserError] | None]) -> None:
        """Raise the first error that a process found, as all do."""
        for index, by, error in filter(None, found):
            error.found_by = "" if index == self.index else by
            raise of_all(error)

    def tensors_of_first(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The first process's tensors by name, in all; what others pass is not looked at."""
        if self.count == 1:
            return tensors
        kinds = self.from_first(lambda: {n: (t.shape, t.dtype) for n, t in tensors.items()})
        if not self.is_first:
            tensors = {
                name: torch.empty(shape, dtype=dtype, device=self.device)
                for name, (shape, dtype) in kinds.items()
            }
        self.broadcast_(*tensors.values())
        return tensors

    def all_gather_rows(self, own: Tensor, local_windows: Tensor, count: int) -> Tensor:
        """Every process's rows, `(count, ...)`, from `own`, whose places are `local_windows`."""
        whole = own.new_zeros((count, *own.shape[1:]))
        whole[local_windows] = own
        self.all_reduce_(whole)
        return whole


def init_distributed(device: str) -> tuple[Ranks, str]:
    """The place of this process among those that a launcher started, and its device.

    With one process `device` is what was asked for.

    Raises UserError where not all of them begin, or they do not reach each other.
    """
    if processes() == 1:
        return Ranks(), device
    from accelerate import PartialState

    # Where there is no GPU accelerate wants to be told, or takes every process for the only one.
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    with all_begun():
        state = PartialState(cpu=on_cpu, timeout=ARRIVAL)
    # There is no public way to wait longer for a peer at work than for one that is to begin.
    torch.distributed.distributed_c10d._set_pg_timeout(_PATIENCE)
    ranks = ranks_of(state)
    if state.device.type == "cpu":  # it has an index, which no tensor's device has
        return ranks, "cpu"
    return replace(ranks, device=state.device), str(state.device)


def ranks_of(state: Any) -> Ranks:
    """The processes that accelerate knows: of its `PartialState` or `Accelerator`."""
    return Ranks(
        state.process_index,
        state.num_processes,
        local_index=max(0, state.local_process_index),
        local_count=int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes)),
    )
