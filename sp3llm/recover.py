"""Tune a compressed model against the dense one it came from: a few hundred steps of distillation.

The story, top-down:

1. find both models, refuse what cannot be done before any work;
2. draw windows to train on, to decide when to stop, and to report on: three texts that share no
   document;
3. load the teacher as asked, or compute its largest logits once and leave it out from then on;
4. train all weights or low-rank adapters, checking a held-out loss now and then and keeping the
   best weights, and checkpoints from which a killed run continues exactly;
5. merge, write a stock model again, and stream all three over the held-out text.

`python -m sp3llm.recover SMALL --teacher DENSE` is the same as `sp3llm recover`, and what
`accelerate launch -m sp3llm.recover` wants.
"""

import hashlib
import json
import logging
import math
import shlex
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sp3llm.config import RecoverConfig
from sp3llm.errors import UserError, reason

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from rich.console import Console
    from rich.progress import Progress
    from torch import Tensor, nn

    from sp3llm.checkpoint import Checkpoint
    from sp3llm.data import Windows
    from sp3llm.families import Family
    from sp3llm.score import Excess
    from sp3llm.teacher import StreamTap, Teacher
    from sp3llm.training import State

# Settings that change neither the course of training nor what its checkpoints hold.
_FREE = (
    *("model", "teacher", "out", "train", "stop_text", "eval_text", "eval_samples", "track"),
    *("checkpoint_every", "teacher_memory", "device"),
)


@dataclass(frozen=True)
class Recovery:
    """What a run produced."""

    name: str
    teacher: str
    out: Path
    architecture: str
    command: str
    state: "State"
    trained_parameters: int
    training: "Windows"
    stopping: "Windows"
    evaluation: "Windows"
    dense_perplexity: float
    perplexity_before: float
    perplexity: float
    excess_before: "Excess"
    excess: "Excess"
    seconds: float
    peak_memory: int
    device_memory: int


@dataclass(frozen=True)
class Pair:
    """The compressed model and its teacher, as they lie on disk."""

    small: "Checkpoint"
    family: "Family"
    name: str
    record: dict[str, Any]
    """`sp3llm.json` of the compressed model; empty where it has none."""
    dense: "Checkpoint"
    dense_family: "Family"
    teacher: str


@dataclass(frozen=True)
class Texts:
    """Three sets of windows that share no document."""

    training: "Windows"
    stopping: "Windows"
    evaluation: "Windows"

    def taught(self) -> "Tensor":
        """What the teacher is asked about: training windows, then those for stopping."""
        import torch

        return torch.cat([self.training.tokens, self.stopping.tokens])


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


def recover(settings: RecoverConfig, console: "Console") -> Recovery | None:
    """Run the whole recovery; the output folder holds the recovered model when it returns.

    Returns None in every process but the first.
    Raises UserError for anything the user can mend; nothing is then left in the output folder.
    """
    from rich.console import Console

    from sp3llm import checkpoint as disk
    from sp3llm import recover_report, report, score, training
    from sp3llm.recover_needs import micro_batch_of

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says how it casts at every call
    started = time.monotonic()
    pair = _pair(settings, console)
    out = settings.out or Path(f"{Path(pair.name).name}-recovered")
    settings = replace(settings, out=out)
    disk.check_output(out)
    disk.check_disk(out, _disk_bytes(settings, pair))
    accelerator = training.engine(settings, out.with_name(out.name + ".logs"))
    if not accelerator.is_main_process:
        console = Console(quiet=True)
    micro_batch = micro_batch_of(settings, _seq_len(settings, pair), accelerator.num_processes)
    texts = _texts(settings, pair)
    _say_epochs(settings, texts, console)
    work = training.work_folder(out)
    claimed = training.locked(work) if accelerator.is_main_process else nullcontext()
    with claimed, report.progress_bars(console) as progress:
        identity = _identity(settings, accelerator, pair, texts)
        if accelerator.is_main_process:
            training.claim(work, identity)
        accelerator.wait_for_everyone()
        lesson = prepare(settings, accelerator, pair, texts, work, micro_batch, progress)
        state = train(lesson, work, progress)
        accelerator.end_training()
        if not accelerator.is_main_process:
            return None
        trained = sum(math.prod(tensor.shape) for tensor in training.load_best(work).values())
        # Processes on a CPU call it cpu:0, which tensors there do not.
        on_cpu, command = accelerator.device.type == "cpu", _command(settings)
        device = "cpu" if on_cpu else str(accelerator.device)
        processes = accelerator.num_processes
        del lesson  # its memory, before the models are streamed
        accelerator.free_memory()

        with disk.output_folder(out) as partial:
            written = export(settings, pair, training.load_best(work), partial)
            losses, before, dense = _measure(pair, written, texts, device, progress)
            result = Recovery(
                name=pair.name,
                teacher=pair.teacher,
                out=out,
                architecture=pair.family.architecture,
                command=command,
                state=state,
                trained_parameters=trained,
                training=texts.training,
                stopping=texts.stopping,
                evaluation=texts.evaluation,
                dense_perplexity=score.perplexity(dense),
                perplexity_before=score.perplexity(before),
                perplexity=score.perplexity(losses),
                excess_before=score.excess_log_perplexity(before, dense),
                excess=score.excess_log_perplexity(losses, dense),
                seconds=time.monotonic() - started,
                peak_memory=report.peak_memory(),
                device_memory=report.device_memory(device),
            )
            _finish(settings, pair, result, partial, device, processes)
        shutil.rmtree(work, ignore_errors=True)

    console.print(recover_report.closing_table(result))
    console.print(recover_report.next_steps(result), highlight=False, markup=False)
    return result


