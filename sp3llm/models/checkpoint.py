"""Read a checkpoint on disk, never more of it than the tensors asked for."""

import contextlib
import functools
import hashlib
import json
import math
import os
import pickle
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sp3llm.errors import UserError, reason
from sp3llm.models import families
from sp3llm.models.families import Family, is_tied, parameter_shapes
from sp3llm.models.source import ADAPTER, adapter_base, read_config
from sp3llm.runtime.files import file_hash
from sp3llm.runtime.git_lfs import is_pointer, pointer_found
from sp3llm.runtime.kept import ReadBefore

# What bitsandbytes, GPTQ, AWQ, compressed-tensors and float8 checkpoints keep beside or in place of
# weights; not all of them say so in their config.json.
_QUANTIZED = (
    *(".SCB", ".absmax", ".quant_map", ".qweight", ".qzeros", ".scales", ".g_idx"),
    *(".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight_format"),
)

# The dtypes that weights may have, as safetensors calls them.
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

# Weights of so many bytes are hashed whole, which takes seconds; more would take minutes.
_HASHED_WHOLE = 4 * 10**9
# Beyond that, of every tensor so many pieces of so many bytes, from its first to its last: a norm,
# a bias or a router is hashed whole, and a matrix that was trained or cut differs in every piece.
_PIECES, _PIECE_BYTES = 4, 2**14


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
    promised: Mapping[str, str] = field(default_factory=dict)
    """Tensors that an index names and their shard does not hold, with that shard's name."""
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """By tensor of which not all is read: the numbers of its rows that are, in their order
    (`models.vocabulary_rows`)."""
    before: ReadBefore = field(default_factory=ReadBefore, compare=False, repr=False)
    """What was read of it before."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors, on the CPU and in their own dtype; memory may hold them, so that they are
        not to be changed in place.

        Raises UserError if a shard is damaged or a tensor holds NaN or infinity.
        """
        return {name: self._read(name) for name in names}

    def _read(self, name: str) -> Tensor:
        stored, rows = (self.files[name], self.stored.get(name, name)), self.rows.get(name)
        place = (*stored, rows)
        kept = self.before.kept(place)
        if kept is not None:
            return kept
        tensor = _read_tensor(*stored)
        if rows is not None:
            tensor = tensor[torch.tensor(rows)]
        if not self.before.is_checked(place) and not torch.isfinite(tensor).all():
            raise UserError(
                f"Tensor '{name}' in '{self.files[name].name}' holds NaN or infinity: get an "
                "undamaged copy of the checkpoint."
            )
        return self.before.keep(place, tensor)

    def dtype(self) -> torch.dtype:
        """The dtype that most of the checkpoint's parameters have."""
        counts: Counter[str] = Counter()
        for name in self.files:
            shape, dtype = self._shape_and_dtype(name)
            counts[dtype] += math.prod(shape)
        for dtype, _ in counts.most_common():
            if dtype in _FLOATS:
                return _FLOATS[dtype]
        raise UserError(f"'{self.folder}' holds no weights: expected a model's.")

    def stored_bytes(self, names: Iterable[str]) -> int:
        """Bytes that tensors take on disk, each in its own dtype."""
        total = 0
        for name in names:
            shape, dtype = self._shape_and_dtype(name)
            total += math.prod(shape) * _FLOATS[dtype].itemsize
        return total

    def _shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape of what is read of a tensor, and safetensors' name of its dtype."""
        shape, dtype = _shape_and_dtype(self.files[name], self.stored.get(name, name))
        return (len(self.rows[name]), *shape[1:]) if name in self.rows else shape, dtype


def open_model(folder: Path) -> tuple[Checkpoint, Family]:
    """Open the checkpoint of a supported model, under its family's names, without its weights.

    Raises UserError if the family is not supported, a file is missing or damaged, or the tensors
    are not those that `config.json` asks for.
    """
    config = read_config(folder)
    _check_no_adapter(folder)
    _check_generation(folder)
    _check_left_over_quantization(folder, config)
    family = families.family_of(config)
    checkpoint = with_tied_table(with_prefix(open_checkpoint(folder), family), family)
    family = families.as_stored(family, {*checkpoint.files, *checkpoint.promised})
    check_tensors(checkpoint, family)
    return checkpoint, family


def _check_no_adapter(folder: Path) -> None:
    """Raise UserError for a folder that transformers would load an adapter from."""
    if (folder / ADAPTER).is_file():
        raise UserError(
            f"Expected a whole model in '{folder}', found an adapter for {adapter_base(folder)} "
            f"({ADAPTER}): merge it first (`merge_and_unload` and `save_pretrained` of peft), and "
            "name the merged model."
        )


