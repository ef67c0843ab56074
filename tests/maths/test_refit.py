"""What no ridge can mend is refused before anything is factored."""

import pytest
import torch

from sp3llm.maths.refit import (
    NotFinite,
    ridge_solution,
    ridged_factor,
    schur_complement,
)
from sp3llm.maths.ridge import ridge_fit
from sp3llm.maths.unit_selection import select_units
from tests.compression.test_refit import gram_of, normal

PRIOR = torch.zeros(3, 2, dtype=torch.float64)


def spoiled_gram(value: float):
    """The Gram of 3 inputs and 2 outputs with one entry that is no number."""
    gram = gram_of(normal(9, 3), normal(9, 2))
    gram.inputs_PP[1, 1] = value
    return gram


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "use",
    [
        lambda gram: ridged_factor(gram.inputs_PP, 1e-6),
        lambda gram: ridge_solution(gram, PRIOR, 1e-6, False),
        lambda gram: ridge_solution(gram, PRIOR, 1e-6, True),
        lambda gram: ridge_fit(gram, gram, PRIOR),
        lambda gram: select_units(gram, PRIOR, 2, 1, "obs", 1e-4),
        lambda gram: select_units(gram, PRIOR, 2, 1, "energy", 1e-4),
        lambda gram: schur_complement(gram, torch.tensor([0]), 1e-4),
    ],
    ids=["factor", "solution", "intercept", "fit", "obs", "energy", "schur"],
)
def test_a_gram_that_is_not_finite_is_refused(use, value):
    with pytest.raises(NotFinite):
        use(spoiled_gram(value))


def test_activations_that_overflow_are_refused_not_looped_over():
    gram = gram_of(torch.full((4, 3), float("inf"), dtype=torch.float64), normal(4, 2))
    with pytest.raises(NotFinite, match="NaN or infinity"):
        ridge_fit(gram, gram, PRIOR)


def test_finite_values_whose_sum_overflows_are_factored():
    gram_PP = 1e308 * torch.eye(4, dtype=torch.float64)
    assert torch.isinf(gram_PP.sum())
    factor_PP, penalty_P, ridge = ridged_factor(gram_PP, 1e-6)
    assert ridge == 1e-6
    assert torch.equal(penalty_P, torch.full((4,), 1e-6 * 1e308, dtype=torch.float64))
    assert torch.allclose(factor_PP @ factor_PP.T / 1e308, torch.eye(4).double(), rtol=1e-5)


def test_a_matrix_that_no_finite_ridge_makes_positive_definite_is_refused():
    """So large an entry beside the diagonal that the ridge overflows before it outweighs it."""
    gram_PP = torch.tensor([[1e308, 1.7e308], [1.7e308, 0]], dtype=torch.float64)
    with pytest.raises(NotFinite, match="No finite ridge"):
        ridged_factor(gram_PP, 1e-6)


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_an_input_is_multiplied_with_makes_no_difference_to_a_fit(intercept, dtype):
    a, y, prior_PQ = normal(300, 6), normal(300, 2, seed=1), normal(6, 2, seed=2)
    factors_P = torch.tensor([0.1, 30.0, 1.0, 25.0, 0.5, 7.0], dtype=torch.float64)
    found = ridge_solution(gram_of(a, y), prior_PQ, 0.1, intercept, dtype, by_input=True)
    scaled = gram_of(a * factors_P, y), prior_PQ / factors_P[:, None]
    other = ridge_solution(*scaled, 0.1, intercept, dtype, by_input=True)
    assert torch.allclose(other[0] * factors_P[:, None], found[0], rtol=1e-5, atol=1e-7)
    if intercept:
        assert torch.allclose(other[1], found[1], rtol=1e-5, atol=1e-7)
