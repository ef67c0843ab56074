"""Cut attention first, where the width is heads times head size."""

from collections.abc import Mapping

from torch import Tensor

from sp3llm.compression.projection import Projection
from sp3llm.compression.units import complement, cut_units
from sp3llm.maths.heads import (
    first_dimensions,
    join_writer,
    project_heads,
    split_writer,
    value_output_projection,
)
from sp3llm.maths.unit_selection import unit_members
from sp3llm.models.families import INTERLEAVED, KEY_VALUE, QUERY, Family, Group


def cut_attention(
    family: Family,
    group: Group,
    tensors: Mapping[str, Tensor],
    projection: Projection,
) -> dict[str, Tensor]:
    """The layer with fewer heads, or with heads of fewer dimensions, still in old coordinates.

    Heads shrink by SP3's projections (`maths.heads`), or KV groups go whole, those first whose
    outputs write least into the kept stream. What is lost of an output's mean goes to the writer's
    bias, if it has one. `tensors` are the layer's dense ones, by their names on disk.
    """
    attention_cut, basis_DK = projection.attention_cut, projection.basis_DK
    if attention_cut is None:
        return dict(tensors)
    moments, cut = attention_cut.heads[group.layer], dict(tensors)
    heads, full = moments.mean_HE.shape
    writer = f"{group.prefix}{family.writers[0]}"
    kept_writer_DQ = basis_DK @ (basis_DK.T @ tensors[f"{writer}.weight"].to(basis_DK))
    writer_HDE = split_writer(kept_writer_DQ, full, heads)
    # Where no bias can take an output's mean, the mean counts with the rest.
    has_bias, mean_HE = f"{writer}.bias" in tensors, moments.mean_HE
    output_HEE = moments.output_HEE
    if not has_bias:
        output_HEE = output_HEE + mean_HE[..., :, None] * mean_HE[..., None, :]
    if attention_cut.head_dim < full:
        maps = first_dimensions(moments.score_maps, attention_cut.head_dim)
        value_HEP, writer_HDP, constant_HD = value_output_projection(
            output_HEE, writer_HDE, attention_cut.head_dim, mean_HE if has_bias else None
        )
        for reader, map_HEP in zip(family.sites[0].readers, (*maps, value_HEP), strict=True):
            for name in (f"{group.prefix}{reader}.weight", f"{group.prefix}{reader}.bias"):
                if name in tensors:
                    cut[name] = project_heads(tensors[name], map_HEP)
        width = len(kept_writer_DQ)
        cut[f"{writer}.weight"], constant_D = join_writer(writer_HDP, constant_HD, width)
    else:
        groups = attention_cut.groups
        kept_G = projection.kept_units and projection.kept_units.kept(KEY_VALUE, group.layer)
        if kept_G is None:
            kept_G = _strongest(output_HEE, writer_HDE, groups, attention_cut.num_key_value_heads)
        gone_G = complement(kept_G, groups)
        unit = heads // groups * full
        units = {QUERY: unit, KEY_VALUE: full, INTERLEAVED: 3 * unit}
        sizes = {QUERY: heads * full, KEY_VALUE: groups * full, INTERLEAVED: 3 * heads * full}
        cut = cut_units(group, cut, kept_G, units, sizes)
        gone_H = unit_members(gone_G, heads // groups)
        constant_D = (writer_HDE[gone_H] @ mean_HE[gone_H][..., None]).sum((0, 2))
    if has_bias:
        cut[f"{writer}.bias"] = tensors[f"{writer}.bias"].to(constant_D) + constant_D
    return cut


def _strongest(output_HEE: Tensor, writer_HDE: Tensor, groups: int, keep: int) -> Tensor:
    """Numbers of the `keep` KV groups that write most, `tr(W C W^T)`, rising."""
    energy_H = ((writer_HDE @ output_HEE) * writer_HDE).sum((1, 2))
    order_G = energy_H.reshape(groups, -1).sum(1).argsort(descending=True, stable=True)
    return order_G[:keep].sort().values