def _check_generation(folder: Path) -> None:
    """Raise UserError where `generation_config.json` is JSON and no object: no class loads beside
    that. What is no JSON they leave alone.
    """
    path = folder / "generation_config.json"
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise UserError(
                f"Expected an object in '{path}', found {type(content).__name__}: get an undamaged "
                "copy of it, or remove it."
            )


def _check_left_over_quantization(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise UserError where a config says quantized, and no tensor is."""
    details = config.get("quantization_config")
    if details is None:
        return
    stated = details.get("quant_method") if isinstance(details, dict) else details
    method = stated or "of no method"
    files, _ = _locate_tensors(folder, config)
    dtypes = {_shape_and_dtype(path, name)[1] for name, path in files.items()}
    if dtypes <= set(_FLOATS) and not any(name.endswith(_QUANTIZED) for name in files):
        raise UserError(
            f"Expected quantized weights in '{folder}', as the quantization_config ({method}) of "
            "its config.json says, found floating-point ones, such as a merged adapter leaves: "
            "take quantization_config out of config.json."
        )


# What the first conversions of TensorFlow's checkpoints called parameters of norms, bert-base's
# among them, and what transformers takes them for, in any class.
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def open_checkpoint(folder: Path) -> Checkpoint:
    """Find config and weights in a folder, without reading the weights.

    Raises UserError if one is missing, or a shard is missing or damaged.
    """
    config = read_config(folder)
    files, promised = _locate_tensors(folder, config)
    return _renamed(Checkpoint(folder, config, files, promised=promised), _present_name)


def _present_name(name: str) -> str:
    for old, present in _OLD_NAMES.items():
        name = name.replace(old, present)
    return name


def _renamed(checkpoint: Checkpoint, new_name: Callable[[str], str]) -> Checkpoint:
    """The checkpoint with other names for its tensors.

    Raises UserError where two would have the same.
    """
    files: dict[str, Path] = {}
    stored: dict[str, str] = {}
    for before, path in checkpoint.files.items():
        name, on_disk = new_name(before), checkpoint.stored.get(before, before)
        if name in files:
            raise UserError(
                f"Expected one tensor for '{name}' in '{checkpoint.folder}', found "
                f"'{stored.get(name, name)}' and '{on_disk}': take the wrong one out of the "
                "weights."
            )
        files[name] = path
        if on_disk != name:
            stored[name] = on_disk
    promised = {new_name(name): shard for name, shard in checkpoint.promised.items()}
    return replace(checkpoint, files=files, stored=stored, promised=promised)


# Where transformers looks for weights, in its order: a whole file goes before an index, and
# safetensors before `.bin`.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def _locate_tensors(
    folder: Path, config: Mapping[str, Any]
) -> tuple[dict[str, Path], dict[str, str]]:
    """Tensor name to the file that holds it, of the files that transformers would load; and the
    tensors that an index promises and no shard holds, with the name of theirs.

    All tensors of the shards count, as they do there, not only those that the index names.
    """
    named = _named_weights(folder, config)
    for candidate in (named,) if named else _WEIGHTS:
        path = folder / candidate
        if not path.is_file():
            continue
        if path.suffix != ".json":
            return dict.fromkeys(_shard_names(path), path), {}
        weight_map = _weight_map(path)
        files = {
            name: folder / shard
            for shard in sorted(set(weight_map.values()))
            for name in _shard_names(folder / shard)
        }
        return files, {name: shard for name, shard in weight_map.items() if name not in files}
    raise UserError(
        f"Expected weights in '{folder}' ({named or 'model.safetensors, pytorch_model.bin'}, or "
        f"shards with an index), found {_other_weights(folder)}."
    )


def _named_weights(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The file that a config names for the weights; None where it leaves it at the usual ones.

    Raises UserError where it is none that transformers would take.
    """
    named = config.get("transformers_weights")
    if named is None:
        return None
    # By name: in a hub cache all files are links to what lies elsewhere.
    inside = isinstance(named, str) and os.path.normpath(named).split(os.sep)[0] not in ("..", "")
    if not inside or not (folder / named).is_file():
        raise UserError(
            f"Expected transformers_weights in config.json to name a file in '{folder}', found "
            f"{named!r}: mend it, or take it out."
        )
    return named


# Files that hold weights which the stock classes do not look for, and what to do about each.
_ELSEWHERE = (
    ("adapter_model.*", "an adapter", "merge it into its base model first, and name the merged"),
    ("*.gguf", "a GGUF file", "name the folder of the model that it was converted from"),
    ("*.onnx", "an ONNX file", "name the folder of the model that it was exported from"),
    ("*.safetensors", "which no index names", "get the index, or give it the usual name"),
    ("pytorch_model*.bin", "which no index names", "get the index, or give it the usual name"),
    ("*.h5", "weights of TensorFlow", "save them as safetensors with transformers 4"),
    ("*.msgpack", "weights of Flax", "save them as safetensors with transformers 4"),
    ("*model*.pt", "weights in another format", "get the model as safetensors"),
    ("*.pth", "weights in another format", "get the model as safetensors"),
    ("global_step*", "a checkpoint of DeepSpeed", "gather it with its zero_to_fp32.py"),
    ("pytorch_model_fsdp*", "a checkpoint of FSDP", "merge it with `accelerate merge-weights`"),
)


def _other_weights(folder: Path) -> str:
    """What a folder without a stock model's weights holds in their place, and what to do."""
    for name in _WEIGHTS:
        path = folder / name
        if path.is_symlink() and not path.exists():  # as in a hub cache whose blobs are gone
            return f"'{name}', a link that leads nowhere: download the model again"
    for pattern, what, remedy in _ELSEWHERE:
        found = sorted(path for path in folder.glob(pattern) if path.name not in _WEIGHTS)
        if found:
            return f"'{found[0].name}' ({what}): {remedy}"
    return "none: name a folder that holds the model's weights"


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): os.fspath(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"'{index}' is no index of shards ({type(error).__name__}: {reason(error)}): get an "
            "undamaged copy of it."
        ) from error


