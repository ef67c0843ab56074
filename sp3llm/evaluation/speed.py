"""How fast a compressed model runs beside its dense one, and how fast its shape says it should.

Both models are in memory and take turns, measurement by measurement, so that whatever slows the
machine slows both. Prefill is bound by arithmetic and promises the ratio of FLOPs; decoding reads
every weight and the KV cache once a token and promises the ratio of those bytes. What is measured
over what is promised is the share of the speed-up that the machine has realised.
"""

import inspect
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sp3llm.errors import UserError, reason
from sp3llm.evaluation.speed_figures import Cell, Measured, Pass, SpeedUp, Spread
from sp3llm.evaluation.speed_table import markdown, table
from sp3llm.options import BenchConfig, command_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from sp3llm.models.families import Family


# Compiled graphs record themselves on the first passes.
_WARM_UPS, _WARM_UPS_COMPILED = 1, 3


@dataclass(frozen=True)
class Subject:
    """A model under measurement."""

    name: str
    model: nn.Module
    config: Mapping[str, Any]
    """Its `config.json`."""
    family: "Family | None"
    """None where sp3llm does not know it, and cannot count its work."""
    disk_bytes: int
    """Of the weight files."""

    @property
    def weight_bytes(self) -> int:
        """Of the parameters and buffers in memory, tied ones once."""
        tensors = {t.data_ptr(): t for t in (*self.model.parameters(), *self.model.buffers())}
        return sum(tensor.nbytes for tensor in tensors.values())

    @property
    def parameters(self) -> int:
        """True parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def itemsize(self) -> int:
        """Bytes of a weight in memory."""
        return next(self.model.parameters()).element_size()


@dataclass(frozen=True)
class Work:
    """What a shape costs at one batch size and prompt length."""

    prefill_flops: int
    """Of a whole batch: every matrix on every token, causal attention, the head on the last."""
    decode_bytes: int
    """Read for one token of each sequence: matrices once, and the KV cache half-way."""


def work_of(
    family: "Family",
    config: Mapping[str, Any],
    batch_size: int,
    prompt_length: int,
    new_tokens: int,
    itemsize: int,
) -> Work:
    """Count from `config.json` what a pass costs.

    Of experts those count that a token goes through, which is all that a batch of one reads.
    """
    from sp3llm.models.families import EMBEDDING, VOCAB, axis_sizes
    from sp3llm.models.shapes import Shape, cost_of

    shape, sizes = Shape.of(family, config), axis_sizes(family, config)
    # A token attends to half of the prompt on average.
    token = cost_of(family, config, shape, (prompt_length + 1) // 2, itemsize)
    head = 2 * sizes[VOCAB] * sizes[EMBEDDING]
    matrices = cost_of(family, config, shape, 0, itemsize).flops // 2 * itemsize
    context = prompt_length + new_tokens // 2
    return Work(
        prefill_flops=batch_size * (prompt_length * (token.flops - head) + head),
        decode_bytes=matrices + batch_size * context * token.kv_cache,
    )


def load(model: str, dtype: str, device: torch.device) -> Subject:
    """Load a model as plain transformers does.

    Raises UserError if there is none that loads.
    """
    from transformers import AutoModelForCausalLM

    from sp3llm.models.families import family_of
    from sp3llm.models.source import read_config, resolve_model

    folder, name, _ = resolve_model(model)
    config = read_config(folder)
    try:
        family = family_of(config)
    except UserError:  # speed can be measured all the same; the table says that nothing is promised
        family = None
    try:
        stock = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype if dtype == "auto" else getattr(torch, dtype)
        )
        stock = stock.to(device).eval()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers raises many kinds
        raise UserError(
            f"Cannot load the model '{name}' ({type(error).__name__}: {reason(error)}): check that "
            "plain transformers loads it."
        ) from error
    files = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    return Subject(name, stock, config, family, sum(file.stat().st_size for file in files))


# --------------------------------------------------------------------------- one pass


def timed(device: torch.device, work: Callable[[], Any]) -> float:
    """Seconds that `work` takes on the device, by its own clock where it has one."""
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record(torch.cuda.current_stream(device))
    work()
    end.record(torch.cuda.current_stream(device))
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1000


class Runner:
    """A model at one batch size and prompt length, with the cache that goes with it."""

    def __init__(self, subject: Subject, prompt: Tensor, new_tokens: int, compiled: bool) -> None:
        from transformers import StaticCache

        self.subject = subject
        self.prompt = prompt
        """Token ids on the device, `(batch, tokens)`."""
        self.new_tokens = new_tokens
        self.forward: Callable[..., Any] = subject.model
        # Transformers renames the argument.
        names = inspect.signature(type(subject.model).forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"
        self.static: Any = None
        if compiled:
            length = prompt.shape[1] + new_tokens
            self.static = StaticCache(config=subject.model.config, max_cache_len=length)
            # The cache takes its memory in a first pass that is not compiled: the graphs may then
            # rely on where it lies.
            self.run()
            # As transformers itself compiles for generation.
            mode = "reduce-overhead" if prompt.device.type == "cuda" else "default"
            self.forward = torch.compile(subject.model, mode=mode, dynamic=False)

    def _next(self, tokens: Tensor, cache: Any) -> Tensor:
        """The likeliest next tokens, `(batch, 1)`."""
        if self.static is not None:
            torch.compiler.cudagraph_mark_step_begin()
        output = self.forward(
            input_ids=tokens, use_cache=True, logits_to_keep=1, **{self.cache_name: cache}
        )
        return output.logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def run(self) -> Pass:
        """Prefill the prompt and generate greedily, without regard to any end of text."""
        from transformers import DynamicCache

        device = self.prompt.device
        _synchronize(device)
        began = time.perf_counter()
        if self.static is not None:
            self.static.reset()
            cache = self.static
        else:
            cache = DynamicCache(config=self.subject.model.config)
        token = self.prompt

        def prefill() -> None:
            nonlocal token
            token = self._next(self.prompt, cache)

        def decode() -> None:
            nonlocal token
            for _ in range(self.new_tokens - 1):
                token = self._next(token, cache)

        prefill_seconds = timed(device, prefill)
        token.tolist()
        first_token = time.perf_counter() - began
        return Pass(prefill_seconds, first_token, timed(device, decode))

    def peak_memory(self) -> int | None:
        """Bytes of the weights and of the most that a pass holds beside them; None: unknown."""
        weights = self.subject.weight_bytes
        held = 0
        if self.static is not None:  # allocated before, and not seen by what follows
            for layer in self.static.layers:
                held += layer.keys.nbytes + layer.values.nbytes
        device = self.prompt.device
        if device.type != "cuda":
            return weights + held + _most_allocated(self.run)
        if self.static is not None:
            return None
        _synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        self.run()
        _synchronize(device)
        return weights + torch.cuda.max_memory_allocated(device) - before


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _most_allocated(work: Callable[[], Any]) -> int:
    """The most bytes of tensors that `work` holds at once on a CPU, by the profiler's trace."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"
    )
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


