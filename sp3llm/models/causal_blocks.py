"""Causal attention in bfloat16 on a CPU, a block of queries at a time, each with the keys up to its
end only.

torch's own kernel takes keys 512 at a time, those behind a query too, and multiplies blocks that
are too small for a CPU's units. While `CausalBlocks` is on, the call that stock attention makes is
answered by two batched products a block and a softmax between them: what stock "eager" attention
does, half of it left out. The scores are rounded to bfloat16, as they are there; against float32
the logits of SmolLM2-135M are off by as much either way (eval/NOTES.md).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

# Queries at once: the fewer, the less is for nothing, and the smaller the products are.
_QUERIES = 64
# Tokens of a window up to which gradients go through blocks: all weights are kept for them.
_MOST_FOR_GRADIENTS = 2048


class CausalBlocks(TorchFunctionMode):
    """While it is on, causal attention is computed in blocks where it is in bfloat16 on a CPU and
    has no mask of its own.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch, or answer for attention."""
        kwargs = kwargs or {}
        if function is scaled_dot_product_attention and _is_plain(args, kwargs):
            return causal_attention(*args, kwargs.get("scale"))
        return function(*args, **kwargs)


def _is_plain(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of attention is of what `causal_attention` takes, and more than a block."""
    if len(args) != 3 or not kwargs.get("is_causal") or kwargs.get("attn_mask") is not None:
        return False
    query, key, _ = args
    taking_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in args)
    return (
        query.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and query.dim() == 4
        and query.shape[2] == key.shape[2] > _QUERIES
        and not kwargs.get("dropout_p")
        and not (taking_gradients and query.shape[2] > _MOST_FOR_GRADIENTS)
    )


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None
) -> Tensor:
    """Causal attention of `(windows, heads, tokens, channels)`, of keys and values of as many heads
    or of groups of them. `scale` is that of the scores; None: one over the root of the channels.
    """
    windows, heads, tokens, channels = query.shape
    groups = key.shape[1]
    scale = 1 / math.sqrt(channels) if scale is None else scale
    # All heads of a group are further queries of the same keys.
    query = query.unflatten(1, (groups, -1))
    key, value = key.flatten(0, 1), value.flatten(0, 1)
    behind = torch.ones(_QUERIES, _QUERIES, dtype=torch.bool).triu(1)
    nothing = query.new_zeros(1, 1, 1)
    blocks = []
    for start in range(0, tokens, _QUERIES):
        end = min(start + _QUERIES, tokens)
        rows, seen = query[..., start:end, :], key[:, :end].mT
        rows = rows.reshape(len(key), -1, channels)
        scores = torch.baddbmm(nothing, rows, seen, beta=0, alpha=scale)
        last = scores.unflatten(1, (-1, end - start))[..., start:]
        last.masked_fill_(behind[: end - start, : end - start], -math.inf)
        block = torch.bmm(scores.softmax(-1), value[:, :end])
        blocks.append(block.view(windows, heads, end - start, -1).transpose(1, 2))
    return torch.cat(blocks, 1).transpose(1, 2)  # in memory by tokens, as stock layers go on
