"""The model on the engine and what it is taught with."""

import hashlib
import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sp3llm.errors import UserError
from sp3llm.options import RecoverConfig
from sp3llm.recovery.inputs import Pair, Texts, weights_digest

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from rich.progress import Progress
    from torch import Tensor, nn

    from sp3llm.recovery.teacher import StreamTap, Teacher


@dataclass(frozen=True)
class Lesson:
    """A model on the engine, and what it is taught with."""

    settings: RecoverConfig
    accelerator: "Accelerator"
    model: "nn.Module"
    optimizer: "torch.optim.Optimizer"
    schedule: "torch.optim.lr_scheduler.LRScheduler"
    names: frozenset[str]
    """Of the weights that are trained."""
    teacher: "Teacher"
    tap: "StreamTap | None"
    target_DK: "Tensor | None"
    """`c T`, where the stream is compared."""
    tokens: "Tensor"
    """`Texts.taught`."""
    training: int
    """How many of them are trained on."""
    micro_batch: int


# --------------------------------------------------------------------------- training


def default_lr(hidden_size: int, lora: bool) -> float:
    """Peak learning rate by the width of the model.

    The constant for all weights was measured at a width of 176 (eval/NOTES.md), that for adapters
    was not.

    The update that a step of Adam makes to what a matrix puts out grows with the width it reads.
    """
    return (1.0 if lora else 0.2) / hidden_size


def load_student(
    settings: RecoverConfig, pair: Pair, dtype: "torch.dtype"
) -> tuple["nn.Module", frozenset[str]]:
    """The compressed model on the CPU with its adapters, if any, and the names of what is trained.

    Raises UserError if peft is asked for and missing.
    """
    from transformers import AutoModelForCausalLM

    from sp3llm.models.families.counts import linear_modules
    from sp3llm.models.stock import training_config

    config = training_config(pair.small.folder)
    model = AutoModelForCausalLM.from_pretrained(pair.small.folder, config=config, dtype=dtype)
    if settings.lora is not None:
        modules = list(linear_modules(pair.family, pair.small.config))
        model = _with_adapters(settings, model, modules)
    names = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return model, frozenset(names)


