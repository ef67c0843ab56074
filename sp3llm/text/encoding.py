"""Rows of a task as token ids: texts, pairs, and the stretches of a context with its question."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sp3llm.errors import UserError, reason
from sp3llm.text.examples import Examples
from sp3llm.text.task_rows import Row, digests

if TYPE_CHECKING:
    from torch import Tensor

# Tokens that neighbouring stretches of a context share, where rows are as long as SQuAD's scripts
# have them; a third of shorter ones.
_STRIDE, _STRIDE_PART = 128, 3


@dataclass(frozen=True)
class Stretches:
    """Contexts with their questions, in as many stretches as they need."""

    examples: Examples
    """A row each; the labels are the tokens where the first answer begins and ends, or 0 and 0."""
    rows: tuple[int, ...]
    """By stretch the number of its row."""
    offsets: "Tensor"
    """By stretch and token where the token begins and ends in the context, characters, `(stretches,
    tokens, 2)`, int64; -1 for tokens that are not of the context."""


def encoded(
    rows: Sequence[Row], tokenizer: Any, seq_len: int, labels: Sequence[float] | None = None
) -> Examples:
    """Texts or pairs, cut to `seq_len` tokens, special ones included, with labels where given.

    Raises UserError if the tokenizer cannot pad, or leaves a text no room.
    """
    import torch

    columns = [list(texts) for texts in zip(*(row.texts for row in rows), strict=True)]
    special = tokenizer.num_special_tokens_to_add(pair=len(columns) > 1)
    if seq_len <= special:  # the library would cut nothing
        raise UserError(
            f"Expected --seq-len of at least {special + 1}, room for a token beside the "
            f"tokenizer's {special} special ones, found {seq_len}: give a larger number."
        )
    found = tokenizer(*columns, truncation=True, max_length=seq_len, verbose=False)
    return Examples(
        **_padded(found, tokenizer),
        labels=None if labels is None else torch.tensor(labels),
        documents=digests(rows),
    )


def encoded_stretches(rows: Sequence[Row], tokenizer: Any, seq_len: int) -> Stretches:
    """Questions with stretches of their contexts of `seq_len` tokens at most.

    Raises UserError if the tokenizer does not say where tokens stand, or a question leaves no room.
    """
    import torch

    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "Expected a tokenizer of the tokenizers library for a task of answers in a text, "
            "which tells where tokens stand, found another: save it with a tokenizer.json."
        )
    try:
        found = tokenizer(
            [row.texts[0].strip() for row in rows],
            [row.texts[1] for row in rows],
            truncation="only_second",
            max_length=seq_len,
            stride=min(_STRIDE, seq_len // _STRIDE_PART),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
    except BaseException as error:  # the library panics where a question fills the row
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"Expected questions that leave room for a context in {seq_len} tokens, found a longer "
            f"one ({reason(error, 80)}): raise --seq-len."
        ) from error
    owners = tuple(found["overflow_to_sample_mapping"])
    padded = _padded(found, tokenizer)
    offsets = torch.full((*padded["input_ids"].shape, 2), -1)
    for at, spans in enumerate(found["offset_mapping"]):
        of_context = [part == 1 for part in found.sequence_ids(at)]
        kept = torch.tensor(of_context)
        offsets[at, : len(spans)][kept] = torch.tensor(spans)[kept]
    answers = [rows[owner].label for owner in owners]
    spans = [
        _answer_tokens(offsets[at], answer["answer_start"][0], len(answer["text"][0]))
        for at, answer in enumerate(answers)
    ]
    examples = Examples(**padded, labels=torch.tensor(spans), documents=digests(rows))
    return Stretches(examples, owners, offsets)


def _answer_tokens(offsets: "Tensor", start: int, length: int) -> tuple[int, int]:
    """First and last token of an answer; 0 and 0 where the stretch does not hold all of it."""
    begins, ends = offsets.unbind(1)
    inside = ((begins >= 0) & (begins < start + length) & (ends > start)).nonzero()[:, 0]
    if not len(inside) or begins[inside[0]] > start or ends[inside[-1]] < start + length:
        return 0, 0
    return int(inside[0]), int(inside[-1])


def _padded(found: Any, tokenizer: Any) -> dict[str, Any]:
    """Token ids, mask and types of rows, padded at the end to the longest."""
    import torch

    if tokenizer.pad_token_id is None:
        raise UserError(
            "Expected a tokenizer with a padding token, which rows of unlike lengths need, found "
            "none: set pad_token in its tokenizer_config.json."
        )
    fills = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0}
    if "token_type_ids" in found:
        fills["token_type_ids"] = 0
    longest = max(map(len, found["input_ids"]))
    padded: dict[str, Any] = {"token_type_ids": None}
    for name, fill in fills.items():
        rows = [list(row) + [fill] * (longest - len(row)) for row in found[name]]
        padded[name] = torch.tensor(rows, dtype=torch.int64)
    return padded
