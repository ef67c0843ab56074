"""How fast a compressed model runs beside its dense one, and how fast its shape says it should.

Both models are in memory and take turns, measurement by measurement, so that whatever slows the
machine slows both. Prefill is bound by arithmetic and promises the ratio of FLOPs; decoding reads
every weight and the KV cache once a token and promises the ratio of those bytes. What is measured
over what is promised is the share of the speed-up that the machine has realised.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sp3llm.errors import UserError, reason
from sp3llm.evaluation.speed_figures import Cell, Measured, Pass, SpeedUp, Spread
from sp3llm.evaluation.speed_run import Subject, load, peak_memory, run_pass, runner_of
from sp3llm.evaluation.speed_table import markdown, table
from sp3llm.options import BenchConfig, command_line, plain_values

if TYPE_CHECKING:
    from rich.console import Console

    from sp3llm.models.families import Family


# Compiled graphs record themselves on the first passes.
_WARM_UPS, _WARM_UPS_COMPILED = 1, 3


class Pair(NamedTuple):
    """The two models that are compared."""

    dense: Subject
    small: Subject


@dataclass(frozen=True)
class Work:
    """What a model has to do at one batch size and prompt length."""

    prefill_flops: int
    """FLOPs for the prompts of a batch: every matrix on every token, causal attention, the head on
    the last token of each."""
    decode_bytes: int
    """Bytes read to generate one token in each sequence: matrices once, and the KV cache of the
    sequences as it is when half of the new tokens are there."""


def work_of(
    family: "Family",
    config: Mapping[str, Any],
    batch_size: int,
    prompt_length: int,
    new_tokens: int,
    itemsize: int,
) -> Work:
    """Count from `config.json` what a pass costs; `itemsize` is the bytes of a weight.

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


# --------------------------------------------------------------------------- both in turns


def measure_cell(
    pair: Pair,
    settings: BenchConfig,
    batch_size: int,
    prompt_length: int,
    advance: Callable[[], Any],
) -> Cell:
    """Both models at one batch size and prompt length, in turns; `advance` is called after every
    measurement.
    """
    prompt = _prompt(pair, settings.seed, batch_size, prompt_length)
    if settings.compile:
        torch.compiler.reset()  # each shape is compiled for itself
    runners = [
        runner_of(subject, prompt, settings.new_tokens, settings.compile) for subject in pair
    ]
    for runner in runners:
        for _ in range(_WARM_UPS_COMPILED if settings.compile else _WARM_UPS):
            run_pass(runner)
    passes: tuple[list[Pass], list[Pass]] = ([], [])
    for repeat in range(settings.repeats):
        # Neither always comes first.
        for at in (0, 1) if repeat % 2 == 0 else (1, 0):
            passes[at].append(run_pass(runners[at]))
            advance()
    dense, small = (
        _measured(own, prompt, settings.new_tokens, peak_memory(runner))
        for own, runner in zip(passes, runners, strict=True)
    )
    prefill, decode = _promises(pair, batch_size, prompt_length, settings.new_tokens)
    return Cell(
        batch_size,
        prompt_length,
        dense,
        small,
        prefill=_speed_up(
            [one.prefill for one in passes[0]], [o.prefill for o in passes[1]], prefill
        ),
        decode=_speed_up([one.decode for one in passes[0]], [o.decode for o in passes[1]], decode),
    )


def _prompt(pair: Pair, seed: int, batch_size: int, prompt_length: int) -> Tensor:
    """Random token ids that both models know, `(batch_size, prompt_length)`, on their device."""
    generator = torch.Generator().manual_seed(seed)
    words = min(subject.model.config.vocab_size for subject in pair)
    prompt = torch.randint(words, (batch_size, prompt_length), generator=generator)
    return prompt.to(next(pair.dense.model.parameters()).device)


def _measured(passes: list[Pass], prompt: Tensor, new_tokens: int, peak: int | None) -> Measured:
    generated = len(prompt) * (new_tokens - 1)  # the first comes with the prompt
    return Measured(
        Spread.of([prompt.numel() / one.prefill for one in passes]),
        Spread.of([generated / one.decode for one in passes]),
        Spread.of([one.first_token for one in passes]),
        peak,
    )


def _promises(
    pair: Pair, batch_size: int, prompt_length: int, new_tokens: int
) -> tuple[float | None, float | None]:
    """Dense over small: FLOPs of a prefill, and bytes read in decoding. None where the family of
    one is unknown.
    """
    if pair.dense.family is None or pair.small.family is None:
        return None, None
    dense, small = (
        work_of(
            subject.family,
            subject.config,
            batch_size,
            prompt_length,
            new_tokens,
            subject.dtype.itemsize,
        )
        for subject in pair
    )
    return dense.prefill_flops / small.prefill_flops, dense.decode_bytes / small.decode_bytes