def _with_adapters(settings: RecoverConfig, model: "nn.Module", modules: list[str]) -> "nn.Module":
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError(
            "--lora needs the package peft, which is not installed: pip install 'sp3llm[recover]', "
            "or leave it out to train all weights."
        ) from error
    adapters = LoraConfig(
        r=settings.lora,
        lora_alpha=settings.lora_alpha or 2 * settings.lora,
        target_modules=modules,  # without the head: where it is tied it stays tied
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what peft asks transformers for
        return get_peft_model(model, adapters)


def prepare(
    settings: RecoverConfig,
    accelerator: "Accelerator",
    pair: Pair,
    texts: Texts,
    work: Path,
    micro_batch: int,
    progress: "Progress",
) -> Lesson:
    """Both models on the engine, with optimizer and schedule."""
    import torch
    import transformers
    from accelerate.utils import set_seed

    from sp3llm.maths.basis import stream_scale
    from sp3llm.models import families
    from sp3llm.models.basis_file import read_basis
    from sp3llm.models.stock import run_layers_again
    from sp3llm.recovery.engine import carry_only_trained
    from sp3llm.recovery.teacher import StreamTap

    transformers.utils.logging.disable_progress_bar()
    set_seed(settings.seed)
    tokens = texts.taught()
    target_DK = None
    if settings.hidden_weight:
        basis_DK = read_basis(pair.small.folder)
        _check_basis(basis_DK, pair)
        target_DK = (stream_scale(basis_DK) * basis_DK).to(accelerator.device)
    teacher = _teacher(settings, accelerator, pair, tokens, work, micro_batch, progress)

    stored = pair.small.dtype()
    low = settings.lora is not None and accelerator.mixed_precision == "bf16"
    dtype = stored if low else torch.promote_types(stored, torch.float32)
    model, names = load_student(settings, pair, dtype)
    if settings.gradient_checkpointing:
        run_layers_again(model)
    tap = None
    if settings.hidden_weight:
        stock = model.get_base_model() if settings.lora is not None else model
        tap = StreamTap(stock, pair.family.layers_module, pair.family.final_norm)
    model.train()
    sizes = families.axis_sizes(pair.family, pair.small.config)
    lr = settings.lr or default_lr(sizes[families.RESIDUAL], settings.lora is not None)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    # Adapters are matrices only, and not every engine takes a group of nothing.
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    warmup = math.ceil(settings.warmup * settings.steps)
    # One further along than transformers has it, whose first step has a rate of 0.
    schedule = transformers.get_cosine_schedule_with_warmup(
        optimizer, warmup + 1, settings.steps + 1
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that no step was taken yet
        schedule.step()
    model, optimizer = accelerator.prepare(model, optimizer)
    # Not prepared: accelerate would move it once for every process.
    accelerator.register_for_checkpointing(schedule)
    if settings.lora is not None:
        carry_only_trained(accelerator, names)
    if settings.track:
        values = {key: str(value) for key, value in asdict(settings).items()}
        accelerator.init_trackers("sp3llm-recover", config=values)
    return Lesson(
        settings=settings,
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        names=names,
        teacher=teacher,
        tap=tap,
        target_DK=target_DK,
        tokens=tokens,
        training=len(texts.training.tokens),
        micro_batch=micro_batch,
    )


def _check_basis(basis_DK: "Tensor", pair: Pair) -> None:
    from sp3llm.models.shapes import Shape

    wanted = tuple(
        Shape.of(family, model.config).hidden_size
        for family, model in ((pair.dense_family, pair.dense), (pair.family, pair.small))
    )
    layers = [model.config.get("num_hidden_layers") for model in (pair.dense, pair.small)]
    if tuple(basis_DK.shape) != wanted or layers[0] != layers[1]:
        raise UserError(
            f"Expected a basis of {wanted} for --hidden-weight, as wide as the teacher and "
            f"'{pair.name}', found {tuple(basis_DK.shape)}: name the dense model that it was made "
            "from."
        )


def _teacher(
    settings: RecoverConfig,
    accelerator: "Accelerator",
    pair: Pair,
    tokens: "Tensor",
    work: Path,
    micro_batch: int,
    progress: "Progress",
) -> "Teacher":
    """The teacher beside the model, or what it said, read from disk."""
    import torch

    from sp3llm.models import families
    from sp3llm.recovery.teacher import (
        LiveTeacher,
        StreamTap,
        close_store,
        create_store,
        fill_store,
        load_teacher,
        stored_logits,
    )

    device, folder = accelerator.device, settings.teacher_logits

    def live() -> LiveTeacher:
        offload = work / "teacher"
        model = load_teacher(
            pair.dense.folder, settings.teacher_dtype, device, settings.teacher_memory, offload
        )
        tap = None
        if settings.hidden_weight:
            family = pair.dense_family
            tap = StreamTap(model, family.layers_module, family.final_norm)
        return LiveTeacher(model, tap, device)

    if folder is None:
        return live()
    vocabulary = families.axis_sizes(pair.family, pair.small.config)[families.VOCAB]
    if settings.top_k > vocabulary:
        raise UserError(
            f"Expected --top-k of at most the vocabulary's {vocabulary}, found {settings.top_k}: "
            "give a smaller number."
        )
    identity = {
        "teacher_weights": weights_digest(pair.dense),
        "teacher_dtype": settings.teacher_dtype,
        "device": device.type,
        "text": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "windows": list(tokens.shape),
        "temperature": settings.temperature,
        "top_k": settings.top_k,
    }
    found = stored_logits(folder, identity, device)
    if found is None:
        teacher = live()
        if accelerator.is_main_process:
            create_store(folder, identity, *tokens.shape)
        accelerator.wait_for_everyone()
        share = torch.arange(len(tokens)).chunk(accelerator.num_processes)
        mine = share[accelerator.process_index] if accelerator.process_index < len(share) else []
        bar = progress.add_task("teacher, largest logits", total=len(mine))
        rows = list(mine.split(micro_batch)) if len(mine) else []
        fill_store(
            folder, teacher, tokens, rows, settings.temperature, lambda n: progress.advance(bar, n)
        )
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            close_store(folder)
        accelerator.wait_for_everyone()
        found = stored_logits(folder, identity, device)
    return found