# --------------------------------------------------------------------------- before any work


def _pair(settings: RecoverConfig, console: "Console") -> Pair:
    """Both models, checked against each other."""
    from sp3llm import checkpoint as disk
    from sp3llm import families, source
    from sp3llm.data import load_tokenizer

    folder, name, note = source.resolve_model(settings.model)
    record = _record_of(folder)
    if settings.teacher is None and "settings" not in record:
        raise UserError(
            f"Expected --teacher for '{name}', which has no {disk.RECORD} that names the dense "
            "model it came from, found none: name it."
        )
    teacher = settings.teacher or record["settings"]["model"]
    dense_folder, dense_name, dense_note = source.resolve_model(teacher)
    if settings.teacher is None:
        dense_note = f"The teacher is {dense_name}, which {name} was made from."
    for line in filter(None, (note, dense_note)):
        console.print(line, markup=False)

    def opened(folder: Path) -> "tuple[Checkpoint, Family]":
        family = families.family_of(source.read_config(folder))
        found = disk.with_prefix(disk.open_checkpoint(folder), family)
        disk.check_tensors(found, family)
        return found, family

    small, family = opened(folder)
    dense, dense_family = opened(dense_folder)
    sizes = [
        families.axis_sizes(f, c.config)[families.VOCAB]
        for f, c in ((family, small), (dense_family, dense))
    ]
    tokenizers = [load_tokenizer(folder).get_vocab() for folder in (folder, dense_folder)]
    if sizes[0] != sizes[1] or tokenizers[0] != tokenizers[1]:
        raise UserError(
            f"Expected a teacher with the vocabulary of '{name}' ({sizes[0]} tokens), found "
            f"another in '{dense_name}' ({sizes[1]} tokens): name the dense model that it was "
            "made from."
        )
    return Pair(small, family, name, record, dense, dense_family, dense_name)


def _record_of(folder: Path) -> dict[str, Any]:
    from sp3llm.checkpoint import RECORD

    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"'{path}' is no record of sp3llm ({reason(error)}): get an undamaged copy, or remove "
            "it."
        ) from error


def _disk_bytes(settings: RecoverConfig, pair: Pair) -> int:
    """Of the output, two checkpoints with moments, and the best weights."""
    from sp3llm import families
    from sp3llm.recover_needs import adapter_parameters

    config = pair.small.config
    parameters = trained = families.count_parameters(pair.family, config)
    if settings.lora is not None:
        trained = adapter_parameters(pair.family, config, settings.lora)
    return parameters * pair.small.dtype().itemsize + (2 * 3 + 1) * 4 * trained


def _seq_len(settings: RecoverConfig, pair: Pair) -> int:
    from sp3llm import families

    return min(
        families.window_length(family, model.config, settings.seq_len)
        for family, model in ((pair.family, pair.small), (pair.dense_family, pair.dense))
    )


