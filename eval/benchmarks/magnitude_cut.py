"""A cut by magnitude, as a baseline: no data, no basis, nothing fitted.

Layers, channels of the stream, neurons, heads and dimensions of heads stay whose weights have the
most energy; all others are left out.
"""

from pathlib import Path

import torch
from torch import Tensor

from sp3llm.compression.units import cut_units
from sp3llm.models import families
from sp3llm.models.checkpoint import open_model
from sp3llm.models.families import Group
from sp3llm.models.source import read_config


def cut_by_magnitude(dense: Path, small: Path) -> dict[str, Tensor]:
    """The weights of the encoder in `dense`, cut to the shape of the one in `small`, by the names
    that are theirs there on disk.
    """
    checkpoint, family = open_model(dense)
    config = read_config(small)
    before, after = (families.axis_sizes(family, one) for one in (checkpoint.config, config))
    heads, all_heads = (
        families.setting(family, one, "num_attention_heads") for one in (config, checkpoint.config)
    )
    groups = families.groups(family, checkpoint.config)
    tensors = [checkpoint.read(group.parameters) for group in groups]
    small_groups = families.groups(family, config)
    energies = [
        _energy(group, own, families.RESIDUAL, before)
        for group, own in zip(groups, tensors, strict=True)
    ]
    total_L = torch.stack([energy_D.sum() for energy_D in energies[1:-1]])
    layers = _loudest(total_L, len(small_groups) - 2).tolist()
    stay = [0, *(layer + 1 for layer in layers), len(groups) - 1]
    groups, tensors, energies = (
        [of[place] for place in stay] for of in (groups, tensors, energies)
    )
    channels_K = _loudest(sum(energies), after[families.RESIDUAL])
    cut: dict[str, Tensor] = {}
    for group, own, there in zip(groups, tensors, small_groups, strict=True):
        kept = cut_units(group, own, channels_K, {families.RESIDUAL: 1}, before)
        if group.prefix:
            neurons_F = _loudest(_energy(group, own, families.FFN, before), after[families.FFN])
            kept = cut_units(group, kept, neurons_F, {families.FFN: 1}, before)
            axes = (families.QUERY, families.KEY_VALUE)
            energy_HE = sum(_energy(group, own, axis, before) for axis in axes)
            energy_HE = energy_HE.reshape(all_heads, -1)
            each = after[families.QUERY] // heads
            dims_P = torch.cat(
                [
                    _loudest(energy_HE[head], each) + head * energy_HE.shape[1]
                    for head in _loudest(energy_HE.sum(1), heads).tolist()
                ]
            )
            kept = cut_units(group, kept, dims_P, dict.fromkeys(axes, 1), before)
        cut |= {
            there.prefix + name.removeprefix(group.prefix): tensor.contiguous()
            for name, tensor in kept.items()
        }
    theirs = families.parameter_shapes(family, config)
    if {name: tuple(tensor.shape) for name, tensor in cut.items()} != theirs:
        raise SystemExit(f"{small}: expected layers and heads of {dense}, all of one size.")
    return cut


def _energy(group: Group, tensors: dict[str, Tensor], axis: str, sizes: dict[str, int]) -> Tensor:
    """Squares of all weights of a group, summed for each place of an axis."""
    total = torch.zeros(sizes[axis], dtype=torch.float64)
    for name, axes in group.parameters.items():
        for dim, own in enumerate(axes):
            if own == axis and name in tensors:
                squares = tensors[name].double().square()
                total += squares.sum([other for other in range(squares.ndim) if other != dim])
    return total


def _loudest(energy: Tensor, count: int) -> Tensor:
    """The places of most energy, rising."""
    return energy.topk(count).indices.sort().values
