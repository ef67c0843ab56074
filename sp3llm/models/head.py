"""What comes after the last layer: token losses, and the gradients that start there."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sp3llm.errors import UserError
from sp3llm.maths.losses import (
    distribution_divergences,
    drawn_labels,
    label_gradients,
    label_losses,
    tokens_at_once,
)
from sp3llm.maths.products import widen
from sp3llm.models.hooks import (
    Injector,
    inputs_of,
    materialized,
    outputs_of,
    replaced,
)
from sp3llm.models.stream import LayeredModel, Stream
from sp3llm.runtime.transfer import fetch, settle, store


@contextmanager
def _from_layers_on(model: LayeredModel, piece: Tensor) -> Iterator[None]:
    """Let a forward run from behind the layers only, where the stream is `piece`."""
    module, family = model.module, model.family
    layers = nn.ModuleList(
        [Injector(layer, piece) for layer in module.get_submodule(family.layers_module)]
    )
    before = [
        name.removesuffix(".weight") for name in family.embeddings if name != family.embedding
    ]
    before += (family.projections or ())[:1]
    with ExitStack() as stack:
        stack.enter_context(replaced(module, family.layers_module, layers))
        for path in before:
            owner, _, attribute = path.rpartition(".")
            if getattr(module.get_submodule(owner), attribute) is not None:
                stock, zero = module.get_submodule(path), piece.detach().new_zeros(())
                stack.enter_context(replaced(module, path, Injector(stock, zero)))
        yield


def _by_module(model: LayeredModel, head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head's tensors under its module's name, which is not always that on disk: GPT-NeoX's
    `embed_out` is `lm_head` in the classes of transformers 5.14 and later.
    """
    stored, outputs = f"{model.family.head}.", model.module.get_output_embeddings()
    path = next(path for path, module in model.module.named_modules() if module is outputs)
    return {
        f"{path}.{name.removeprefix(stored)}" if name.startswith(stored) else name: tensor
        for name, tensor in head.items()
    }


@torch.no_grad()
def token_losses(
    model: LayeredModel,
    head: Mapping[str, Tensor],
    stream: Stream,
    tokens: Tensor,
) -> Tensor:
    """Negative log-likelihood of every next token, `(windows, tokens - 1)`, float64, in nats.

    `stream` is the one after the last layer of `tokens`. Norm, head and whatever the model does
    to its logits are those of the stock forward. `head` holds the final norm's weight and the
    head's (for tied embeddings: the table, under the head's name).
    """
    module, execution = model.module, model.execution
    losses = torch.empty((len(tokens), tokens.shape[1] - 1), dtype=torch.float64)
    step = tokens_at_once(module.config.vocab_size)
    with materialized(module, _by_module(model, head), execution):
        for row, window in enumerate(tokens):
            for start in range(0, len(window) - 1, step):
                piece = stream.hidden[row : row + 1, start : min(start + step, len(window) - 1)]
                piece = fetch(piece, execution.device)
                with _from_layers_on(model, piece):
                    logits = module(inputs_embeds=piece, use_cache=False).logits[0]
                labels = window[start + 1 : start + 1 + len(logits)].to(execution.device)
                losses[row, start : start + len(labels)] = label_losses(logits, labels).cpu()
    check_said(losses)
    return losses


@torch.no_grad()
def next_tokens(model: LayeredModel, head: Mapping[str, Tensor], stream: Stream) -> Tensor:
    """How often every token is to be expected next, summed over the places of each window:
    `(windows, V)`, float64.

    `head` and `stream` are those of `token_losses`, and the distributions the stock forward's.

    Raises UserError if the logits hold NaN or infinity.
    """
    module, execution = model.module, model.execution
    rows = module.config.vocab_size
    expected = torch.zeros((len(stream.hidden), rows), dtype=torch.float64)
    step = tokens_at_once(rows)
    with materialized(module, _by_module(model, head), execution):
        for row, hidden in enumerate(stream.hidden):
            for start in range(0, len(hidden), step):
                piece = fetch(hidden[None, start : start + step], execution.device)
                with _from_layers_on(model, piece):
                    logits = module(inputs_embeds=piece, use_cache=False).logits[0]
                expected[row] += widen(logits).softmax(-1).sum(0).double().cpu()
    check_said(expected)
    return expected


@dataclass(frozen=True)
class End:
    """A streamed model behind its last layer."""

    model: LayeredModel
    head: Mapping[str, Tensor]
    """The final norm's weight and the head's, as for `token_losses`."""
    stream: Stream
    """After the last layer."""


