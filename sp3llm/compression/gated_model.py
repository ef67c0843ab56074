"""A stock model whose stream, neurons and KV groups go through gates, without a line of it copied.

The stream is turned into the frame of a mask, gated and turned back in front of every norm, which
is what gating everything that writes into it comes to; so the model's own weights stay as they
are, tied ones too, and without gates it is the dense model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sp3llm.compression.units import gated_writers
from sp3llm.maths.gates import Gates
from sp3llm.models import families
from sp3llm.models.families import FFN, Family


class GatedModel:
    """A frozen stock model and the gates in it.

    `frame_DC` are the coordinates that stream gates are about, as orthonormal columns: `(D, D)`,
    under LayerNorm `(D, D - 1)` and mean-free.
    """

    def __init__(
        self, model: nn.Module, family: Family, config: Mapping[str, Any], frame_DC: Tensor
    ) -> None:
        self.model = model.requires_grad_(False)
        self._frame_DC = frame_DC
        self._open: Gates | None = None
        layers = model.get_submodule(family.layers_module)
        for group in families.groups(family, config):
            if not group.prefix:
                continue
            layer = layers[group.layer]
            for site in group.sites:
                layer.get_submodule(site.norm).register_forward_pre_hook(self._stream_gate)
            for writer, axis in gated_writers(family, group):
                gate = self._unit_gate(axis, group.layer)
                layer.get_submodule(writer).register_forward_pre_hook(gate)
        model.get_submodule(family.final_norm).register_forward_pre_hook(self._stream_gate)

    def set_frame(self, frame_DC: Tensor) -> None:
        """Let stream gates be about other coordinates from now on."""
        self._frame_DC = frame_DC

    @contextmanager
    def through(self, gates: Gates) -> Iterator[nn.Module]:
        """The model with these gates for the duration of the block, those of every window by
        themselves: `(B, C)`, `(B, L, F)`, `(B, L, G)`.

        Its gradients must be taken inside: a layer may run again for them.
        """
        self._open = gates
        try:
            yield self.model
        finally:
            self._open = None

    def _stream_gate(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._open is None or self._open.stream_C is None:
            return None
        x, frame_DC = args[0], self._frame_DC.to(args[0])
        turned_BSC = _by_window(x @ frame_DC, self._open.stream_C)
        gated_BSC = turned_BSC * self._open.stream_C[:, None].to(x)
        return (gated_BSC @ frame_DC.T).reshape(x.shape), *args[1:]

    def _unit_gate(self, axis: str, layer: int) -> Callable[..., tuple[Tensor, ...] | None]:
        def gate(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if self._open is None:
                return None
            gates_BLU = self._open.neurons_LF if axis == FFN else self._open.groups_LG
            if gates_BLU is None:
                return None
            a, gates_BU = args[0], gates_BLU[:, layer]
            units = gates_BU.repeat_interleave(a.shape[-1] // gates_BU.shape[1], 1)
            gated = _by_window(a, units) * units[:, None].to(a)
            return gated.reshape(a.shape), *args[1:]

        return gate


def _by_window(x: Tensor, gates: Tensor) -> Tensor:
    """`(B, tokens, width)`: OPT's layers put windows and tokens on one axis."""
    return x.reshape(len(gates), -1, x.shape[-1])
