"""What training needs, set up on the engine: the student, its optimizer, its teacher, its text."""

import hashlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sp3llm.errors import UserError
from sp3llm.recovery.inputs import Pair, Run, of_files
from sp3llm.recovery.student import load_student, optimizer_of

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress
    from torch import Tensor, nn

    from sp3llm.recovery.stored_logits import StoredTeacher
    from sp3llm.recovery.teacher import LiveTeacher, StatesTap, StreamTap
    from sp3llm.text.examples import Examples


@dataclass(frozen=True)
class TrainingSetup:
    """A model on the engine, and what it is taught with."""

    run: Run
    model: "nn.Module"
    optimizer: "torch.optim.Optimizer"
    schedule: "torch.optim.lr_scheduler.LambdaLR"
    names: frozenset[str]
    """Of the weights that are trained."""
    teacher: "LiveTeacher | StoredTeacher"
    tap: "StreamTap | StatesTap | None"
    """On the model, where its residual stream is compared with the teacher's."""
    target_DK: "Tensor | None"
    """What takes the teacher's stream to the model's, where they are compared: `c T`, the basis
    scaled (`maths.basis.stream_scale`).
    """
    places: tuple[int, ...]
    """By stream of the model that is compared which of the teacher's is its target."""
    tokens: "Tensor | Examples"
    """Windows, token ids `(windows, seq_len)`, or rows of a task: those to train on, then those
    that decide when to stop (`Texts.taught`).
    """
    training: int
    """How many of them are trained on."""


