"""Compress a model into a smaller one of the same stock architecture.

The story, top-down (SP3, arXiv 2308.16475, carried to LLMs with one basis for the whole stream):

1. find the model, its family and its tokenizer; refuse what cannot be done before any work; with
   `--vocab-from` the model with the tokens that its text uses, and no others, is the dense one from
   here on;
2. list the shapes within the budget;
3. stream the dense model over calibration text, layer by layer, and sum the second moments of the
   normalised residual stream; held-out text goes along for the perplexity before;
4. take one global basis of the stream;
5. choose the shape that loses least, as predicted from the pass and checked by trial refits on a
   little of the text; or with `--mask learned` let gates learn what to keep, and the shape with it;
6. layer by layer beside the dense model: fold the norms, rotate, cut, refit what is left in closed
   form, write it;
7. stream the result over the held-out text for the perplexity after;
8. with `--recover-steps`, tune it against the dense model; with `--score`, score both on tasks of
   lm-eval; with `--quantize`, write it in few bits too.

`python -m sp3llm.compress [MODEL] --keep 0.75` is the same as `sp3llm compress`.
"""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sp3llm.compression.afterwards import (
    is_being_recovered,
    quantize_result,
    recover_result,
    write_report,
)
from sp3llm.compression.attempts import compress_resumably
from sp3llm.compression.job import Figures, Job, Result, kept_neurons_of, with_dtype
from sp3llm.compression.preparing import prepare
from sp3llm.compression.recording import record_of
from sp3llm.compression.shape_search import choose_shape
from sp3llm.compression.stages import (
    build,
    energy_kept,
    final_basis,
    learn_mask,
    measure,
    whole_spectrum,
)
from sp3llm.compression.texts import draw_texts, read_mask_windows, with_windows_that_tell
from sp3llm.options import CompressConfig, command_line
from sp3llm.reporting.record import (
    LearnedMask,
    PartCounts,
    Record,
    read_record,
    write_record,
)
from sp3llm.reporting.typed_json import from_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from sp3llm.evaluation.task_scores import Reported
    from sp3llm.runtime.journal import Journal
    from sp3llm.runtime.processes import Ranks
    from sp3llm.vocabulary.same_text import HeldOut
    from sp3llm.vocabulary.wanted import Wanted


def compress(settings: CompressConfig, console: "Console") -> Result | None:
    """Run the whole pipeline; the output folder holds the compressed model when it returns.

    What a killed run of the same settings has finished is not done again; None where that was the
    compression itself. Under `accelerate launch` every process calls this, and the first one
    writes.

    Raises UserError for anything the user can mend; nothing is then left in the output folder.
    """
    from sp3llm.runtime.presence import lost_process_told
    from sp3llm.runtime.processes import init_distributed

    ranks, device = init_distributed(settings.device)
    with lost_process_told():
        return _compress(settings, ranks, device, console)


def _compress(
    settings: CompressConfig, ranks: "Ranks", device: str, console: "Console"
) -> Result | None:
    """`compress`, as one of `ranks`."""
    from sp3llm.evaluation.harness import score_compressed
    from sp3llm.reporting.card import write_card
    from sp3llm.reporting.compression import closing_table, next_steps
    from sp3llm.runtime.progress import print_line

    job = None

    def look() -> "Wanted | None":
        nonlocal job
        job = prepare(settings, ranks, device, console)
        return None if job.vocabulary is None else job.vocabulary.wanted

    # It may download; the others on its host then find everything there.
    wanted = ranks.from_first(look)
    job = ranks.in_all(lambda: job or prepare(settings, ranks, device, console, wanted))
    out = Path(os.path.realpath(job.out))  # where `.` is when it has been replaced
    result = None
    if ranks.from_first(lambda: is_being_recovered(job)):
        print_line(console, f"'{job.out}' is compressed; going on with its recovery.")
        held_out = ranks.from_first(lambda: _held_out(job, out))
    else:
        result, record, job = compress_resumably(job, run_stages, console)
        held_out = result.held_out
        console.print(closing_table(record))
        if ranks.is_first:
            write_report(job, out, held_out, record, console)
        print_line(console, next_steps(job.out, record, settings.report))
    if settings.recover_steps:
        recover_result(job, ranks.from_first(lambda: read_record(out)), console)
    if settings.score:
        score_compressed(settings, out, console)
    if (settings.recover_steps or settings.score) and ranks.is_first:
        record = read_record(out)
        write_card(out, record, job.folder)
        write_report(job, out, held_out, record, console)
    if settings.quantize and ranks.is_first:
        quantize_result(settings, out, console)
    return result


def _held_out(job: Job, out: Path) -> "HeldOut | Reported":
    """What the job's models are measured on, read anew, in the tokens that the run has chosen."""
    from sp3llm.compression.tasks import read_rows
    from sp3llm.reporting.origins import held_out_text

    if job.settings.task is not None:
        return read_rows(job).held_out
    return held_out_text(read_record(out), out, job.folder)


