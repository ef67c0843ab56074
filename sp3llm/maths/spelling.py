"""A distribution over words, in the pieces that words are spelled in. Tensors only.

A vocabulary that has lost some of its tokens spells them in those that stay. A model of all tokens
would say such a token at once; what it gives to the token is what a model of fewer has to give to
the token's first piece, and behind that to the next. Renormalised over the tokens that stay, its
distribution would never begin such a word.

Shape suffixes: S tokens of a window, V and K rows of the whole vocabulary and of the small one.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Below any probability that matters: its logarithm is finite. And what one may be times, at most.
_LEAST, _MOST = 1e-30, 1e30


class _Node(NamedTuple):
    """Some pieces in a row that a word begins with."""

    word: int | None
    """The word that they spell, if they spell one, by row of the whole vocabulary."""
    start: int
    """Where among all words that go on those begin that go on from here."""
    count: int
    """How many these are."""


@dataclass(frozen=True)
class Spelling:
    """How the words that a vocabulary has lost are spelled in what is left of it."""

    rows_K: Tensor
    """By row of the small vocabulary that of the whole one, int64."""
    tokens: int
    """How many rows of the small vocabulary are tokens; those behind only pad."""
    words_W: Tensor
    """Rows of the whole vocabulary of all words that are spelled, int64."""
    first_W: Tensor
    """The first piece of each, by row of the small vocabulary, int64."""
    going_on_G: Tensor
    """All words again, int64, once for each of their beginnings."""
    next_G: Tensor
    """With which piece each goes on from there, by row of the small vocabulary, int64."""
    nodes: Mapping[tuple[int, ...], _Node]
    """By their pieces, one at least."""

    @staticmethod
    def of(rows_K: Tensor, tokens: int, pieces: Mapping[int, Sequence[int]]) -> "Spelling":
        """From the pieces of each word, two at least."""
        going_on: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        ending = {}
        for word, spelled in pieces.items():
            ending[tuple(spelled)] = word
            for count in range(1, len(spelled)):
                going_on.setdefault(tuple(spelled[:count]), []).append((word, spelled[count]))
        nodes, start = {}, 0
        for prefix, members in going_on.items():
            nodes[prefix] = _Node(ending.get(prefix), start, len(members))
            start += len(members)
        for prefix, word in ending.items():
            nodes.setdefault(prefix, _Node(word, 0, 0))
        flat = [member for members in going_on.values() for member in members]

        def whole_numbers(values: Iterable[int]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.int64)

        return Spelling(
            rows_K=rows_K,
            tokens=tokens,
            words_W=whole_numbers(pieces),
            first_W=whole_numbers(spelled[0] for spelled in pieces.values()),
            going_on_G=whole_numbers(word for word, _ in flat),
            next_G=whole_numbers(piece for _, piece in flat),
            nodes=nodes,
        )


def spelled_logits(logits_SV: Tensor, tokens_S: Tensor, spelling: Spelling) -> Tensor:
    """Logits of the next piece behind each token of a window, `(S, K)`, float32, from those of a
    model of all tokens that has read the same pieces.

    `tokens_S` are rows of the small vocabulary. What was read may end within a word: the forward
    algorithm keeps how likely each beginning is, by what the model gave to the words that begin so
    where they began. The window begins with a whole token.
    """
    shares_SV = logits_SV.float().softmax(-1)
    device = shares_SV.device
    rows_K, words_W = spelling.rows_K.to(device), spelling.words_W.to(device)
    pieces_SK = shares_SV[:, rows_K]
    pieces_SK[:, spelling.tokens :] = 0
    pieces_SK.index_add_(1, spelling.first_W.to(device), shares_SV[:, words_W])

    begun = _begun(tokens_S.tolist(), spelling)
    starts = torch.tensor([one.start for one in begun], dtype=torch.int64, device=device)
    counts = torch.tensor([one.node.count for one in begun], dtype=torch.int64)
    members = [torch.arange(one.node.start, one.node.start + one.node.count) for one in begun]
    member = torch.cat([torch.zeros(0, dtype=torch.int64), *members])
    number = torch.arange(len(begun)).repeat_interleave(counts).to(device)
    given = shares_SV[starts[number], spelling.going_on_G[member].to(device)]
    ending = torch.tensor([one.node.word or 0 for one in begun], dtype=torch.int64, device=device)
    before_S = torch.arange(len(tokens_S) - 1, device=device)
    said = _Said(
        whole_S=shares_SV[before_S, rows_K[tokens_S[1:].to(device)]].tolist(),
        going_on=shares_SV.new_zeros(len(begun)).index_add_(0, number, given).tolist(),
        ending=shares_SV[starts, ending].tolist(),
    )
    whole_S, weights = _weights(begun, said)

    pieces_SK *= shares_SV.new_tensor(whole_S)[:, None]
    places = torch.tensor([one.place for one in begun], dtype=torch.int64, device=device)
    at = places[number] * pieces_SK.shape[1] + spelling.next_G[member].to(device)
    pieces_SK.view(-1).index_add_(0, at, given * shares_SV.new_tensor(weights)[number])
    return pieces_SK.clamp_min_(_LEAST).log_()


@dataclass(frozen=True)
class _Begun:
    """A beginning of words that what was read may end with."""

    place: int
    """Behind which token."""
    start: int
    """Behind which token the word began."""
    node: _Node


@dataclass(frozen=True)
class _Said:
    """What the model gave to what was read."""

    whole_S: list[float]
    """To every token but the first, as a whole one."""
    going_on: list[float]
    """By beginning: to all words that go on, where they began."""
    ending: list[float]
    """By beginning: to the word that it spells, if it spells one."""


def _begun(tokens: Sequence[int], spelling: Spelling) -> list[_Begun]:
    """All beginnings of words that a window may hold, by place."""
    begun: list[_Begun] = []
    prefixes: list[tuple[int, tuple[int, ...]]] = []
    for place, token in enumerate(tokens):
        longer = [(start, (*prefix, token)) for start, prefix in prefixes]
        if place:
            longer.append((place - 1, (token,)))
        prefixes = [(start, prefix) for start, prefix in longer if prefix in spelling.nodes]
        begun += [_Begun(place, start, spelling.nodes[prefix]) for start, prefix in prefixes]
    return begun


def _weights(begun: Sequence[_Begun], said: _Said) -> tuple[list[float], list[float]]:
    """How likely what was read ends with a whole token, behind every token; and for every
    beginning, what the probability of a word that goes on was there is times, to be what it is now.
    """
    at: list[list[int]] = [[] for _ in range(len(said.whole_S) + 1)]
    for number, one in enumerate(begun):
        at[one.place].append(number)
    longest = max((one.place - one.start for one in begun), default=1)
    # How likely all that was read so far ended with a whole token there, relative to the last.
    ends = deque([1.0], maxlen=longest)
    whole_S, weights = [1.0], [0.0] * len(begun)
    for place in range(1, len(at)):
        ended, total = ends[-1] * said.whole_S[place - 1], 0.0
        for number in at[place]:
            # Capped: after a few places where hardly anything was likely it has no bound, and what
            # it is times has vanished.
            before = min(ends[begun[number].start - place], _MOST)
            if begun[number].node.word is not None:
                ended += before * said.ending[number]
            weights[number] = before
            total += before * said.going_on[number]
        total += ended
        if total < _LEAST:  # nothing is known but that it was said
            ended, total = 1.0, 1.0
            for number in at[place]:
                weights[number] = 0.0
        ends.append(ended)
        for back in range(len(ends)):
            ends[back] /= total
        for number in at[place]:
            weights[number] = min(weights[number] / total, _MOST)
        whole_S.append(ends[-1])
    return whole_S, weights
