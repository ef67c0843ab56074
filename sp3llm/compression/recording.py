"""What the record has of a compression."""

from dataclasses import asdict, replace

from sp3llm.compression.job import Job, Result, hub_id
from sp3llm.reporting.record import (
    Excess,
    Fit,
    LearnedMask,
    PartCounts,
    Prediction,
    Record,
    SameText,
    TextSet,
    Trial,
    Vocabulary,
)
from sp3llm.reporting.typed_json import from_json, to_json


def record_of(job: Job, result: Result, parameters: PartCounts, mask: LearnedMask | None) -> Record:
    """Everything needed to know, and repeat, what was done; options as they were resolved."""
    from sp3llm.runtime.machine import machine, versions

    held_out, of_text = result.held_out, {}
    named = {"task": ",".join(result.calibration.sources)}
    if job.settings.task is None:
        same = held_out.describe(dense=result.dense_perplexity, small=result.perplexity)
        of_text = {
            "excess_log_perplexity": from_json(Excess, result.excess.describe()),
            "same_text": from_json(SameText, same) if same else None,
        }
        held_out = held_out.windows
        named = {
            "calib": ",".join(result.calibration.sources),
            "eval_text": ",".join(held_out.sources),
        }
    device, dtype = str(job.execution.device), str(job.dtype).removeprefix("torch.")
    settings = replace(
        job.settings,
        out=result.out,
        samples=job.settings.calibrated,
        **named,
        seq_len=result.calibration.tokens.shape[1],
        allocate=job.settings.allocation,
        multiple_of=result.plan.multiple_of,
        device=device,
        dtype=dtype,
    )
    return Record(
        model=result.name,
        base_model=hub_id(job.settings, result.name),
        architecture=result.architecture,
        dense_architecture=job.family.architecture,
        command=result.command,
        settings=to_json(settings),
        plan=result.plan,
        calibration=from_json(TextSet, result.calibration.describe()),
        evaluation=from_json(TextSet, held_out.describe()),
        dense_perplexity=result.dense_perplexity,
        perplexity=result.perplexity,
        answers=result.answers,
        **of_text,
        layers=result.layers,
        trials=tuple(
            Trial(**asdict(shape), trial_loss=loss) for shape, loss in result.findings.tried.items()
        ),
        predictions=tuple(
            Prediction(**asdict(shape), predicted_loss=loss)
            for shape, loss in result.findings.predicted.items()
        ),
        fits=tuple(from_json(Fit, fit) for fit in result.fits),
        logit_scale=None if result.head_fit is None else result.head_fit.logit_scale,
        head_step_gain=None if result.head_fit is None else result.head_fit.step_gain,
        eigenvalues=tuple(result.eigenvalues.tolist()),
        energy_kept=result.energy_kept,
        dtype=dtype,
        compute_dtype=str(job.execution.dtype).removeprefix("torch."),
        dense_weight_bytes=result.dense_bytes,
        weight_bytes=result.weight_bytes,
        seconds=round(result.seconds, 2),
        peak_memory_bytes=result.peak_memory,
        device_memory_bytes=result.device_memory,
        versions=versions(),
        machine=machine(device),
        mask=mask,
        parameters=parameters,
        vocabulary=_vocabulary(job),
    )


def _vocabulary(job: Job) -> Vocabulary | None:
    """What the record has of the tokens that stayed."""
    from sp3llm.models import families

    chosen = job.vocabulary
    if chosen is None:
        return None
    return Vocabulary(
        sources=chosen.wanted.sources,
        counted_tokens=chosen.wanted.tokens,
        used_tokens=chosen.wanted.used,
        covered=chosen.wanted.covered(chosen.kept.old_ids),
        dense_tokens=chosen.dense_tokens,
        tokens=len(chosen.kept.old_ids),
        parameters=families.count_parameters(job.family, job.dense.config),
        files_left_out=dict(chosen.files.left_out),
    )
