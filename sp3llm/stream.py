"""Run a stock model layer by layer: the one module that knows hooks and the class's own forward.

The model is built from its config with weights on the meta device. Its own `forward` is called
with recorders in place of the layers, which tells what each layer is called with (masks, rotary
embeddings) without a line of it being copied; then the weights of one layer at a time are placed,
all windows go through it, and the weights go again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from sp3llm.errors import UserError, reason
from sp3llm.execution import Execution, give_back
from sp3llm.families import EACH, Family

Probe = Callable[[slice, Tensor], None]
"""Called with the rows of a batch and what a module is called with there: for a norm the stream at
its read site, `(windows, tokens, D)`."""

Returns = dict[str, int | None]
"""By submodule: how many values it returns; None: a tensor alone."""

# Logits computed at once.
_LOGITS_A_BATCH = 2**24


@dataclass(frozen=True)
class Stream:
    """The residual stream of a set of windows, between two layers."""

    hidden: Tensor
    """`(windows, tokens, D)` in the room that streams have, replaced in place as layers run."""
    calls: Mapping[int, list[dict[str, Any]]]
    """By number of windows in a batch: the keyword arguments of every layer."""


def empty_model(config: Mapping[str, Any]) -> nn.Module:
    """The stock model of a config, with weights on the meta device and real buffers."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        stock = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        stock.use_cache = False
        stock.output_router_logits = False  # a loss for training, from layers that do not run here
        with init_empty_weights(include_buffers=False), no_init_weights():
            # Experts by the class's own loop: the grouped kernel knows no float64.
            model = AutoModelForCausalLM.from_config(stock, experts_implementation="eager")
    except Exception as error:  # each config class checks its values in its own way
        raise UserError(
            "Expected a config.json that transformers accepts, found one it rejects "
            f"({type(error).__name__}: {reason(error)}): mend it, or update transformers."
        ) from error
    return model.eval()


class _Recorder(nn.Module):
    """Stands where a layer stood and keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None
        self.kwargs: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, *_: Any, **kwargs: Any) -> Tensor:
        self.hidden, self.kwargs = hidden_states, kwargs
        return hidden_states


class _Injector(nn.Module):
    """Stands where a layer stood and hands on a stream computed elsewhere."""

    def __init__(self, hidden: Any) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.hidden


@contextmanager
def _placed(model: nn.Module, tensors: Mapping[str, Tensor], on: Execution) -> Iterator[None]:
    """Give the named parameters real values for the duration of the block."""
    from accelerate.utils import set_module_tensor_to_device

    for name, tensor in tensors.items():
        set_module_tensor_to_device(
            model, name, on.device, value=tensor, dtype=on.dtype, clear_cache=False
        )
    try:
        yield
    finally:
        for name in tensors:
            set_module_tensor_to_device(model, name, "meta")


@contextmanager
def _in_place_of(model: nn.Module, path: str, module: nn.Module) -> Iterator[None]:
    """Put another module at `path` for the duration of the block."""
    stock = model.get_submodule(path)
    owner_path, _, attribute = path.rpartition(".")
    owner = model.get_submodule(owner_path)
    setattr(owner, attribute, module)
    try:
        yield
    finally:
        setattr(owner, attribute, stock)


def _batches(windows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, windows)) for start in range(0, windows, size)]


def _rows(windows: Tensor, on: Execution) -> list[slice]:
    """The batches that windows, `(windows, tokens, ...)`, go through a layer in."""
    return _batches(len(windows), on.windows_a_batch(windows.shape[1]))


def _call(stream: Stream, windows: int, index: int, on: Execution) -> dict[str, Any]:
    """What layer `index` is called with, on the device it runs on."""
    kwargs = stream.calls[windows][index]
    if len(on.devices) < 2:
        return kwargs
    from accelerate.utils import send_to_device

    return send_to_device(kwargs, on.device)


@torch.no_grad()
def open_stream(
    model: nn.Module,
    family: Family,
    embeddings: Mapping[str, Tensor],
    tokens: Tensor,
    on: Execution,
    saved: Tensor | None = None,
) -> Stream:
    """Embed `tokens` (`(windows, tokens)`) by the stock forward and note each layer's arguments.

    With `saved`, `(windows, tokens, D)`, the stream is that one, as it once stood between two
    layers.

    Raises UserError if the embeddings yield NaN or infinity.
    """
    recorders = [_Recorder() for _ in model.get_submodule(family.layers_module)]
    hidden: Tensor | None = None
    calls: dict[int, list[dict[str, Any]]] = {}
    decoder = model.get_submodule(family.layers_module.rpartition(".")[0])
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(on.device))
    with (
        _placed(model, embeddings, on),
        _in_place_of(model, family.layers_module, nn.ModuleList(recorders)),
        _bypassed(model, [family.final_norm, *(family.projections or ())[1:]]),
    ):
        # One window by itself too: the backward pass goes window by window. A process without a
        # window of its own needs the stream's width all the same.
        for rows in [None, *_rows(tokens, on)]:
            batch = tokens.new_zeros(1, tokens.shape[1]) if rows is None else tokens[rows]
            if len(batch) in calls and saved is not None:
                continue
            decoder(input_ids=batch.to(on.device), use_cache=False)
            embedded = recorders[0].hidden
            calls.setdefault(len(batch), [recorder.kwargs for recorder in recorders])
            if hidden is None:
                hidden = on.room((*tokens.shape, embedded.shape[-1]), embedded.dtype)
            if rows is not None and saved is None:
                hidden[rows] = embedded.to(hidden.device)
    if saved is not None:
        hidden.copy_(saved)
    _check_finite(hidden, "the embeddings")
    return Stream(hidden, calls)


def by_parameter(family: Family, index: int, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A layer's tensors as the class has them, which keeps its experts as one: `(E, ..., ...)`."""
    prefix = family.layer_prefix.format(layer=index)
    found = dict(tensors)
    for fused, stored in family.experts.fused.items() if family.experts else ():
        parts = []
        for name in stored:
            first, each, last = f"{prefix}{name}".partition(EACH)
            if not each:
                parts += [found.pop(first)] if first in found else []
                continue
            experts = []
            while (expert := f"{first}{len(experts)}{last}") in found:
                experts.append(found.pop(expert))
            parts += [torch.stack(experts)] if experts else []
        if parts:  # a layer without experts has none
            found[f"{prefix}{fused}"] = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
    return found


