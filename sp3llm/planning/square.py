"""Candidates of models whose width is heads times head size."""

from collections.abc import Iterable
from dataclasses import replace

from sp3llm.errors import UserError
from sp3llm.models.shapes import Shape
from sp3llm.options.field import flag
from sp3llm.planning.limits import SMALL_MULTIPLE, head_dim_step
from sp3llm.planning.spending import Request, nothing_fits, with_widest_ffn

# Embedding widths that are tried beside the whole one, in quarters of it.
_EMBEDDING_QUARTERS = (3, 2)
# Sizes of heads that vLLM's attention takes on CPUs as on GPUs (docs/deploy.md). Large heads shrink
# to these; smaller ones in all steps, since half of a head, or whole ones gone, loses far more.
SERVED_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
_LARGE_HEAD_DIM = 128
# From this width on they are multiples of 64, which tensor cores like.
_WIDE_TABLE = 1024


def square_candidates(request: Request, start: Shape) -> list[Shape]:
    """Shapes whose width is heads times head size, the full embedding width first.

    Heads shrink alike where no rotary embedding forbids it, in steps of 8 (those of 128 and more to
    `SERVED_HEAD_DIMS`, unless a width is asked for), or go whole; where embeddings have a width of
    their own, three quarters and half of it are tried too. In each row hidden sizes rise from the
    widest that leaves the FFN whole; wider ones have a narrower FFN, which takes up the remainder
    of the budget.

    `start` is the shape that `by_hand.start_shape` makes. Raises UserError if no shape is allowed,
    or none fits.
    """
    rows = [
        [square for shape in row if (square := _made_square(request, shape)) is not None]
        for row in (*_shrunk_heads(request, start), _whole_heads(request, start))
    ]
    within = [shape for row in rows for shape in _within_budget(request, row)]
    if within:
        return within
    allowed = [shape for row in rows for shape in row]
    if not allowed:
        raise _nothing_square(request)
    raise nothing_fits(request, min(allowed, key=request.cost))


def _shrunk_heads(request: Request, start: Shape) -> Iterable[list[Shape]]:
    """A row of shapes with smaller heads for each embedding width."""
    limits = request.limits
    if request.family.rotary or limits.num_key_value_heads is not None:
        return
    head_dims = [limits.head_dim] if limits.head_dim else _head_dims(request)
    for width in _embedding_widths(request):
        row = replace(start, word_embed_proj_dim=width)
        yield [replace(row, head_dim=head_dim) for head_dim in head_dims]


def _head_dims(request: Request) -> list[int]:
    """Sizes that heads shrink to, if none is asked for."""
    step, dense = head_dim_step(request.family), request.dense.head_dim
    sizes = range(step, dense, step)
    asked = request.limits.hidden_size or request.limits.multiple_of
    if dense < _LARGE_HEAD_DIM or request.family.task_head is not None or asked:
        return list(sizes)
    return [head_dim for head_dim in sizes if head_dim in SERVED_HEAD_DIMS]


def _whole_heads(request: Request, start: Shape) -> list[Shape]:
    """The row of shapes with fewer KV groups, each with its query heads."""
    limits, dense = request.limits, request.dense
    if limits.num_key_value_heads is not None:
        counts: Iterable[int] = [limits.num_key_value_heads]
    elif limits.head_dim is not None:
        counts = []
    else:
        devices = limits.tensor_parallel
        counts = range(devices, dense.num_key_value_heads + 1, devices)
    row = replace(start, word_embed_proj_dim=_embedding_widths(request)[0])
    return [row.with_groups(count) for count in counts]


def _embedding_widths(request: Request) -> list[int | None]:
    """Widths of the embedding table that are tried, the widest first."""
    full = request.dense.word_embed_proj_dim
    if request.family.projections is None or not request.keeps_tie:
        return [full]
    if request.limits.word_embed_proj_dim is not None:
        return [request.limits.word_embed_proj_dim]
    if request.limits.only_width:
        return [full]
    multiple = 64 if full >= _WIDE_TABLE else SMALL_MULTIPLE
    narrower = [full * quarters // 4 // multiple * multiple for quarters in _EMBEDDING_QUARTERS]
    return [full, *(width for width in dict.fromkeys(narrower) if 0 < width < full)]


def _made_square(request: Request, shape: Shape) -> Shape | None:
    """The shape with the width that its heads make; None where that is not allowed."""
    width, asked = shape.num_attention_heads * shape.head_dim, request.limits.hidden_size
    if (asked and asked != width) or width % (request.limits.multiple_of or 1):
        return None
    if width > request.dense.hidden_size:  # Qwen3's heads are wider together than the stream
        return None
    # Hugging Face builds the projections only where the widths differ (docs/design.md 3.5).
    if shape.tie_word_embeddings and shape.word_embed_proj_dim == width:
        return None
    square = shape.with_width(width)
    return square if shape.tie_word_embeddings else square.untied()


def _within_budget(request: Request, row: list[Shape]) -> list[Shape]:
    """Of shapes that rise in width the widest within the budget, and wider ones with less FFN."""
    fitting = [shape for shape in row if request.cost(shape) <= request.budget]
    if request.keeps_ffn:
        return fitting[-1:]
    cut = [with_widest_ffn(request, shape) for shape in row[len(fitting) :]]
    return fitting[-1:] + [shape for shape in cut if shape not in (None, request.dense)]


def _nothing_square(request: Request) -> UserError:
    limits, dense, family = request.limits, request.dense, request.family
    names = ("hidden_size", "head_dim", "num_key_value_heads", "word_embed_proj_dim", "multiple_of")
    given = ["--square"] if limits.square else []
    given += [
        f"{flag(name)} {getattr(limits, name)}"
        for name in names
        if getattr(limits, name) is not None
    ]
    whole = dense.head_dim * dense.num_attention_heads // dense.num_key_value_heads
    step = head_dim_step(family)
    shrunk = (
        f"{step * dense.num_attention_heads} (heads of {step}, {2 * step}, ... dimensions) or of "
    )
    tied = (
        ", and a table that stays tied cannot be as wide as the stream"
        if family.projections and request.keeps_tie
        else ""
    )
    return UserError(
        f"No shape is allowed by {', '.join(given)}: the width is to be heads times head size, "
        f"so a multiple of {'' if family.rotary else shrunk}{whole} (whole heads), and "
        f"{dense.hidden_size} at most{tied}; change or leave out one of them."
    )
