"""Merge key-value heads before anything else is cut, by what the dense layer reads."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sp3llm.compression.reading import as_read, norm_of, real_rows
from sp3llm.compression.refitter import Refitter
from sp3llm.compression.statistics import MomentSum
from sp3llm.maths.merging import Attention, merge_heads
from sp3llm.models.families import Group
from sp3llm.models.shapes import Shape
from sp3llm.models.stream import Stream, probe_stream


def merges(refitter: Refitter) -> bool:
    """Whether the small model has fewer key-value heads for the same query heads."""
    return refitter.shape.merges_heads(Shape.of(refitter.family, refitter.dense.config))


def read_moment(refitter: Refitter, stream: Stream) -> Tensor:
    """Second moment of the dense stream as it stands, normalised but for the norm's weight, and of
    a 1 beside it, `(D + 1, D + 1)`, float64, over all processes.
    """
    width = Shape.of(refitter.family, refitter.dense.config).hidden_size
    total = MomentSum.of(1, width, refitter.execution)

    def add_batch(rows: slice, x: Tensor) -> None:
        total.add(real_rows(as_read(refitter.family, refitter.eps, x), stream.real, rows))

    probe_stream(stream, add_batch, refitter.execution)
    seen = total.over(refitter.execution.ranks)
    ((square_DD,), (mean_D,)) = seen.moments(), seen.means()
    moment = torch.ones(width + 1, width + 1, dtype=torch.float64, device=square_DD.device)
    moment[:width, :width] = square_DD
    moment[:width, width] = moment[width, :width] = mean_D
    return moment


def with_merged_heads(
    refitter: Refitter, group: Group, source: Mapping[str, Tensor], moment: Tensor
) -> dict[str, Tensor]:
    """A dense layer with the key-value heads of the small model's shape and all query heads, still
    in the coordinates of the dense stream. `moment` is of `read_moment`.
    """
    family, shape, site = refitter.family, refitter.shape, refitter.family.sites[0]
    names = [f"{group.prefix}{reader}" for reader in site.readers]
    writer = f"{group.prefix}{family.writers[0]}.weight"
    weight_D, bias_D = norm_of(family, f"{group.prefix}{site.norm}", source, moment)
    # From what is normalised, and 1, to what the readers are multiplied by, and 1.
    read = torch.diag(torch.cat([weight_D, weight_D.new_ones(1)]))
    if bias_D is not None:
        read[:-1, -1] = bias_D
    readers = [_with_bias(source, name, moment) for name in names]
    dense = Attention(*readers, source[writer].to(moment))
    merged = merge_heads(dense, read @ moment @ read.T, shape.head_dim, shape.num_key_value_heads)
    tensors = {**source, writer: merged.writer_NQ}
    for name, rows in zip(names, (merged.query_QD, merged.key_CD, merged.value_CD), strict=True):
        tensors[f"{name}.weight"] = rows[:, :-1]
        if f"{name}.bias" in source:
            tensors[f"{name}.bias"] = rows[:, -1]
    return tensors


def _with_bias(source: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """A reader's matrix with its bias, or zeros, as a last column."""
    weight = source[f"{name}.weight"].to(like)
    bias = source.get(f"{name}.bias")
    column = weight.new_zeros(len(weight)) if bias is None else bias.to(like)
    return torch.cat([weight, column[:, None]], dim=1)
