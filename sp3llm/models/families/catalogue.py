"""The families there are, and those that are refused, with the reason.

Matching is by `config.model_type` and exact: a family that is not here is refused, never
approximated.
"""

import json
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from typing import Any

from sp3llm.errors import UserError
from sp3llm.models.families.bert import ENCODERS
from sp3llm.models.families.llama import (
    GEMMA,
    GRANITE,
    LLAMA,
    MISTRAL,
    PHI3,
    QWEN2,
    QWEN3,
    SMOLLM3,
)
from sp3llm.models.families.moe import MIXTRAL, QWEN2_MOE, QWEN3_MOE
from sp3llm.models.families.neox import GPT_NEOX
from sp3llm.models.families.opt import OPT
from sp3llm.models.families.schema import Family, TaskHead
from sp3llm.models.families.sizes import setting
from sp3llm.models.families.stablelm import STABLELM

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        GEMMA,
        GRANITE,
        SMOLLM3,
        PHI3,
        STABLELM,
        OPT,
        GPT_NEOX,
        MIXTRAL,
        QWEN2_MOE,
        QWEN3_MOE,
    )
}

_POST_NORM = "its norms sit after the sublayer, on the stream, so no exact rotation exists"
REFUSED: Mapping[str, str] = {
    "gemma2": _POST_NORM,
    "gemma3": _POST_NORM,
    "gemma3_text": _POST_NORM,
    "olmo2": _POST_NORM,
    "olmo3": _POST_NORM,
}

# Sizes of which a model may have none: without experts the layers are dense ones.
_MAY_BE_NONE = {
    *("num_experts", "num_local_experts", "num_experts_per_tok", "decoder_sparse_step"),
    *("moe_intermediate_size", "shared_expert_intermediate_size"),
}
# No size is larger in a model that anything loads, and more layers take minutes to be listed alone.
_MOST_OF_ANY, _MOST = 2**31 - 1, {"num_hidden_layers": 10_000, "n_layers": 10_000}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a `config.json`.

    Raises UserError, with the list of what is supported, for any other `model_type`, for a class
    that is not among the family's, and for a quantized checkpoint.
    """
    model_type = config.get("model_type")
    supported = ", ".join(sorted([*FAMILIES, *ENCODERS]))
    if isinstance(model_type, str) and model_type in REFUSED:
        raise UserError(
            f"Model family '{model_type}' cannot be compressed into a stock model: "
            f"{REFUSED[model_type]}; supported families are {supported}."
        )
    if not isinstance(model_type, str) or model_type not in {**FAMILIES, **ENCODERS}:
        raise UserError(
            f"Expected a model of a supported family ({supported}), found model_type "
            f"'{model_type}' in config.json: choose a model of a supported family."
        )
    family = _encoder_of(config) if model_type in ENCODERS else _decoder_of(config)
    _check_sizes(family, config)
    if config.get("return_dict") is False:
        raise UserError(
            "Expected no return_dict in config.json, found false, with which transformers' own "
            "classes do not run: take it out."
        )
    for key, (value, why) in family.unsupported.items():
        present = setting(family, config, key)
        if present != value:
            raise UserError(
                f"A {model_type} model with {key} = {json.dumps(present)} cannot be compressed: "
                f"{why}; choose another model."
            )
    if "quantization_config" not in config and isinstance(config.get("quantization"), dict):
        raise UserError(
            "The checkpoint is in MLX's format, quantized (quantization in config.json), and its "
            "weights cannot be rotated: load the unquantized checkpoint it was made from, and "
            "convert the compressed model instead."
        )
    if config.get("quantization_config"):
        details = config["quantization_config"]
        known = isinstance(details, dict) and details.get("quant_method")
        method = known or "by an unknown method"
        raise UserError(
            f"The checkpoint is quantized ({method}), and its weights cannot be rotated: load the "
            "unquantized checkpoint it was made from, and quantize the compressed model instead."
        )
    return family


def _stated_architecture(config: Mapping[str, Any], default: str) -> str:
    """The stock class that `config.json` names; `default` where it names none."""
    stated = config.get("architectures") or [default]
    return str(stated[0] if isinstance(stated, list) else stated)


def _decoder_of(config: Mapping[str, Any]) -> Family:
    """The family of a causal language model."""
    family = FAMILIES[config["model_type"]]
    architecture = _stated_architecture(config, family.architecture)
    # The first conversions of Llama spelled it LLaMAForCausalLM; transformers goes by model_type.
    if architecture.lower() != family.architecture.lower():
        raise UserError(
            f"Expected architecture {family.architecture}, found {architecture} in "
            "config.json: choose the causal language model of this family."
        )
    return family


def _encoder_of(config: Mapping[str, Any]) -> Family:
    """The family of an encoder with the head that its class has."""
    classes = ENCODERS[config["model_type"]]
    architecture = _stated_architecture(config, next(iter(classes)))
    if architecture not in classes:
        raise UserError(
            f"Expected architecture {', '.join(classes)}, found {architecture} in config.json: "
            "fine-tune the model for one of these, or save the encoder without its head."
        )
    return classes[architecture]


def as_stored(family: Family, names: Container[str]) -> Family:
    """The family as a checkpoint with tensors of those names has it: without a pooler where they
    hold none of it.

    Classes for masked words have none; transformers would draw one at random and go on.
    """
    head = family.task_head
    if head is None or head.answer is not None or any(name in names for name in family.ending):
        return family
    return replace(family, ending={}, task_head=TaskHead(None, None, first_only=False))


def left_out_line(
    family: Family, config: Mapping[str, Any], names: Iterable[str] = ()
) -> str | None:
    """A line to print where the model is another stock class with a head, by its `config.json` or
    by its tensors' names, and the family's own is what is written; None: it is that.
    """
    stated = _stated_architecture(config, family.architecture)
    is_itself = stated.lower() == family.architecture.lower()
    if is_itself and not any(name.startswith(family.heads_above) for name in names):
        return None
    of = "" if is_itself else f" of this {stated}"
    return (
        f"The head for masked words{of} is left out: what is compressed and written is the "
        f"encoder, a {family.architecture}, to fine-tune or distil."
    )


def _check_sizes(family: Family, config: Mapping[str, Any]) -> None:
    """Raise UserError where a size is no whole number, or one that no model can have: nothing that
    is counted with it would be right.
    """
    for key, default in family.defaults.items():
        is_size = default is None or (isinstance(default, int) and not isinstance(default, bool))
        stated = config.get(key)
        if not is_size or stated is None:
            continue
        least, most = int(key not in _MAY_BE_NONE), _MOST.get(key, _MOST_OF_ANY)
        whole = isinstance(stated, int) and not isinstance(stated, bool)
        if not whole or not least <= stated <= most:
            bound = f"at most {most}" if whole and stated > most else f"at least {least}"
            raise UserError(
                f"Expected {key} in config.json to be a whole number of {bound}, found "
                f"{json.dumps(stated)}: get an undamaged copy of the checkpoint, or mend it."
            )
