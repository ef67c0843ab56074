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

import functools
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from sp3llm.reporting.record import (
    Excess,
    FourModels,
    MeasuredModel,
    QuantizationCost,
    QuantizationEntry,
    Record,
    SameText,
    read_record,
    without_measurements,
    write_record,
)
from sp3llm.reporting.typed_json import from_json, to_json

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.progress import Progress
    from torch import Tensor

    from sp3llm.models.families import Family
    from sp3llm.models.objectives.schema import Objective
    from sp3llm.models.shapes import Shape
    from sp3llm.runtime.devices import Execution
    from sp3llm.vocabulary.same_text import HeldOut


# Of a weight, its share of the scales included: a float32 for a row, or for 64 weights.
_BYTES = {"int8": 1.02, "nf4": 0.5625}


@dataclass(frozen=True)
class Measuring:
    """What models are measured on, and where."""

    held_out: "HeldOut"
    execution: "Execution"
    progress: "Progress"

    def reading(self, what: str) -> "tuple[Tensor, Callable[[Tensor], Tensor]]":
        """Token ids as the `dense` or the `compressed` model has them, `(windows, tokens)`, and
        what makes losses on them, `(windows, tokens - 1)`, comparable with the other's.
        """
        if what == "dense":
            return self.held_out.tokens, self.held_out.dense_nats
        return self.held_out.small_tokens, self.held_out.small_nats


@dataclass(frozen=True)
class Found:
    """What was measured of one model."""

    losses: "Tensor"
    """Nats a token of the dense model, a row a window (`HeldOut.small_nats`)."""
    weight_bytes: int
    """Of its files of weights."""
    linear_bytes: int
    """Of what is, or would be, quantized, its scales included."""


def quantize(settings: QuantizeConfig, console: "Console") -> Record:
    """Run the whole quantization; the output folder holds the model when it returns.

    Returns the record written.
    Raises UserError for anything the user can mend; nothing is then left in the output folder.
    """
    from sp3llm.quantization.bits import check_installed, check_widths
    from sp3llm.reporting.origins import held_out_text
    from sp3llm.reporting.quantization import closing_table, next_steps
    from sp3llm.runtime.devices import arithmetic_of, resolve_execution
    from sp3llm.runtime.folders import output_folder
    from sp3llm.runtime.progress import print_line, progress_bars

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says how it casts at every call
    started = time.monotonic()
    check_installed(f"--to {settings.to}", "leave the model as it is")
    small, dense, record = _pair(settings, console)
    dtype = arithmetic_of(dense.checkpoint.dtype(), small.checkpoint.dtype())
    execution = resolve_execution(settings.device, dtype)
    if execution.device.type == "cpu":
        check_widths(settings.to, small.linear(), f"'{small.name}'")
    folder = Path(settings.model)
    if not folder.is_dir():  # one of the hub, which has no place to stand beside
        folder = Path(folder.name)
    out = settings.out or quantized_folder(folder, settings.to)
    _check_output(out, settings.to, small, dense)
    held_out = held_out_text(record, small.checkpoint.folder, dense.checkpoint.folder)

    say = functools.partial(print_line, console)

    with output_folder(out, say) as partial, progress_bars(console) as progress:
        measuring = Measuring(held_out, execution, progress)
        stock, models = _measure_four(dense, small, settings.to, partial, measuring)
        sources = {"dense": dense, "small": small}
        entry = _entry(settings, out, sources, models, measuring, started)
        record = replace(without_measurements(record), quantization=entry)
        _finish(small, dense, record, stock, partial)
    console.print(closing_table(record.model, record.evaluation, entry))
    say(next_steps(out, record.architecture, entry))
    return record


def quantized_folder(folder: Path, to: str) -> Path:
    """Where the quantized model goes if nobody says: beside the other."""
    folder = Path(os.path.realpath(folder))
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