@dataclass(frozen=True)
class Logits:
    """What models say at a few tokens of a window, and what the small ones' heads read there;
    `(tokens, V)` and `(tokens, E)`.
    """

    smalls: list[Tensor]
    dense: Tensor
    reads: list[Tensor]


@torch.no_grad()
def logits_beside(smalls: Sequence[End], dense: End) -> Iterator[tuple[int, slice, Logits]]:
    """Logits of small models and of the dense one, by the stock forwards, at the tokens of the
    windows that all streams are of: a window's number, which of its tokens, and the logits. Every
    end has a module of its own.
    """
    ends = (*smalls, dense)
    if len({id(end.model.module) for end in ends}) < len(ends):
        raise ValueError("Ends whose heads are placed side by side need modules of their own.")
    execution = dense.model.execution
    windows, tokens = dense.stream.hidden.shape[:2]
    step = tokens_at_once(dense.model.module.config.vocab_size)

    def logits_at(end: End, row: int, part: slice) -> Tensor:
        piece = fetch(end.stream.hidden[row : row + 1, part], execution.device)
        with _from_layers_on(end.model, piece):
            return end.model.module(inputs_embeds=piece, use_cache=False).logits[0]

    with ExitStack() as stack:
        for end in ends:
            by_module = _by_module(end.model, end.head)
            stack.enter_context(materialized(end.model.module, by_module, execution))
        reads = [
            stack.enter_context(inputs_of(small.model.module.get_output_embeddings()))
            for small in smalls
        ]
        for row in range(windows):
            for start in range(0, tokens, step):
                part = slice(start, min(start + step, tokens))
                said = [logits_at(small, row, part) for small in smalls]
                read = [of_small.pop()[0] for of_small in reads]
                yield row, part, Logits(said, logits_at(dense, row, part), read)


def token_divergences(smalls: Sequence[End], dense: End) -> list[Tensor]:
    """Kullback-Leibler divergence, at every token of the windows that all streams are of, of each
    small model's distribution over the next one from the dense model's, `(windows, tokens)`,
    float64, in nats.

    Raises UserError if the logits hold NaN or infinity.
    """
    shape = dense.stream.hidden.shape[:2]
    found = [torch.empty(shape, dtype=torch.float64) for _ in smalls]
    for row, part, logits in logits_beside(smalls, dense):
        divergences = distribution_divergences(logits.smalls, logits.dense)
        for place, of_small in zip(found, divergences, strict=True):
            place[row, part] = of_small.cpu()
    for of_small in found:
        check_said(of_small)
    return found


def check_said(found: Tensor) -> None:
    """Raises UserError if what was made of a model's logits holds NaN or infinity."""
    if not torch.isfinite(found).all():
        raise UserError(
            "The model's logits hold NaN or infinity: try --dtype float32, or another checkpoint."
        )


def backward_head(
    model: LayeredModel,
    head: Mapping[str, Tensor],
    stream: Stream,
    windows: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Gradients of the summed loss by the stream after the last layer and by the norm's output.

    Labels are drawn from the model's own distribution, each window's with its number, of those in
    `windows`, as the seed. Both are `(windows, tokens, D)`, where streams are.
    """
    module, execution = model.module, model.execution
    generator = torch.Generator(execution.device)
    like = tuple(stream.hidden.shape), stream.hidden.dtype
    by_stream, by_norm = (execution.empty_stream(*like) for _ in range(2))
    step = tokens_at_once(module.config.vocab_size)
    with materialized(module, _by_module(model, head), execution):
        norm = module.get_submodule(model.family.final_norm)
        for row, number in enumerate(windows):
            generator.manual_seed(number)
            for start in range(0, stream.hidden.shape[1], step):
                part = (slice(row, row + 1), slice(start, start + step))
                piece = fetch(stream.hidden[part], execution.device).requires_grad_()
                with _from_layers_on(model, piece), outputs_of(norm) as normalised:
                    logits = module(inputs_embeds=piece, use_cache=False).logits[0]
                upper = label_gradients(logits.detach(), drawn_labels(logits, generator))
                gradients = torch.autograd.grad(logits, [piece, normalised[0]], upper)
                for place, gradient in zip((by_stream, by_norm), gradients, strict=True):
                    store(place[part], gradient, execution.device)
    settle(execution.device)
    return by_stream, by_norm
