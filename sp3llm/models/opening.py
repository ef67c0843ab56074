"""Open a stream: embed a batch by the stock forward, and note what each layer is called with."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sp3llm.models.hooks import Recorder, bypassed, materialized, replaced
from sp3llm.models.stream import FiniteSums, LayeredModel, Stream, batches, call_key
from sp3llm.runtime.transfer import settle, store
from sp3llm.text.batches import rows_of
from sp3llm.text.examples import Examples


@torch.no_grad()
def open_stream(
    model: LayeredModel,
    embeddings: Mapping[str, Tensor],
    tokens: Tensor | Examples,
    saved: Tensor | None = None,
) -> Stream:
    """Embed `tokens` (`(windows, tokens)`, or padded examples) by the stock forward and note each
    layer's arguments.

    With `saved`, `(windows, tokens, D)`, the stream is that one, as it once stood between two
    layers.

    Raises UserError if the embeddings yield NaN or infinity.
    """
    module, family, execution = model.module, model.family, model.execution
    recorders = [Recorder(layer) for layer in module.get_submodule(family.layers_module)]
    hidden: Tensor | None = None
    seen = FiniteSums()
    calls: dict[tuple[int, int], list[dict[str, Any]]] = {}
    padded = isinstance(tokens, Examples)
    for part in module.modules():
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, buffer.to(execution.device))
    with (
        materialized(module, embeddings, execution),
        replaced(module, family.layers_module, nn.ModuleList(recorders)),
        bypassed(module, _behind_layers(model)),
    ):
        # One window by itself too: the backward pass goes window by window. A process without a
        # window of its own needs the stream's width all the same.
        for rows in [None, *batches(tokens, execution)]:
            key = call_key(rows or slice(0, 1), padded)
            if key in calls and saved is not None:
                continue
            recorded = rows or slice(0, 1)
            if padded:
                batch = rows_of(tokens, recorded).to(execution.device)
                module.base_model(**batch.inputs())
            else:
                batch = tokens.new_zeros(1, tokens.shape[1]) if rows is None else tokens[rows]
                decoder = module.get_submodule(family.layers_module.rpartition(".")[0])
                decoder(input_ids=batch.to(execution.device), use_cache=False)
            embedded = recorders[0].hidden
            calls.setdefault(key, [recorder.kwargs for recorder in recorders])
            if hidden is None:
                hidden = execution.empty_stream((*tokens.shape, embedded.shape[-1]), embedded.dtype)
            if rows is not None and saved is None:
                seen.add(embedded)
                store(hidden[rows], embedded, execution.device)
    settle(execution.device)
    if saved is not None:
        hidden.copy_(saved)
        seen.add(hidden)
    seen.check([hidden], "the embeddings")
    return Stream(hidden, calls, tokens.attention_mask.bool() if padded else None)


def _behind_layers(model: LayeredModel) -> list[str]:
    """Modules behind the layers that a forward of the model without its head would run."""
    module, family = model.module, model.family
    if family.task_head is None:
        return [family.final_norm, *(family.projections or ())[1:]]
    pooler = getattr(module.base_model, "pooler", None)
    return [path for path, part in module.named_modules() if part is pooler and pooler is not None]
