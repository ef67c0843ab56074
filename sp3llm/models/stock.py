"""Stock models: empty ones to run layer by layer, and frozen ones in memory."""

import warnings
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sp3llm.errors import UserError, reason
from sp3llm.models.families import EACH, Family
from sp3llm.models.objectives.schema import Objective


def load_frozen(
    folder: Path, objective: Objective, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """The stock model of a checkpoint, whole, on a device; no dropout, whatever its config says.

    On a GPU it keeps no activations of a layer but what enters it.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = training_config(folder)
    model = (
        objective.stock_class()
        .from_pretrained(folder, config=config, dtype=dtype, experts_implementation="eager")
        .to(device)
    )
    if device.type == "cuda":
        run_layers_again(model)
        return model.train()  # the only mode in which they do; there is no dropout
    return model.eval()


def empty_model(config: Mapping[str, Any], objective: Objective) -> nn.Module:
    """The stock model of a config, with weights on the meta device and real buffers."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        # Of a copy: config classes write into the nested entries that they are given.
        stock = CONFIG_MAPPING[config["model_type"]].from_dict(deepcopy(dict(config)))
        stock.use_cache = False
        stock.output_router_logits = False  # a loss for training, from layers that do not run here
        with init_empty_weights(include_buffers=False), no_init_weights():
            # Experts by the class's own loop: the grouped kernel knows no float64.
            model = objective.stock_class().from_config(stock, experts_implementation="eager")
    except Exception as error:  # each config class checks its values in its own way
        raise UserError(
            "Expected a config.json that transformers accepts, found one it rejects "
            f"({type(error).__name__}: {reason(error)}): mend it, or update transformers."
        ) from error
    return model.eval()


def fuse_experts(family: Family, index: int, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A layer's tensors as on disk under the names of the class's parameters: the class stacks the
    matrices of all experts, `(E, ..., ...)`, which lie one by one on disk. Others stay as they are.
    """
    prefix = family.layer_prefix.format(layer=index)
    by_class = dict(tensors)
    for fused, stored in family.experts.fused.items() if family.experts else ():
        parts = []
        for name in stored:
            first, each, last = f"{prefix}{name}".partition(EACH)
            if not each:
                parts += [by_class.pop(first)] if first in by_class else []
                continue
            experts = []
            while (expert := f"{first}{len(experts)}{last}") in by_class:
                experts.append(by_class.pop(expert))
            parts += [torch.stack(experts)] if experts else []
        if parts:  # a layer without experts has none
            by_class[f"{prefix}{fused}"] = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
    return by_class


def check_found(name: str, loading_info: Mapping[str, Any]) -> None:
    """Raise UserError where transformers drew weights that the files of model `name` lack, by its
    `output_loading_info`: it says so in its log alone, and goes on.
    """
    missing = sorted(loading_info["missing_keys"])
    if missing:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise UserError(
            f"Expected weights of the whole model in '{name}', found none for '{missing[0]}'"
            f"{others}, which transformers would draw at random: get a complete copy of the "
            "checkpoint."
        )


# Config keys of dropout, and of noise that routers train with.
_DROPOUT = (
    *("attention_dropout", "dropout", "activation_dropout", "hidden_dropout", "layerdrop"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    *("seq_classif_dropout", "qa_dropout"),
    *("resid_pdrop", "embd_pdrop", "attn_pdrop", "router_jitter_noise"),
)


def training_config(folder: Path) -> Any:
    """The stock config of a checkpoint, without cache and dropout.

    With a few hundred steps, and a teacher's answer to every token, there is nothing for dropout to
    prevent; and without it two processes train what one does.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    config.use_cache = False
    for key in _DROPOUT:
        if hasattr(config, key):
            setattr(config, key, 0.0)
    return config


def run_layers_again(model: nn.Module) -> None:
    """In training keep no activations of a layer but what enters it, and compute them again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5 renamed it midway
        # Only this kind passes on gradients under frozen embeddings, as adapters and gates have.
        model.gradient_checkpointing_enable({"use_reentrant": False})
