"""Weights in few bits, as bitsandbytes holds them: what it takes, and what it gets wrong.

Its nf4 keeps a scale for every 64 neighbouring weights, counted through the whole matrix. Kernels
for CPUs take rows of whole blocks only: the one for AVX512-BF16 fails elsewhere (and wants outputs
in 32s), the others dequantize wrongly without a word: an error of 0.25 of a random matrix with rows
of 688, where nf4 costs 0.09 (bitsandbytes 0.50.2). Those for GPUs are written for any width; they
were not run here.
"""

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sp3llm.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


# Widths that nf4 takes on a CPU are multiples of these.
_INPUTS, _OUTPUTS = 64, 32


def check_installed(what: str, instead: str) -> None:
    """Raise UserError, naming `what` needs it and what to do `instead`, if bitsandbytes is not."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"{what} needs bitsandbytes, which is not installed: pip install 'sp3llm[quantize]', "
            f"or {instead}."
        )


def bits_config(bits: str, arithmetic: "torch.dtype") -> Any:
    """What transformers wants to know; nf4 weights are multiplied in `arithmetic`."""
    from transformers import BitsAndBytesConfig

    if bits == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=arithmetic
    )


def unfit(bits: str, modules: Mapping[str, tuple[int, ...]]) -> str | None:
    """The first of linear modules, given with the shapes `(outputs, inputs)` of their weights, that
    bitsandbytes cannot run on a CPU; None: it can run all.
    """
    for name, (outputs, inputs) in modules.items():
        if bits == "nf4" and (inputs % _INPUTS or outputs % _OUTPUTS):
            return f"{inputs} inputs and {outputs} outputs in '{name}'"
    return None


def check_widths(bits: str, modules: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise UserError if bitsandbytes cannot run linear modules of `what` on a CPU."""
    misfit = unfit(bits, modules)
    if misfit is not None:
        raise UserError(
            f"Expected widths that bitsandbytes' {bits} takes on a CPU (inputs in multiples of "
            f"{_INPUTS}, outputs of {_OUTPUTS}), found {misfit} of {what}: fix them with "
            "--hidden-size and --intermediate-size, choose int8, or quantize on a GPU."
        )


def take_any_width(model: "nn.Module") -> None:
    """Let the nf4 modules of a model on a CPU dequantize block by block, which is right for every
    width; nothing else about the model changes.
    """
    from functools import partial

    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # accelerate's hooks, where there are any, stand around what they call `_old_forward`.
            name = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
            setattr(module, name, partial(_linear_by_blocks, module))


def _linear_by_blocks(module: Any, x: "Tensor") -> "Tensor":
    from torch.nn.functional import linear

    arithmetic = module.compute_dtype or x.dtype
    weight = _dequantized(module.weight).to(arithmetic)
    bias = None if module.bias is None else module.bias.to(arithmetic)
    return linear(x.to(arithmetic), weight, bias).to(x.dtype)


def _dequantized(weight: Any) -> "Tensor":
    """The weight of an nf4 module, `(outputs, inputs)`: one block a row goes through the kernel."""
    from copy import copy

    import torch
    from bitsandbytes.functional import dequantize_4bit

    state = copy(weight.quant_state)
    shape, size = state.shape, state.blocksize
    state.shape = torch.Size((state.absmax.numel(), size))
    packed = weight.data.view(torch.uint8).reshape(-1)
    packed = torch.nn.functional.pad(packed, (0, state.shape.numel() // 2 - packed.numel()))
    return dequantize_4bit(packed[:, None], state).reshape(-1)[: shape.numel()].reshape(shape)