def run_stages(
    job: Job, journal: "Journal", model: Path, started: float, progress: "Progress"
) -> tuple[Result, Record]:
    """All stages, and their record; what `journal` has of one is not done again. `model` holds
    everything then.
    """
    import torch

    from sp3llm.compression.depth import kept_layers
    from sp3llm.compression.expected_tokens import with_expected_tokens
    from sp3llm.compression.figures import text_figures
    from sp3llm.compression.tasks import read_mask_rows, read_rows, task_answers
    from sp3llm.compression.vocabulary_losses import vocabulary_losses
    from sp3llm.evaluation.perplexity import measure_losses
    from sp3llm.models import families
    from sp3llm.models.basis_file import write_basis
    from sp3llm.models.companions import copy_companions
    from sp3llm.models.export import written
    from sp3llm.models.sentence_modules import copy_modules
    from sp3llm.models.served import export_of
    from sp3llm.models.shapes import resized_config
    from sp3llm.planning.limits import plan_of
    from sp3llm.planning.search import Findings
    from sp3llm.reporting.card import write_card
    from sp3llm.reporting.plans import plan_line
    from sp3llm.reporting.weights import blocks_line
    from sp3llm.runtime.files import write_json
    from sp3llm.runtime.machine import device_memory, peak_memory
    from sp3llm.runtime.memory import trim_memory
    from sp3llm.runtime.progress import print_line
    from sp3llm.text.tokenizer import keep_tokenizer_class
    from sp3llm.vocabulary.restricting import instead_of

    job = with_expected_tokens(job, journal, progress)
    settings, dense, family, execution = job.settings, job.dense, job.family, job.execution
    reading = progress.add_task("text, calibration and evaluation", total=1)
    task_rows = (
        None if settings.task is None else execution.ranks.from_first(lambda: read_rows(job))
    )
    if task_rows is None:
        calibration, held_out = draw_texts(job, journal)
    else:
        calibration, held_out = task_rows.calibration, task_rows.held_out
    progress.advance(reading)
    mask_windows = None
    if settings.mask == "learned":  # read now: what is wrong with a text is said before any work
        rows = task_rows is not None
        mask_windows = execution.ranks.from_first(
            lambda: (read_mask_rows if rows else read_mask_windows)(job, held_out)
        )
    evaluated = None if task_rows is not None else held_out.tokens
    refits = settings.refit and not all(map(job.is_whole, job.shapes))
    tokens = with_windows_that_tell(job, calibration, held_out)
    # A mask is learned on the whole model, which needs the memory itself.
    keeps = execution.keeps_dense and refits and mask_windows is None
    runs = {} if keeps else None
    moments, dense_losses = measure(job, tokens, evaluated, journal, progress, runs)
    if mask_windows is not None:
        mask = learn_mask(job, moments, mask_windows, journal, progress)
        shape, findings = mask.shape, Findings()
    else:
        mask = None
        fewer = vocabulary_losses(job, journal, progress)
        shape, findings = choose_shape(job, moments, tokens, journal, progress, fewer)
        job = job.with_vocabulary_of(shape)
        if job.dense is not dense:
            dense, runs = job.dense, None
            calibration, held_out = draw_texts(job, journal)
            tokens = with_windows_that_tell(job, calibration, held_out)
    plan = plan_of(family, job.original.config, job.limits, shape)
    print_line(progress.console, plan_line(job.name, plan))
    blocks = blocks_line(family, job.original.config, job.limits, plan)
    if blocks:
        print_line(progress.console, blocks)
    layers = kept_layers(moments, shape)
    small_config = resized_config(family, dense.config, shape, layers)
    small_config = with_dtype(small_config, job.dtype, job.dense_dtype)
    # What is computed stays in the dense model's family; what is written, and scored, may not.
    export = export_of(family, small_config, settings.export_as)
    if job.is_whole(shape):
        eigenvalues, projection, energy = whole_spectrum(moments), None, 1.0
    else:
        eigenvalues, projection = final_basis(job, shape, moments, tokens, journal, mask)
        energy = energy_kept(moments, projection)
    neurons_LF = kept_neurons_of(job, moments, shape, projection)
    del moments  # at large widths several matrices that nothing needs any more
    trim_memory()
    of_shape = (shape, projection, layers, neurons_LF)
    of_build = (tokens, len(calibration.tokens), export, model, journal, progress, runs or None)
    fits, head_fit = build(job, *of_shape, *of_build)
    del runs  # gigabytes, of streams that nothing chases any more
    small = execution.ranks.from_first(
        lambda: written(export.family, export.config, job.dtype, model)
    )
    if task_rows is None:
        tokens = held_out.small_tokens
        losses = measure_losses(small, export.family, tokens, execution, progress, journal)
        figures = text_figures(job, held_out, losses, dense_losses)
    else:
        figures = execution.ranks.from_first(
            lambda: Figures(answers=task_answers(job, task_rows, small, progress))
        )
    result = Result(
        name=job.name,
        out=job.out,
        architecture=export.family.architecture,
        command=command_line(settings),
        plan=plan,
        findings=findings,
        layers=layers or (),
        fits=fits,
        head_fit=head_fit,
        eigenvalues=eigenvalues,
        energy_kept=energy,
        dense_bytes=job.original.stored_bytes(
            families.parameter_shapes(family, job.original.config)
        ),
        weight_bytes=plan.parameters * job.dtype.itemsize,
        calibration=calibration,
        held_out=held_out,
        **vars(figures),
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(),
        device_memory=device_memory(str(execution.device)),
    )
    parts = PartCounts(
        dense=families.count_parts(family, job.original.config),
        small=families.count_parts(export.family, export.config),
    )
    about_mask = None
    if mask is not None:
        trained_on = mask_windows.describe()
        about_mask = from_json(LearnedMask, {**mask.describe(), "training": trained_on})
    record = record_of(job, result, parts, about_mask)
    if execution.ranks.is_first:
        instead = None if job.vocabulary is None else instead_of(job.vocabulary.files)
        copied = copy_companions(job.folder, model, instead)
        copied += copy_modules(job.folder, model, plan.shape.hidden_size)
        record = replace(record, files_copied=tuple(copied))
        write_record(model, record)
        write_card(model, record, job.folder)
        write_basis(
            model, torch.eye(len(eigenvalues)) if projection is None else projection.writes()
        )
        if export.family is not family:
            keep_tokenizer_class(job.folder, model)
        write_json(model / "config.json", export.config, allow_nan=True)
    return result, record
