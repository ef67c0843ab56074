"""A stock model whose stream, neurons and KV groups go through gates, without a line of it copied.

What the gates take of the stream, seen in the frame of a mask, is taken off in front of every
norm, which is what gating everything that writes into it comes to; so the model's own weights stay
as they are, tied ones too, and without gates it is the dense model.

Where norms sit on the stream what stands in front of one has been gated before: every writer's
output is gated by itself, once, and so are the embeddings. Behind each norm goes what its weights
mix into coordinates whose gates are closed, and nothing else.
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
                norm = layer.get_submodule(site.norm)
                if family.post_norm:
                    norm.register_forward_hook(self._closed_gate)
                else:
                    norm.register_forward_pre_hook(self._stream_gate)
            for writer in group.writers if family.post_norm else ():
                layer.get_submodule(writer).register_forward_hook(self._written_gate)
            for writer, axis in gated_writers(family, group):
                gate = self._unit_gate(axis, group.layer)
                layer.get_submodule(writer).register_forward_pre_hook(gate)
        outer = family.embedding_norm if family.post_norm else family.final_norm
        norm = model.get_submodule(outer)
        norm.register_forward_pre_hook(self._stream_gate)
        if family.post_norm:
            norm.register_forward_hook(self._closed_gate)

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
        gates_BC = self._stream_gates()
        return None if gates_BC is None else (self._gated(args[0], gates_BC), *args[1:])

    def _written_gate(self, _: nn.Module, __: tuple[Tensor, ...], x: Tensor) -> Tensor | None:
        gates_BC = self._stream_gates()
        return None if gates_BC is None else self._gated(x, gates_BC)

    def _closed_gate(self, _: nn.Module, __: tuple[Tensor, ...], x: Tensor) -> Tensor | None:
        gates_BC = self._stream_gates()
        return None if gates_BC is None else self._gated(x, (gates_BC > 0).to(gates_BC))

    def _stream_gates(self) -> Tensor | None:
        return None if self._open is None else self._open.stream_C

    def _gated(self, x: Tensor, gates_BC: Tensor) -> Tensor:
        """The stream, or a part of it, without what gates take of it."""
        frame_DC = self._frame_DC.to(x)
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
