"""What a trial says of the model that all the text makes."""

import pytest
import torch

from sp3llm.compression.trials import Trial, losses_of


def regression_errors(tokens: int, inputs: int, seed: int) -> tuple[float, float]:
    """Mean squared error, halved as divergences are, of least squares on other tokens and on its
    own.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(count, inputs, generator=generator, dtype=torch.float64)
        return x, x.sum(1) + torch.randn(count, generator=generator, dtype=torch.float64)

    x, y = drawn(tokens)
    solution = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    own = (y - x @ solution).square().mean().item() / 2
    x, y = drawn(4000)
    return (y - x @ solution).square().mean().item() / 2, own


def mean_errors(tokens: int, inputs: int = 20) -> tuple[float, float]:
    found = torch.tensor([regression_errors(tokens, inputs, seed) for seed in range(60)])
    return tuple(found.mean(0).tolist())


def test_a_trial_of_little_text_says_what_more_of_it_makes():
    other, own = mean_errors(200)
    for times in (2, 5):
        expected, _ = mean_errors(200 * times)
        (found,) = losses_of([Trial((other,), (own,), None)], 1 / times)
        assert found == pytest.approx(expected, rel=0.02)
        assert expected < 0.97 * other


def test_a_trial_of_all_the_text_says_what_it_lost():
    trials = [Trial((0.4, 0.2), (0.1, 0.1), None), Trial((0.5, 0.3), (0.2, 0.0), None)]
    assert losses_of(trials) == pytest.approx([0.3, 0.4])
    by_text = [Trial((0.4, 0.2), (0.1, 0.1), (0.4, 0.2)), Trial((0.5, 0.3), (0.2, 0.0), (0.5, 0.3))]
    assert losses_of(by_text) == pytest.approx([0.3, 0.4])
    assert losses_of(by_text, 0.5) == pytest.approx([0.3 - 0.05, 0.4 - 0.075])