class _Reached(Exception):  # noqa: N818  (not an error: the way out of a forward)
    """The module that a layer was to be run up to has been reached."""


@torch.no_grad()
def run_layer(
    model: nn.Module,
    family: Family,
    index: int,
    tensors: Mapping[str, Tensor],
    streams: list[tuple[Stream, Mapping[str, Probe]]],
    on: Execution,
    until: str | None = None,
    silent: "Mapping[str, int | None]" = MappingProxyType({}),
    note: "Returns | None" = None,
) -> None:
    """Send each stream through layer `index`, in place, with its weights placed for that long.

    Each stream comes with probes by module name, relative to the layer, which see that module's
    input. With `until` the layer runs up to that module only, and the streams stay as they are.
    Submodules in `silent` do not run: zeros stand for what they would have added to the stream,
    in as many values as they return. `note` has submodules as keys and is told how many that is.

    Raises UserError, naming the layer, if its output holds NaN or infinity.
    """
    layer = model.get_submodule(family.layers_module)[index]
    by_class = by_parameter(family, index, tensors)
    with _placed(model, by_class, on), _noted(layer, note):
        for stream, probes in streams:
            hidden = stream.hidden
            for rows in _rows(hidden, on):
                batch = hidden[rows].to(on.device)
                with _probed(layer, rows, probes, until), _silenced(layer, batch, silent):
                    output = layer(batch, **_call(stream, len(batch), index, on))
                    output = output[0] if isinstance(output, tuple) else output
                    hidden[rows] = output.to(hidden.device)
            if until is None:
                _check_finite(hidden, f"layer {index}")
    give_back()


@torch.no_grad()
def add_to_stream(
    stream: Stream,
    inputs: Tensor,
    kept: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    multiplier: float,
    on: Execution,
    where: str,
) -> None:
    """Add a linear writer's output to the stream, in place, as the stock layer would.

    `inputs` `(windows, tokens, P)` anywhere, of which `weight`, `(K, kept)`, reads those at the
    indices `kept` (None: all), `bias` `(K,)`, `multiplier` the family's on all that is added.

    Raises UserError, saying where, if the stream then holds NaN or infinity.
    """
    weight = weight.to(on.device, on.dtype)
    bias = None if bias is None else bias.to(on.device, on.dtype)
    hidden = stream.hidden
    for rows in _rows(inputs, on):
        read = inputs[rows].to(on.device)
        read = read if kept is None else read[..., kept]
        written = nn.functional.linear(read, weight, bias)
        moved_on = hidden[rows].to(on.device) + written * multiplier
        hidden[rows] = moved_on.to(hidden.device)
    _check_finite(stream.hidden, where)