def _texts(settings: RecoverConfig, pair: Pair) -> Texts:
    """Windows of the three texts. What is reported on is the compression's own, where known."""
    from sp3llm import data, families

    tokenizer = data.load_tokenizer(pair.small.folder)
    seq_len = _seq_len(settings, pair)
    calibrated = pair.record.get("calibration", {})
    evaluated = pair.record.get("evaluation", {})
    names = settings.train or ",".join(calibrated.get("sources", ["wikitext2"]))
    eval_names = (
        settings.eval_text
        or ",".join(evaluated.get("sources", []))
        or data.default_evaluation(names)
    )
    evaluation = data.evaluation_windows(
        eval_names,
        tokenizer,
        settings.eval_samples,
        evaluated.get("seq_len", seq_len),
        _calibrated_documents(pair.record, eval_names, tokenizer),
    )
    training = data.training_windows(
        names,
        tokenizer,
        settings.steps * settings.batch,
        seq_len,
        settings.seed,
        evaluation.documents,
    )
    stopping = data.training_windows(
        settings.stop_text or names,
        tokenizer,
        settings.stop_windows,
        seq_len,
        0,
        evaluation.documents | training.documents,
        stopping=settings.stop_text is None,
    )
    vocabulary = families.axis_sizes(pair.family, pair.small.config)[families.VOCAB]
    largest = max(w.tokens.max().item() for w in (training, stopping, evaluation))
    if largest >= vocabulary:
        raise UserError(
            f"Expected token ids below the model's vocab_size {vocabulary}, found {largest}: the "
            f"tokenizer in '{pair.small.folder}' belongs to another model."
        )
    return Texts(training, stopping, evaluation)


def _calibrated_documents(record: dict[str, Any], names: str, tokenizer: Any) -> frozenset[str]:
    """Documents that the compression was calibrated on, where it read sets that are also to be
    reported on: they are left out, as the compression left them out.
    """
    from sp3llm import data

    calibrated = record.get("calibration", {})
    sources = calibrated.get("sources", [])
    shared = set(sources) & {name.strip() for name in names.split(",")}
    if all(data.resolve_source(name).stdlib for name in shared):
        return frozenset()  # divided by content already
    samples, seq_len = calibrated["samples"], calibrated["seq_len"]
    seed = record["settings"]["seed"]
    return data.calibration_windows(",".join(sources), tokenizer, samples, seq_len, seed).documents


def _say_epochs(settings: RecoverConfig, texts: Texts, console: "Console") -> None:
    windows = len(texts.training.tokens)
    epochs = settings.steps * settings.batch / windows
    console.print(
        f"{settings.steps} steps of {settings.batch} windows of {texts.training.tokens.shape[1]} "
        f"tokens; the text holds {windows} windows"
        + (f", gone through {epochs:.1f} times." if epochs > 1 else "."),
        highlight=False,
        markup=False,
    )


def _identity(
    settings: RecoverConfig, accelerator: "Accelerator", pair: Pair, texts: Texts
) -> dict[str, Any]:
    """What checkpoints depend on: a run that differs in any of it cannot continue from them."""
    chosen = {key: value for key, value in asdict(settings).items() if key not in _FREE}
    logits = chosen.pop("teacher_logits")
    if logits is None:
        del chosen["top_k"]
    return {
        **chosen,
        "teacher_logits": None if logits is None else str(logits),
        "precision": accelerator.mixed_precision,
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "engine": str(accelerator.distributed_type.value),
        "training_text": texts.training.sha256,
        "stopping_text": texts.stopping.sha256,
        "model_weights": _digest(pair.small),
        "teacher_weights": _digest(pair.dense),
    }