def _pair(settings: QuantizeConfig, console: "Console") -> tuple[Source, Source, Record]:
    """The compressed model, the dense one, and the record that binds them."""
    from sp3llm.models.source import resolve_model
    from sp3llm.reporting.origins import find_dense
    from sp3llm.runtime.progress import print_line

    folder, name, note = resolve_model(settings.model)
    small = _opened(folder, name)
    record = read_record(folder)
    dense_folder = find_dense(record, settings.dense)
    dense = _opened(dense_folder, settings.dense or record.model)
    if settings.dense is None:
        print_line(console, f"The dense model is {dense.name}.")
    if note:
        print_line(console, note)
    return small, dense, record


def _opened(folder: Path, name: str) -> Source:
    """A model on disk; one that is quantized already, or no decoder, is refused."""
    from sp3llm.models.checkpoint import open_model
    from sp3llm.models.source import read_config

    quantization = read_config(folder).get("quantization_config")
    if quantization:
        method = quantization.get("quant_method")
        raise UserError(
            f"Expected a model in full precision, found '{name}', which is quantized already "
            f"({method}): name the one it was made from."
        )
    model = Source(*open_model(folder), name)
    if model.objective().evaluation_windows is None:
        raise UserError(
            f"Expected a decoder, which is scored on text in every precision, found '{name}', a "
            f"{model.family.architecture}: load it in few bits as it is, with transformers' "
            "quantization_config=BitsAndBytesConfig(load_in_8bit=True)."
        )
    return model


def _check_output(out: Path, to: str, small: Source, dense: Source) -> None:
    from sp3llm.runtime.folders import check_disk, check_not_input, check_output

    for model in (small, dense):
        folder = model.checkpoint.folder.resolve()
        if folder in (out.resolve(), *out.resolve().parents):
            raise UserError(
                f"Expected another --out than the model itself or a folder in it, found '{out}': "
                "the one in full precision stays, so choose another folder."
            )
        check_not_input(out, folder, f"'{model.name}'")
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

    tokens, nats = measuring.reading(what)
    losses = measure_losses(
        model.checkpoint,
        model.family,
        tokens,
        measuring.execution,
        measuring.progress,
        what=f"{what} model, perplexity",
    )
    linear = linear_parameters(model) * model.checkpoint.dtype().itemsize
    return Found(nats(losses), weight_bytes(model.checkpoint), linear)


def _in_few_bits(
    model: Source, to: str, folder: Path, measuring: Measuring, what: str
) -> tuple[dict[str, Any], Found]:
    """Write a model quantized into `folder`, without a config, and measure what was written.

    Returns its `quantization_config`, too.
    """
    from sp3llm.quantization.bits import take_any_width, unfit

    execution, progress = measuring.execution, measuring.progress
    tokens, nats = measuring.reading(what)
    bar = progress.add_task(f"{what} model, to {to}", total=1)
    stock = write_quantized(model, to, execution.device, folder)
    progress.update(bar, completed=1)
    files = sorted(folder.glob("*.safetensors"))
    bar = progress.add_task(f"{what} model in {to}, perplexity", total=len(tokens))
    quantized = load_quantized(folder, model, stock, execution)
    if execution.device.type == "cpu" and unfit(to, model.linear()):
        take_any_width(quantized)
    objective = model.objective()
    losses = losses_of(
        quantized, objective, tokens, execution.device, lambda: progress.advance(bar)
    )
    sizes = tensor_bytes(files)
    linear = sum(sizes[name] for name in sizes if _is_of(name, model.linear()))
    return stock, Found(nats(losses), sum(path.stat().st_size for path in files), linear)


def _is_of(name: str, modules: Iterable[str]) -> bool:
    """Whether a tensor is a quantized module's weight, or scales of one."""
    return name.endswith(".SCB") or any(name.startswith(f"{module}.weight") for module in modules)


