"""The refitted model's head, one step nearer to what the dense model says.

Least squares brings the stream back, token by token alike, and a model made of it expects what is
frequent more often than the dense one does, and what is rare less, on the very text that it is
fitted to. A tied head is not refitted at all (docs/design.md 3.5). One step of the divergence
itself, in the head's matrix alone, mends some of what is lost, from sums over a little text
(docs/design.md 3.17).
"""

import torch

from sp3llm.compression.ends import on_tokens, on_windows, with_head
from sp3llm.compression.refitter import Refitter
from sp3llm.maths.head_step import add_to_head, no_tokens, stepped_head
from sp3llm.models.families import logit_divisor
from sp3llm.models.head import End, logits_beside

# At least, where there are as many, evenly over the windows that were fitted to; how many more
# would help was not measured.
_TOKENS = 16384


def stepped(refitter: Refitter, small: End, dense: End) -> End:
    """The small model with its head one step on, by tokens all over the windows that were fitted
    to. The same on every process.
    """
    ranks, device = refitter.execution.ranks, refitter.execution.device
    fitted = slice(0, refitter.unseen_from)
    few = [on_windows(end, fitted) for end in (small, dense)]
    windows, length = few[0].stream.hidden.shape[:2]
    count = torch.tensor([windows])
    ranks.all_reduce_(count)
    few = [on_tokens(end, places(int(count), length)) for end in few]

    name = f"{refitter.family.head}.weight"
    sums = no_tokens(*small.head[name].shape, device)
    for _, _, both in logits_beside(few[:1], few[1]):
        add_to_head(sums, *both.reads, *both.smalls, both.dense)
    ranks.all_reduce_(*sums.tensors)
    divisor = logit_divisor(refitter.family, refitter.dense.config)
    table = stepped_head(small.head[name], sums, divisor)
    ranks.broadcast_(table)
    return with_head(refitter, small, {name: table})


def places(windows: int, length: int) -> slice:
    """Which tokens of windows of that length, of so many, a step is by: `_TOKENS` of them all, or
    all there are, and at least one a window. What stands first is like nothing else.
    """
    stride = max(1, (length - 1) // -(-_TOKENS // windows))
    return slice(max(1, stride - 1), None, stride)
