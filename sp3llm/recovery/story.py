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

import contextlib
import functools
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sp3llm.options import RecoverConfig, command_line
from sp3llm.recovery.inputs import (
    Run,
    disk_bytes,
    identify,
    open_pair,
    resolved,
    run_identity,
    say_texts,
    with_steps,
)
from sp3llm.recovery.result import Recovery, export, write_result
from sp3llm.recovery.setup import set_up
from sp3llm.recovery.subject import subject_of
from sp3llm.recovery.training import train

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from sp3llm.recovery.checkpoints import State
    from sp3llm.reporting.record import RecoveryEntry


def recover(settings: RecoverConfig, console: "Console", in_place: bool = False) -> Recovery | None:
    """Run the whole recovery; the output folder holds the recovered model when it returns.

    `in_place`: the output may take the place of the model that is tuned, as where one command makes
    both.

    Returns None in every process but the first.
    Raises UserError for anything the user can mend; nothing is then left in the output folder.
    """
    from sp3llm.models.served import refused_by
    from sp3llm.recovery.checkpoints import claim, locked
    from sp3llm.reporting.recovery import closing_table, next_steps
    from sp3llm.runtime.locks import check_shared, empty_folder
    from sp3llm.runtime.presence import lost_process_told
    from sp3llm.runtime.progress import print_line, progress_bars

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says how it casts at every call
    # At every checkpoint of a tied model, that the head is written once.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    started = time.monotonic()
    with lost_process_told():
        run, console = _prepare(settings, console, in_place)

    say = functools.partial(print_line, console)

    with lost_process_told(), contextlib.ExitStack() as stack:
        run.ranks.from_first(lambda: stack.enter_context(locked(run.work, say)))
        place = f"'{run.work}', where recovery keeps its checkpoints"
        check_shared(run.work, run.ranks, place, "choose an --out that all of them see")
        progress = stack.enter_context(progress_bars(console))
        run.ranks.from_first(lambda: claim(run.work, run_identity(run)))
        state = train(set_up(run, progress), progress)
        run.accelerator.end_training()
        if not run.ranks.is_first:
            return None
        run.accelerator.free_memory()  # before the models are streamed
        result, entry = _write(run, state, started, progress, say)
        empty_folder(run.work)  # its lock is held until here
    console.print(closing_table(result.name, entry))
    refusing = refused_by(run.pair.family, run.pair.small.config)
    say(next_steps(result.out, result.architecture, refusing, entry))
    return result


def _prepare(settings: RecoverConfig, console: "Console", in_place: bool) -> "tuple[Run, Console]":
    """Find everything that could be wrong, before any work.

    Returns the console that goes with the process, too: only the first one speaks.
    """
    from rich.console import Console

    from sp3llm.planning.recovery_needs import micro_batch_of
    from sp3llm.recovery.checkpoints import work_folder
    from sp3llm.recovery.engine import engine
    from sp3llm.runtime.folders import check_disk, check_not_input, check_output
    from sp3llm.runtime.processes import ranks_of

    pair = open_pair(settings, console)
    subject = subject_of(pair.objective)
    out = settings.out or Path(f"{Path(pair.name).name}-recovered")
    settings = replace(resolved(settings, pair.objective), out=out)
    check_output(out)
    check_not_input(out, pair.dense.folder, "the teacher")
    if not in_place:
        check_not_input(out, pair.small.folder, "the model that is tuned")
    if settings.teacher_logits is not None:
        check_not_input(out, settings.teacher_logits, "the teacher's logits")
    for name, path in subject.files(settings, pair).items():
        check_not_input(out, path, f"the text '{name}'")
    check_disk(out, disk_bytes(settings, pair))
    accelerator = engine(settings, pair.small.dtype(), out.with_name(out.name + ".logs"))
    ranks = ranks_of(accelerator)
    if not ranks.is_first:
        console = Console(quiet=True)
    micro_batch = micro_batch_of(settings, subject.length(settings, pair), ranks.count)
    texts = ranks.in_all(lambda: subject.draw(settings, pair))
    settings = with_steps(settings, pair.objective, texts)
    say_texts(settings, texts, subject.unit, console)
    model_files, teacher_files = identify(settings, pair, texts, ranks)
    run = Run(
        settings=settings,
        accelerator=accelerator,
        ranks=ranks,
        pair=pair,
        texts=texts,
        work=work_folder(out),
        micro_batch=micro_batch,
        model_files=model_files,
        teacher_files=teacher_files,
    )
    return run, console


def _write(
    run: Run, state: "State", started: float, progress: "Progress", say: Callable[[str], None]
) -> tuple[Recovery, "RecoveryEntry"]:
    """Write the best weights as a stock model, and what it is measured to be worth.

    `started` is when the recovery began, by `time.monotonic`. Returns what the record has of it,
    too.
    """
    from sp3llm.recovery.checkpoints import load_best, trained_parameters
    from sp3llm.runtime.folders import output_folder
    from sp3llm.runtime.machine import device_memory, peak_memory

    settings, pair, texts, accelerator = run.settings, run.pair, run.texts, run.accelerator
    # Processes on a CPU call it cpu:0, which tensors there do not.
    device = "cpu" if accelerator.device.type == "cpu" else str(accelerator.device)
    with output_folder(settings.out, say) as partial:
        written = export(settings, pair, load_best(run.work), partial)
        figures = subject_of(pair.objective).measure(pair, written, texts, device, progress)
        result = Recovery(
            name=pair.name,
            teacher=pair.teacher,
            out=settings.out,
            architecture=pair.family.architecture,
            command=command_line(settings),
            state=state,
            trained_parameters=trained_parameters(run.work),
            training=texts.training,
            stopping=texts.stopping,
            held_out=texts.held_out,
            **vars(figures),
            seconds=time.monotonic() - started,
            peak_memory=peak_memory(),
            device_memory=device_memory(device),
        )
        entry = write_result(settings, pair, result, partial, device, run.ranks.count)
    return result, entry
