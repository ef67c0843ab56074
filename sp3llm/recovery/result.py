"""What a recovery leaves: a stock model again, its losses, its record."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sp3llm.options import RecoverConfig
from sp3llm.recovery.figures import Figures
from sp3llm.recovery.inputs import Pair
from sp3llm.recovery.student import load_student, peak_lr
from sp3llm.reporting.record import (
    Excess,
    Record,
    RecoveryEntry,
    SameText,
    TextSet,
    TunedRecord,
    without_measurements,
    write_record,
)
from sp3llm.reporting.typed_json import from_json, to_json

if TYPE_CHECKING:
    from torch import Tensor

    from sp3llm.evaluation.task_scores import Reported
    from sp3llm.models.checkpoint import Checkpoint
    from sp3llm.recovery.checkpoints import State
    from sp3llm.text.task_sets import TaskSet
    from sp3llm.text.windows import Windows
    from sp3llm.vocabulary.same_text import HeldOut


@dataclass(frozen=True, kw_only=True)
class Recovery(Figures):
    """What a run produced, and what it is worth."""

    name: str
    teacher: str
    out: Path
    architecture: str
    command: str
    state: "State"
    trained_parameters: int
    training: "Windows | TaskSet"
    stopping: "Windows | TaskSet"
    held_out: "HeldOut | Reported"
    seconds: float
    peak_memory: int
    device_memory: int


# --------------------------------------------------------------------------- the result


def export(
    settings: RecoverConfig, pair: Pair, best: "dict[str, Tensor]", folder: Path
) -> "Checkpoint":
    """Write the best weights as the stock model's, adapters merged in float32, in its own dtype.

    Returns the checkpoint written. `config.json` is not yet: the folder does not load until the
    caller says it is whole.
    """
    import torch
    from safetensors import safe_open

    from sp3llm.models.checkpoint import Checkpoint, check_tensors
    from sp3llm.models.export import share_file

    dtype = pair.small.dtype()
    wide = torch.promote_types(dtype, torch.float32)
    model, names = load_student(settings, pair, wide)
    assert names == best.keys()
    model.load_state_dict(best, strict=False)
    if settings.lora is not None:
        model = model.merge_and_unload()
    model.to(dtype).save_pretrained(folder, max_shard_size="2GB")
    for name in ("config.json", "generation_config.json"):  # the model's own are copied instead
        (folder / name).unlink(missing_ok=True)
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        share_file(path)
        with safe_open(path, framework="pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    written = Checkpoint(folder, pair.small.config, files)
    check_tensors(written, pair.family)
    return written


def write_result(
    settings: RecoverConfig,
    pair: Pair,
    result: Recovery,
    folder: Path,
    device: str,
    processes: int,
) -> RecoveryEntry:
    """Everything of the output but its weights; `config.json` last. Returns what the record has of
    the recovery.
    """
    from sp3llm.models.basis_file import BASIS
    from sp3llm.models.companions import carried_config, copy_companions
    from sp3llm.reporting.card import write_card
    from sp3llm.runtime.files import write_json

    small = pair.small.folder
    copy_companions(small, folder)
    if (small / BASIS).is_file():
        shutil.copyfile(small / BASIS, folder / BASIS)
    entry = _entry(settings, pair, result, device, processes)
    record = pair.record or TunedRecord()
    if isinstance(record, Record):
        record = without_measurements(record)
    record = replace(record, recoveries=(*record.recoveries, entry))
    write_record(folder, record)
    if isinstance(record, Record):
        write_card(folder, record, small)  # its card carries the licence, its folder the texts
    else:
        card = _tuned_card(settings, pair, entry)
        (folder / "README.md").write_text(card, encoding="utf-8")
    write_json(folder / "config.json", carried_config(pair.small.config), allow_nan=True)
    return entry


def _tuned_card(settings: RecoverConfig, pair: Pair, entry: RecoveryEntry) -> str:
    """README.md of a model that sp3llm did not compress: that of before, if sp3llm wrote it, with
    a section on this recovery too.
    """
    from sp3llm.reporting.metadata import carried_metadata, tuned_again
    from sp3llm.reporting.recovery import card_section, tuned_card

    card = pair.small.folder / "README.md"
    if pair.record is not None and card.is_file():
        text = tuned_again(card.read_text(encoding="utf-8"), pair.name, entry)
        return text + card_section(entry)
    base_model = None if Path(settings.model).exists() else pair.name
    carried = carried_metadata(pair.small.folder)
    return tuned_card(pair.name, entry, base_model, carried, pair.objective.pipeline)


def _entry(
    settings: RecoverConfig, pair: Pair, result: Recovery, device: str, processes: int
) -> RecoveryEntry:
    """What the record has of a recovery; options as they were resolved."""
    from sp3llm.runtime.machine import machine, versions

    state, training, stopping = result.state, result.training, result.stopping
    held_out = result.held_out
    of_text = {}
    if result.excess is not None:
        same = held_out.describe(
            dense=result.dense_perplexity, before=result.perplexity_before, small=result.perplexity
        )
        of_text = {
            "dense_perplexity": result.dense_perplexity,
            "perplexity_before": result.perplexity_before,
            "perplexity": result.perplexity,
            "excess_log_perplexity_before": from_json(Excess, result.excess_before.describe()),
            "excess_log_perplexity": from_json(Excess, result.excess.describe()),
            "same_text": from_json(SameText, same) if same else None,
        }
        held_out = held_out.windows
    evaluation = from_json(TextSet, held_out.describe())
    named = {"task": training, "train": training, "stop_text": stopping, "eval_text": evaluation}
    names = ("train", "stop_text", "eval_text") if of_text else ("task",)
    sources = {name: ",".join(named[name].sources) for name in names}
    length = training.tokens.shape[1]
    resolved = replace(
        settings,
        out=result.out,
        teacher=pair.teacher,
        **sources,
        seq_len=length,
        lr=peak_lr(settings, pair, state.held_out[0][1], settings.batch * length),
        check_every=settings.checked_every,
        checkpoint_every=settings.saved_every,
        device=device,
    )
    return RecoveryEntry(
        command=result.command,
        settings=to_json(resolved),
        trained_parameters=result.trained_parameters,
        steps=state.step,
        best_step=state.best_step,
        stopped_early=state.stopped,
        held_out_losses=tuple(map(tuple, state.held_out)),
        training_losses=tuple(map(tuple, state.trained)),
        training=from_json(TextSet, training.describe()),
        stopping=from_json(TextSet, stopping.describe()),
        evaluation=evaluation,
        **of_text,
        scores=result.scores or None,
        processes=processes,
        training_seconds=round(state.seconds, 2),
        seconds=round(result.seconds, 2),
        peak_memory_bytes=result.peak_memory,
        device_memory_bytes=result.device_memory,
        versions=versions(),
        machine=machine(device),
    )
