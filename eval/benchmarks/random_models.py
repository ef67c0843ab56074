"""Checkpoints of random weights, for measuring what depends on shapes alone."""

import json
from pathlib import Path

import torch

from sp3llm.models.export import shard_layout, write_index
from sp3llm.models.families import count_parameters, family_of, parameter_shapes
from sp3llm.models.source import bundled_model
from sp3llm.runtime.files import write_tensors


def write_random_model(
    folder: Path, config: dict, dtype: torch.dtype, device: str = "cpu", tokenizer: bool = True
) -> int:
    """A seeded checkpoint, a shard a layer, with the bundled tokenizer or none; its parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    family = family_of(config)
    shapes = parameter_shapes(family, config)
    parameters = count_parameters(family, config)
    layout = [[group] for shard in shard_layout(family, config, dtype) for group in shard]
    generator = torch.Generator(device).manual_seed(0)
    for number, (group,) in enumerate(layout):
        tensors = {
            name: torch.ones(shapes[name], dtype=dtype)
            if len(shapes[name]) == 1
            else torch.randn(shapes[name], generator=generator, device=device)
            .mul_(0.02)
            .to("cpu", dtype)
            for name in group.parameters
        }
        write_tensors(folder / f"model-{number + 1:05d}-of-{len(layout):05d}.safetensors", tensors)
    write_index(folder, layout, parameters * dtype.itemsize, parameters)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for file in bundled_model().glob("tokenizer*") if tokenizer else ():
        (folder / file.name).write_bytes(file.read_bytes())
    return parameters
