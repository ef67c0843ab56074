"""The model that is trained: loaded, with adapters where asked for, its optimizer and schedule."""

import math
import warnings
from typing import TYPE_CHECKING

from sp3llm.errors import UserError
from sp3llm.options import RecoverConfig
from sp3llm.recovery.inputs import Pair

if TYPE_CHECKING:
    import torch
    from torch import nn


# Peak learning rate of adapters in a model one wide, five times that of all weights of a decoder;
# not measured.
_LR_OF_ADAPTERS = 5
# Of the rate of a model that is far from its teacher, at least so much.
_LEAST_SHARE = 0.15
# Of AdamW: a second moment over some 20 steps, as language models are trained, since there are only
# a few hundred; torch's 0.999 would average over a thousand.
_BETAS = (0.9, 0.95)


def peak_lr(settings: RecoverConfig, pair: Pair, start_loss: float, step_tokens: int) -> float:
    """Peak learning rate: the one that is given; else by the width of the model, and by how far it
    is from the teacher as the steps begin, `start_loss`, in nats a token, for the `step_tokens`
    that a step sees.

    The update that a step of Adam makes to what a matrix puts out grows with the width it reads.
    And of a step of few tokens most is noise, which takes a model that has little to learn away
    from the teacher. A loss that is more than the divergence says nothing of that distance.
    """
    from sp3llm.models import families

    if settings.lr is not None:
        return settings.lr
    width = families.axis_sizes(pair.family, pair.small.config)[families.RESIDUAL]
    recipe = pair.objective.recipe
    lr = recipe.lr_of_weights * (1 if settings.lora is None else _LR_OF_ADAPTERS) / width
    if recipe.far is None or settings.lm_weight or settings.hidden_weight:
        return lr
    share = (start_loss * step_tokens / (settings.kl_weight * recipe.far)) ** 2
    return lr * min(1.0, max(_LEAST_SHARE, share))


def set_peak_lr(schedule: "torch.optim.lr_scheduler.LambdaLR", lr: float) -> None:
    """Let a schedule that has not been used yet rise to another rate."""
    for group, before in zip(schedule.optimizer.param_groups, schedule.base_lrs, strict=True):
        group["lr"] *= lr / before
        group["initial_lr"] = lr
    schedule.base_lrs = [lr] * len(schedule.base_lrs)


def load_student(
    settings: RecoverConfig, pair: Pair, dtype: "torch.dtype"
) -> tuple["nn.Module", frozenset[str]]:
    """The compressed model on the CPU with its adapters, if any, and the names of what is trained.

    Raises UserError if peft is asked for and missing.
    """
    from sp3llm.models.families.counts import linear_modules
    from sp3llm.models.stock import training_config

    config = training_config(pair.small.folder)
    model = pair.objective.stock_class().from_pretrained(
        pair.small.folder, config=config, dtype=dtype
    )
    if settings.lora is not None:
        modules = list(linear_modules(pair.family, pair.small.config))
        model = _with_adapters(settings, model, modules, pair.objective.task_type)
    names = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return model, frozenset(names)


def _with_adapters(
    settings: RecoverConfig, model: "nn.Module", modules: list[str], task_type: str
) -> "nn.Module":
    """The model with low-rank adapters on these modules, which alone are trained."""
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
        task_type=task_type,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what peft asks transformers for
        return get_peft_model(model, adapters)


def optimizer_of(
    settings: RecoverConfig, model: "nn.Module"
) -> tuple["torch.optim.Optimizer", "torch.optim.lr_scheduler.LambdaLR"]:
    """AdamW over what is trained, with weight decay on matrices only, and its schedule: a linear
    warm-up and a cosine to 0 over the run's steps, of a peak that `set_peak_lr` sets.
    """
    import torch
    from transformers import get_cosine_schedule_with_warmup

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    # Adapters are matrices only, and not every engine takes a group of nothing.
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=_BETAS)
    warmup = math.ceil(settings.warmup * settings.steps)
    # One further along than transformers has it, whose first step has a rate of 0.
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup + 1, settings.steps + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that no step was taken yet
        schedule.step()
    return optimizer, schedule
