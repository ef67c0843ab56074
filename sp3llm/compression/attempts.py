"""A compression from its journal: continued after a kill, with smaller batches out of memory."""

import functools
import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sp3llm.compression.job import Job, Result, run_identity
from sp3llm.errors import ResumableError
from sp3llm.options import CompressConfig
from sp3llm.reporting.record import Record
from sp3llm.runtime.folders import RECORD

if TYPE_CHECKING:
    from rich.console import Console

    from sp3llm.runtime.devices import Execution
    from sp3llm.runtime.journal import Journal
    from sp3llm.runtime.placement import BytesNeeded


# Stages, as the journal of a run knows them; the streaming passes have names of their own.
_BATCH = "batch"
_FINISHED = "finished"


def compress_resumably(
    job: Job, run_stages: Callable[..., tuple[Result, Record]], console: "Console"
) -> tuple[Result, Record, Job]:
    """Run the stages of a job, as often as memory asks for.

    `run_stages` is called with the job, its journal, the folder of the model, when all began, and
    the progress bars. Returns the result, its record, and the job as it ran at last.
    """
    import torch

    from sp3llm.runtime.folders import MODEL, run_folder
    from sp3llm.runtime.journal import open_journal
    from sp3llm.runtime.locks import check_shared
    from sp3llm.runtime.memory import is_out_of_memory
    from sp3llm.runtime.progress import print_line, progress_bars

    started, settings, ranks = time.monotonic(), job.settings, job.execution.ranks

    say = functools.partial(print_line, console)

    with run_folder(job.out, settings.fresh, ranks, say) as folder:
        if settings.recover_steps or settings.score:
            place = f"'{job.out}' for --recover-steps and --score"
            advice = "leave them out, and tune or score the result on the first host"
            check_shared(folder, ranks, place, advice)
        journal = open_journal(folder / f"state-{ranks.index}", run_identity(job), ranks, say)
        model = folder / MODEL
        _take_back(journal, job.out, model)
        job = _placed(job, journal, folder, settings)
        result = None
        with progress_bars(console) as progress:
            while result is None:
                try:
                    result, record = run_stages(job, journal, model, started, progress)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                if result is None:  # what the attempt held goes with its frames
                    gc.collect()
                    torch.cuda.empty_cache()
                    job = replace(job, execution=_halved(job, journal))
        journal.save(_FINISHED, 0)
        ranks.all_gather(None)  # the first process clears up when all have come here
    return result, record, job


def _take_back(journal: "Journal", out: Path, model: Path) -> None:
    """A run killed between giving its result the final name and clearing up has that to do again:
    its result goes back to where the run finds it.
    """
    finished = journal.latest(_FINISHED) is not None  # all processes ask together
    if not (journal.ranks.is_first and finished):
        return
    if not any(model.iterdir()) and (out / RECORD).is_file():
        model.rmdir()
        out.rename(model)


def _placed(job: Job, journal: "Journal", folder: Path, settings: CompressConfig) -> Job:
    """The job with a decision on where streams lie, how much goes through a layer at once, and how
    many weights stay in memory; what a run before has found out about batches holds, since sums
    depend on them in their last bits.
    """
    from sp3llm.planning.needs import Workload, needs_of
    from sp3llm.planning.windows import window_length
    from sp3llm.runtime.placement import BytesNeeded, Known, place_streams, weights_kept

    seq_len = window_length(job.family, job.dense.config, settings.seq_len)
    workload = Workload(
        settings.calibrated,
        settings.eval_samples,
        seq_len,
        job.dense_dtype.itemsize,
        job.execution.dtype.itemsize,
    )
    needs = needs_of(job.family, job.dense.config, job.shapes[0], workload, job.limits.export_as)
    before = journal.latest(_BATCH)
    found = {} if before is None else before.facts
    batches = [n for n in (settings.batch_tokens, found.get("tokens")) if n is not None]
    needed = BytesNeeded(
        *(needs.streams, needs.working, needs.token, needs.inputs, needs.running, needs.dense)
    )
    execution = place_streams(
        job.execution,
        settings.streams,
        needed,
        Known(min(batches, default=None), found.get("share"), found.get("keeps_inputs")),
        folder / "scratch",
        job.max_memory,
    )
    _save_batch(journal, execution)
    line = _shortage_line(execution, needed, seq_len, job.max_memory)
    if line is not None:
        journal.say(line)
    kept = weights_kept(execution, needed, job.max_memory)
    dense = replace(job.dense, before=kept)
    original = dense if job.original is job.dense else replace(job.original, before=kept)
    return replace(job, execution=execution, dense=dense, original=original)


def _save_batch(journal: "Journal", execution: "Execution") -> None:
    """Let the run be continued as it is."""
    facts = {
        "tokens": execution.batch_tokens,
        "share": execution.share_tokens,
        "keeps_inputs": execution.keeps_inputs,
    }
    journal.save(_BATCH, 0, facts=facts)


def _shortage_line(
    execution: "Execution", needed: "BytesNeeded", seq_len: int, max_memory: Mapping[str, int]
) -> str | None:
    """What to say where a GPU may not have the memory that a run takes at the very least; None: it
    has. It is estimated, so that the run begins all the same.
    """
    from sp3llm.reporting.formatting import human_bytes
    from sp3llm.runtime.memory import gpu_memory
    from sp3llm.runtime.placement import least_memory

    if execution.device.type != "cuda":
        return None
    least, most = least_memory(execution, needed, seq_len), gpu_memory(execution.device, max_memory)
    if least <= most:
        return None
    return (
        f"A layer, its Gram matrices and one window take about {human_bytes(least)} of a GPU, of "
        f"which {human_bytes(most)} can be had: if it runs out, raise --max-memory, or shorten "
        "--seq-len."
    )


def _halved(job: Job, journal: "Journal") -> "Execution":
    """Half the tokens at once, after the GPU has run out of memory.

    Raises ResumableError where the run cannot go on by itself.
    """
    from sp3llm.planning.windows import window_length

    seq_len = window_length(job.family, job.dense.config, job.settings.seq_len)
    windows = min(job.execution.windows_a_batch(seq_len), job.settings.calibrated)
    fewer = max(1, windows // 2)
    execution = replace(job.execution, batch_tokens=fewer * seq_len)
    _save_batch(journal, execution)
    if windows == 1:
        raise ResumableError(
            "The GPU ran out of memory with a single window: give the same command again with "
            "--streams host or disk, or close what else uses the GPU."
        )
    if job.execution.ranks.count > 1:
        raise ResumableError(
            f"The GPU ran out of memory with {windows} windows at once: give the same command "
            f"again, which goes on with {fewer}."
        )
    journal.say(f"The GPU ran out of memory; going on with {fewer} windows at once, not {windows}.")
    return execution
