"""A step of a head: sums that stream, and steps that lead to what the other model says."""

from itertools import pairwise

import pytest
import torch

from sp3llm.maths.head_step import add_to_head, no_tokens, stepped_head
from sp3llm.maths.losses import distribution_divergences

# Many, so that what a step takes as known beforehand is next to nothing.
TOKENS, VOCABULARY, COLUMNS = 20_000, 30, 6


def readings(constant: bool = True) -> torch.Tensor:
    """What a head reads; with a channel that is the same for every token, or next to it."""
    torch.manual_seed(0)
    read_NE = torch.randn(TOKENS, COLUMNS, dtype=torch.float64)
    if constant:
        read_NE[:, 0] = 3 + 0.01 * read_NE[:, 0]
    return read_NE


def sums_of(read_NE, table_VE, wanted_NV, divisor=1.0, pieces=1):
    sums = no_tokens(*table_VE.shape, torch.device("cpu"))
    said_NV = read_NE @ table_VE.T / divisor
    for piece in zip(*(t.chunk(pieces) for t in (read_NE, said_NV, wanted_NV)), strict=True):
        add_to_head(sums, *piece)
    return sums


def steps(read_NE, table_VE, wanted_NV, count, divisor=1.0):
    """Divergences before each of some steps, and after them."""

    def divergence() -> float:
        said_NV = read_NE @ table_VE.T / divisor
        return distribution_divergences([said_NV], wanted_NV)[0].mean().item()

    found = [divergence()]
    for _ in range(count):
        sums = sums_of(read_NE, table_VE, wanted_NV, divisor)
        table_VE = stepped_head(table_VE, sums, divisor)
        found.append(divergence())
    return found


def tables():
    torch.manual_seed(1)
    own, other = (torch.randn(VOCABULARY, COLUMNS, dtype=torch.float64) for _ in range(2))
    return own, own + 0.3 * other


def test_sums_over_pieces_are_those_over_all():
    read_NE, (small_VE, dense_VE) = readings(), tables()
    wanted_NV = read_NE @ dense_VE.T
    whole, streamed = (sums_of(read_NE, small_VE, wanted_NV, pieces=n) for n in (1, 7))
    expected_NV = (read_NE @ small_VE.T).softmax(-1)
    assert torch.allclose(whole.said_V, expected_NV.sum(0))
    assert torch.allclose(whole.moment_EE, read_NE.T @ read_NE)
    for one, other in zip(whole.tensors, streamed.tensors, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-3)


def test_who_says_the_same_stays_as_it_is():
    read_NE, (small_VE, _) = readings(), tables()
    sums = sums_of(read_NE, small_VE, read_NE @ small_VE.T)
    torch.testing.assert_close(stepped_head(small_VE, sums), small_VE, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("divisor", [1.0, 8.0])
def test_steps_lead_to_what_the_other_says(constant, divisor):
    read_NE, (small_VE, dense_VE) = readings(constant), tables()
    found = steps(read_NE, divisor * small_VE, read_NE @ dense_VE.T, 40, divisor)
    assert all(after < before for before, after in pairwise(found))
    assert found[1] < 0.8 * found[0]
    assert found[-1] < 0.05 * found[0]


def test_a_bias_on_each_token_is_taken_at_once():
    """Along what is next to constant, of which the step itself would take a part."""
    read_NE, (small_VE, _) = readings(), tables()
    torch.manual_seed(2)
    biases_V = torch.randn(VOCABULARY, dtype=torch.float64)
    found = steps(read_NE, small_VE, read_NE @ small_VE.T + biases_V, 1)
    assert found[1] < 0.1 * found[0]


def test_tokens_that_neither_expects_stay_as_they_are():
    read_NE, (small_VE, dense_VE) = readings(), tables()
    for table_VE in (small_VE, dense_VE):
        table_VE[-5:] = 0
        table_VE[-5:, 0] = -20
    sums = sums_of(read_NE, small_VE, read_NE @ dense_VE.T)
    change_VE = stepped_head(small_VE, sums) - small_VE
    assert change_VE[-5:].abs().max() < 1e-6 * change_VE[:-5].abs().max()


def test_sums_of_bfloat16_are_next_to_those_of_what_was_rounded():
    read_NE, (small_VE, dense_VE) = readings().bfloat16(), tables()
    said_NV, wanted_NV = ((read_NE.double() @ t.T).bfloat16() for t in (small_VE, dense_VE))
    found, exact = (no_tokens(VOCABULARY, COLUMNS, torch.device("cpu")) for _ in range(2))
    for piece in zip(*(t.split(500) for t in (read_NE, said_NV, wanted_NV)), strict=True):
        add_to_head(found, *piece)
        add_to_head(exact, *(t.double() for t in piece))
    for one, other in zip(found.tensors, exact.tensors, strict=True):
        assert (one - other).norm() < 1e-3 * other.norm()
