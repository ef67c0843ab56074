"""Write a compressed model in few bits, and measure it beside the dense model quantized alike.

The story, top-down:

1. find both models, refuse what cannot be done before any work;
2. read the held-out windows that the compression was scored on;
3. let transformers and bitsandbytes quantize the compressed model, write it;
4. take the losses of four models on those windows: dense and compressed, in full precision
   (streamed) and in few bits (as plain transformers loads what was written, whole in memory);
5. write the record, the card and, last, `config.json`.

What is written is stock: it loads with plain transformers where bitsandbytes is installed.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sp3llm.config import QuantizeConfig, command_line
from sp3llm.errors import UserError, reason

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.progress import Progress
    from torch import Tensor

    from sp3llm.checkpoint import Checkpoint
    from sp3llm.execution import Execution
    from sp3llm.families import Family
    from sp3llm.plan import Shape

# Logits that are turned into losses at once.
_LOGITS_A_STEP = 2**24
_SHARD = "2GB"
# Of a weight, its share of the scales included: a float32 for a row, or for 64 weights.
_BYTES = {"int8": 1.02, "nf4": 0.5625}


@dataclass(frozen=True)
class Source:
    """A model in full precision, as it lies on disk."""

    checkpoint: "Checkpoint"
    family: "Family"
    name: str

    def linear(self) -> dict[str, tuple[int, ...]]:
        """The modules that are quantized, with the shapes of their weights."""
        from sp3llm.recover_needs import linear_modules

        return linear_modules(self.family, self.checkpoint.config)

    def dtype(self) -> "torch.dtype":
        """Of what is not quantized: that of the checkpoint, float32 at most."""
        import torch

        dtype = self.checkpoint.dtype()
        return torch.float32 if dtype == torch.float64 else dtype


@dataclass(frozen=True)
class Found:
    """What was measured of one model."""

    losses: "Tensor"
    """Nats, `(windows, tokens - 1)`."""
    weight_bytes: int
    """Of its files of weights."""
    linear_bytes: int
    """Of what is, or would be, quantized, its scales included."""


def quantize(settings: QuantizeConfig, console: "Console") -> dict[str, Any]:
    """Run the whole quantization; the output folder holds the model when it returns.

    Returns the record written.
    Raises UserError for anything the user can mend; nothing is then left in the output folder.
    """
    import torch

    from sp3llm import bits, quantize_report, report, samples
    from sp3llm import checkpoint as disk
    from sp3llm.execution import execution

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says how it casts at every call
    started = time.monotonic()
    bits.check_installed(f"--to {settings.to}", "leave the model as it is")
    small, dense, record = _pair(settings, console)
    dtype = torch.promote_types(small.checkpoint.dtype(), dense.checkpoint.dtype())
    on = execution(settings.device, dtype)
    if on.device.type == "cpu":
        bits.check_widths(settings.to, small.linear(), f"'{small.name}'")
    folder = Path(settings.model)
    if not folder.is_dir():  # one of the hub, which has no place to stand beside
        folder = Path(folder.name)
    out = settings.out or quantized_folder(folder, settings.to)
    _check_output(out, settings.to, small, dense)
    tokens = samples.held_out_tokens(record, small.checkpoint.folder)
    with disk.output_folder(out) as partial, report.progress_bars(console) as progress:
        found = {
            "dense": _in_full(dense, tokens, on, progress, "dense"),
            "small": _in_full(small, tokens, on, progress, "compressed"),
        }
        with _aside(partial) as folder:  # it is only wanted for its numbers
            found["dense_quantized"] = _in_few_bits(
                dense, settings.to, folder, tokens, on, progress, "dense"
            )[1]
        stock, found["small_quantized"] = _in_few_bits(
            small, settings.to, partial, tokens, on, progress, "compressed"
        )
        entry = _entry(settings, out, small, dense, found, on)
        entry |= {
            "seconds": round(time.monotonic() - started, 2),
            "peak_memory_bytes": report.peak_memory(),
            "device_memory_bytes": report.device_memory(str(on.device)),
        }
        record = _finish(small, dense, record, entry, stock, partial)
    console.print(quantize_report.closing_table(record))
    console.print(quantize_report.next_steps(out, record), highlight=False, markup=False)
    return record


def quantized_folder(folder: Path, to: str) -> Path:
    """Where the quantized model goes if nobody says: beside the other."""
    folder = Path(os.path.abspath(folder))
    return folder.with_name(f"{folder.name}-{to}")


def check_before(
    to: str,
    device: "torch.device",
    family: "Family",
    config: Mapping[str, Any],
    shapes: "Sequence[Shape]",
    out: Path,
) -> None:
    """Raise UserError for what `quantize` would refuse of a compressed model that is yet to be
    made at `out`, in any of `shapes`.
    """
    from sp3llm import bits
    from sp3llm.checkpoint import check_output
    from sp3llm.plan import resized_config
    from sp3llm.recover_needs import linear_modules

    bits.check_installed(f"--quantize {to}", "leave it out")
    check_output(quantized_folder(out, to))
    for shape in shapes if device.type == "cpu" else ():
        modules = linear_modules(family, resized_config(family, config, shape))
        sizes = f"hidden_size {shape.hidden_size}, intermediate_size {shape.intermediate_size}"
        bits.check_widths(to, modules, f"one of the shapes within the budget, {sizes}")


# --------------------------------------------------------------------------- before any work


def _pair(settings: QuantizeConfig, console: "Console") -> tuple[Source, Source, dict[str, Any]]:
    """The compressed model, the dense one, and the record that binds them."""
    from sp3llm import samples, source
    from sp3llm.record import read_record

    folder, name, note = source.resolve_model(settings.model)
    small = _opened(folder, name)
    record = read_record(folder)
    dense_folder = samples.find_dense(record, settings.dense)
    dense = _opened(dense_folder, settings.dense or str(record["model"]))
    if settings.dense is None:
        console.print(f"The dense model is {dense.name}.", markup=False, highlight=False)
    if note:
        console.print(note, markup=False)
    return small, dense, record


def _opened(folder: Path, name: str) -> Source:
    from sp3llm import checkpoint as disk
    from sp3llm import families, source

    config = source.read_config(folder)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if config.get("quantization_config"):
        raise UserError(
            f"Expected a model in full precision, found '{name}', which is quantized already "
            f"({method}): name the one it was made from."
        )
    family = families.family_of(config)
    checkpoint = disk.with_prefix(disk.open_checkpoint(folder), family)
    disk.check_tensors(checkpoint, family)
    return Source(checkpoint, family, name)


def _check_output(out: Path, to: str, small: Source, dense: Source) -> None:
    from sp3llm import checkpoint as disk

    for model in (small, dense):
        folder = model.checkpoint.folder.resolve()
        if folder in (out.resolve(), *out.resolve().parents):
            raise UserError(
                f"Expected another --out than the model itself or a folder in it, found '{out}': "
                "the one in full precision stays, so choose another folder."
            )
    disk.check_output(out)
    # The dense one goes before the compressed one comes.
    disk.check_disk(out, max(_quantized_bytes(model, to) for model in (small, dense)))


def _quantized_bytes(model: Source, to: str) -> int:
    """About what the files of a model in few bits take."""
    whole, linear = _weight_bytes(model.checkpoint), _linear_parameters(model)
    return whole - round(linear * (model.checkpoint.dtype().itemsize - _BYTES[to]))


@contextmanager
def _aside(partial: Path) -> Iterator[Path]:
    """A folder on the disk of the output that goes with the block."""
    folder = partial / "dense"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --------------------------------------------------------------------------- four models


def _in_full(
    model: Source, tokens: "Tensor", on: "Execution", progress: "Progress", what: str
) -> Found:
    """A model as it is, streamed."""
    from sp3llm.measure import measure_losses

    losses = measure_losses(
        model.checkpoint, model.family, tokens, on, progress, what=f"{what} model, perplexity"
    )
    linear = _linear_parameters(model) * model.checkpoint.dtype().itemsize
    return Found(losses, _weight_bytes(model.checkpoint), linear)


def _in_few_bits(
    model: Source,
    to: str,
    folder: Path,
    tokens: "Tensor",
    on: "Execution",
    progress: "Progress",
    what: str,
) -> tuple[dict[str, Any], Found]:
    """Write a model quantized into `folder`, without a config, and measure what was written.

    Returns its `quantization_config`, too.
    """
    from sp3llm import bits

    bar = progress.add_task(f"{what} model, to {to}", total=1)
    stock = write_quantized(model, to, on.device, folder)
    progress.update(bar, completed=1)
    files = sorted(folder.glob("*.safetensors"))
    bar = progress.add_task(f"{what} model in {to}, perplexity", total=len(tokens))
    quantized = load_quantized(folder, model, stock, on)
    if on.device.type == "cpu" and bits.unfit(to, model.linear()):
        bits.take_any_width(quantized)
    losses = losses_of(quantized, tokens, on.device, lambda: progress.advance(bar))
    sizes = _tensor_bytes(files)
    linear = sum(
        size for name, size in sizes.items()
        if name.endswith(".SCB") or any(name.startswith(f"{m}.weight") for m in model.linear())
    )  # fmt: skip
    return stock, Found(losses, sum(path.stat().st_size for path in files), linear)


def write_quantized(model: Source, to: str, device: "torch.device", folder: Path) -> dict[str, Any]:
    """Write the weights that transformers and bitsandbytes make of a model.

    `config.json` is not written: the folder does not load until the caller says it is whole.
    Returns what it has to hold as `quantization_config`.
    Raises UserError if the model does not load.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from sp3llm import bits
    from sp3llm import checkpoint as disk

    source, dtype = model.checkpoint.folder, model.dtype()
    arithmetic = dtype if dtype == torch.float16 else torch.bfloat16
    config = bits.bits_config(to, arithmetic)
    with _told(source):
        quantized = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, quantization_config=config, device_map={"": device}
        )
    # Before it runs: the kernel for AVX512-BF16 repacks weights and rounds their scales.
    quantized.save_pretrained(folder, max_shard_size=_SHARD)
    for path in folder.glob("*.safetensors"):
        disk.share_file(path)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name in ("config.json", "generation_config.json"):  # the model's own are copied instead
        (folder / name).unlink(missing_ok=True)
    return dict(written["quantization_config"])