def _speed_up(dense: list[float], small: list[float], promised: float | None) -> SpeedUp:
    """From the seconds that both took, measurement by measurement."""
    ratios = [before / after for before, after in zip(dense, small, strict=True)]
    return SpeedUp(Spread.of(ratios), promised)


# --------------------------------------------------------------------------- the command


def bench(settings: BenchConfig, console: "Console") -> dict[str, Any]:
    """Measure both models over all batch sizes and prompt lengths, and print the table.

    Returns what `--output` holds.

    Raises UserError for anything the user can mend.
    """
    from sp3llm.runtime.devices import resolve_execution
    from sp3llm.runtime.progress import print_line

    device = resolve_execution(settings.device, torch.float32).device
    _check_output(settings.output)
    try:
        with console.status("loading the models"):
            dense = load(settings.against, settings.dtype, device)
            small = load(settings.model, settings.dtype, device)
        pair = Pair(dense, small)
        _check_positions(settings, pair)
        cells = _cells(pair, settings, console)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "The GPU ran out of memory: both models have to fit together with their caches; give "
            "smaller --batch-sizes or --prompt-lengths."
        ) from error
    record = _record(settings, pair, cells, device)
    console.print(table(record, cells))
    unknown = [subject.name for subject in pair if subject.family is None]
    if unknown:
        print_line(
            console,
            f"No promise is shown: sp3llm does not know the family of {' or '.join(unknown)}.",
        )
    print_line(console, _write(settings.output, record, cells))
    return record


def _cells(pair: Pair, settings: BenchConfig, console: "Console") -> list[Cell]:
    from sp3llm.runtime.progress import progress_bars

    shapes = [(b, p) for b in settings.batch_sizes for p in settings.prompt_lengths]
    with progress_bars(console) as progress:
        bar = progress.add_task("measuring in turns", total=2 * settings.repeats * len(shapes))
        return [
            measure_cell(pair, settings, batch_size, length, lambda: progress.advance(bar))
            for batch_size, length in shapes
        ]


def _record(
    settings: BenchConfig, pair: Pair, cells: list[Cell], device: torch.device
) -> dict[str, Any]:
    """What `--output` holds, as plain values."""
    from sp3llm.runtime.machine import machine, versions

    return {
        "command": command_line(settings),
        "model": pair.small.name,
        "against": pair.dense.name,
        "settings": plain_values(settings),
        "dtype": str(pair.small.dtype).removeprefix("torch."),
        "attention": pair.small.model.config._attn_implementation,
        "weights": {"dense": pair.dense.describe(), "small": pair.small.describe()},
        "cells": [cell.describe() for cell in cells],
        "machine": {**machine(str(device)), "threads": torch.get_num_threads()},
        "versions": versions(),
    }


def _write(output: Path | None, record: dict[str, Any], cells: list[Cell]) -> str:
    """Writes the record, and the table beside it; what to tell the user."""
    if output is None:
        return "Nothing was written: --output FILE.json keeps the figures."
    page = output.with_suffix(".md")
    try:
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        page.write_text(markdown(record, cells), encoding="utf-8")
    except OSError as error:
        raise _unwritable(output, error) from error
    return f"Written to {output} and {page.name}."


def _check_output(output: Path | None) -> None:
    """Raise UserError, before anything is measured, where figures cannot be written to, or would
    take the place of something else.
    """
    if output is None:
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
        taken = [path for path in (output, output.with_suffix(".md")) if os.path.lexists(path)]
    except OSError as error:
        raise _unwritable(output, error) from error
    if taken and not _holds_figures(output):
        raise UserError(
            f"Expected --output to name a new file, or one that sp3llm bench wrote, found "
            f"'{taken[0]}': name another."
        )


def _holds_figures(output: Path) -> bool:
    """Whether a file is of figures that were written before."""
    try:
        record = json.loads(output.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and {"against", "cells"} <= record.keys()


def _unwritable(output: Path, error: OSError) -> UserError:
    return UserError(f"Cannot write to '{output}' ({reason(error)}): name another --output.")


def _check_positions(settings: BenchConfig, pair: Pair) -> None:
    needed = max(settings.prompt_lengths) + settings.new_tokens
    for subject in pair:
        most = getattr(subject.model.config, "max_position_embeddings", None)
        if most is not None and needed > most:
            raise UserError(
                f"Expected prompts and new tokens of at most {most} together, the positions of "
                f"'{subject.name}', found {needed}: give shorter --prompt-lengths or fewer "
                "--new-tokens."
            )