def _damaged(shard: Path, why: str) -> UserError:
    if is_pointer(shard):
        return pointer_found(shard)
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
    for name, value in tensors.items():
        if value.is_meta or value.layout != torch.strided:
            what = "without its numbers" if value.is_meta else "that is sparse"
            raise UserError(
                f"Shard '{shard}' holds a tensor {what}, '{name}': get the model as safetensors."
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


def with_prefix(checkpoint: Checkpoint, family: Family) -> Checkpoint:
    """The checkpoint under the class's own names, where it was saved from a class that this one
    holds, or that holds this one: transformers loads it all the same.

    Files of a bare decoder, OPT's among them, lack the names' first part; those of an encoder with
    a head for masked words have one too many.
    """
    if family.held_as is not None:
        own = parameter_shapes(family, checkpoint.config)
        held = {family.held_as + name: name for name in own}
        return _renamed(checkpoint, lambda name: held.get(name, name))
    prefix = family.embedding.partition(".")[0] + "."
    bare = family.embedding.removeprefix(prefix)
    if family.embedding in checkpoint.files or bare not in checkpoint.files:
        return checkpoint
    head = f"{family.head}."
    return _renamed(checkpoint, lambda name: name if name.startswith(head) else prefix + name)


def with_tied_table(checkpoint: Checkpoint, family: Family) -> Checkpoint:
    """The checkpoint with a tied table under the name of the embeddings, where it was saved under
    the head's alone.

    Raises UserError where both are there and differ: transformers then keeps them apart, whatever
    `config.json` says.
    """
    head, embedding = f"{family.head}.weight", family.embedding
    if not is_tied(family, checkpoint.config) or head not in checkpoint.files:
        return checkpoint
    if embedding not in checkpoint.files:
        files = {**checkpoint.files, embedding: checkpoint.files[head]}
        stored = {**checkpoint.stored, embedding: checkpoint.stored.get(head, head)}
        return replace(checkpoint, files=files, stored=stored)
    tables = checkpoint.read([head, embedding])
    if not torch.equal(tables[head], tables[embedding]):
        raise UserError(
            f"Expected '{head}' to be the table of '{embedding}', as tie_word_embeddings in "
            f"config.json says, found another in '{checkpoint.folder}': set tie_word_embeddings to "
            "false, which keeps both, or take the head out of the weights."
        )
    return checkpoint


def check_tensors(checkpoint: Checkpoint, family: Family) -> None:
    """Compare the names, shapes and dtypes on disk with what the family's table predicts.

    Raises UserError naming the first tensor that is missing, not expected, or of another shape.
    """
    expected = parameter_shapes(family, checkpoint.config)
    tied_head = f"{family.head}.weight" if is_tied(family, checkpoint.config) else None
    for name in checkpoint.files:
        known = name in expected or name == tied_head or name.endswith(family.ignored_suffixes)
        known = known or name.startswith(family.heads_above)
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
        if name in checkpoint.promised:
            raise UserError(
                f"Expected tensor '{name}' in shard '{checkpoint.promised[name]}', as the index "
                "says, found none: get an undamaged copy of the checkpoint."
            )
        if name not in checkpoint.files:
            raise UserError(
                f"Expected tensor '{name}', which config.json asks for, found none in "
                f"'{checkpoint.folder}': get a complete copy of the checkpoint."
            )
        stored = checkpoint.stored.get(name, name)
        stored_shape, dtype = _shape_and_dtype(checkpoint.files[name], stored)
        if 0 in stored_shape:
            raise UserError(
                f"Expected tensor '{name}' of shape {shape}, found an empty one, such as DeepSpeed "
                "ZeRO-3 leaves in place of partitioned weights: gather them first (zero_to_fp32.py "
                "beside the checkpoint does), and name the whole model."
            )
        if dtype not in _FLOATS:
            raise UserError(
                f"Expected tensor '{name}' in float32, float16 or bfloat16, found {dtype}: "
                "the checkpoint is quantized; load the unquantized one it was made from."
            )
        if stored_shape != shape:
            raise UserError(
                f"Expected tensor '{name}' of shape {shape}, found {stored_shape}: config.json and "
                "weights do not belong together."
            )


def _shape_and_dtype(shard: Path, name: str) -> tuple[tuple[int, ...], str]:
    """Shape of a tensor and safetensors' name of its dtype; of other dtypes torch's."""
    if shard.suffix == ".bin":
        tensor = _load_bin(shard)[name]
        names = {dtype: name for name, dtype in _FLOATS.items()}
        return tuple(tensor.shape), names.get(tensor.dtype, str(tensor.dtype))
    with safe_open(shard, framework="pt") as file:
        view = file.get_slice(name)
        return tuple(view.get_shape()), view.get_dtype()


def head_tensors(checkpoint: Checkpoint, family: Family) -> dict[str, Tensor]:
    """Weights of the final norm and the head; where the head is tied to the embeddings, their table
    under the head's own name.
    """
    *_, head = families.groups(family, checkpoint.config)
    tensors = checkpoint.read(head.parameters)
    if families.is_tied(family, checkpoint.config):
        table = checkpoint.read([family.embedding])[family.embedding]
        tensors[f"{family.head}.weight"] = table
    return tensors


# --------------------------------------------------------------------------- identity


def identity(checkpoint: Checkpoint) -> dict[str, str]:
    """What tells a model from another one, by file name: `config.json` and every shard; and the
    rows that are read, where those are not all.

    Shards are hashed whole where all are a few GB at most, otherwise by their size, their header
    (names, shapes and dtypes) and pieces of every tensor.
    """
    config = json.dumps(dict(checkpoint.config)).encode()
    shards = sorted(set(checkpoint.files.values()))
    whole = sum(shard.stat().st_size for shard in shards) <= _HASHED_WHOLE
    hashes = {"config.json": hashlib.sha256(config).hexdigest()[:16]}
    for shard in shards:
        content = file_hash(shard) if whole else _hash_of_pieces(shard)
        hashes[shard.name] = f"{shard.stat().st_size} bytes, {content[:16]}"
    if checkpoint.rows:
        rows = json.dumps(sorted(checkpoint.rows.items())).encode()
        hashes["rows"] = hashlib.sha256(rows).hexdigest()[:16]
    return hashes


def _hash_of_pieces(shard: Path) -> str:
    """sha256 of a shard's header and of pieces of its tensors."""
    digest = hashlib.sha256()
    if shard.suffix == ".bin":  # mapped into memory, where its format allows
        for name, tensor in sorted(_load_bin(shard).items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            stored = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            for first, last in _pieces(0, stored.nbytes):
                digest.update(stored[first:last])
        return digest.hexdigest()
    with shard.open("rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
        digest.update(length + header)
        start = file.tell()
        for name, entry in sorted(json.loads(header).items()):
            if name == "__metadata__":
                continue
            for first, last in _pieces(*entry["data_offsets"]):
                file.seek(start + first)
                digest.update(file.read(last - first))
    return digest.hexdigest()


def _pieces(first: int, last: int) -> list[tuple[int, int]]:
    """Where the pieces of a tensor begin and end that lies from byte `first` to `last`."""
    if last - first <= _PIECES * _PIECE_BYTES:
        return [(first, last)]
    step = (last - first - _PIECE_BYTES) / (_PIECES - 1)
    starts = (first + round(number * step) for number in range(_PIECES))
    return [(start, start + _PIECE_BYTES) for start in starts]