# --------------------------------------------------------------------------- both in turns


def measure_cell(
    dense: Subject,
    small: Subject,
    settings: BenchConfig,
    batch_size: int,
    prompt_length: int,
    device: torch.device,
    advance: Callable[[], Any],
) -> Cell:
    """Both models at one batch size and prompt length, in turns."""
    generator = torch.Generator().manual_seed(settings.seed)
    words = min(subject.model.config.vocab_size for subject in (dense, small))
    prompt = torch.randint(words, (batch_size, prompt_length), generator=generator).to(device)
    if settings.compile:
        torch.compiler.reset()  # each shape is compiled for itself
    runners = [
        Runner(subject, prompt, settings.new_tokens, settings.compile) for subject in (dense, small)
    ]
    for runner in runners:
        for _ in range(_WARM_UPS_COMPILED if settings.compile else _WARM_UPS):
            runner.run()
    passes: tuple[list[Pass], list[Pass]] = ([], [])
    for repeat in range(settings.repeats):
        # Neither always comes first.
        for at in (0, 1) if repeat % 2 == 0 else (1, 0):
            passes[at].append(runners[at].run())
            advance()
    peaks = [runner.peak_memory() for runner in runners]
    found = [
        _measured(passes[at], batch_size, prompt_length, settings.new_tokens, peaks[at])
        for at in (0, 1)
    ]
    works = [
        work_of(
            subject.family,
            subject.config,
            batch_size,
            prompt_length,
            settings.new_tokens,
            subject.itemsize,
        )
        if subject.family
        else None
        for subject in (dense, small)
    ]
    known = None not in works
    return Cell(
        batch_size,
        prompt_length,
        *found,
        prefill=SpeedUp(
            Spread.of([d.prefill / s.prefill for d, s in zip(*passes, strict=True)]),
            works[0].prefill_flops / works[1].prefill_flops if known else None,
        ),
        decode=SpeedUp(
            Spread.of([d.decode / s.decode for d, s in zip(*passes, strict=True)]),
            works[0].decode_bytes / works[1].decode_bytes if known else None,
        ),
    )