@contextmanager
def _noted(layer: nn.Module, note: "Returns | None") -> Iterator[None]:
    """Tell how many values submodules return."""

    def hook_of(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Any], None]:
        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Any) -> None:
            note[path] = len(output) if isinstance(output, tuple) else None

        return hook

    paths = list(note or {})
    handles = [layer.get_submodule(p).register_forward_hook(hook_of(p)) for p in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _silenced(
    layer: nn.Module, batch: Tensor, silent: "Mapping[str, int | None]"
) -> Iterator[None]:
    """Let zeros stand for what submodules return."""
    with ExitStack() as stack:
        for path, count in silent.items():
            zeros = torch.zeros_like(batch)
            whole = zeros if count is None else (zeros, *[None] * (count - 1))
            stack.enter_context(_in_place_of(layer, path, _Injector(whole)))
        yield


@contextmanager
def _probed(
    layer: nn.Module, rows: slice, probes: Mapping[str, Probe], until: str | None
) -> Iterator[None]:
    """Show modules' inputs to probes; leave the block at once when `until` is reached."""

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if name in probes:
                seen = args[0]  # OPT's layers put windows and tokens on one axis
                probes[name](rows, seen.reshape(rows.stop - rows.start, -1, seen.shape[-1]))
            if name == until:
                raise _Reached

        return hook

    names = dict.fromkeys([*probes, *([until] if until else [])])
    handles = [layer.get_submodule(n).register_forward_pre_hook(hook_of(n)) for n in names]
    try:
        yield
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()


def probe_stream(stream: Stream, probe: Probe, on: Execution) -> None:
    """Show the stream as it stands (after the last layer: what the final norm reads)."""
    for rows in _rows(stream.hidden, on):
        probe(rows, stream.hidden[rows].to(on.device))


@contextmanager
def _bypassed(model: nn.Module, paths: list[str]) -> Iterator[None]:
    """Let modules hand on what they are given, where the model has them."""
    with ExitStack() as stack:
        for path in paths:
            owner, _, attribute = path.rpartition(".")
            if getattr(model.get_submodule(owner), attribute) is not None:
                stack.enter_context(_in_place_of(model, path, nn.Identity()))
        yield


@contextmanager
def _from_layers_on(model: nn.Module, family: Family, piece: Tensor) -> Iterator[None]:
    """Let a forward run from behind the layers only, where the stream is `piece`."""
    layers = nn.ModuleList([_Injector(piece) for _ in range(model.config.num_hidden_layers)])
    before = [
        name.removesuffix(".weight") for name in family.embeddings if name != family.embedding
    ]
    before += (family.projections or ())[:1]
    with ExitStack() as stack:
        stack.enter_context(_in_place_of(model, family.layers_module, layers))
        for path in before:
            owner, _, attribute = path.rpartition(".")
            if getattr(model.get_submodule(owner), attribute) is not None:
                nothing = _Injector(piece.detach().new_zeros(()))
                stack.enter_context(_in_place_of(model, path, nothing))
        yield


def _by_module(family: Family, head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head's tensors under its module's name, which is not always that on disk."""
    stored = f"{family.head}."
    return {
        f"{family.head_module}.{name.removeprefix(stored)}" if name.startswith(stored) else name: t
        for name, t in head.items()
    }


@torch.no_grad()
def token_losses(
    model: nn.Module,
    family: Family,
    head: Mapping[str, Tensor],
    stream: Stream,
    tokens: Tensor,
    on: Execution,
) -> Tensor:
    """Negative log-likelihood of every next token, `(windows, tokens - 1)`, float64, in nats.

    `stream` is the one after the last layer of `tokens`. Norm, head and whatever the model does
    to its logits are those of the stock forward. `head` holds the final norm's weight and the
    head's (for tied embeddings: the table, under the head's name).
    """
    losses = torch.empty((len(tokens), tokens.shape[1] - 1), dtype=torch.float64)
    step = max(1, _LOGITS_A_BATCH // model.config.vocab_size)
    with _placed(model, _by_module(family, head), on):
        for row, window in enumerate(tokens):
            for start in range(0, len(window) - 1, step):
                piece = stream.hidden[row : row + 1, start : min(start + step, len(window) - 1)]
                piece = piece.to(on.device)
                with _from_layers_on(model, family, piece):
                    logits = model(inputs_embeds=piece, use_cache=False).logits[0]
                targets = window[start + 1 : start + 1 + len(logits)].to(on.device)
                wide = logits if logits.dtype == torch.float64 else logits.float()
                loss = nn.functional.cross_entropy(wide, targets, reduction="none")
                losses[row, start : start + len(loss)] = loss.double().cpu()
    if not torch.isfinite(losses).all():
        raise UserError(
            "The model's logits hold NaN or infinity: try --dtype float32, or another checkpoint."
        )
    return losses


def backward_head(
    model: nn.Module,
    family: Family,
    head: Mapping[str, Tensor],
    stream: Stream,
    windows: Sequence[int],
    on: Execution,
) -> tuple[Tensor, Tensor]:
    """Gradients of the summed loss by the stream after the last layer and by the norm's output.

    Labels are drawn from the model's own distribution, each window's with its number, of those in
    `windows`, as the seed. Both are `(windows, tokens, D)`, where `stream` is.
    """
    generator = torch.Generator(on.device)
    by_stream, by_norm = torch.empty_like(stream.hidden), torch.empty_like(stream.hidden)
    step = max(1, _LOGITS_A_BATCH // model.config.vocab_size)
    with _placed(model, _by_module(family, head), on):
        norm = model.get_submodule(family.final_norm)
        for row, number in enumerate(windows):
            generator.manual_seed(number)
            for start in range(0, stream.hidden.shape[1], step):
                part = (slice(row, row + 1), slice(start, start + step))
                piece = stream.hidden[part].to(on.device).requires_grad_()
                with _from_layers_on(model, family, piece), _outputs(norm) as seen:
                    logits = model(inputs_embeds=piece, use_cache=False).logits[0].float()
                labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
                loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
                gradients = torch.autograd.grad(loss, [piece, seen[0]])
                for store, gradient in zip((by_stream, by_norm), gradients, strict=True):
                    store[part] = gradient.reshape(piece.shape).to(store.device)
    return by_stream, by_norm


def backward_layer(
    model: nn.Module,
    family: Family,
    index: int,
    tensors: Mapping[str, Tensor],
    stream: Stream,
    upstream: Tensor,
    norms: list[str],
    on: Execution,
) -> tuple[Tensor, list[Tensor]]:
    """Carry a gradient down through layer `index`, whose input is `stream`.

    Returns the gradient by that input and, for each norm named, by the norm's output.
    """
    layer = model.get_submodule(family.layers_module)[index]
    below = torch.empty_like(stream.hidden)
    by_norm = [torch.empty_like(stream.hidden) for _ in norms]
    with _placed(model, by_parameter(family, index, tensors), on):
        for row in range(len(stream.hidden)):
            rows = slice(row, row + 1)
            batch = stream.hidden[rows].to(on.device).requires_grad_()
            with _outputs(*(layer.get_submodule(norm) for norm in norms)) as seen:
                output = layer(batch, **_call(stream, 1, index, on))
            output = output[0] if isinstance(output, tuple) else output
            upper = upstream[rows].to(on.device)
            gradients = torch.autograd.grad(output, [batch, *seen], upper)
            for store, gradient in zip((below, *by_norm), gradients, strict=True):
                store[rows] = gradient.reshape(batch.shape).to(store.device)
    return below, by_norm


@contextmanager
def _outputs(*modules: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the modules return, in the order they run."""
    seen: list[Tensor] = []
    handles = [m.register_forward_hook(lambda _m, _a, out: seen.append(out)) for m in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _check_finite(hidden: Tensor, where: str) -> None:
    # The sum is an order of magnitude cheaper than looking at every value, and finite only if
    # all are; finite values whose sum overflows are looked at.
    total = hidden.sum(dtype=torch.promote_types(hidden.dtype, torch.float32))
    if not torch.isfinite(total) and not torch.isfinite(hidden).all():
        raise UserError(
            f"The activations after {where} hold NaN or infinity: try --dtype float32, or an "
            "undamaged copy of the checkpoint."
        )
