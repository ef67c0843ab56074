"""What comes after an encoder's last layer: answers, and the gradients that start there."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sp3llm.maths.losses import distribution_divergences
from sp3llm.maths.products import widen
from sp3llm.models.head import End, check_said
from sp3llm.models.hooks import Injector, materialized, replaced
from sp3llm.models.stream import LayeredModel, Stream, batches
from sp3llm.runtime.transfer import fetch, settle, store
from sp3llm.text.examples import Examples

Logits = Callable[[Any, Examples], Tensor]
"""The logits in a stock model's output for a batch, `(rows, ..., classes)`; values have one."""


@contextmanager
def _from_layers_on(model: LayeredModel, piece: Tensor) -> Iterator[None]:
    """Let a forward run from behind the layers only, where the stream is `piece`."""
    module, family = model.module, model.family
    stock = module.get_submodule(family.layers_module)
    layers = nn.ModuleList([Injector(layer, piece) for layer in stock])
    embeddings = family.embeddings_module
    with (
        replaced(module, family.layers_module, layers),
        replaced(module, embeddings, Injector(module.get_submodule(embeddings), piece)),
    ):
        yield


def _answers(logits: Logits, model: LayeredModel, stream: Stream, rows: slice, x: Tensor) -> Tensor:
    """Logits of the rows of a batch, whose stream behind the last layer is `x`."""
    real = stream.real[rows].to(x.device).long()
    batch = Examples(torch.zeros_like(real), real, None, None, frozenset())
    with _from_layers_on(model, x):
        return logits(model.module(**batch.inputs()), batch)


@torch.no_grad()
def row_losses(
    logits: Logits, model: LayeredModel, head: Mapping[str, Tensor], stream: Stream, batch: Examples
) -> Tensor:
    """Losses on each row's own label, `(rows, 1)`, float64: in nats, of spans the mean over where
    they begin and end; of values the squared error.
    """
    execution = model.execution
    found = torch.empty((len(batch), 1), dtype=torch.float64)
    with materialized(model.module, head, execution):
        for rows in batches(stream.hidden, execution):
            x = fetch(stream.hidden[rows], execution.device)
            answers = widen(_answers(logits, model, stream, rows, x))
            labels = batch.labels[rows].to(answers.device)
            if answers.shape[-1] == 1:
                losses = (answers[..., 0] - labels.to(answers)).square()
            else:
                flat = answers.flatten(0, -2)
                losses = nn.functional.cross_entropy(flat, labels.flatten(), reduction="none")
            found[rows] = losses.reshape(len(x), -1).double().mean(1, keepdim=True).cpu()
    check_said(found)
    return found


@torch.no_grad()
def row_divergences(logits: Logits, smalls: Sequence[End], dense: End) -> list[Tensor]:
    """How far each small model's answers are from the dense one's, `(rows, 1)`, float64: of
    distributions the Kullback-Leibler divergence, in nats, of values the squared difference.
    """
    execution, hidden = dense.model.execution, dense.stream.hidden
    found = [torch.empty((len(hidden), 1), dtype=torch.float64) for _ in smalls]

    def answers_at(end: End, rows: slice) -> Tensor:
        x = fetch(end.stream.hidden[rows], execution.device)
        return _answers(logits, end.model, end.stream, rows, x)

    with ExitStack() as stack:
        for end in (*smalls, dense):
            stack.enter_context(materialized(end.model.module, end.head, execution))
        for rows in batches(hidden, execution):
            wanted = answers_at(dense, rows)
            said = [answers_at(small, rows) for small in smalls]
            if wanted.shape[-1] == 1:
                far = [(widen(one) - widen(wanted)).square().double() for one in said]
            else:
                several = [one.flatten(0, -2) for one in said]
                far = distribution_divergences(several, wanted.flatten(0, -2))
            for one, place in zip(far, found, strict=True):
                place[rows] = one.reshape(rows.stop - rows.start, -1).mean(1, keepdim=True).cpu()
    for one in found:
        check_said(one)
    return found