def _measured(
    passes: list[Pass], batch_size: int, prompt_length: int, new_tokens: int, peak: int | None
) -> Measured:
    return Measured(
        Spread.of([batch_size * prompt_length / p.prefill for p in passes]),
        Spread.of([batch_size * (new_tokens - 1) / p.decode for p in passes]),
        Spread.of([p.first_token for p in passes]),
        peak,
    )


def bench(settings: BenchConfig, console: "Console") -> dict[str, Any]:
    """Measure both models over all batch sizes and prompt lengths, and print the table.

    Returns what `--output` holds.

    Raises UserError for anything the user can mend.
    """
    from sp3llm.runtime.devices import resolve_execution
    from sp3llm.runtime.machine import machine, versions
    from sp3llm.runtime.progress import progress_bars

    device = resolve_execution(settings.device, torch.float32).device
    _check_output(settings.output)
    try:
        with console.status("loading the models"):
            dense = load(settings.against, settings.dtype, device)
            small = load(settings.model, settings.dtype, device)
        _check_positions(settings, (dense, small))
        with progress_bars(console) as progress:
            cells = _cells(dense, small, settings, device, progress)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "The GPU ran out of memory: both models have to fit together with their caches; give "
            "smaller --batch-sizes or --prompt-lengths."
        ) from error
    record = {
        "command": command_line(settings),
        "model": small.name,
        "against": dense.name,
        "settings": {
            key: str(value) if isinstance(value, Path) else value
            for key, value in asdict(settings).items()
        },
        "dtype": str(next(small.model.parameters()).dtype).removeprefix("torch."),
        "attention": small.model.config._attn_implementation,
        "weights": {
            name: {
                "parameters": subject.parameters,
                "disk_bytes": subject.disk_bytes,
                "memory_bytes": subject.weight_bytes,
            }
            for name, subject in (("dense", dense), ("small", small))
        },
        "cells": [cell.describe() for cell in cells],
        "machine": {**machine(str(device)), "threads": torch.get_num_threads()},
        "versions": versions(),
    }
    console.print(table(record, cells))
    unknown = [subject.name for subject in (dense, small) if subject.family is None]
    if unknown:
        console.print(
            f"No promise is shown: sp3llm does not know the family of {' or '.join(unknown)}.",
            markup=False,
        )
    if settings.output is None:
        console.print("Nothing was written: --output FILE.json keeps the figures.", markup=False)
    else:
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        settings.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        page = settings.output.with_suffix(".md")
        page.write_text(markdown(record, cells), encoding="utf-8")
        console.print(f"Written to {settings.output} and {page.name}.", markup=False)
    return record


def _cells(
    dense: Subject,
    small: Subject,
    settings: BenchConfig,
    device: torch.device,
    progress: "Progress",
) -> list[Cell]:
    shapes = [(b, p) for b in settings.batch_sizes for p in settings.prompt_lengths]
    bar = progress.add_task("measuring in turns", total=2 * settings.repeats * len(shapes))
    return [
        measure_cell(dense, small, settings, batch, prompt, device, lambda: progress.advance(bar))
        for batch, prompt in shapes
    ]


def _check_output(output: Path | None) -> None:
    if output is not None and output.parent.exists() and not output.parent.is_dir():
        raise UserError(
            f"Expected --output in a folder, found the file '{output.parent}': name another place."
        )


def _check_positions(settings: BenchConfig, subjects: Sequence[Subject]) -> None:
    needed = max(settings.prompt_lengths) + settings.new_tokens
    for subject in subjects:
        most = getattr(subject.model.config, "max_position_embeddings", None)
        if most is not None and needed > most:
            raise UserError(
                f"Expected prompts and new tokens of at most {most} together, the positions of "
                f"'{subject.name}', found {needed}: give shorter --prompt-lengths or fewer "
                "--new-tokens."
            )
