"""Checkpoints on disk: read them a group at a time, write new ones safely.

Reading never loads more than the tensors asked for. Writing goes to a folder beside the target
that gets its `config.json` last and the target's name only when everything is in it, so that a
killed run leaves nothing that loads.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sp3llm.errors import ResumableError, UserError, reason
from sp3llm.execution import Ranks
from sp3llm.families import Family, Group, groups, is_tied, parameter_shapes
from sp3llm.record import RECORD
from sp3llm.resume import MANIFEST, Journal
from sp3llm.source import read_config

# Inside the folder of a run: what becomes the result. What a journal knows groups and shards as.
MODEL = "model"
WEIGHTS, SHARD = "weights", "shard"

# Not weights of the model: training state, and formats of other tools.
_NOT_CARRIED = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".index.json", ".md", ".h5")
_CARRIED = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_NEVER_CARRIED = ("config.json", RECORD, "trainer_state.json", "training_args.json")

# What bitsandbytes, GPTQ, AWQ, compressed-tensors and float8 checkpoints keep beside or in place of
# weights; not all of them say so in their config.json.
_QUANTIZED = (
    *(".SCB", ".absmax", ".quant_map", ".qweight", ".qzeros", ".scales", ".g_idx"),
    *(".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight_format"),
)

# What a fingerprint looks at of a shard.
_SAMPLED_PIECES, _SAMPLED_BYTES = 256, 2**14
_SHARD_BYTES = 2 * 10**9
# Headers, tokenizer, card, and what a file system loses to blocks.
_DISK_MARGIN = 64 * 2**20


# --------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face checkpoint on disk: its config, and where each tensor lies."""

    folder: Path
    """The folder of the checkpoint."""
    config: Mapping[str, Any]
    """`config.json` as it stands."""
    files: Mapping[str, Path]
    """Tensor name to the shard that holds it."""
    stored: Mapping[str, str] = field(default_factory=dict)
    """Tensor name to its name in the shard, where the two differ."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors, on the CPU and in their own dtype.

        Raises UserError if a shard is damaged or a tensor holds NaN or infinity.
        """
        tensors = {
            name: _read_tensor(self.files[name], self.stored.get(name, name)) for name in names
        }
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise UserError(
                    f"Tensor '{name}' in '{self.files[name].name}' holds NaN or infinity: get an "
                    "undamaged copy of the checkpoint."
                )
        return tensors

    def dtype(self) -> torch.dtype:
        """The dtype of the checkpoint's weights: that of its first matrix."""
        for name, path in self.files.items():
            tensor = _read_tensor(path, self.stored.get(name, name))
            if tensor.ndim == 2:
                return tensor.dtype
        raise UserError(f"'{self.folder}' holds no matrix: expected a model's weights.")


def open_checkpoint(folder: Path) -> Checkpoint:
    """Find config and weights in a folder, without reading the weights.

    Raises UserError if one is missing, or a shard is missing or damaged.
    """
    return Checkpoint(folder, read_config(folder), _locate_tensors(folder))


