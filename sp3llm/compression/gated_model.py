"""A stock model whose stream, neurons and KV groups go through gates, without a line of it copied.

What the gates take of the stream, seen in the frame of a mask, is taken off in front of every
norm, which is what gating everything that writes into it comes to; so the model's own weights stay
as they are, tied ones too, and without gates it is the dense model. Where norms sit on the stream,
whose weights mix what is kept with what is not, it is taken off behind them as well.
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
    under LayerNorm `(D, D - 1)` and mean-free; the mean has no gate.
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
                self._gate_at(layer.get_submodule(site.norm), family.post_norm)
            for writer, axis in gated_writers(family, group):
                gate = self._unit_gate(axis, group.layer)
                layer.get_submodule(writer).register_forward_pre_hook(gate)
        outer = family.embedding_norm if family.post_norm else family.final_norm
        self._gate_at(model.get_submodule(outer), family.post_norm)

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

    def _gate_at(self, norm: nn.Module, behind: bool) -> None:
        """Gate the stream in front of a norm, and behind it too where that is the stream."""

        def in_front(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            return (self._gated(args[0]), *args[1:]) if self._gates_stream() else None

        def after(_: nn.Module, __: tuple[Tensor, ...], x: Tensor) -> Tensor | None:
            return self._gated(x) if self._gates_stream() else None

        norm.register_forward_pre_hook(in_front)
        if behind:
            norm.register_forward_hook(after)

    def _gates_stream(self) -> bool:
        return self._open is not None and self._open.stream_C is not None

    def _gated(self, x: Tensor) -> Tensor:
        """The stream without what its gates take of it."""
        frame_DC, gates_BC = self._frame_DC.to(x), self._open.stream_C
        turned_BSC = _by_window(x @ frame_DC, gates_BC)
        taken_BSC = turned_BSC * (1 - gates_BC[:, None].to(x))
        return x - (taken_BSC @ frame_DC.T).reshape(x.shape)

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
