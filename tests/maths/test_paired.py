"""How trials are compared: by divergences, and by text where text tells."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sp3llm.maths.paired import weighed_losses

SEEDS = st.integers(0, 2**16)


@given(SEEDS, st.integers(2, 40))
def test_text_that_says_the_same_changes_nothing(seed, windows):
    """Whatever is common to all candidates, the difficulty of a window among it, is no news."""
    generator = torch.Generator().manual_seed(seed)
    divergences_CW = torch.rand(3, windows, generator=generator, dtype=torch.float64) + 0.1
    common_W = torch.randn(windows, generator=generator, dtype=torch.float64)
    found_C = weighed_losses(divergences_CW, divergences_CW + common_W)
    assert torch.allclose(found_C, divergences_CW.mean(1), rtol=1e-12)


@given(SEEDS)
def test_what_text_tells_beyond_its_error_counts(seed):
    """The second diverges more, and loses so much less on every window that it is better."""
    generator = torch.Generator().manual_seed(seed)
    noise_CW = 1e-4 * torch.randn(2, 30, generator=generator, dtype=torch.float64)
    divergences_CW = torch.tensor([[0.020], [0.025]], dtype=torch.float64).expand(2, 30)
    excess_CW = torch.tensor([[0.034], [0.026]], dtype=torch.float64) + noise_CW
    first, second = weighed_losses(divergences_CW, excess_CW).tolist()
    assert second < first == pytest.approx(0.020)


@given(SEEDS)
def test_noise_of_text_does_not_count(seed):
    """Where windows say now this and now that, divergences alone decide."""
    generator = torch.Generator().manual_seed(seed)
    signs_W = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(5)
    size = 0.1 + torch.rand(1, generator=generator, dtype=torch.float64)
    divergences_CW = torch.tensor([[0.020], [0.025]], dtype=torch.float64).expand(2, 10)
    excess_CW = torch.stack([0 * signs_W, size * signs_W])
    assert torch.equal(weighed_losses(divergences_CW, excess_CW), divergences_CW.mean(1))


def test_of_one_window_nothing_is_told():
    divergences_CW = torch.tensor([[0.2], [0.3]], dtype=torch.float64)
    found_C = weighed_losses(divergences_CW, torch.tensor([[0.5], [0.1]], dtype=torch.float64))
    assert torch.equal(found_C, divergences_CW[:, 0])
