"""What a recovery will need of a device's memory, from `config.json` alone. Imports no torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sp3llm.errors import UserError
from sp3llm.models.families import (
    FFN,
    KEY_VALUE,
    QUERY,
    RESIDUAL,
    VOCAB,
    Family,
    axis_sizes,
    count_parameters,
    setting,
)
from sp3llm.models.families.counts import linear_modules
from sp3llm.models.served import export_of
from sp3llm.models.shapes import Shape, resized_config
from sp3llm.options import RecoverConfig

# Tokens that a process runs at once where nothing else is said.
_TOKENS_A_MICRO_BATCH = 2048
# Bytes a parameter of bitsandbytes' formats: nf4 with a float32 scale to 64 weights, int8 with one
# a row, which comes to nothing.
_NF4, _INT8 = 0.5 + 4 / 64, 1.0
_FLOAT32, _BFLOAT16 = 4, 2
# Tensors of the size of the logits, float32, that are alive at once: the model's own, the
# teacher's, the gradient that is taken along (`maths.losses.divergence`), and what it becomes on
# its way back. Losses that are not taken in pieces, of labels and of a teacher's largest logits,
# make more.
_LOGITS, _LOGITS_WHOLE = 4, 8
# Of the size of a teacher's logits, float32, while its distribution over more tokens is spelled.
_WHOLE_LOGITS = 2
# Bytes that a CUDA context and cuBLAS take, and the part of all the rest that is lost in gaps
# between blocks.
_MARGIN, _GAPS = 10**9, 0.05
# Bytes a token that a layer keeps for its backward pass under bfloat16 autocast: for each channel
# of the stream, each row of queries, keys and values, and each neuron of the FFN. Counted in torch
# on a Llama, weights and their copies apart, they are 26, 2.7 and 8, with adapters 18, 3.4 and 8;
# rounded up for other kernels.
_STREAM_BYTES, _HEADS_BYTES, _FFN_BYTES = 28, 4, 10


@dataclass(frozen=True)
class RecoveryNeeds:
    """Bytes on one device that trains with bfloat16 autocast."""

    teacher: int
    """The dense model's weights."""
    weights: int
    """The compressed model's, adapters included."""
    optimizer: int
    """Gradients and AdamW's moments, float32."""
    activations: int
    """What the backward pass needs, and the widest layer's on the way."""
    logits: int
    """Logits of both models and what the loss makes of them."""
    total: int
    """All of it, and what a device takes for itself."""


def micro_batch_of(settings: RecoverConfig, seq_len: int, processes: int = 1) -> int:
    """Windows that a process runs at once; they divide its share of a step.

    Raises UserError where what was asked for does not divide.
    """
    if settings.batch % processes:
        raise UserError(
            f"Expected --batch to divide among {processes} processes, found {settings.batch}: use "
            "a multiple."
        )
    share = settings.batch // processes
    if settings.micro_batch is not None:
        if share % settings.micro_batch:
            raise UserError(
                f"Expected --micro-batch to divide a process's {share} windows a step, found "
                f"{settings.micro_batch}: use a divisor."
            )
        return settings.micro_batch
    most = max(1, _TOKENS_A_MICRO_BATCH // seq_len)
    return max(count for count in range(1, min(share, most) + 1) if share % count == 0)


def recovery_needs_of(
    family: Family,
    config: Mapping[str, Any],
    shape: Shape,
    settings: RecoverConfig,
    seq_len: int,
    itemsize: int,
    export_as: str = "same",
) -> RecoveryNeeds:
    """Estimate the device memory of `sp3llm recover` for a model cut to `shape` and written as
    `export_as` says (`models.served.export_of`): biases that were added as zeros are trained too.

    `itemsize` is that of the checkpoints' weights. With adapters the model's own weights stay in
    it; otherwise they are float32, and autocast keeps copies in bfloat16 for the backward pass.
    """
    export = export_of(family, resized_config(family, config, shape), export_as)
    written, small = export.family, export.config
    tokens = micro_batch_of(settings, seq_len) * seq_len
    parameters = count_parameters(written, small)
    if settings.lora is None:
        trained, weights = parameters, (_FLOAT32 + _BFLOAT16) * parameters
    else:
        trained = adapter_parameters(written, small, settings.lora)
        weights = itemsize * parameters + _FLOAT32 * trained
    teacher = teacher_bytes(family, config, settings.teacher_dtype, itemsize)
    if settings.teacher_memory is not None:
        teacher = min(teacher, int(settings.teacher_memory * 1e9))
    if settings.teacher_logits is not None:
        teacher = 0
    layers = setting(written, small, "num_hidden_layers")
    a_layer = _layer_activations(written, small)
    kept = _FLOAT32 * axis_sizes(written, small)[RESIDUAL]  # the stream as it enters a layer
    if settings.gradient_checkpointing:
        # The layer that is computed again, and its gradients.
        activations = tokens * (layers * kept + 2 * a_layer)
    else:
        activations = tokens * (layers + 1) * a_layer
    whole = settings.lm_weight or settings.teacher_logits is not None
    copies = _LOGITS_WHOLE if whole else _LOGITS
    logits = copies * _FLOAT32 * tokens * axis_sizes(written, small)[VOCAB]
    every_token = axis_sizes(family, config)[VOCAB]
    spells = family.task_head is None and settings.teacher_logits is None
    if spells and every_token > axis_sizes(written, small)[VOCAB]:
        # The teacher's own, and what becomes of them, a window at a time.
        logits += (itemsize * tokens + _WHOLE_LOGITS * _FLOAT32 * seq_len) * every_token
    optimizer = 3 * _FLOAT32 * trained  # the gradient and AdamW's two moments
    needed = teacher + weights + optimizer + activations + logits
    return RecoveryNeeds(
        teacher=teacher,
        weights=weights,
        optimizer=optimizer,
        activations=activations,
        logits=logits,
        total=int(needed * (1 + _GAPS)) + _MARGIN,
    )


def adapter_parameters(family: Family, config: Mapping[str, Any], rank: int) -> int:
    """Parameters of adapters on `linear_modules`: `rank (in + out)` each."""
    return rank * sum(map(sum, linear_modules(family, config).values()))


def teacher_bytes(
    family: Family, config: Mapping[str, Any], teacher_dtype: str, itemsize: int
) -> int:
    """Bytes of the dense model's weights on a GPU in one of the formats of `--teacher-dtype`.

    In int8 and nf4 are the linear modules only: embeddings, head and norms never are.
    """
    parameters = count_parameters(family, config)
    if teacher_dtype in ("auto", "float32", "bfloat16"):
        sizes = {"auto": itemsize, "float32": _FLOAT32, "bfloat16": _BFLOAT16}
        return parameters * sizes[teacher_dtype]
    low = sum(map(math.prod, linear_modules(family, config).values()))
    size = {"int8": _INT8, "nf4": _NF4}[teacher_dtype]
    return int(low * size) + (parameters - low) * itemsize


def _layer_activations(family: Family, config: Mapping[str, Any]) -> int:
    """Bytes a token that one layer keeps for its backward pass under bfloat16 autocast."""
    sizes = axis_sizes(family, config)
    heads = sizes[QUERY] + 2 * sizes[KEY_VALUE]
    return _STREAM_BYTES * sizes[RESIDUAL] + _HEADS_BYTES * heads + _FFN_BYTES * sizes[FFN]