def losses_of(
    model: Any,
    objective: "Objective",
    tokens: "Tensor",
    device: "torch.device",
    advance: Callable[[], None] = lambda: None,
) -> "Tensor":
    """Losses of a model in memory by its objective, `(windows, tokens - 1)`, float64, in nats.

    A window at a time: what int8 holds back as outliers depends on all tokens of a batch.
    Raises UserError if one is no number.
    """
    import torch

    losses = torch.empty((len(tokens), tokens.shape[1] - 1), dtype=torch.float64)
    for row, window in enumerate(tokens):
        losses[row] = objective.losses_in_memory(model, window, device)
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
    sources: Mapping[str, Source],
    measured: Mapping[str, Found],
    measuring: Measuring,
    started: float,
) -> QuantizationEntry:
    """What the record has of a quantization into `out` that began at `started`, by
    `time.monotonic`; `sources` are `dense` and `small`, `measured` has the names of `FourModels`.
    """
    from importlib.metadata import version

    from sp3llm.models import families
    from sp3llm.quantization import bits
    from sp3llm.runtime.machine import device_memory, machine, peak_memory, versions

    execution = measuring.execution
    losses = {name: model.losses for name, model in measured.items()}
    small, dense = sources["small"], sources["dense"]
    models = {
        name: MeasuredModel(
            perplexity=small.objective().merit(model.losses),
            excess_log_perplexity=_excess(model.losses, losses["dense"]),
            weight_bytes=model.weight_bytes,
            linear_bytes=model.linear_bytes,
            window_losses=tuple(model.losses.mean(1).tolist()),
        )
        for name, model in measured.items()
    }
    perplexities = {name: model.perplexity for name, model in models.items()}
    same = measuring.held_out.describe(**perplexities)
    resolved = replace(settings, dense=dense.name, out=out, device=str(execution.device))
    is_cpu = execution.device.type == "cpu"
    return QuantizationEntry(
        command=command_line(settings),
        settings=to_json(resolved),
        bits=settings.to,
        parameters=families.count_parameters(small.family, small.checkpoint.config),
        quantized_parameters=linear_parameters(small),
        models=FourModels(**models),
        cost=QuantizationCost(
            dense=_excess(losses["dense_quantized"], losses["dense"]),
            small=_excess(losses["small_quantized"], losses["small"]),
        ),
        over_dense_quantized=_excess(losses["small_quantized"], losses["dense_quantized"]),
        dense_runs_elsewhere_only=bits.unfit(settings.to, dense.linear()) if is_cpu else None,
        compute_dtype=str(execution.dtype).removeprefix("torch."),
        versions={**versions(), "bitsandbytes": version("bitsandbytes")},
        machine=machine(str(execution.device)),
        seconds=round(time.monotonic() - started, 2),
        peak_memory_bytes=peak_memory(),
        device_memory_bytes=device_memory(str(execution.device)),
        same_text=from_json(SameText, same) if same else None,
    )


def _excess(losses: "Tensor", baseline: "Tensor") -> Excess:
    """Log-perplexity over another model's, from both `Found.losses`."""
    from sp3llm.maths.paired import excess_log_perplexity

    return from_json(Excess, excess_log_perplexity(losses, baseline).describe())


def _finish(
    small: Source, dense: Source, record: Record, stock: Mapping[str, Any], folder: Path
) -> None:
    """Everything of the output but its weights; `config.json` last."""
    from sp3llm.models.companions import carried_config, copy_companions
    from sp3llm.reporting.card import write_card
    from sp3llm.runtime.files import write_json

    copy_companions(small.checkpoint.folder, folder)
    write_record(folder, record)
    if (small.checkpoint.folder / "README.md").is_file():  # the licence that it carries
        shutil.copyfile(small.checkpoint.folder / "README.md", folder / "README.md")
    write_card(folder, record, dense.checkpoint.folder)
    config = {**carried_config(small.checkpoint.config), "quantization_config": dict(stock)}
    write_json(folder / "config.json", config, allow_nan=True)
