"""Find again what a record speaks of: the dense model, and the held-out text."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sp3llm.errors import UserError
from sp3llm.reporting.record import Record

if TYPE_CHECKING:
    from torch import Tensor

    from sp3llm.vocabulary.same_text import HeldOut


def dense_folder(record: Record, named: str | None = None) -> Path | None:
    """What `find_dense` finds, or None."""
    try:
        return find_dense(record, named)
    except UserError:
        return None


def find_dense(record: Record, named: str | None = None) -> Path:
    """The folder of the dense model: the one named, or where the record says it was.

    A model of the hub that nobody named is looked for in the hub cache only.

    Raises UserError if it is not there, or is not the model that was compressed.
    """
    from sp3llm.models import families
    from sp3llm.models.checkpoint import open_model
    from sp3llm.models.shapes import Shape
    from sp3llm.models.source import resolve_model

    recorded = record.settings["model"]
    if named is not None or recorded is None or Path(recorded).is_dir():
        folder, _, _ = resolve_model(named or recorded)
    else:
        folder = _cached(record.base_model, recorded)
    dense, family = open_model(folder)
    shape, count = Shape.of(family, dense.config), families.count_parameters(family, dense.config)
    plan = record.plan
    # Earlier versions did not record all sizes.
    recorded = {name: size for name, size in asdict(plan.dense_shape).items() if size is not None}
    is_other = any(getattr(shape, name) != size for name, size in recorded.items())
    if is_other or count != plan.dense_parameters:
        raise UserError(
            f"Expected the dense model that this one was made from "
            f"({plan.dense_parameters:,} parameters) in '{folder}', found another "
            f"({count:,}): name the right one with --dense."
        )
    return folder


def _cached(base_model: str | None, recorded: str) -> Path:
    from huggingface_hub import snapshot_download

    if base_model:
        try:
            folder = Path(snapshot_download(base_model, local_files_only=True))
        except (OSError, ValueError):  # not in the cache, or no hub id
            folder = None
        if folder and any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir()):
            return folder
    raise UserError(
        f"The dense model '{recorded}' is not at hand: name its folder, or its hub id to download "
        "it, with --dense."
    )


def held_out_text(record: Record, folder: Path, dense: Path | None = None) -> "HeldOut":
    """The held-out text of a run once more, as the `dense` model in that folder and the compressed
    one in `folder` read it; the former is asked for where they have different vocabularies.

    Raises UserError if the text cannot be read, or is not what it was.
    """
    from sp3llm.models import families
    from sp3llm.models.objectives.catalogue import objective_of
    from sp3llm.models.source import read_config
    from sp3llm.text.tokenizer import load_tokenizer
    from sp3llm.vocabulary.same_text import calibrated_documents, held_out_text

    settings, objective = record.settings, objective_of(record.architecture)
    tokenizer = load_tokenizer(folder)
    whole, positions = tokenizer, settings["seq_len"]
    if record.vocabulary is not None:
        dense = dense or find_dense(record)
        whole, config = load_tokenizer(dense), read_config(dense)
        positions = families.setting(families.family_of(config), config, "max_position_embeddings")
    drawn = (settings["samples"], settings["seq_len"], settings["seed"])
    calibrated = calibrated_documents(
        objective.calibration_windows, settings["calib"], (whole, tokenizer), *drawn
    )
    held_out = held_out_text(
        objective.evaluation_windows,
        settings["eval_text"],
        (whole, tokenizer),
        settings["eval_samples"],
        settings["seq_len"],
        calibrated,
        positions,
    )
    if held_out.windows.sha256 != record.evaluation.sha256:
        raise UserError(
            f"The held-out text '{settings['eval_text']}' is not what it was when the model was "
            "compressed (its files changed, or for stdlib the Python): run the same command "
            "where it is the same."
        )
    return held_out


def held_out_tokens(record: Record, folder: Path) -> "Tensor":
    """Those of `held_out_text` that the dense model reads, token ids, `(windows, tokens)`."""
    return held_out_text(record, folder).tokens
