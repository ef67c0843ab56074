"""Write a checkpoint as its groups come: shards, an index, nothing that loads until it is whole."""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sp3llm.models.checkpoint import Checkpoint
from sp3llm.models.families import Family, Group, groups, parameter_shapes
from sp3llm.runtime.files import write_json
from sp3llm.runtime.journal import REPLACING, Journal

# Stages, as a journal knows them: groups of a shard that is not yet whole, and whole shards.
WEIGHTS = "weights"
SHARD = "shard"
# Small enough to be merged, and written again after a kill, in seconds.
_SHARD_BYTES = 2 * 10**9


def shard_layout(
    family: Family, config: Mapping[str, Any], dtype: torch.dtype
) -> list[list[Group]]:
    """Which groups share a shard: whole groups, in order, up to 2 GB (one at least)."""
    shapes = parameter_shapes(family, config)
    layout: list[list[Group]] = []
    room = 0
    for group in groups(family, config):
        size = sum(math.prod(shapes[name]) for name in group.parameters) * dtype.itemsize
        if not layout or size > room:
            layout.append([])
            room = _SHARD_BYTES
        layout[-1].append(group)
        room -= size
    return layout


def with_zeros(
    tensors: Mapping[str, Tensor], added: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """A group's tensors and, of `dtype` on the CPU, zeros of the names and shapes `added`."""
    return {**tensors, **{name: torch.zeros(shape, dtype=dtype) for name, shape in added.items()}}


def write_model(
    family: Family,
    config: Mapping[str, Any],
    built: Iterable[tuple[int, Mapping[str, Tensor]]],
    dtype: torch.dtype,
    folder: Path,
    journal: Journal,
) -> Iterator[tuple[int, Callable[[], None]]]:
    """Write groups as they come, by number, and a shard whenever its last group has come. A tensor
    of an earlier group that comes with a later one takes the place of what it was.

    Writing goes on in a thread while the next group is made. Yields the number of every group and
    a function that waits until it is on the disk; what the journal has already is not written
    again.

    `config.json` is not written: the folder does not load until the caller says it is whole.
    """
    layout = shard_layout(family, config, dtype)
    with ThreadPoolExecutor(1) as writer:
        before: Future[None] | None = None
        for index, tensors in built:
            if before is not None:
                before.result()
            before = writer.submit(_write_group, journal, folder, layout, index, tensors)
            yield index, before.result
        if before is not None:
            before.result()
    for left in folder.glob(f"{REPLACING}*"):  # by a run that was killed
        left.unlink()
    size = sum(math.prod(shape) for shape in parameter_shapes(family, config).values())
    write_index(folder, layout, size * dtype.itemsize, size)


def _write_group(
    journal: Journal,
    folder: Path,
    layout: list[list[Group]],
    index: int,
    tensors: Mapping[str, Tensor],
) -> None:
    """Make a group durable, and with the last one of a shard the shard in place of its groups.

    What belongs to an earlier group is put there first: a run that is killed in between makes this
    group again, and puts the same there.
    """
    own = dict(tensors)
    for earlier, group in enumerate(itertools.chain(*layout)):
        if earlier == index:
            break
        if changed := {name: own.pop(name) for name in group.parameters if name in own}:
            _replace(journal, folder, layout, earlier, changed)
    shard = _shard_of(layout, index)
    if journal.load(SHARD, shard) is not None:
        return
    journal.add(WEIGHTS, index, own)
    first = sum(len(groups) for groups in layout[:shard])
    members = range(first, first + len(layout[shard]))
    if index < members[-1]:
        return
    merged = {name: t for i in members for name, t in journal.load(WEIGHTS, i).tensors.items()}
    path = folder / _shard_name(shard, len(layout))
    journal.add(SHARD, shard, merged, path)
    journal.drop_steps(WEIGHTS, members)


def _replace(
    journal: Journal,
    folder: Path,
    layout: list[list[Group]],
    index: int,
    changed: Mapping[str, Tensor],
) -> None:
    """Put tensors of a group that is on the disk in the place of what they were."""
    shard = _shard_of(layout, index)
    if (whole := journal.load(SHARD, shard)) is not None:
        path = folder / _shard_name(shard, len(layout))
        journal.add(SHARD, shard, {**whole.tensors, **changed}, path)
    else:
        group = journal.load(WEIGHTS, index).tensors
        journal.add(WEIGHTS, index, {**group, **changed})


def _shard_of(layout: list[list[Group]], index: int) -> int:
    """The number of the shard that holds a group, by the group's number in the model."""
    ends = itertools.accumulate(len(groups) for groups in layout)
    return next(shard for shard, end in enumerate(ends) if index < end)


def groups_written(
    family: Family, config: Mapping[str, Any], dtype: torch.dtype, journal: Journal
) -> int:
    """How many groups, from the first on without a gap, a run before has written whole."""
    layout = shard_layout(family, config, dtype)
    count = sum(len(groups) for groups in layout)
    for index in range(count):
        shard = _shard_of(layout, index)
        if journal.load(SHARD, shard) is not None:
            continue
        # The last group of a shard is what has the shard written: it must come again.
        is_last = index + 1 == count or _shard_of(layout, index + 1) != shard
        if is_last or journal.load(WEIGHTS, index) is None:
            return index
    return count


def written_group(
    family: Family, config: Mapping[str, Any], dtype: torch.dtype, journal: Journal, index: int
) -> Mapping[str, Tensor]:
    """A group that `write_model` has written, by its number; mapped from its file."""
    layout = shard_layout(family, config, dtype)
    found = journal.load(SHARD, _shard_of(layout, index)) or journal.load(WEIGHTS, index)
    group = list(itertools.chain(*layout))[index]
    return {name: found.tensors[name] for name in group.parameters}


def written(
    family: Family, config: Mapping[str, Any], dtype: torch.dtype, folder: Path
) -> Checkpoint:
    """The checkpoint that `write_model` has written."""
    layout = shard_layout(family, config, dtype)
    files = {
        name: folder / _shard_name(number, len(layout))
        for number, shard in enumerate(layout)
        for group in shard
        for name in group.parameters
    }
    return Checkpoint(folder, config, files)


def share_file(path: Path) -> None:
    """Give a file of weights the mode of any other: safetensors writes for the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def _shard_name(number: int, count: int) -> str:
    return (
        "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
    )


def write_index(
    folder: Path, layout: list[list[Group]], weight_bytes: int, parameters: int
) -> None:
    """Write the index that says which shard holds which tensor; none is needed for one shard."""
    if len(layout) == 1:
        return
    weight_map = {
        name: _shard_name(number, len(layout))
        for number, shard in enumerate(layout)
        for group in shard
        for name in group.parameters
    }
    metadata = {"total_size": weight_bytes, "total_parameters": parameters}
    write_json(
        folder / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map}
    )