def _digest(checkpoint: "Checkpoint") -> str:
    """Hash of a checkpoint's weights, as they lie on disk."""
    digest = hashlib.sha256()
    for path in sorted(set(checkpoint.files.values())):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


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

    from sp3llm.recover_needs import linear_modules
    from sp3llm.training import training_config

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

    from sp3llm import families, training
    from sp3llm.basis import read_basis
    from sp3llm.project import stream_scale
    from sp3llm.teacher import StreamTap

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
        training.run_layers_again(model)
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
        training.carry_only_trained(accelerator, names)
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
    from sp3llm.plan import Shape

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

    from sp3llm import families
    from sp3llm.teacher import (
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
        "teacher_weights": _digest(pair.dense),
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


def train(lesson: Lesson, work: Path, progress: "Progress") -> "State":
    """Take the steps that are left; the best weights are on disk when it returns.

    Raises UserError if the loss is no number any more.
    """
    from sp3llm import training

    settings, accelerator = lesson.settings, lesson.accelerator
    state = training.load_checkpoint(accelerator, work)
    if state.step:
        progress.console.print(f"Continuing from step {state.step}.", highlight=False)
    else:
        _check(lesson, state, [], work)
    bar = progress.add_task("recovery", total=settings.steps, completed=state.step)
    recent: list[Tensor] = []
    with _kept_time(state) as lap:
        while state.step < settings.steps and not state.stopped:
            recent.append(_step(lesson, state.step))
            state.step += 1
            at_end = state.step == settings.steps
            if state.step % settings.checked_every == 0 or at_end:
                _check(lesson, state, recent, work)
                recent = []
                what = f"recovery, held-out loss {state.held_out[-1][1]:.4f}"
                progress.update(bar, description=what)
            if state.step % settings.saved_every == 0 or at_end or state.stopped:
                lap()
                # A mean of the training loss that a kill cuts in two is not worth a file.
                training.save_checkpoint(accelerator, work, state)
            progress.update(bar, completed=state.step)
    return state


@contextmanager
def _kept_time(state: "State") -> Iterator[Any]:
    """Adds the time spent to the state whenever what it yields is called."""
    last = time.monotonic()

    def lap() -> None:
        nonlocal last
        now = time.monotonic()
        state.seconds, last = state.seconds + now - last, now

    yield lap


def _step(lesson: Lesson, step: int) -> "Tensor":
    """One optimizer step over this process's share; returns the share's loss."""
    import torch

    from sp3llm.training import share_of_step

    settings, accelerator = lesson.settings, lesson.accelerator
    share = share_of_step(
        settings, lesson.training, step, accelerator.process_index, accelerator.num_processes
    )
    micro_batches = share.split(lesson.micro_batch)
    total = torch.zeros((), device=accelerator.device)
    for number, rows in enumerate(micro_batches, 1):
        is_last = number == len(micro_batches)
        with nullcontext() if is_last else accelerator.no_sync(lesson.model):
            loss = _loss(lesson, rows) / len(micro_batches)
            accelerator.backward(loss)
        total += loss.detach()
    accelerator.clip_grad_norm_(lesson.model.parameters(), settings.clip)
    lesson.optimizer.step()
    lesson.schedule.step()
    lesson.optimizer.zero_grad()
    return total


def _loss(lesson: Lesson, rows: "Tensor") -> "Tensor":
    """The loss on windows of `Lesson.tokens`, a mean over tokens."""
    from sp3llm.distill import language_model_loss, stream_error

    settings = lesson.settings
    tokens = lesson.tokens[rows].to(lesson.accelerator.device)
    logits = lesson.model(input_ids=tokens, use_cache=False).logits[:, :-1]
    found, dense = lesson.teacher.divergence(logits, rows, tokens, settings.temperature)
    loss = settings.kl_weight * found
    if settings.lm_weight:
        loss = loss + settings.lm_weight * language_model_loss(logits, tokens[:, 1:])
    if lesson.tap is not None:
        small = lesson.tap.take()
        loss = loss + settings.hidden_weight * stream_error(small, dense, lesson.target_DK)
    return loss


def _check(lesson: Lesson, state: "State", recent: "list[Tensor]", work: Path) -> None:
    """Take the held-out loss, keep the weights if they are the best so far, decide to stop."""
    import torch

    from sp3llm import training

    settings, accelerator = lesson.settings, lesson.accelerator
    rows = torch.arange(lesson.training, len(lesson.tokens))
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    total = torch.zeros((), device=accelerator.device)
    with torch.no_grad():
        for some in mine.split(lesson.micro_batch) if len(mine) else ():
            total += len(some) * _loss(lesson, some)
    loss = accelerator.reduce(total, "sum").item() / len(rows)
    values = {"held_out_loss": loss}
    if recent:
        mean = accelerator.reduce(torch.stack(recent).mean(), "mean").item()
        state.trained.append([state.step, mean])
        values |= {"loss": mean, "lr": lesson.schedule.get_last_lr()[0]}
    if not math.isfinite(loss):
        raise UserError(
            f"Expected a finite loss at step {state.step}, found {loss}: use a smaller --lr, or "
            "--precision float32."
        )
    state.held_out.append([state.step, loss])
    if settings.track:
        accelerator.log(values, step=state.step)
    if state.best_loss is None or loss < state.best_loss:
        state.best_step, state.best_loss, state.worse = state.step, loss, 0
        training.save_best(accelerator, lesson.model, lesson.names, work)
    else:
        state.worse += 1
        state.stopped = state.worse >= settings.patience


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

    from sp3llm import checkpoint as disk

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
        disk.share_file(path)
        with safe_open(path, framework="pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    written = disk.Checkpoint(folder, pair.small.config, files)
    disk.check_tensors(written, pair.family)
    return written


def _measure(
    pair: Pair, written: "Checkpoint", texts: Texts, device: str, progress: "Progress"
) -> "tuple[Tensor, Tensor, Tensor]":
    """Token losses on the held-out windows: recovered, before, dense."""
    import torch

    from sp3llm.execution import execution
    from sp3llm.measure import measure_losses

    tokens = texts.evaluation.tokens
    found = []
    for checkpoint, family in (
        (written, pair.family),
        (pair.small, pair.family),
        (pair.dense, pair.dense_family),
    ):
        dtype = torch.promote_types(pair.dense.dtype(), checkpoint.dtype())
        on = execution(device, dtype)
        found.append(measure_losses(checkpoint, family, tokens, on, progress))
    return tuple(found)


def _finish(
    settings: RecoverConfig,
    pair: Pair,
    result: Recovery,
    folder: Path,
    device: str,
    processes: int,
) -> None:
    """Everything of the output but its weights; `config.json` last."""
    from sp3llm import checkpoint as disk
    from sp3llm import recover_report
    from sp3llm.basis import BASIS
    from sp3llm.record import MEASURED

    disk.copy_companions(pair.small.folder, folder)
    if (pair.small.folder / BASIS).is_file():
        shutil.copyfile(pair.small.folder / BASIS, folder / BASIS)
    record = dict(pair.record)
    earlier = record.pop("recoveries", [])
    for measured in MEASURED:  # on the weights before
        record.pop(measured, None)
    entry = _entry(settings, pair, result, device, processes)
    disk.write_json(folder / disk.RECORD, {**record, "recoveries": [*earlier, entry]})
    card = pair.small.folder / "README.md"
    before = card.read_text(encoding="utf-8") if pair.record and card.is_file() else ""
    text = recover_report.card(before, result)
    (folder / "README.md").write_text(text, encoding="utf-8")
    disk.write_json(folder / "config.json", dict(pair.small.config))


def _entry(
    settings: RecoverConfig, pair: Pair, result: Recovery, device: str, processes: int
) -> dict[str, Any]:
    """What `sp3llm.json` keeps of a recovery."""
    from sp3llm import families, report

    state, training = result.state, result.training
    width = families.axis_sizes(pair.family, pair.small.config)[families.RESIDUAL]
    resolved = replace(
        settings,
        out=str(result.out),
        teacher=pair.teacher,
        train=",".join(training.sources),
        stop_text=",".join(result.stopping.sources),
        eval_text=",".join(result.evaluation.sources),
        seq_len=training.tokens.shape[1],
        lr=settings.lr or default_lr(width, settings.lora is not None),
        check_every=settings.checked_every,
        checkpoint_every=settings.saved_every,
        teacher_logits=None if settings.teacher_logits is None else str(settings.teacher_logits),
        device=device,
    )
    return {
        "command": result.command,
        "settings": asdict(resolved),
        "trained_parameters": result.trained_parameters,
        "steps": state.step,
        "best_step": state.best_step,
        "stopped_early": state.stopped,
        "held_out_losses": state.held_out,
        "training_losses": state.trained,
        "training": training.describe(),
        "stopping": result.stopping.describe(),
        "evaluation": result.evaluation.describe(),
        "dense_perplexity": result.dense_perplexity,
        "perplexity_before": result.perplexity_before,
        "perplexity": result.perplexity,
        "excess_log_perplexity_before": result.excess_before.describe(),
        "excess_log_perplexity": result.excess.describe(),
        "processes": processes,
        "training_seconds": round(state.seconds, 2),
        "seconds": round(result.seconds, 2),
        "peak_memory_bytes": result.peak_memory,
        "device_memory_bytes": result.device_memory,
        "versions": report.versions(),
        "machine": report.machine(device),
    }


def _command(settings: RecoverConfig) -> str:
    """The command line that gives these settings."""
    defaults = asdict(RecoverConfig(model=""))
    words = ["sp3llm", "recover", settings.model]
    for key, value in asdict(settings).items():
        if key == "model" or value == defaults[key]:
            continue
        option = f"--{key.replace('_', '-')}"
        words += [option] if isinstance(value, bool) else [option, str(value)]
    return shlex.join(words)


if __name__ == "__main__":
    from sp3llm.cli import main

    main(prefix=["recover"])
