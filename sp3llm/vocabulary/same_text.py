"""The same text in the tokens of two vocabularies, of which one is some of the other's.

Losses of models with different tokenizers compare where both predict exactly the same text, summed
over it. Windows of text are drawn in the dense model's tokens, and every one is encoded anew, word
by word: the words that the dense tokenizer cut the text into, which the restricted one cuts it into
too. A word whose tokens are all kept keeps them, of others the restricted model makes new ones.
What a word begins or ends with outside the window, and the rest of a character whose bytes the
window cuts in two, is not there for either. Where no BOS goes before a window, its first token is
not predicted; in the other tokens, neither is what its text becomes, and a boundary between tokens
is kept behind it.
"""

import bisect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sp3llm.text.windows import Windows


@dataclass(frozen=True)
class SameText:
    """Windows of text in the tokens of a restricted vocabulary, and what of it is predicted in
    these and in the dense tokens.

    W windows, S dense tokens and R restricted ones a window, at most.
    """

    tokens_WR: Tensor
    """Restricted ids, int64, padded at the end."""
    counted_WR: Tensor
    """Whether a token's loss counts, bool, `(W, R - 1)`: its own is the one before its place."""
    dense_counted_WS: Tensor
    """The same of the dense tokens, `(W, S - 1)`."""
    bytes: int
    """Of the text that is predicted, in all windows together; special tokens have none."""

    @property
    def dense_tokens(self) -> int:
        """Dense tokens that are predicted."""
        return int(self.dense_counted_WS.sum())

    @property
    def tokens(self) -> int:
        """Restricted tokens that are predicted."""
        return int(self.counted_WR.sum())

    def nats(self, losses_WR: Tensor) -> Tensor:
        """Restricted tokens' losses, `(W, R - 1)`, summed in each window and divided by the mean
        number of dense tokens in one: nats a dense token, `(W, 1)`, whose mean is that of all.
        """
        return (losses_WR * self.counted_WR).sum(1, keepdim=True) / self._dense_tokens_a_window

    def dense_nats(self, losses_WS: Tensor) -> Tensor:
        """The same of the dense tokens' losses, `(W, S - 1)`."""
        nats_W1 = (losses_WS * self.dense_counted_WS).sum(1, keepdim=True)
        return nats_W1 / self._dense_tokens_a_window

    def describe(self, perplexities: Mapping[str, float]) -> dict[str, Any]:
        """What `HeldOut.describe` says."""
        tokens_a_byte = self.dense_tokens / self.bytes if self.bytes else math.nan
        bits = {name: math.log2(value) * tokens_a_byte for name, value in perplexities.items()}
        return {
            "dense_tokens": self.dense_tokens,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "bits_a_byte": bits,
        }

    @property
    def _dense_tokens_a_window(self) -> float:
        return self.dense_tokens / len(self.tokens_WR)


@dataclass(frozen=True)
class HeldOut:
    """Held-out text, as a dense model and one that was made from it read it."""

    windows: Windows
    """In the dense model's tokens."""
    same: SameText | None
    """In those of the other one, where it has another vocabulary; None: they are the same."""

    @property
    def tokens(self) -> Tensor:
        """What the dense model reads, token ids, `(windows, tokens)`."""
        return self.windows.tokens

    @property
    def small_tokens(self) -> Tensor:
        """What the other one reads, with what does not count behind the end of a window's text."""
        return self.tokens if self.same is None else self.same.tokens_WR

    def dense_nats(self, losses: Tensor) -> Tensor:
        """Of the dense model's losses, `(windows, tokens - 1)`, those that the other one's compare
        with, a row a window, whose mean is that of all: nats a dense token.
        """
        return losses if self.same is None else self.same.dense_nats(losses)

    def small_nats(self, losses: Tensor) -> Tensor:
        """The same of the other one's losses."""
        return losses if self.same is None else self.same.nats(losses)

    def describe(self, **perplexities: float) -> dict[str, Any] | None:
        """What `sp3llm.json` records of text in two vocabularies, and by model what its perplexity
        a dense token comes to; None where there is one.
        """
        return None if self.same is None else self.same.describe(perplexities)


def held_out_text(
    draw: Callable[..., Windows],
    names: str,
    tokenizers: tuple[Any, Any],
    samples: int,
    seq_len: int,
    exclude: frozenset[str],
    positions: int,
) -> HeldOut:
    """Held-out windows, drawn by `draw` (an objective's `evaluation_windows`) with the first of two
    tokenizers and encoded anew with the second, which has some of its tokens or all.

    What `draw` takes and raises holds here; `positions` is how many tokens a model takes.
    """
    dense, small = tokenizers
    is_restricted = dense.get_vocab() != small.get_vocab()
    windows = draw(names, dense, samples, seq_len, exclude, words=is_restricted)
    if not is_restricted:
        return HeldOut(windows, None)
    return HeldOut(windows, same_text(windows, dense, small, positions))


def calibrated_documents(
    draw: Callable[..., Windows],
    names: str,
    tokenizers: tuple[Any, Any],
    samples: int,
    seq_len: int,
    seed: int,
) -> frozenset[str]:
    """Content hashes of documents that held-out text is to share none of: those that either of two
    tokenizers, the dense model's and one with some of its tokens, draws calibration windows from by
    `draw` (an objective's `calibration_windows`).

    The dense one, whose windows hold most text, needs as many documents as any other, so that what
    is held out does not depend on which tokens stay.
    """
    dense, small = tokenizers
    different = [dense] if dense is small else [dense, small]
    return frozenset().union(
        *(draw(names, one, samples, seq_len, seed).documents for one in different)
    )


