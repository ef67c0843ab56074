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

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sp3llm.errors import UserError
from sp3llm.options import QuantizeConfig, command_line
from sp3llm.quantization.files import (
    Source,
    linear_parameters,
    load_quantized,
    tensor_bytes,
    weight_bytes,
    write_quantized,
)

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.progress import Progress
    from torch import Tensor

    from sp3llm.models.families import Family
    from sp3llm.models.shapes import Shape
    from sp3llm.runtime.devices import Execution


# Logits that are turned into losses at once: 64 MB of float32.
_LOGITS_A_STEP = 2**24
# Of a weight, its share of the scales included: a float32 for a row, or for 64 weights.
_BYTES = {"int8": 1.02, "nf4": 0.5625}


@dataclass(frozen=True)
class Measuring:
    """What models are measured on, and where."""

    tokens: "Tensor"
    """Held-out token ids, `(windows, seq_len)`."""
    execution: "Execution"
    progress: "Progress"


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

    from sp3llm.quantization.bits import check_installed, check_widths
    from sp3llm.reporting.origins import held_out_tokens
    from sp3llm.reporting.quantization import closing_table, next_steps
    from sp3llm.runtime.devices import resolve_execution
    from sp3llm.runtime.folders import output_folder
    from sp3llm.runtime.machine import device_memory, peak_memory
    from sp3llm.runtime.progress import progress_bars

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says how it casts at every call
    started = time.monotonic()
    check_installed(f"--to {settings.to}", "leave the model as it is")
    small, dense, record = _pair(settings, console)
    dtype = torch.promote_types(small.checkpoint.dtype(), dense.checkpoint.dtype())
    execution = resolve_execution(settings.device, dtype)
    if execution.device.type == "cpu":
        check_widths(settings.to, small.linear(), f"'{small.name}'")
    folder = Path(settings.model)
    if not folder.is_dir():  # one of the hub, which has no place to stand beside
        folder = Path(folder.name)
    out = settings.out or quantized_folder(folder, settings.to)
    _check_output(out, settings.to, small, dense)
    tokens = held_out_tokens(record, small.checkpoint.folder)

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    with output_folder(out, say) as partial, progress_bars(console) as progress:
        measuring = Measuring(tokens, execution, progress)
        stock, models = _measure_four(dense, small, settings.to, partial, measuring)
        entry = _entry(settings, out, small, dense, models, execution)
        entry |= {
            "seconds": round(time.monotonic() - started, 2),
            "peak_memory_bytes": peak_memory(),
            "device_memory_bytes": device_memory(str(execution.device)),
        }
        record = _finish(small, dense, record, entry, stock, partial)
    console.print(closing_table(record))
    console.print(next_steps(out, record), highlight=False, markup=False)
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
    from sp3llm.models.families.counts import linear_modules
    from sp3llm.models.shapes import resized_config
    from sp3llm.quantization.bits import check_installed, check_widths
    from sp3llm.runtime.folders import check_output

    check_installed(f"--quantize {to}", "leave it out")
    check_output(quantized_folder(out, to))
    for shape in shapes if device.type == "cpu" else ():
        modules = linear_modules(family, resized_config(family, config, shape))
        sizes = f"hidden_size {shape.hidden_size}, intermediate_size {shape.intermediate_size}"
        check_widths(to, modules, f"one of the shapes within the budget, {sizes}")


# --------------------------------------------------------------------------- before any work


def _pair(settings: QuantizeConfig, console: "Console") -> tuple[Source, Source, dict[str, Any]]:
    """The compressed model, the dense one, and the record that binds them."""
    from sp3llm.models.source import resolve_model
    from sp3llm.reporting.origins import find_dense
    from sp3llm.reporting.record import read_record

    folder, name, note = resolve_model(settings.model)
    small = _opened(folder, name)
    record = read_record(folder)
    dense_folder = find_dense(record, settings.dense)
    dense = _opened(dense_folder, settings.dense or str(record["model"]))
    if settings.dense is None:
        console.print(f"The dense model is {dense.name}.", markup=False, highlight=False)
    if note:
        console.print(note, markup=False)
    return small, dense, record


def _opened(folder: Path, name: str) -> Source:
    """A model on disk; one that is quantized already is refused."""
    from sp3llm.models.checkpoint import open_model
    from sp3llm.models.source import read_config

    quantization = read_config(folder).get("quantization_config")
    if quantization:
        method = quantization.get("quant_method")
        raise UserError(
            f"Expected a model in full precision, found '{name}', which is quantized already "
            f"({method}): name the one it was made from."
        )
    return Source(*open_model(folder), name)


def _check_output(out: Path, to: str, small: Source, dense: Source) -> None:
    from sp3llm.runtime.folders import check_disk, check_output

    for model in (small, dense):
        folder = model.checkpoint.folder.resolve()
        if folder in (out.resolve(), *out.resolve().parents):
            raise UserError(
                f"Expected another --out than the model itself or a folder in it, found '{out}': "
                "the one in full precision stays, so choose another folder."
            )
    check_output(out)
    # The dense one goes before the compressed one comes.
    check_disk(out, max(_quantized_bytes(model, to) for model in (small, dense)))


def _quantized_bytes(model: Source, to: str) -> int:
    """About what the files of a model in few bits take."""
    whole, linear = weight_bytes(model.checkpoint), linear_parameters(model)
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