def _locate_tensors(folder: Path) -> dict[str, Path]:
    for index, single in (
        ("model.safetensors.index.json", "model.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    ):
        if (folder / index).is_file():
            weight_map = _weight_map(folder / index)
            shards = {
                shard: set(_shard_names(folder / shard)) for shard in set(weight_map.values())
            }
            for name, shard in weight_map.items():
                if name not in shards[shard]:
                    raise UserError(
                        f"Expected tensor '{name}' in shard '{shard}', as {index} says, found "
                        "none: get an undamaged copy of the checkpoint."
                    )
            return {name: folder / shard for name, shard in weight_map.items()}
        if (folder / single).is_file():
            return dict.fromkeys(_shard_names(folder / single), folder / single)
    raise UserError(
        f"Expected weights in '{folder}' (model.safetensors, pytorch_model.bin, or shards with an "
        "index), found none: name a folder that holds the model's weights."
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): os.fspath(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"'{index}' is no index of shards ({type(error).__name__}: {reason(error)}): get an "
            "undamaged copy of it."
        ) from error


def _damaged(shard: Path, why: str) -> UserError:
    return UserError(
        f"Shard '{shard}' is truncated or corrupt ({why}): get an undamaged copy of it."
    )


def _shard_names(shard: Path) -> list[str]:
    if not shard.is_file():
        raise UserError(f"Shard '{shard}' is missing: get a complete copy of the checkpoint.")
    if shard.suffix == ".bin":
        return list(_load_bin(shard))
    try:
        with safe_open(shard, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise _damaged(shard, reason(error)) from error


@functools.lru_cache(maxsize=1)
def _load_bin(shard: Path) -> dict[str, Tensor]:
    """A legacy shard, mapped into memory where its format allows. Never runs code from it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            try:
                tensors = torch.load(shard, map_location="cpu", mmap=True, weights_only=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                tensors = torch.load(shard, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's text goes on about weights_only=False
        if "GLOBAL" in str(error) or "Unsupported class" in str(error):
            raise UserError(
                f"Shard '{shard}' holds objects other than tensors, which can run code when they "
                "are loaded: get the model as safetensors."
            ) from error
        raise _damaged(shard, "no file of tensors") from error
    except Exception as error:  # zip and torch raise many kinds for damaged files
        raise _damaged(shard, reason(error, 80)) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in tensors.items()
    ):
        raise UserError(
            f"Expected a dictionary of tensors in shard '{shard}', found something else: get the "
            "model's own pytorch_model.bin, or its safetensors."
        )
    return tensors


def _read_tensor(shard: Path, name: str) -> Tensor:
    if shard.suffix == ".bin":
        return _load_bin(shard)[name]
    try:
        with safe_open(shard, framework="pt") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise _damaged(shard, reason(error)) from error


def fingerprint(checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells a model from another one: `config.json` and, of every shard, its size and a hash
    of its header and of pieces all over it. Reading 140 GB whole would take minutes.
    """
    found: dict[str, Any] = {"config.json": _sha256(json.dumps(dict(checkpoint.config)).encode())}
    for path in sorted(set(checkpoint.files.values())):
        size = path.stat().st_size
        digest = hashlib.sha256()
        with path.open("rb") as file:
            for piece in range(_SAMPLED_PIECES):
                file.seek(size * piece // _SAMPLED_PIECES)
                digest.update(file.read(_SAMPLED_BYTES))
        found[path.name] = f"{size} bytes, {digest.hexdigest()[:16]}"
    return found


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def with_prefix(checkpoint: Checkpoint, family: Family) -> Checkpoint:
    """The checkpoint under the causal model's names, where it was saved from the bare decoder.

    Such files, OPT's among them, lack the names' first part; transformers loads them all the same.
    """
    prefix = family.embedding.partition(".")[0] + "."
    bare = family.embedding.removeprefix(prefix)
    if family.embedding in checkpoint.files or bare not in checkpoint.files:
        return checkpoint
    head = f"{family.head}."
    named = {name if name.startswith(head) else prefix + name: name for name in checkpoint.files}
    files = {name: checkpoint.files[stored] for name, stored in named.items()}
    return replace(checkpoint, files=files, stored=named)


def check_tensors(checkpoint: Checkpoint, family: Family) -> None:
    """Compare the names, shapes and dtypes on disk with what the family's table predicts.

    Raises UserError naming the first tensor that is missing, not expected, or of another shape.
    """
    expected = parameter_shapes(family, checkpoint.config)
    tied_head = f"{family.head}.weight" if is_tied(family, checkpoint.config) else None
    for name in checkpoint.files:
        known = name in expected or name == tied_head or name.endswith(family.ignored_suffixes)
        if not known and name.endswith(_QUANTIZED):
            raise UserError(
                f"Found tensor '{name}', which only quantized checkpoints have: load the "
                "unquantized one it was made from."
            )
        if not known:
            raise UserError(
                f"Found tensor '{name}' that a {family.architecture} of this config.json does not "
                "have: the checkpoint holds more than this model, or a variant of it; choose "
                "another."
            )
    for name, shape in expected.items():
        if name not in checkpoint.files:
            raise UserError(
                f"Expected tensor '{name}', which config.json asks for, found none in "
                f"'{checkpoint.folder}': get a complete copy of the checkpoint."
            )
        stored = checkpoint.stored.get(name, name)
        found_shape, found_dtype = _shape_and_dtype(checkpoint.files[name], stored)
        if found_dtype not in ("F64", "F32", "F16", "BF16"):
            raise UserError(
                f"Expected tensor '{name}' in float32, float16 or bfloat16, found {found_dtype}: "
                "the checkpoint is quantized; load the unquantized one it was made from."
            )
        if found_shape != shape:
            raise UserError(
                f"Expected tensor '{name}' of shape {shape}, found {found_shape}: config.json and "
                "weights do not belong together."
            )


def _shape_and_dtype(shard: Path, name: str) -> tuple[tuple[int, ...], str]:
    if shard.suffix == ".bin":
        tensor = _load_bin(shard)[name]
        names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16"}
        names[torch.bfloat16] = "BF16"
        return tuple(tensor.shape), names.get(tensor.dtype, str(tensor.dtype))
    with safe_open(shard, framework="pt") as file:
        view = file.get_slice(name)
        return tuple(view.get_shape()), view.get_dtype()


# --------------------------------------------------------------------------- writing


@contextlib.contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes `out` when the block ends without an exception.

    Until then it is called `out` + `.partial`; an exception removes it, and what a killed run
    left under that name is removed by the next one. An earlier result of sp3llm at `out` is
    replaced at the very end.

    Raises UserError if `out` exists and is not ours, or another run is writing it.
    """
    with _working_folder(out) as partial:
        _empty(partial)
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        (partial / ".lock").unlink()
        _replace_folder(partial, out)


@contextlib.contextmanager
def run_folder(out: Path, fresh: bool, ranks: Ranks) -> Iterator[Path]:
    """A folder to work in that outlives a killed run; its `model` becomes `out` in the end.

    It is called `out` + `.partial`. Bad input removes it, everything else leaves it for the same
    command to continue; `fresh` empties it first. An earlier result of sp3llm at `out` is replaced
    at the very end. Only the first of several processes holds and clears it.

    Raises UserError if `out` exists and is not ours, or another run is writing it.
    """
    with contextlib.ExitStack() as stack:

        def begin() -> Path:
            partial = stack.enter_context(_working_folder(out))
            if fresh:
                _empty(partial)
            shutil.rmtree(partial / "scratch", ignore_errors=True)
            (partial / MODEL).mkdir(exist_ok=True)
            return partial

        partial = ranks.from_first(begin)
        continued = any(partial.glob(f"state-*/{MANIFEST}"))
        try:
            with _full_disk_told(partial):
                yield partial
        except UserError as error:
            # What an earlier run has done is not this one's to throw away.
            if ranks.is_first and not continued and not isinstance(error, ResumableError):
                _remove(partial)
            raise
        if ranks.is_first:
            _replace_folder(partial / MODEL, out)
            _remove(partial)


@contextlib.contextmanager
def _working_folder(out: Path) -> Iterator[Path]:
    """`out` + `.partial`, locked for the duration of the block."""
    check_output(out)
    out = Path(os.path.abspath(out))  # `.` and `..` have no name to add to
    partial = out.with_name(out.name + ".partial")
    for beside in (partial, _earlier(out)):
        if beside.is_dir() and any(beside.iterdir()) and not _is_ours(beside):
            raise UserError(
                f"The folder '{beside}' is needed while '{out}' is written, but exists and was not "
                "written by sp3llm: move it away, or choose another --out."
            )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        lock = (partial / ".lock").open("a")
    except OSError as error:
        raise UserError(
            f"Cannot write to '{out.parent}' ({error.strerror}): choose another --out."
        ) from error
    with lock:
        _take_lock(lock, out)
        with _full_disk_told(partial):
            yield partial


@contextlib.contextmanager
def _full_disk_told(partial: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResumableError(
            f"Cannot write to '{partial}' ({error.strerror}): free some disk space, and give the "
            "same command again, or choose another --out."
        ) from error


def _remove(partial: Path) -> None:
    """Remove a folder of ours, last of all what says that it is ours."""
    _empty(partial)
    shutil.rmtree(partial, ignore_errors=True)


def held_by_run(out: Path) -> int:
    """Bytes that a run of the same `--out` has on the disk already."""
    out = Path(os.path.abspath(out))
    partial = out.with_name(f"{out.name}.partial")
    return sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())


def _empty(partial: Path) -> None:
    for leftover in partial.iterdir():
        if leftover.name != ".lock":
            leftover.unlink() if leftover.is_file() else shutil.rmtree(leftover)


def _take_lock(lock: IO[str], out: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(
            f"Another sp3llm run is writing '{out}': wait for it, or choose another --out."
        ) from error


def check_output(out: Path) -> None:
    """Raise UserError if `out` exists and is neither empty nor an earlier result of sp3llm."""
    if out.is_dir() and os.path.ismount(out):
        raise UserError(
            f"Expected a folder that can be renamed for --out, found the mount point '{out}': "
            "choose a folder inside it."
        )
    if out.exists() and not out.is_dir():
        raise UserError(f"Expected a folder for --out, found the file '{out}': choose another.")
    if out.is_dir() and any(out.iterdir()) and not (out / RECORD).is_file():
        raise UserError(
            f"The output folder '{out}' exists and was not written by sp3llm (no {RECORD} in it): "
            "choose another --out, or empty it."
        )


def _is_ours(folder: Path) -> bool:
    """Whether sp3llm wrote the folder, or began to."""
    return (folder / RECORD).is_file() or (folder / ".lock").is_file()


def _replace_folder(partial: Path, out: Path) -> None:
    """Give `partial` the name `out`; an earlier result goes only when the new one stands."""
    out = Path(os.path.abspath(out))
    earlier = _earlier(out)
    if out.is_dir() and any(out.iterdir()):
        shutil.rmtree(earlier, ignore_errors=True)
        os.replace(out, earlier)
    os.replace(partial, out)
    if _is_ours(earlier):
        shutil.rmtree(earlier, ignore_errors=True)


def _earlier(out: Path) -> Path:
    """Where an earlier result waits while the new one takes its name."""
    return out.with_name(out.name + ".replaced")


def check_disk(out: Path, weight_bytes: int) -> None:
    """Raise UserError if the disk of `out` has no room for the compressed weights."""
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    needed = weight_bytes + _DISK_MARGIN
    if free < needed:
        raise UserError(
            f"Expected {needed / 1e9:.2f} GB of free disk for '{out}', found {free / 1e9:.2f} GB: "
            "free some, or choose another --out."
        )


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


def write_model(
    family: Family,
    config: Mapping[str, Any],
    built: Iterable[tuple[int, Mapping[str, Tensor]]],
    dtype: torch.dtype,
    folder: Path,
    journal: Journal,
) -> Iterator[tuple[int, Callable[[], None]]]:
    """Write groups as they come, by number, and a shard whenever its last group has come.

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
    size = sum(math.prod(shape) for shape in parameter_shapes(family, config).values())
    write_index(folder, layout, size * dtype.itemsize, size)


def _write_group(
    journal: Journal,
    folder: Path,
    layout: list[list[Group]],
    index: int,
    tensors: Mapping[str, Tensor],
) -> None:
    shard = _shard_of(layout, index)
    if journal.load(SHARD, shard) is not None:
        return
    journal.save(WEIGHTS, index, tensors, keep_all=True)
    first = sum(len(groups) for groups in layout[:shard])
    members = range(first, first + len(layout[shard]))
    if index < members[-1]:
        return
    merged = {name: t for i in members for name, t in journal.load(WEIGHTS, i).tensors.items()}
    path = folder / _shard_name(shard, len(layout))
    journal.save(SHARD, shard, merged, keep_all=True, path=path)
    journal.drop_steps(WEIGHTS, members)


def _shard_of(layout: list[list[Group]], index: int) -> int:
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


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, chat templates and generation config as they are; return their names."""
    copied = []
    for path in sorted(source.iterdir()):
        carried = path.suffix in _CARRIED and not path.name.endswith(_NOT_CARRIED)
        if path.is_file() and carried and path.name not in _NEVER_CARRIED:
            shutil.copyfile(path, target / path.name)
            copied.append(path.name)
    for folder in ("chat_templates", "additional_chat_templates"):
        if (source / folder).is_dir():
            shutil.copytree(source / folder, target / folder, dirs_exist_ok=True)
            copied.append(folder)
    return copied


def write_json(path: Path, value: Any) -> None:
    """Write JSON, indented, with a closing newline."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
