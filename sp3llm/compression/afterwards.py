"""What follows a compression: report, recovery, quantization."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sp3llm.compression.job import Job
from sp3llm.errors import UserError, reason
from sp3llm.options import CompressConfig, QuantizeConfig, RecoverConfig, command_line
from sp3llm.reporting.record import Record, read_record
from sp3llm.runtime.folders import RECORD

if TYPE_CHECKING:
    from rich.console import Console

    from sp3llm.vocabulary.same_text import HeldOut


def is_being_recovered(job: Job) -> bool:
    """Whether this very command has compressed the model before and was killed in its recovery."""
    from sp3llm.recovery.checkpoints import work_folder

    if not job.settings.recover_steps or job.settings.fresh or not work_folder(job.out).is_dir():
        return False
    if not (job.out / RECORD).is_file():
        return False
    record = read_record(job.out)
    return record.command == command_line(job.settings) and not record.recoveries


def write_report(
    job: Job, out: Path, held_out: "HeldOut", record: Record, console: "Console"
) -> None:
    """Write report.html into the result, with samples where memory holds the dense model."""
    from sp3llm.reporting.page import write_page
    from sp3llm.reporting.samples import with_samples

    if job.settings.report:
        record, why = with_samples(
            out,
            record,
            console,
            str(job.execution.device),
            dense=job.folder,
            held_out=held_out,
        )
        write_page(out, record, why)


def recover_result(job: Job, record: Record, console: "Console") -> None:
    """Tune the result; what is tuned takes its place when it is whole."""
    from sp3llm.models.source import bundled_model
    from sp3llm.recovery.story import recover

    settings = job.settings
    recovery = RecoverConfig(
        model=str(job.out),
        teacher=settings.model or str(bundled_model()),
        out=job.out,
        **_learned_from(settings, record),
        eval_samples=settings.eval_samples,
        steps=settings.recover_steps,
        seq_len=settings.seq_len,
        device=settings.device,
        seed=settings.seed,
    )
    with _standing(job.out, "its recovery did not begin or end", "recover"):
        recover(recovery, console, in_place=True)


def _learned_from(settings: CompressConfig, record: Record) -> dict[str, str]:
    """What a recovery of the result learns from and is measured on: the compression's own text or
    task.
    """
    if settings.task is not None:
        return {"task": settings.task}
    return {
        "train": ",".join(record.calibration.sources),
        "eval_text": ",".join(record.evaluation.sources),
    }


def quantize_result(settings: CompressConfig, out: Path, console: "Console") -> None:
    """Write the result in few bits too, beside itself."""
    from sp3llm.quantization.story import quantize

    quantization = QuantizeConfig(str(out), settings.quantize or "", device=settings.device)
    with _standing(out, "was not quantized", "quantize"):
        quantize(quantization, console)


@contextlib.contextmanager
def _standing(out: Path, failed: str, command: str) -> Iterator[None]:
    """What goes wrong after the compression takes nothing from its result, and says so."""
    import torch

    try:
        yield
    except (UserError, torch.OutOfMemoryError) as error:
        raise UserError(
            f"The compressed model in '{out}' stands, but {failed} (mend it and use `sp3llm "
            f"{command}`): {reason(error, 600)}."
        ) from error
