"""Before a compression does any work: the model is found, and everything that could be wrong."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sp3llm.compression.job import Job, evaluation_sets, files_named
from sp3llm.errors import UserError
from sp3llm.options import CompressConfig

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from sp3llm.runtime.processes import Ranks
    from sp3llm.vocabulary.wanted import Wanted


# A mask is learned on the whole model, its activations apart: it and its largest table twice.
_ROOM_TO_LEARN = 1.25


def prepare(
    settings: CompressConfig,
    ranks: "Ranks",
    device: str,
    console: "Console",
    wanted: "Wanted | None" = None,
) -> Job:
    """Find the model and everything that could be wrong, before any work.

    `wanted` is what another process has read of the text that the vocabulary is chosen by.
    """
    from sp3llm.compression.refitter import held_back_from
    from sp3llm.compression.shape_search import FEWEST_WINDOWS
    from sp3llm.compression.vocabulary import shapes_with, vocabularies_of
    from sp3llm.evaluation.harness import check_scoring
    from sp3llm.evaluation.task_metrics import check_installed
    from sp3llm.models import families
    from sp3llm.models.checkpoint import open_model
    from sp3llm.models.objectives.catalogue import objective_of
    from sp3llm.models.sentence_modules import check_modules
    from sp3llm.models.source import resolve_model
    from sp3llm.models.stock import empty_model
    from sp3llm.planning.candidates import without_trials
    from sp3llm.planning.encoders import check_encoder
    from sp3llm.planning.limits import limits_of, plan_of
    from sp3llm.planning.needs import Workload, needs_of
    from sp3llm.planning.windows import window_length
    from sp3llm.quantization.story import check_before
    from sp3llm.reporting.formatting import human_bytes
    from sp3llm.runtime.devices import arithmetic_of, idle_gpus_line, resolve_execution
    from sp3llm.runtime.folders import check_disk, check_not_input, check_output, held_by_run
    from sp3llm.runtime.memory import memory_limits
    from sp3llm.runtime.placement import free_memory
    from sp3llm.runtime.progress import print_line
    from sp3llm.vocabulary.restricting import restricted_checkpoint

    folder, name, note = resolve_model(settings.model)
    if note:
        print_line(console, note)
    dense, family = open_model(folder)
    left_out = families.left_out_line(family, dense.config, dense.files)
    if left_out:
        print_line(console, left_out)
    check_encoder(family, settings, compresses=True)
    check_modules(folder)
    if settings.task is not None:
        check_installed()
    original = dense
    dense_dtype = dense.dtype()
    dtype = _dtype(settings.dtype, dense_dtype)
    limits = limits_of(settings, dtype.itemsize)
    held_out = evaluation_sets(settings)
    vocabularies = vocabularies_of(settings, dense, family, limits, held_out, wanted, console)
    shapes, vocabularies = shapes_with(vocabularies, family, original.config, limits)
    if vocabularies:
        dense = restricted_checkpoint(dense, family, vocabularies[0].kept)
        limits = replace(limits, vocab_rows=vocabularies[0].kept.rows)
    if settings.moments == "raw" and families.is_square(family, dense.config):
        raise UserError(
            f"Expected --moments normalised for a {family.model_type} model, whose heads are cut "
            "by what they read, found raw: leave it out."
        )
    learned = settings.mask == "learned"
    if not settings.refit and not learned:
        shapes = [without_trials(shapes)]
    if settings.moments == "raw" and len(shapes) > 1 and not learned:
        raise UserError(
            "Expected a single shape with --moments raw, which predict nothing, found "
            f"{len(shapes)} to choose from: add --allocate width and --tie keep or untie, or leave "
            "--moments raw out."
        )
    fixed = family.projections is None and any(shape.tie_word_embeddings for shape in shapes)
    if settings.turn != "none" and fixed:
        raise UserError(
            f"Expected --turn none where '{name}' keeps its embeddings tied, which fixes the "
            f"rotation, found {settings.turn}: leave it out, or add --tie untie."
        )

    out = settings.out or Path(f"{Path(name).name.replace(' ', '-')}-keep{100 * settings.keep:g}")
    check_output(out)
    check_not_input(out, folder, "the model that is compressed")
    if ranks.is_first:  # the others do not read it
        for text, path in files_named(settings).items():
            check_not_input(out, path, f"the text '{text}'")
    if settings.refit:
        held_back_from(settings.calibrated)
    if not learned and len(shapes) > 1 and settings.calibrated < FEWEST_WINDOWS:
        raise UserError(
            f"The search for a shape needs at least {FEWEST_WINDOWS} calibration windows, "
            f"found {settings.calibrated}: raise --samples, or leave nothing to search for with "
            "--allocate width, --tie keep and, for OPT, --head-dim."
        )
    max_memory = memory_limits(settings.max_memory)
    arithmetic = arithmetic_of(dense_dtype, dtype)
    execution = resolve_execution(device, arithmetic, ranks, max_memory, settings.compute_dtype)
    largest = max(plan_of(family, original.config, limits, shape).parameters for shape in shapes)
    workload = Workload(
        settings.calibrated,
        settings.eval_samples,
        window_length(family, dense.config, settings.seq_len),
        dense_dtype.itemsize,
        execution.dtype.itemsize,
    )
    kept = needs_of(family, dense.config, shapes[0], workload, limits.export_as).kept
    result_bytes = largest * dtype.itemsize if ranks.is_first else 0
    check_disk(out, result_bytes + kept - held_by_run(out))
    # Refuses a config that transformers rejects, before any work.
    empty_model(dense.config, objective_of(family.architecture))
    if learned:
        dense_bytes = families.count_parameters(family, dense.config) * execution.dtype.itemsize
        room = free_memory(execution, max_memory)
        if dense_bytes * _ROOM_TO_LEARN > room:
            raise UserError(
                "Expected room for the whole dense model for --mask learned, "
                f"{human_bytes(dense_bytes * _ROOM_TO_LEARN)} on {execution.device}, found "
                f"{human_bytes(room)}: use --mask closed-form, which streams it."
            )
    if settings.score:
        check_scoring(settings)
    line = idle_gpus_line(execution, "sp3llm.compress")
    if line:
        print_line(console, line)
    if settings.quantize:
        check_before(settings.quantize, execution.device, family, dense.config, shapes, out)
    return Job(
        settings=settings,
        folder=folder,
        name=name,
        dense=dense,
        original=original,
        vocabularies=vocabularies,
        vocabulary=vocabularies[0] if vocabularies else None,
        family=family,
        dense_dtype=dense_dtype,
        dtype=dtype,
        limits=limits,
        shapes=shapes,
        out=out,
        execution=execution,
        max_memory=max_memory,
    )


def _dtype(asked: str, dense: "torch.dtype") -> "torch.dtype":
    import torch

    return dense if asked == "auto" else getattr(torch, asked)