def load_quantized(folder: Path, model: Source, stock: Mapping[str, Any], on: "Execution") -> Any:
    """The stock model of what `write_quantized` wrote; what is not quantized is computed in the
    arithmetic that models in full precision are, so that the bits are all that differs.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = {**model.checkpoint.config, "quantization_config": dict(stock)}
    parsed = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    with _told(folder):
        quantized = AutoModelForCausalLM.from_pretrained(
            folder,
            config=parsed,
            generation_config=GenerationConfig(),  # there is none in the folder yet
            device_map={"": on.device},
        )
    for parameter in quantized.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(on.dtype)
    return quantized.requires_grad_(False).eval()


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """What transformers or bitsandbytes raise, in one sentence."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(
            f"Cannot quantize '{folder}' with bitsandbytes ({type(error).__name__}: "
            f"{reason(error)}): check that it supports this device, or use --device cpu."
        ) from error


def losses_of(
    model: Any,
    tokens: "Tensor",
    device: "torch.device",
    advance: Callable[[], None] = lambda: None,
) -> "Tensor":
    """Negative log-likelihood of every next token by a model in memory, `(windows, tokens - 1)`,
    float64, in nats.

    A window at a time: what int8 holds back as outliers depends on all tokens of a batch.
    Raises UserError if one is no number.
    """
    import torch
    from torch.nn.functional import cross_entropy

    losses = torch.empty((len(tokens), tokens.shape[1] - 1), dtype=torch.float64)
    for row, window in enumerate(tokens.to(device)):
        with torch.no_grad():
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
        step = max(1, _LOGITS_A_STEP // logits.shape[1])
        pieces = zip(logits.split(step), window[1:].split(step), strict=True)
        losses[row] = torch.cat(
            [cross_entropy(some.float(), next_, reduction="none") for some, next_ in pieces]
        ).double()
        advance()
    if not torch.isfinite(losses).all():
        raise UserError(
            "The quantized model's logits hold NaN or infinity: quantize to the other of int8 and "
            "nf4, or compress with --dtype bfloat16."
        )
    return losses


def _linear_parameters(model: Source) -> int:
    import math

    return sum(math.prod(shape) for shape in model.linear().values())


def _weight_bytes(checkpoint: "Checkpoint") -> int:
    return sum(path.stat().st_size for path in set(checkpoint.files.values()))


def _tensor_bytes(files: Sequence[Path]) -> dict[str, int]:
    from safetensors import safe_open

    found = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
    return found


# --------------------------------------------------------------------------- the result


def _entry(
    settings: QuantizeConfig,
    out: Path,
    small: Source,
    dense: Source,
    found: Mapping[str, Found],
    on: "Execution",
) -> dict[str, Any]:
    """What `sp3llm.json` keeps of a quantization (`record`)."""
    from importlib.metadata import version

    from sp3llm import bits, families, report, score

    resolved = replace(settings, dense=dense.name, out=out, device=str(on.device))
    base = found["dense"].losses
    models = {
        name: {
            "perplexity": score.perplexity(one.losses),
            "excess_log_perplexity": score.excess_log_perplexity(one.losses, base).describe(),
            "weight_bytes": one.weight_bytes,
            "linear_bytes": one.linear_bytes,
            "window_losses": one.losses.mean(1).tolist(),
        }
        for name, one in found.items()
    }
    cost = {
        name: score.excess_log_perplexity(
            found[f"{name}_quantized"].losses, found[name].losses
        ).describe()
        for name in ("dense", "small")
    }
    versus = score.excess_log_perplexity(
        found["small_quantized"].losses, found["dense_quantized"].losses
    )
    unfit = on.device.type == "cpu" and bits.unfit(settings.to, dense.linear())
    return {
        "command": command_line(settings),
        "settings": {key: None if value is None else str(value)
                     for key, value in asdict(resolved).items()},
        "bits": settings.to,
        "parameters": families.count_parameters(small.family, small.checkpoint.config),
        "quantized_parameters": _linear_parameters(small),
        "models": models,
        "cost": cost,
        "over_dense_quantized": versus.describe(),
        "dense_runs_elsewhere_only": unfit or None,
        "compute_dtype": str(on.dtype).removeprefix("torch."),
        "versions": {**report.versions(), "bitsandbytes": version("bitsandbytes")},
        "machine": report.machine(str(on.device)),
    }  # fmt: skip


def _finish(
    small: Source,
    dense: Source,
    record: Mapping[str, Any],
    entry: Mapping[str, Any],
    stock: Mapping[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Everything of the output but its weights; `config.json` last. Returns the record."""
    from sp3llm import card
    from sp3llm import checkpoint as disk
    from sp3llm.record import MEASURED

    disk.copy_companions(small.checkpoint.folder, folder)
    kept = {key: value for key, value in record.items() if key not in MEASURED}
    kept["quantization"] = dict(entry)
    disk.write_json(folder / disk.RECORD, kept)
    if (small.checkpoint.folder / "README.md").is_file():  # the licence that it carries
        shutil.copyfile(small.checkpoint.folder / "README.md", folder / "README.md")
    card.write_card(folder, kept, dense.checkpoint.folder)
    config = {**small.checkpoint.config, "quantization_config": dict(stock)}
    disk.write_json(folder / "config.json", config)
    return kept
