"""What a model of all tokens gives to words, in the pieces that they are spelled in."""

import itertools

import pytest
import torch

from sp3llm.maths.spelling import Spelling, spelled_logits

# Tokens 0 to 3 of the small vocabulary are 4, 0, 1, 2 of the whole one; 3 to 6 are spelled.
ROWS = torch.tensor([4, 0, 1, 2])
WORDS = {3: (1, 2), 5: (1, 2, 3), 6: (2, 2)}


def whole_distribution(seed: int, count: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64).softmax(0)


def by_brute_force(shares: torch.Tensor, pieces: tuple[int, ...], longest: int) -> torch.Tensor:
    """What follows pieces, where words are drawn independently: over all that may be said."""
    spelled = {int(row): (small,) for small, row in enumerate(ROWS)} | WORDS
    found = torch.zeros(len(ROWS), dtype=torch.float64)
    # The first token is whole; every word has a piece at least.
    for count in range(1, longest + 1):
        for words in itertools.product(spelled, repeat=count):
            said = (pieces[0], *itertools.chain.from_iterable(spelled[word] for word in words))
            before_last = len(said) - len(spelled[words[-1]])
            # The last word reaches beyond what was read, and no word before it does.
            if before_last <= len(pieces) < len(said) and said[: len(pieces)] == pieces:
                found[said[len(pieces)]] += shares[list(words)].prod()
    return found / found.sum()


@pytest.mark.parametrize(
    "pieces", [(0, 1), (0, 1, 2), (0, 1, 2, 2), (1, 1, 2, 3), (2, 2, 2, 2), (3, 0, 1, 2)]
)
def test_the_next_piece_is_as_likely_as_all_that_may_be_said_makes_it(pieces):
    shares = whole_distribution(0)
    logits = shares.log().expand(len(pieces), -1)
    spelling = Spelling.of(ROWS, len(ROWS), WORDS)
    found = spelled_logits(logits, torch.tensor(pieces), spelling).exp()
    assert torch.allclose(found.sum(1), torch.ones(len(pieces)), atol=1e-6)
    for read in range(1, len(pieces) + 1):
        expected = by_brute_force(shares, pieces[:read], len(pieces) + 1)
        assert torch.allclose(found[read - 1].double(), expected, atol=1e-6), read


def test_where_all_tokens_stay_nothing_changes():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    spelling = Spelling.of(torch.arange(7), 7, {})
    found = spelled_logits(logits, torch.tensor([1, 2, 3, 4, 5]), spelling)
    assert torch.allclose(found, logits.log_softmax(-1), atol=1e-6)


def test_rows_that_only_pad_are_never_said():
    logits = torch.randn(2, 7, generator=torch.Generator().manual_seed(2))
    spelling = Spelling.of(ROWS, 3, {3: (1, 2)})
    found = spelled_logits(logits, torch.tensor([0, 1]), spelling)
    assert (found[:, 3] < -60).all()
    assert found.isfinite().all()


@pytest.mark.parametrize("gap", [30, 46, 90, 100, 120, 1e4])
@pytest.mark.parametrize("lost", [30, 60, 88, 96, 110, 1e4])
@pytest.mark.parametrize("read", [[0, 1, 2], [0, 1, 2, 3, 2, 3, 2, 3], [1, 1, 1, 1, 1, 1]])
def test_what_no_model_would_say_leaves_finite_logits(gap, lost, read):
    words = {3: (1, 2, 3), 5: (1, 2, 3, 2), 6: (1, 1, 1, 1, 1)}
    logits = torch.full((len(read), 7), -float(gap))
    logits[:, list(words)] = -float(lost)
    logits[:, 4] = 0
    spelling = Spelling.of(ROWS, len(ROWS), words)
    assert spelled_logits(logits, torch.tensor(read), spelling).isfinite().all()
