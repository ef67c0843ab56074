"""Weights that were read before: what is known of them, and what memory still holds of them."""

from collections.abc import Hashable

from torch import Tensor


class ReadBefore:
    """What a run has read of a checkpoint's tensors, by where they lie.

    A compression reads a model five times and more. That a tensor is finite has to be looked at
    once; and on its way to a GPU it has to be locked in memory, where it may as well stay for the
    next time, as long as there is room. Those read first stay: passes go through a model in order,
    and whatever is dropped for the sake of another is what will be wanted before it.
    """

    def __init__(self, room: int = 0, locked: bool = False) -> None:
        self._room = room
        self._locked = locked
        self._kept: dict[Hashable, Tensor] = {}
        self._checked: set[Hashable] = set()

    def kept(self, place: Hashable) -> Tensor | None:
        """A tensor that memory holds."""
        return self._kept.get(place)

    def is_checked(self, place: Hashable) -> bool:
        """Whether a tensor is known to be sound."""
        return place in self._checked

    def keep(self, place: Hashable, tensor: Tensor) -> Tensor:
        """Take note of a sound tensor, and hold it in memory where there is room.

        Returns it as it is held from now on.
        """
        self._checked.add(place)
        # Locked memory comes in powers of two.
        taken = 1 << max(0, tensor.nbytes - 1).bit_length() if self._locked else tensor.nbytes
        if taken > self._room:
            return tensor
        try:
            tensor = tensor.pin_memory() if self._locked else tensor
        except RuntimeError:  # the system limits how much is locked
            self._room = 0
            return tensor
        self._room -= taken
        self._kept[place] = tensor
        return tensor
