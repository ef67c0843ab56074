"""Stand in for modules, and look at what goes through them: context managers over a stock model."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sp3llm.runtime.devices import Execution

Probe = Callable[[slice, Tensor], None]
"""Called with the rows of a batch and what a module is called with there: for a norm the stream at
its read site, `(windows, tokens, D)`."""


def both_probes(one: Mapping[str, Probe], two: Mapping[str, Probe]) -> dict[str, Probe]:
    """The probes of both, one after the other where both have one of a module."""

    def of(name: str) -> Probe:
        there = [probes[name] for probes in (one, two) if name in probes]

        def probe(rows: slice, x: Tensor) -> None:
            for each in there:
                each(rows, x)

        return probe

    return {name: of(name) for name in {**one, **two}}


ValueCounts = dict[str, int | None]
"""By submodule of a layer: the length of the tuple it returns; None: it returns a bare tensor."""


class _StandIn(nn.Module):
    """Stands where a stock module stood, and has the attributes that the model asks it for: a
    release may read `layer.attention_type` before it calls the layer.
    """

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        # Not a submodule: what is moved or listed here is none of the stock module's.
        object.__setattr__(self, "_stock", stock)

    def __getattr__(self, name: str) -> Any:
        """What this module has not, the stock one may."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._stock, name)


class Recorder(_StandIn):
    """Stands where a layer stood and keeps what it was called with, all but the stream by name."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__(stock)
        self.hidden: Tensor | None = None
        self.kwargs: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Keep the call, and hand the stream on as it is."""
        names = list(inspect.signature(self._stock.forward).parameters)[1:]
        named = dict(zip(names, args, strict=False))
        self.hidden, self.kwargs = hidden_states, {**named, **kwargs}
        return hidden_states


class Injector(_StandIn):
    """Stands where a module stood and hands on what was computed elsewhere."""

    def __init__(self, stock: nn.Module, value: Any) -> None:
        super().__init__(stock)
        self.value = value

    def forward(self, *_: Any, **__: Any) -> Any:
        """The value it was made with."""
        return self.value


@contextmanager
def materialized(
    model: nn.Module, tensors: Mapping[str, Tensor], execution: Execution
) -> Iterator[None]:
    """Give the named parameters real values for the duration of the block."""
    from accelerate.utils import set_module_tensor_to_device

    for name, tensor in tensors.items():
        set_module_tensor_to_device(
            model, name, execution.device, value=tensor, dtype=execution.dtype, clear_cache=False
        )
    try:
        yield
    finally:
        for name in tensors:
            set_module_tensor_to_device(model, name, "meta")


@contextmanager
def replaced(model: nn.Module, path: str, module: nn.Module) -> Iterator[None]:
    """Put another module at `path` for the duration of the block."""
    stock = model.get_submodule(path)
    owner_path, _, attribute = path.rpartition(".")
    owner = model.get_submodule(owner_path)
    setattr(owner, attribute, module)
    try:
        yield
    finally:
        setattr(owner, attribute, stock)


class _Reached(Exception):  # noqa: N818  (not an error: the way out of a forward)
    """The module that a layer was to be run up to has been reached."""


@contextmanager
def value_counts(layer: nn.Module, paths: list[str]) -> Iterator[ValueCounts]:
    """Note how many values submodules of a layer return when it runs in the block."""
    counts: ValueCounts = dict.fromkeys(paths)

    def hook_of(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Any], None]:
        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Any) -> None:
            counts[path] = len(output) if isinstance(output, tuple) else None

        return hook

    handles = [layer.get_submodule(path).register_forward_hook(hook_of(path)) for path in paths]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def zeroed_blocks(
    layer: nn.Module,
    batch: Tensor,
    zeroed: Mapping[str, int | None],
    handing_on: Sequence[str] = (),
) -> Iterator[None]:
    """Let zeros of the batch's shape stand for what submodules of a layer return: alone, or as the
    first of so many values, see `value_counts`; and let others hand on what they are given.
    """
    with ExitStack() as stack:
        stack.enter_context(bypassed(layer, handing_on))
        for path, count in zeroed.items():
            zeros = torch.zeros_like(batch)
            whole = zeros if count is None else (zeros, *[None] * (count - 1))
            stack.enter_context(replaced(layer, path, Injector(layer.get_submodule(path), whole)))
        yield


@contextmanager
def probed(
    layer: nn.Module, rows: slice, probes: Mapping[str, Probe], stop_before: str | None
) -> Iterator[None]:
    """Show modules' inputs to probes; leave the block at once when `stop_before` is reached."""

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if name in probes:
                read = args[0]  # OPT's layers put windows and tokens on one axis
                probes[name](rows, read.reshape(rows.stop - rows.start, -1, read.shape[-1]))
            if name == stop_before:
                raise _Reached

        return hook

    names = dict.fromkeys([*probes, *([stop_before] if stop_before else [])])
    handles = [layer.get_submodule(n).register_forward_pre_hook(hook_of(n)) for n in names]
    try:
        yield
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def bypassed(model: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """Let modules hand on what they are given, where the model has them."""
    with ExitStack() as stack:
        for path in paths:
            owner, _, attribute = path.rpartition(".")
            if getattr(model.get_submodule(owner), attribute) is not None:
                stack.enter_context(replaced(model, path, nn.Identity()))
        yield


@contextmanager
def outputs_of(*modules: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the modules return, in the order they run."""
    outputs: list[Tensor] = []
    handles = [m.register_forward_hook(lambda _m, _a, out: outputs.append(out)) for m in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def inputs_of(*modules: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the modules are called with, in the order they run."""
    inputs: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        for module in modules
    ]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
