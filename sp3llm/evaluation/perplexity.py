"""Losses of a checkpoint, streamed layer by layer."""

from collections.abc import Mapping

from rich.progress import Progress
from torch import Tensor

from sp3llm.models import families
from sp3llm.models.checkpoint import Checkpoint, head_tensors
from sp3llm.models.families import Family, Group
from sp3llm.models.objectives.catalogue import objective_of
from sp3llm.models.opening import open_stream
from sp3llm.models.stream import LayeredModel, run_layer
from sp3llm.runtime.devices import Execution
from sp3llm.runtime.journal import NOTHING_KEPT, Journal
from sp3llm.runtime.prefetch import prefetch
from sp3llm.runtime.progress import tracked
from sp3llm.text.batches import rows_of
from sp3llm.text.examples import Examples

# The stage of this pass in a journal.
LOSSES = "losses"


def measure_losses(
    checkpoint: Checkpoint,
    family: Family,
    tokens: Tensor | Examples,
    execution: Execution,
    progress: Progress | None = None,
    journal: Journal = NOTHING_KEPT,
    what: str = "compressed model, perplexity",
) -> Tensor:
    """Losses of a checkpoint by its objective, streamed: `(windows, tokens - 1)`, float64, nats.

    `tokens` are token ids, `(windows, tokens)`, of which every process takes its share; each gets
    all losses. The first process reads the checkpoint for all: what a run has written lies on its
    host, and perhaps on no other. `what` is the title of the progress bar. What `journal` has of
    the pass from a run before is not done again.
    """
    objective = objective_of(family.architecture)
    model, ranks = LayeredModel.of(checkpoint.config, family, objective, execution), execution.ranks

    def read(group: Group) -> Mapping[str, Tensor]:
        return checkpoint.read(group.parameters) if ranks.is_first else {}

    embeddings, *layers, _ = families.groups(family, checkpoint.config)
    local_windows = execution.local_windows(*tokens.shape)
    own = rows_of(tokens, local_windows)
    before = journal.latest(LOSSES)
    start, saved = (0, None) if before is None else (before.step, before.tensors["stream"])
    stream = open_stream(model, ranks.tensors_of_first(read(embeddings)), own, saved)
    sources = prefetch(layers[start:], read, execution.device)
    bar = tracked(progress, what, sources, start, len(layers))
    for index, (_, tensors) in enumerate(bar, start):
        run_layer(model, index, ranks.tensors_of_first(tensors), [(stream, {})])
        if journal.due():
            journal.save(LOSSES, index + 1, {"stream": stream.hidden})
    head = ranks.tensors_of_first(head_tensors(checkpoint, family) if ranks.is_first else {})
    losses = objective.losses(model, head, stream, own)
    return ranks.all_gather_rows(losses, local_windows, len(tokens))
