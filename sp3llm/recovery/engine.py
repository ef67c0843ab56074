"""The engine of recovery: accelerate's processes, arithmetic and trackers."""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import LoggerType, is_tensorboard_available, is_wandb_available

from sp3llm.errors import UserError, reason
from sp3llm.options import RecoverConfig
from sp3llm.runtime.devices import compute_dtype
from sp3llm.runtime.presence import all_begun


def engine(settings: RecoverConfig, stored: torch.dtype, logs: Path) -> Accelerator:
    """The processes that train, one, or those of `accelerate launch`, a model whose weights are
    `stored` in that dtype.

    Trackers that write files write to the folder `logs`.

    Raises UserError if there is no such device or tracker, or not all processes begin.
    """
    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    if settings.device == "cuda" and on_cpu:
        raise UserError(
            "Expected a GPU that torch can use for --device cuda, found none: use --device cpu or "
            "auto."
        )
    precision = settings.precision
    if precision == "auto":
        on_units = compute_dtype("auto", stored, torch.device("cpu")) == torch.bfloat16
        precision = "bfloat16" if on_units or not on_cpu else "float32"
    available = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    if settings.track is not None and not available[settings.track]():
        raise UserError(
            f"--track {settings.track} needs the package {settings.track}, which is not installed: "
            f"pip install {settings.track}, or leave it out."
        )
    try:
        with all_begun():
            return Accelerator(
                cpu=on_cpu,
                mixed_precision="bf16" if precision == "bfloat16" else "no",
                log_with=None if settings.track is None else LoggerType(settings.track),
                project_dir=str(logs),
            )
    except ValueError as error:
        raise UserError(
            f"accelerate cannot run with --precision {precision} here ({reason(error)}): use "
            "--precision float32, or another process."
        ) from error