def same_text(windows: Windows, dense: Any, small: Any, positions: int) -> SameText:
    """Windows that were drawn with the tokenizer `dense` (`evaluation_windows(..., words=True)`) in
    the tokens of `small`, which has some of its tokens.

    A window that takes more than `positions` of these is predicted as far as they go, in both.
    """
    encoder = _Encoder.of(dense, small)
    marks = windows.begins_word.clone()
    if not windows.begins_with_bos:
        marks[:, 1] = True
    rows, counted, dense_counted, predicted_bytes = [], [], [], 0
    for ids, begins in zip(windows.tokens.tolist(), marks.tolist(), strict=True):
        length, row = encoder.fitting(ids, begins, positions)
        given = 1 if windows.begins_with_bos else len(encoder.encoded(ids[:1], begins))
        rows.append(row)
        counted.append([*[False] * (given - 1), *[True] * (len(row) - given)])
        dense_counted.append([place < length for place in range(1, len(ids))])
        predicted_bytes += sum(encoder.bytes_of(token) for token in ids[1:length])
    longest = max(map(len, rows))
    return SameText(
        torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
        torch.tensor([row + [False] * (longest - 1 - len(row)) for row in counted]),
        torch.tensor(dense_counted),
        predicted_bytes,
    )


@dataclass(frozen=True)
class _Encoder:
    """What makes restricted tokens of dense ones."""

    tokens: Mapping[int, str]
    """Dense tokens by id."""
    small_ids: Mapping[str, int]
    """Restricted ids by token."""
    model: Any
    """What makes tokens of a word, of the restricted tokenizer."""
    whole: frozenset[int]
    """Dense ids that become the same token, whatever is beside them: added ones, the unknown one
    and single bytes."""
    textless: frozenset[int]
    """Of those the special ones and the unknown one."""
    bytewise: bool
    """Whether every character of a token stands for a byte of text."""
    prefix: str | None
    """What a token begins with that continues a word."""
    of_texts: dict[str, list[int]] = field(default_factory=dict)
    """Of words that were encoded before, by their text."""

    @staticmethod
    def of(dense: Any, small: Any) -> "_Encoder":
        parsed = json.loads(dense.backend_tokenizer.to_str())
        model, ids = parsed["model"], dense.get_vocab()
        unknown = model.get("unk_token")
        if model.get("unk_id") is not None:
            unknown = model["vocab"][model["unk_id"]][0]
        unknown = {ids[unknown]} if unknown in ids else set()
        added = {entry["id"]: entry["special"] for entry in parsed["added_tokens"]}
        alone = set()
        if model.get("byte_fallback"):
            alone = {ids[name] for byte in range(256) if (name := f"<0x{byte:02X}>") in ids}
        return _Encoder(
            tokens={token_id: token for token, token_id in ids.items()},
            small_ids=small.get_vocab(),
            model=small.backend_tokenizer.model,
            whole=frozenset(added) | unknown | alone,
            textless=frozenset(token for token, special in added.items() if special) | unknown,
            bytewise=_names(parsed["pre_tokenizer"], "ByteLevel")
            or _names(parsed["decoder"], "ByteLevel"),
            prefix=model["continuing_subword_prefix"] if model["type"] == "WordPiece" else None,
        )

    def encoded(self, ids: Sequence[int], begins_word: Sequence[bool]) -> list[int]:
        """Restricted ids of the text of dense ones, of which some are known to begin a word."""
        row: list[int] = []
        word: list[int] = []
        for token_id, begins in zip(ids, begins_word, strict=False):
            if begins or token_id in self.whole:
                row += self._of_word(word)
                word = []
            if token_id in self.whole:
                row.append(self.small_ids[self.tokens[token_id]])
            else:
                word.append(token_id)
        return row + self._of_word(word)

    def fitting(
        self, ids: Sequence[int], begins_word: Sequence[bool], positions: int
    ) -> tuple[int, list[int]]:
        """How many of the dense ids become `positions` restricted ones at most, and these."""

        def taken(length: int) -> int:
            return len(self.encoded(ids[:length], begins_word))

        length = len(ids)
        if taken(length) > positions:
            length = bisect.bisect_right(range(length), positions, lo=1, key=taken) - 1
        while taken(length) > positions:  # a cut word may take more than all of it
            length -= 1
        return length, self.encoded(ids[:length], begins_word)

    def _of_word(self, word: Sequence[int]) -> list[int]:
        """Restricted ids of a word's tokens, or of those of them that are there: these where all
        are kept, else what the restricted model makes of their text.
        """
        tokens = [self.tokens[token_id] for token_id in word]
        kept = [self.small_ids.get(token) for token in tokens]
        if None not in kept:
            return kept
        text = "".join(map(self._text, tokens))
        if text not in self.of_texts:
            self.of_texts[text] = [token.id for token in self.model.tokenize(text)]
        return self.of_texts[text]

    def _text(self, token: str) -> str:
        """What a token says, without the sign that it continues a word."""
        return token if self.prefix is None else token.removeprefix(self.prefix)

    def bytes_of(self, token_id: int) -> int:
        """Bytes of text that a dense token stands for."""
        token = self.tokens[token_id]
        if token_id in self.textless:
            return 0
        if token_id in self.whole and token[:3] == "<0x":
            return 1
        if self.bytewise and token_id not in self.whole:
            return len(token)
        return len(self._text(token).replace("\u2581", " ").encode())


def _names(settings: Any, kind: str) -> bool:
    """Whether nested settings of a tokenizer have a part of that type."""
    if isinstance(settings, list):
        return any(_names(part, kind) for part in settings)
    if not isinstance(settings, dict):
        return False
    return settings.get("type") == kind or any(_names(part, kind) for part in settings.values())
