"""What errors in the dense model cost: the Fisher information of its stream, from loss gradients.

Labels are drawn from the model itself, so that `A = E[g g^T]`, `g` the gradient of a token's loss
by the stream, is the stream's Fisher information: an error with second moment `E` costs `tr(A E)
/ 2` nats a token, to second order, errors of different tokens and places taken as independent.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sp3llm.compression.dense_pass import DensePass
from sp3llm.compression.depth import layer_loss
from sp3llm.compression.reading import folded_norm
from sp3llm.maths.moments import add_second_moment
from sp3llm.maths.products import operand, widen
from sp3llm.models.backward import backward_layer
from sp3llm.models.checkpoint import head_tensors
from sp3llm.models.opening import open_stream
from sp3llm.models.stream import Stream, run_layer
from sp3llm.runtime.prefetch import prefetch
from sp3llm.runtime.progress import tracked
from sp3llm.runtime.transfer import fetched
from sp3llm.text.batches import rows_of


def measure_gradients(run: DensePass) -> None:
    """Fill `run.fisher`: forward over a few windows, whose every layer's input is kept, and back.

    What the journal has from a run before is not done again.
    """
    if run.fisher.restore_from(run.journal.latest("fisher")):
        return
    family, journal, layers, sums = run.family, run.journal, run.layers, run.fisher
    inputs, opened = _traced_inputs(run)
    model, windows, sites = run.model(run.dense), run.traced_windows(), len(family.sites)
    before = journal.latest("gradient")
    if before is None:
        head = head_tensors(run.dense, family)
        final = replace(opened, hidden=inputs[-1])
        upstream, read = run.objective.loss_gradients(model, head, final, windows)
        scale_D = None if family.post_norm else _fold(run, family.final_norm, head)
        total_DD = _mean_square(run, read, scale_D)
        sums.head_DD.add_(total_DD)
        sums.add_site(sites * len(layers), total_DD)
        start = 0
    else:
        start, saved = before.step, before.tensors["upstream"]
        upstream = run.execution.empty_stream(tuple(saved.shape), saved.dtype).copy_(saved)
        sums.restore(before.tensors)
    downwards = list(enumerate(layers))[::-1]
    sources = prefetch(
        downwards[start:], lambda pair: run.dense.read(pair[1].parameters), run.execution.device
    )
    bar = tracked(run.progress, "dense model, loss gradients", sources, start, len(layers))
    for done, ((index, group), tensors) in enumerate(bar, start + 1):
        if run.gaps is not None:
            ends = inputs[index : index + 2]
            sums.layers_L[index] = layer_loss(run, index, *ends, upstream, opened.real)
        stream = replace(opened, hidden=inputs[index])
        scales = [_fold(run, f"{group.prefix}{site.norm}", tensors) for site in family.sites]
        by_site, behind = ([_nothing(run) for _ in family.sites] for _ in range(2))
        for _, found in backward_layer(model, index, tensors, stream, upstream):
            for total_DD, gradients, scale_D in zip(by_site, found.by_site, scales, strict=True):
                _add_squares(total_DD, gradients, scale_D)
            for total_DD, gradients in zip(behind, found.behind, strict=True):
                _add_squares(total_DD, gradients)
        for number, (at_site, after) in enumerate(zip(by_site, behind, strict=True)):
            sums.add_site(index * sites + number, _mean(run, at_site))
            sums.add_behind(index * sites + number, _mean(run, after))
        del inputs[index + 1 :]  # what was read of its file would stay in memory
        if journal.due():
            journal.save("gradient", done, {**sums.pack(), "upstream": upstream})
    sums.check_finite()
    journal.save("fisher", 0, sums.pack())
    journal.drop("gradient", "input")


def _traced_inputs(run: DensePass) -> tuple[list[Tensor], Stream]:
    """Every layer's input for the windows traced, and behind them what the head reads; and the
    stream that these were, for what layers are called with.
    """
    journal, layers, model = run.journal, run.layers, run.model(run.dense)
    kept = journal.leading("input")
    inputs = [journal.kept("input", index) for index in range(kept)]
    tokens = rows_of(run.calibration, run.traced_windows())
    stream = open_stream(model, run.embeddings(run.dense), tokens, inputs[-1] if inputs else None)
    if not inputs:
        inputs.append(journal.keep("input", 0, stream.hidden))
    start = len(inputs) - 1
    sources = prefetch(
        layers[start:], lambda group: run.dense.read(group.parameters), run.execution.device
    )
    bar = tracked(run.progress, "dense model, a little text", sources, start, len(layers))
    for index, (_, tensors) in enumerate(bar, start):
        run_layer(model, index, tensors, [(stream, {})])
        inputs.append(journal.keep("input", index + 1, stream.hidden))
    return inputs, stream


def _fold(run: DensePass, norm: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """What gradients by what a site's readers read are times, `(D,)`, to be those by the normalised
    stream: the norm's weight.
    """
    return folded_norm(run.family, norm, tensors, _SCALE.to(run.execution.device))[0]


# Of the dtype that gradients are scaled in.
_SCALE = torch.empty(0, dtype=torch.float32)


def _mean_square(run: DensePass, gradients: Tensor, scale_D: Tensor | None = None) -> Tensor:
    """Mean `g g^T` of gradients, `(windows, tokens, D)`, each channel times its scale, over all
    processes and the tokens that are traced; `(D, D)`, float64.
    """
    total_DD = _nothing(run)
    rows = [slice(row, row + 1) for row in range(len(gradients))]
    for _, window in fetched(gradients, rows, run.execution.device):
        _add_squares(total_DD, window, scale_D)
    return _mean(run, total_DD)


def _nothing(run: DensePass) -> Tensor:
    """The sum of no squares, `(D, D)`."""
    width = run.shape.hidden_size
    return torch.zeros(width, width, dtype=torch.float64, device=run.execution.device)


def _add_squares(total_DD: Tensor, gradients: Tensor, scale_D: Tensor | None = None) -> None:
    """Add `g g^T` of gradients, `(windows, tokens, D)`, each channel times its scale."""
    for window in gradients:
        scaled = operand(window)
        if scale_D is not None:
            scaled = (scaled * scale_D.to(widen(scaled))).to(scaled.dtype)
        add_second_moment(total_DD, scaled)


def _mean(run: DensePass, total_DD: Tensor) -> Tensor:
    """What squares come to for each token that is traced, in the windows of all processes."""
    run.execution.ranks.all_reduce_(total_DD)
    return total_DD / run.traced_tokens
