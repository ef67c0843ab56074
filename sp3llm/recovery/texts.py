"""What a decoder's recovery learns from and is judged by: text, and its perplexity."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sp3llm.errors import UserError
from sp3llm.options import RecoverConfig
from sp3llm.recovery.figures import Figures
from sp3llm.recovery.inputs import Pair, Texts

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import Progress
    from torch import Tensor

    from sp3llm.models.checkpoint import Checkpoint
    from sp3llm.text.windows import Windows

# As few windows still tell one step from another: all are asked about the same text.
_FEW = 4


def window_length_of(settings: RecoverConfig, pair: Pair) -> int:
    """Tokens a training window: as asked, or what both models have positions for."""
    from sp3llm.planning.windows import window_length

    return min(
        window_length(family, model.config, settings.seq_len)
        for family, model in ((pair.family, pair.small), (pair.dense_family, pair.dense))
    )


def _sets_to_train_and_report_on(settings: RecoverConfig, pair: Pair) -> tuple[str, str]:
    """Both comma-separated lists of sets: as asked, or the compression's own, where known."""
    from sp3llm.text.sources import default_evaluation

    compression = pair.compression
    calibrated = compression.calibration.sources if compression else ("wikitext2",)
    evaluated = compression.evaluation.sources if compression else ()
    names = settings.train or ",".join(calibrated)
    return names, settings.eval_text or ",".join(evaluated) or default_evaluation(names)


def text_files(settings: RecoverConfig, pair: Pair) -> dict[str, Path]:
    """The files among all sets that are read, by how the lists name them."""
    from sp3llm.text.sources import local_files, split_names

    lists = (*_sets_to_train_and_report_on(settings, pair), settings.stop_text or "")
    names = [name for names in filter(None, lists) for name in split_names(names)]
    return local_files(",".join(dict.fromkeys(names)))


def draw_texts(settings: RecoverConfig, pair: Pair) -> Texts:
    """Windows of the three texts. What is reported on is the compression's own, where known."""
    from sp3llm.models import families
    from sp3llm.text.tokenizer import load_tokenizer
    from sp3llm.text.windows import check_token_ids
    from sp3llm.vocabulary.same_text import held_out_text

    tokenizer = load_tokenizer(pair.small.folder)
    seq_len = window_length_of(settings, pair)
    compression = pair.compression
    names, eval_names = _sets_to_train_and_report_on(settings, pair)
    whole = tokenizer if pair.rows is None else load_tokenizer(pair.dense.folder)
    calibrated, note = _calibrated_documents(pair, eval_names, (whole, tokenizer))
    held_out = held_out_text(
        pair.objective.evaluation_windows,
        eval_names,
        (whole, tokenizer),
        settings.eval_samples,
        compression.evaluation.seq_len if compression else seq_len,
        calibrated,
        families.setting(pair.family, pair.small.config, "max_position_embeddings"),
    )
    evaluation = held_out.windows
    training = pair.objective.training_windows(
        names,
        tokenizer,
        settings.steps * settings.batch,
        seq_len,
        settings.seed,
        evaluation.documents,
    )
    draw = partial(
        pair.objective.training_windows,
        settings.stop_text or names,
        tokenizer,
        settings.stop_windows,
        seq_len,
        0,
        stopping=settings.stop_text is None,
        to_stop_by=settings.stop_text is not None,
    )
    known = evaluation.documents | training.documents
    stopping = _stopping_windows(draw, known, calibrated, min(_FEW, settings.stop_windows))
    for family, model, windows in (
        (pair.family, pair.small, (training, stopping)),
        (pair.dense_family, pair.dense, (evaluation,)),
    ):
        vocab_size = families.axis_sizes(family, model.config)[families.VOCAB]
        check_token_ids([some.tokens for some in windows], vocab_size, model.folder)
    fitted = not stopping.documents.isdisjoint(calibrated)
    return Texts(training, stopping, held_out, note, fitted)


def _stopping_windows(
    draw: "Callable[..., Windows]",
    known: frozenset[str],
    calibrated: frozenset[str],
    enough: int,
) -> "Windows":
    """Windows that decide when to stop, as `draw` has them with documents to exclude: of none in
    `known`, and of none in `calibrated` where that leaves `enough`, since the closed form was
    fitted to those and looks better there than it is.
    """
    windows = draw(exclude=known)
    if windows.documents.isdisjoint(calibrated):
        return windows
    try:
        unseen = draw(exclude=known | calibrated)
    except UserError:  # not a window
        return windows
    return unseen if len(unseen.tokens) >= enough else windows


def _calibrated_documents(
    pair: Pair, names: str, tokenizers: tuple[Any, Any]
) -> tuple[frozenset[str], str]:
    """Documents that the compression was calibrated on, which are left out of what is reported on,
    the sets `names`, as the compression left them out: another file may hold them too.

    Where that text is gone, and is none of those sets, nothing can be left out: what to say of it
    comes second.
    """
    from sp3llm.text.sources import resolve_source, split_names
    from sp3llm.vocabulary.same_text import calibrated_documents

    compression = pair.compression
    if compression is None:
        return frozenset(), ""
    calibrated, reported = compression.calibration, split_names(names)
    sets = list(calibrated.sources)
    try:
        if all(resolve_source(name).stdlib for name in {*sets, *reported}):
            return frozenset(), ""  # divided by content already
        documents = calibrated_documents(
            pair.objective.calibration_windows,
            ",".join(sets),
            tokenizers,
            calibrated.samples,
            calibrated.seq_len,
            compression.settings["seed"],
        )
    except UserError:
        if not set(sets).isdisjoint(reported):
            raise
        return frozenset(), (
            f"What was calibrated on ({', '.join(sets)}) is not at hand: documents of it may be "
            "among those that are reported on."
        )
    return documents, ""


def measure_texts(
    pair: Pair, written: "Checkpoint", texts: Texts, device: str, progress: "Progress"
) -> Figures:
    """Perplexities of the recovered model, the one before and the dense one on the held-out
    windows, and their excess over the dense one's.
    """
    from sp3llm.maths.paired import excess_log_perplexity

    losses, before, dense = _losses(pair, written, texts, device, progress)
    merit = pair.objective.merit
    return Figures(
        dense_perplexity=merit(dense),
        perplexity_before=merit(before),
        perplexity=merit(losses),
        excess_before=excess_log_perplexity(before, dense),
        excess=excess_log_perplexity(losses, dense),
    )


def _losses(
    pair: Pair, written: "Checkpoint", texts: Texts, device: str, progress: "Progress"
) -> "tuple[Tensor, Tensor, Tensor]":
    """Losses of the recovered model, the one before and the dense one on the held-out windows,
    float64, in nats a token of the dense one, a row a window (`HeldOut.small_nats`).
    """
    from sp3llm.evaluation.perplexity import measure_losses
    from sp3llm.runtime.devices import arithmetic_of, resolve_execution

    held_out = texts.held_out
    small = (held_out.small_tokens, held_out.small_nats)
    losses = []
    for name, checkpoint, family, (tokens, nats) in (
        ("recovered model", written, pair.family, small),
        ("compressed model", pair.small, pair.family, small),
        ("dense model", pair.dense, pair.dense_family, (held_out.tokens, held_out.dense_nats)),
    ):
        dtype = arithmetic_of(pair.dense.dtype(), checkpoint.dtype())
        execution = resolve_execution(device, dtype)
        what = f"{name}, perplexity"
        found = measure_losses(checkpoint, family, tokens, execution, progress, what=what)
        losses.append(nats(found))
    return tuple(losses)
