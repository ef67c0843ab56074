"""The text of a compression: calibration, evaluation and a mask's training windows."""

from typing import TYPE_CHECKING

from sp3llm.compression.job import Job, calibration_sets

if TYPE_CHECKING:
    from sp3llm.runtime.journal import Journal
    from sp3llm.text.windows import Windows


_TEXT = "text"


def draw_windows(job: Job, journal: "Journal") -> "tuple[Windows, Windows]":
    """Calibration and evaluation windows of the length the model can take; the first process
    reads the text.
    """
    from sp3llm.text.windows import Windows

    before = journal.latest(_TEXT)
    if before is None:
        both = job.execution.ranks.from_first(lambda: read_windows(job))
        facts = [
            {**vars(windows), "tokens": None, "documents": sorted(windows.documents)}
            for windows in both
        ]
        tensors = {str(i): windows.tokens for i, windows in enumerate(both)}
        journal.save(_TEXT, 0, tensors, {"windows": facts})
        return both
    calibration, evaluation = (
        Windows(
            **{
                **facts,
                "tokens": before.tensors[str(i)],
                "sources": tuple(facts["sources"]),
                "documents": frozenset(facts["documents"]),
            }
        )
        for i, facts in enumerate(before.facts["windows"])
    )
    return calibration, evaluation


def read_windows(job: Job) -> "tuple[Windows, Windows]":
    """Calibration and evaluation windows, read anew.

    Raises UserError if a text will not do, or the tokenizer has ids that the model has not.
    """
    from sp3llm.models import families
    from sp3llm.planning.windows import window_length
    from sp3llm.text.sources import default_evaluation
    from sp3llm.text.tokenizer import load_tokenizer
    from sp3llm.text.windows import check_token_ids

    settings, dense, family = job.settings, job.dense, job.family
    seq_len = window_length(family, dense.config, settings.seq_len)
    tokenizer = load_tokenizer(dense.folder)
    calib = calibration_sets(settings)
    calibration = job.objective.calibration_windows(
        calib, tokenizer, settings.samples, seq_len, settings.seed
    )
    evaluation = job.objective.evaluation_windows(
        settings.eval_text or default_evaluation(calib),
        tokenizer,
        settings.eval_samples,
        seq_len,
        calibration.documents,
    )
    vocab_size = families.axis_sizes(family, dense.config)[families.VOCAB]
    check_token_ids((calibration, evaluation), vocab_size, dense.folder)
    return calibration, evaluation


def read_mask_windows(job: Job, evaluation: "Windows") -> "Windows":
    """What a mask learns on: the training part of the calibration sets."""
    from sp3llm.planning.windows import window_length
    from sp3llm.text.tokenizer import load_tokenizer

    settings = job.settings
    return job.objective.training_windows(
        calibration_sets(settings),
        load_tokenizer(job.dense.folder),
        settings.mask_steps * settings.mask_batch,
        window_length(job.family, job.dense.config, settings.seq_len),
        settings.seed,
        evaluation.documents,
    )