def set_up(run: Run, progress: "Progress") -> TrainingSetup:
    """Both models on the engine, with optimizer and schedule.

    Raises UserError if the teacher does not load, or what it is to be compared with does not fit.
    """
    import torch
    import transformers
    from accelerate.utils import set_seed

    from sp3llm.models.stock import run_layers_again
    from sp3llm.recovery.checkpoints import carry_only_trained
    from sp3llm.recovery.teacher import tap_of

    settings, accelerator, pair = run.settings, run.accelerator, run.pair
    transformers.utils.logging.disable_progress_bar()
    set_seed(settings.seed)
    tokens = run.texts.taught(pair.objective)
    target_DK = _stream_target(run) if settings.hidden_weight else None
    places = stream_places(pair) if settings.hidden_weight else ()
    teacher = _teacher(run, tokens, progress)

    stored = pair.small.dtype()
    low = settings.lora is not None and accelerator.mixed_precision == "bf16"
    dtype = stored if low else torch.promote_types(stored, torch.float32)
    model, names = load_student(settings, pair, dtype)
    if settings.gradient_checkpointing:
        run_layers_again(model)
    tap = None
    if settings.hidden_weight:
        stock = model.get_base_model() if settings.lora is not None else model
        tap = tap_of(stock, pair.objective, pair.family)
    model.train()
    optimizer, schedule = optimizer_of(settings, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    # Not prepared: accelerate would move it once for every process.
    accelerator.register_for_checkpointing(schedule)
    if settings.lora is not None:
        carry_only_trained(accelerator, names)
    if settings.track:
        values = {key: str(value) for key, value in asdict(settings).items()}
        accelerator.init_trackers("sp3llm-recover", config=values)
    return TrainingSetup(
        run=run,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        names=names,
        teacher=teacher,
        tap=tap,
        target_DK=target_DK,
        places=places,
        tokens=tokens,
        training=len(run.texts.training.tokens),
    )


def _stream_target(run: Run) -> "Tensor":
    """`TrainingSetup.target_DK`, on the engine's device."""
    from sp3llm.maths.basis import stream_scale
    from sp3llm.models.basis_file import read_basis

    basis_DK = read_basis(run.pair.small.folder)
    _check_basis(basis_DK, run.pair)
    return (stream_scale(basis_DK) * basis_DK).to(run.accelerator.device)


def _check_basis(basis_DK: "Tensor", pair: Pair) -> None:
    """Raise UserError if the basis is not one from the teacher's stream to the model's."""
    from sp3llm.models import families

    wanted = tuple(
        families.axis_sizes(family, model.config)[families.RESIDUAL]
        for family, model in ((pair.dense_family, pair.dense), (pair.family, pair.small))
    )
    if tuple(basis_DK.shape) != wanted:
        raise UserError(
            f"Expected a basis of {wanted} for --hidden-weight, as wide as the teacher and "
            f"'{pair.name}', found {tuple(basis_DK.shape)}: name the dense model that it was made "
            "from."
        )


def stream_places(pair: Pair) -> tuple[int, ...]:
    """By stream of the model, in front of every layer and behind the last, which of the teacher's
    it is compared with.

    That is the same one where no layer is gone. Else what a layer leaves is compared with what the
    teacher has in front of the next layer that stayed, as the refit fits it (docs/design.md 3.14).

    Raises UserError where it is not known which layers stayed.
    """
    from sp3llm.models import families

    deep, dense = (
        families.setting(family, model.config, "num_hidden_layers")
        for family, model in ((pair.family, pair.small), (pair.dense_family, pair.dense))
    )
    if deep == dense:
        return tuple(range(deep + 1))
    stayed = pair.compression.layers if pair.compression else ()
    if len(stayed) != deep or max(stayed) >= dense:
        raise UserError(
            f"Expected as many layers as the teacher's {dense} for --hidden-weight, or a record of "
            f"those that stayed, found {deep} in '{pair.name}' and no such record: give "
            "--hidden-weight 0."
        )
    return (0, *stayed[1:], dense)


# --------------------------------------------------------------------------- the teacher


def _teacher(run: Run, tokens: "Tensor", progress: "Progress") -> "LiveTeacher | StoredTeacher":
    """The teacher beside the model, or its largest logits, from disk, computed where there are
    none yet.
    """
    from sp3llm.models import families
    from sp3llm.recovery.stored_logits import stored_logits
    from sp3llm.recovery.teacher import live_teacher

    settings, device, rows = run.settings, run.accelerator.device, run.pair.rows
    if settings.teacher_logits is None:
        return live_teacher(run)
    vocab_size = families.axis_sizes(run.pair.family, run.pair.small.config)[families.VOCAB]
    if settings.top_k > vocab_size:
        raise UserError(
            f"Expected --top-k of at most the vocabulary's {vocab_size}, found {settings.top_k}: "
            "give a smaller number."
        )
    identity = {
        **of_files("teacher", run.teacher_files),
        "teacher_dtype": settings.teacher_dtype,
        "device": device.type,
        "rows": None if rows is None else hashlib.sha256(repr(rows).encode()).hexdigest(),
        "spelled": True if run.pair.spells else None,
        "text": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "windows": list(tokens.shape),
        "temperature": settings.temperature,
        "top_k": settings.top_k,
    }
    stored = stored_logits(settings.teacher_logits, identity, device)
    if stored is None:
        _store_logits(run, identity, tokens, progress)
        stored = stored_logits(settings.teacher_logits, identity, device)
    return stored


def _store_logits(
    run: Run, identity: dict[str, Any], tokens: "Tensor", progress: "Progress"
) -> None:
    """Compute the teacher's largest logits, every process those of its share of the windows."""
    import torch

    from sp3llm.recovery.stored_logits import close_store, create_store, fill_store
    from sp3llm.recovery.teacher import live_teacher

    accelerator, folder = run.accelerator, run.settings.teacher_logits
    teacher = live_teacher(run)
    if accelerator.is_main_process:
        create_store(folder, identity, *tokens.shape)
    accelerator.wait_for_everyone()
    shares = torch.arange(len(tokens)).chunk(accelerator.num_processes)
    index = accelerator.process_index
    mine = shares[index] if index < len(shares) else torch.arange(0)
    bar = progress.add_task("teacher, largest logits", total=len(mine))
    rows = mine.split(run.micro_batch) if len(mine) else ()
    for count in fill_store(folder, teacher, tokens, rows, run.settings.temperature):
        progress.advance(bar, count)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        close_store(folder)
    accelerator.wait_for_everyone()