def backward_answers(
    logits: Logits,
    temperature: float,
    model: LayeredModel,
    head: Mapping[str, Tensor],
    stream: Stream,
    windows: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Gradients by the stream after the last layer, `(windows, tokens, D)`, where streams are,
    whose second moments are the Fisher information of the answers; twice, since that stream is
    what the head reads.

    What is differentiated is `sum_c s_c sqrt(p_c) (z_c - sum_d p_d z_d)`, `p` the answer's
    distribution at a temperature and `s` random signs, from the number, of those in `windows`, of a
    batch's first row: in the mean over signs its gradients' second moment is the Fisher
    information, without the noise of labels drawn. At 2, as in distillation, rows of which the
    model is sure have a say. Of a value it is the value itself.
    """

    def weighed_answers(rows: slice, x: Tensor) -> Tensor:
        answers = widen(_answers(logits, model, stream, rows, x))
        shares = (answers.detach() / temperature).softmax(-1)
        if answers.shape[-1] > 1:
            answers = answers - (shares * answers).sum(-1, keepdim=True)
        return shares.sqrt() * answers

    with materialized(model.module, head, model.execution):
        return _signed_gradients(model, stream, windows, weighed_answers)


def _signed_gradients(
    model: LayeredModel,
    stream: Stream,
    windows: Sequence[int],
    values_of: Callable[[slice, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Gradients by a stream of the sum of values, each with a random sign, twice
    (`backward_answers`); `values_of` gives them for the rows of a batch and their stream.
    """
    execution = model.execution
    generator = torch.Generator()
    by_stream = execution.empty_stream(tuple(stream.hidden.shape), stream.hidden.dtype)
    for rows in batches(stream.hidden, execution):
        x = fetch(stream.hidden[rows], execution.device).requires_grad_()
        values = values_of(rows, x)
        generator.manual_seed(windows[rows.start])
        signs = 2.0 * torch.randint(0, 2, values.shape, generator=generator) - 1
        (gradient,) = torch.autograd.grad((signs.to(values) * values).sum(), x)
        store(by_stream[rows], gradient, execution.device)
    settle(execution.device)
    return by_stream, by_stream


def _pooled(stream: Stream, rows: slice, x: Tensor) -> Tensor:
    """The mean of each row's real tokens, `(rows, D)`, of length 1, float32 at least."""
    real = stream.real[rows].to(x.device)[..., None]
    return nn.functional.normalize((widen(x) * real).sum(1) / real.sum(1), dim=-1)


@torch.no_grad()
def pooled_distances(smalls: Sequence[End], dense: End) -> list[Tensor]:
    """How far each small model's cosines between pooled rows are from the dense one's, `(rows, 1)`,
    float64: the mean squared difference over the other rows, however many go through a layer at
    once. Pooled rows themselves have other widths.
    """

    def cosines_of(end: End) -> Tensor:
        execution, hidden = end.model.execution, end.stream.hidden
        pooled = [
            _pooled(end.stream, rows, fetch(hidden[rows], execution.device)).double().cpu()
            for rows in batches(hidden, execution)
        ]
        pooled_RD = torch.cat(pooled) if pooled else torch.empty((0, 1), dtype=torch.float64)
        return pooled_RD @ pooled_RD.T

    wanted_RR, found = cosines_of(dense), []
    for small in smalls:
        far_RR = (cosines_of(small) - wanted_RR).square()
        found.append(far_RR.sum(1, keepdim=True) / max(1, len(far_RR) - 1))
        check_said(found[-1])
    return found


def pooled_gradients(
    model: LayeredModel,
    _: Mapping[str, Tensor],
    stream: Stream,
    windows: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """What `backward_answers` gives, of pooled rows: the gradient of a random direction of each."""
    return _signed_gradients(model, stream, windows, partial(_pooled, stream))
