"""The text of a compression: calibration, evaluation and what else it learns from."""

from typing import TYPE_CHECKING, Any

from sp3llm.compression.job import Job, calibration_sets, evaluation_sets
from sp3llm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from sp3llm.evaluation.task_scores import Reported
    from sp3llm.runtime.journal import Journal
    from sp3llm.text.batches import Batch
    from sp3llm.text.task_sets import TaskSet
    from sp3llm.text.windows import Windows
    from sp3llm.vocabulary.choosing import ChosenVocabulary
    from sp3llm.vocabulary.same_text import HeldOut


# Stages, as the journal of a run knows them: the first text, and that in the tokens of another
# vocabulary that a search has chosen.
_TEXT, _CHOSEN_TEXT = "text", "text-chosen"


def draw_texts(job: Job, journal: "Journal") -> "tuple[Windows, HeldOut]":
    """Calibration windows in the tokens that stay, and held-out ones, of the length that the model
    can take; the first process reads the text.
    """
    from sp3llm.text.windows import Windows
    from sp3llm.vocabulary.same_text import HeldOut, SameText

    is_first = job.vocabulary is None or job.vocabulary is job.vocabularies[0]
    stage = _TEXT if is_first else _CHOSEN_TEXT
    before = journal.latest(stage)
    if before is None:
        calibration, held_out = job.execution.ranks.from_first(lambda: read_texts(job))
        both = (calibration, held_out.windows)
        facts = [
            {**vars(one), "tokens": None, "begins_word": None, "documents": sorted(one.documents)}
            for one in both
        ]
        tensors = {f"{i}.tokens": windows.tokens for i, windows in enumerate(both)}
        same = {} if held_out.same is None else vars(held_out.same)
        numbers = {name: value for name, value in same.items() if isinstance(value, int)}
        tensors |= {f"same.{name}": same[name] for name in same.keys() - numbers.keys()}
        journal.save(stage, 0, tensors, {"windows": facts, "same": numbers})
        return calibration, held_out
    calibration, evaluation = (
        Windows(
            **{
                **facts,
                "tokens": before.tensors[f"{i}.tokens"],
                "sources": tuple(facts["sources"]),
                "documents": frozenset(facts["documents"]),
            }
        )
        for i, facts in enumerate(before.facts["windows"])
    )
    same = {
        name.removeprefix("same."): tensor
        for name, tensor in before.tensors.items()
        if name.startswith("same.")
    }
    same |= before.facts["same"]
    return calibration, HeldOut(evaluation, SameText(**same) if same else None)


def read_texts(job: Job) -> "tuple[Windows, HeldOut]":
    """Calibration and held-out windows, read anew.

    Raises UserError if a text will not do, or the tokenizer has ids that the model has not.
    """
    from sp3llm.models import families
    from sp3llm.planning.windows import window_length
    from sp3llm.text.tokenizer import load_tokenizer
    from sp3llm.text.windows import check_token_ids
    from sp3llm.vocabulary.same_text import calibrated_documents, held_out_text

    settings, dense, family = job.settings, job.dense, job.family
    seq_len = window_length(family, dense.config, settings.seq_len)
    tokenizer = tokenizer_of(job, job.vocabulary)
    whole = tokenizer if job.vocabulary is None else load_tokenizer(dense.folder)
    draw, drawn = job.objective.calibration_windows, (settings.calibrated, seq_len, settings.seed)
    calib = calibration_sets(settings)
    calibration = draw(calib, tokenizer, *drawn)
    calibrated = calibration.documents
    if whole is not tokenizer:
        calibrated |= calibrated_documents(draw, calib, (whole, whole), *drawn)
    held_out = held_out_text(
        job.objective.evaluation_windows,
        evaluation_sets(settings),
        (whole, tokenizer),
        settings.eval_samples,
        seq_len,
        calibrated,
        families.setting(family, dense.config, "max_position_embeddings"),
    )
    for checkpoint, windows in ((dense, calibration), (job.original, held_out.windows)):
        vocab_size = families.axis_sizes(family, checkpoint.config)[families.VOCAB]
        check_token_ids([windows.tokens], vocab_size, dense.folder)
    return calibration, held_out


def tokenizer_of(job: Job, vocabulary: "ChosenVocabulary | None") -> Any:
    """The tokenizer of the tokens that stay; None: of all."""
    from sp3llm.text.tokenizer import load_tokenizer
    from sp3llm.vocabulary.restricting import restricted_tokenizer

    if vocabulary is None:
        return load_tokenizer(job.dense.folder)
    return restricted_tokenizer(vocabulary, job.dense.config)


def with_windows_that_tell(
    job: Job, calibration: "Windows | TaskSet", held_out: "HeldOut | Reported"
) -> "Batch":
    """The calibration windows, and behind them those that no fit is to see and that tell how sure
    the model may be (`compression.logit_scale`): of the same sets, of documents that are neither
    calibrated nor reported on. None of these where no such text is left, or nothing asks for them.
    """
    import torch

    from sp3llm.compression.logit_scale import is_scaled
    from sp3llm.planning.windows import windows_that_tell

    tokens = calibration.tokens
    if not job.settings.refit or not is_scaled(job.family, job.objective):
        return tokens
    count = windows_that_tell(*tokens.shape)

    def draw() -> "Tensor":
        known = calibration.documents | held_out.windows.documents
        tokenizer = tokenizer_of(job, job.vocabulary)
        of_sets = (calibration_sets(job.settings), tokenizer, count, tokens.shape[1], 0, known)
        try:
            told_by = job.objective.training_windows(*of_sets).tokens
        except UserError:  # not a window is left
            return tokens[:0]
        check_ids(job, told_by)
        return told_by

    return torch.cat([tokens, job.execution.ranks.from_first(draw)]) if count else tokens


def read_mask_windows(job: Job, held_out: "HeldOut") -> "Windows":
    """What a mask learns on: the training part of the calibration sets, nothing of `held_out`."""
    from sp3llm.planning.windows import window_length
    from sp3llm.text.tokenizer import load_tokenizer

    settings = job.settings
    windows = job.objective.training_windows(
        calibration_sets(settings),
        load_tokenizer(job.dense.folder),
        settings.mask_steps * settings.mask_batch,
        window_length(job.family, job.dense.config, settings.seq_len),
        settings.seed,
        held_out.windows.documents,
    )
    check_ids(job, windows.tokens)
    return windows


def check_ids(job: Job, *batches: "Batch") -> None:
    """Raise UserError where the tokenizer has ids that the dense model has not."""
    from sp3llm.models import families
    from sp3llm.text.windows import check_token_ids

    vocab_size = families.axis_sizes(job.family, job.dense.config)[families.VOCAB]
    check_token_ids(batches, vocab_size, job.dense.folder)
