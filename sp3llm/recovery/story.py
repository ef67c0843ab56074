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

import logging
import math
import shutil
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sp3llm.options import RecoverConfig, command_line
from sp3llm.recovery.inputs import (
    disk_bytes,
    draw_texts,
    open_pair,
    run_identity,
    say_epochs,
    window_length_of,
)
from sp3llm.recovery.lesson import prepare
from sp3llm.recovery.result import Recovery, export, measure_three, write_result
from sp3llm.recovery.training import train

if TYPE_CHECKING:
    from rich.console import Console


def recover(settings: RecoverConfig, console: "Console") -> Recovery | None:
    """Run the whole recovery; the output folder holds the recovered model when it returns.

    Returns None in every process but the first.
    Raises UserError for anything the user can mend; nothing is then left in the output folder.
    """
    from rich.console import Console

    from sp3llm.maths.paired import excess_log_perplexity, perplexity
    from sp3llm.planning.recovery_needs import micro_batch_of
    from sp3llm.recovery.engine import claim, engine, load_best, locked, work_folder
    from sp3llm.reporting.recovery import closing_table, next_steps
    from sp3llm.runtime.folders import check_disk, check_output, output_folder
    from sp3llm.runtime.machine import device_memory, peak_memory
    from sp3llm.runtime.progress import progress_bars

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says how it casts at every call
    started = time.monotonic()
    pair = open_pair(settings, console)
    out = settings.out or Path(f"{Path(pair.name).name}-recovered")
    settings = replace(settings, out=out)
    check_output(out)
    check_disk(out, disk_bytes(settings, pair))
    accelerator = engine(settings, out.with_name(out.name + ".logs"))
    if not accelerator.is_main_process:
        console = Console(quiet=True)
    micro_batch = micro_batch_of(
        settings, window_length_of(settings, pair), accelerator.num_processes
    )
    texts = draw_texts(settings, pair)
    say_epochs(settings, texts, console)
    work = work_folder(out)
    claimed = locked(work) if accelerator.is_main_process else nullcontext()
    with claimed, progress_bars(console) as progress:
        identity = run_identity(settings, accelerator, pair, texts)
        if accelerator.is_main_process:
            claim(work, identity)
        accelerator.wait_for_everyone()
        lesson = prepare(settings, accelerator, pair, texts, work, micro_batch, progress)
        state = train(lesson, work, progress)
        accelerator.end_training()
        if not accelerator.is_main_process:
            return None
        trained = sum(math.prod(tensor.shape) for tensor in load_best(work).values())
        # Processes on a CPU call it cpu:0, which tensors there do not.
        on_cpu, command = accelerator.device.type == "cpu", command_line(settings)
        device = "cpu" if on_cpu else str(accelerator.device)
        processes = accelerator.num_processes
        del lesson  # its memory, before the models are streamed
        accelerator.free_memory()

        with output_folder(out) as partial:
            written = export(settings, pair, load_best(work), partial)
            losses, before, dense = measure_three(pair, written, texts, device, progress)
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
                dense_perplexity=perplexity(dense),
                perplexity_before=perplexity(before),
                perplexity=perplexity(losses),
                excess_before=excess_log_perplexity(before, dense),
                excess=excess_log_perplexity(losses, dense),
                seconds=time.monotonic() - started,
                peak_memory=peak_memory(),
                device_memory=device_memory(device),
            )
            entry = write_result(settings, pair, result, partial, device, processes)
        shutil.rmtree(work, ignore_errors=True)

    console.print(closing_table(pair.name, entry))
    architecture = pair.family.architecture
    console.print(next_steps(out, architecture, entry), highlight=False, markup=False)
    return result