def _measure_four(
    dense: Source, small: Source, to: str, partial: Path, measuring: Measuring
) -> tuple[dict[str, Any], dict[str, Found]]:
    """Quantize the compressed model into `partial`, and measure both models in full precision and
    in few bits.

    Returns the compressed one's `quantization_config`, and what was measured.
    """
    in_full = {
        "dense": _in_full(dense, measuring, "dense"),
        "small": _in_full(small, measuring, "compressed"),
    }
    with _aside(partial) as folder:  # it is only wanted for its numbers
        _, dense_quantized = _in_few_bits(dense, to, folder, measuring, "dense")
    stock, small_quantized = _in_few_bits(small, to, partial, measuring, "compressed")
    quantized = {"dense_quantized": dense_quantized, "small_quantized": small_quantized}
    return stock, in_full | quantized


def _in_full(model: Source, measuring: Measuring, what: str) -> Found:
    """A model as it is, streamed; `what` is how progress calls it."""
    from sp3llm.evaluation.perplexity import measure_losses

    losses = measure_losses(
        model.checkpoint,
        model.family,
        measuring.tokens,
        measuring.execution,
        measuring.progress,
        what=f"{what} model, perplexity",
    )
    linear = linear_parameters(model) * model.checkpoint.dtype().itemsize
    return Found(losses, weight_bytes(model.checkpoint), linear)


def _in_few_bits(
    model: Source, to: str, folder: Path, measuring: Measuring, what: str
) -> tuple[dict[str, Any], Found]:
    """Write a model quantized into `folder`, without a config, and measure what was written.

    Returns its `quantization_config`, too.
    """
    from sp3llm.quantization.bits import take_any_width, unfit

    tokens, execution, progress = measuring.tokens, measuring.execution, measuring.progress
    bar = progress.add_task(f"{what} model, to {to}", total=1)
    stock = write_quantized(model, to, execution.device, folder)
    progress.update(bar, completed=1)
    files = sorted(folder.glob("*.safetensors"))
    bar = progress.add_task(f"{what} model in {to}, perplexity", total=len(tokens))
    quantized = load_quantized(folder, model, stock, execution)
    if execution.device.type == "cpu" and unfit(to, model.linear()):
        take_any_width(quantized)
    losses = losses_of(quantized, tokens, execution.device, lambda: progress.advance(bar))
    sizes = tensor_bytes(files)
    linear = sum(sizes[name] for name in sizes if _is_of(name, model.linear()))
    return stock, Found(losses, sum(path.stat().st_size for path in files), linear)


def _is_of(name: str, modules: Iterable[str]) -> bool:
    """Whether a tensor is a quantized module's weight, or scales of one."""
    return name.endswith(".SCB") or any(name.startswith(f"{module}.weight") for module in modules)


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


# --------------------------------------------------------------------------- the result


def _entry(
    settings: QuantizeConfig,
    out: Path,
    small: Source,
    dense: Source,
    found: Mapping[str, Found],
    execution: "Execution",
) -> dict[str, Any]:
    """What `sp3llm.json` keeps of a quantization (`record`)."""
    from importlib.metadata import version

    from sp3llm.maths.paired import excess_log_perplexity, perplexity
    from sp3llm.models import families
    from sp3llm.quantization import bits
    from sp3llm.runtime.machine import machine, versions

    resolved = replace(settings, dense=dense.name, out=out, device=str(execution.device))
    base = found["dense"].losses
    models = {
        name: {
            "perplexity": perplexity(one.losses),
            "excess_log_perplexity": excess_log_perplexity(one.losses, base).describe(),
            "weight_bytes": one.weight_bytes,
            "linear_bytes": one.linear_bytes,
            "window_losses": one.losses.mean(1).tolist(),
        }
        for name, one in found.items()
    }
    cost = {
        name: excess_log_perplexity(
            found[f"{name}_quantized"].losses, found[name].losses
        ).describe()
        for name in ("dense", "small")
    }
    versus = excess_log_perplexity(found["small_quantized"].losses, found["dense_quantized"].losses)
    unfit = execution.device.type == "cpu" and bits.unfit(settings.to, dense.linear())
    return {
        "command": command_line(settings),
        "settings": {key: None if value is None else str(value)
                     for key, value in asdict(resolved).items()},
        "bits": settings.to,
        "parameters": families.count_parameters(small.family, small.checkpoint.config),
        "quantized_parameters": linear_parameters(small),
        "models": models,
        "cost": cost,
        "over_dense_quantized": versus.describe(),
        "dense_runs_elsewhere_only": unfit or None,
        "compute_dtype": str(execution.dtype).removeprefix("torch."),
        "versions": {**versions(), "bitsandbytes": version("bitsandbytes")},
        "machine": machine(str(execution.device)),
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
    from sp3llm.models.companions import copy_companions
    from sp3llm.reporting.card import write_card
    from sp3llm.reporting.record import MEASURED
    from sp3llm.runtime.files import write_json
    from sp3llm.runtime.folders import RECORD

    copy_companions(small.checkpoint.folder, folder)
    kept = {key: value for key, value in record.items() if key not in MEASURED}
    kept["quantization"] = dict(entry)
    write_json(folder / RECORD, kept)
    if (small.checkpoint.folder / "README.md").is_file():  # the licence that it carries
        shutil.copyfile(small.checkpoint.folder / "README.md", folder / "README.md")
    write_card(folder, kept, dense.checkpoint.folder)
    config = {**small.checkpoint.config, "quantization_config": dict(stock)}
    write_json(folder / "config.json", config)
    return kept
