"""Products of bfloat16 numbers, factors in float32, and few ridges instead of many: as good."""

import pytest
import torch

from sp3llm.maths.moments import add_second_moment, column_sums
from sp3llm.maths.products import product, symmetric_product
from sp3llm.maths.refit import float32_factor, gram_tensors, ridge_solution, squared_error
from sp3llm.maths.ridge import RIDGES, ridge_errors, ridge_fit, search_ridge
from sp3llm.maths.unit_selection import drop_units, select_units
from tests.compression.test_refit import gram_of, normal
from tests.conftest import relative_error

# Of a sum over the most tokens below in float32, each step of which rounds by 2^-24 at random.
FLOAT32 = 5000**0.5 * 2**-24


def uneven(tokens: int, width: int, seed: int = 0, orders: float = 4) -> torch.Tensor:
    """Tokens whose channels differ in size by so many orders of magnitude, float32."""
    mix = normal(width, width, seed=seed + 50) / width**0.5
    sizes = torch.logspace(-orders / 2, orders / 2, width)
    return (normal(tokens, width, seed=seed) * sizes @ mix).float()


def test_products_of_bfloat16_numbers_are_exact_but_for_their_sum():
    a, b = normal(3000, 40).bfloat16(), normal(3000, 24, seed=1).bfloat16()
    exact = a.double().T @ b.double()
    assert product(a, b).dtype == torch.float32
    assert relative_error(product(a, b).double(), exact) < FLOAT32
    assert relative_error(symmetric_product(a, a).double(), a.double().T @ a.double()) < FLOAT32


def test_a_float32_operand_beside_a_bfloat16_one_keeps_sixteen_bits():
    a, b = normal(3000, 40).bfloat16(), normal(3000, 24, seed=1).float()
    exact = a.double().T @ b.double()
    assert relative_error(product(a, b).double(), exact) < 2**-16
    assert relative_error(product(b, a).double(), exact.T) < 2**-16
    rounded = a.double().T @ b.bfloat16().double()
    assert relative_error(rounded, exact) > 2**-11  # what a plain bfloat16 product would lose


def test_moments_and_sums_of_bfloat16_tokens_are_those_of_the_same_numbers():
    x = uneven(5000, 32).bfloat16()
    total = torch.zeros(32, 32, dtype=torch.float64)
    add_second_moment(total, x)
    assert relative_error(total, x.double().T @ x.double()) < FLOAT32
    assert relative_error(column_sums(x), x.double().sum(0)) < FLOAT32


@pytest.mark.parametrize("weighted", [False, True])
def test_a_bfloat16_gram_is_that_of_tokens_rounded_once(weighted):
    # Of four orders the squares of the least would leave no digit in a float32 sum.
    a, y = uneven(5000, 24, orders=2).bfloat16(), uneven(5000, 8, seed=3)
    weight = normal(5000, seed=4).exp().float() if weighted else None
    root = torch.ones(5000) if weight is None else weight.sqrt()
    rounded_a = (a * root[:, None]).bfloat16().double()
    rounded_y = (y * root[:, None]).bfloat16().double()
    found = gram_of(a, y, weight)
    root = root.double()
    exact = (
        rounded_a.T @ rounded_a,
        rounded_a.T @ rounded_y,
        root @ rounded_a,
        root @ rounded_y,
        rounded_y.square().sum(),
        root.square().sum(),
    )
    for mine, other in zip(gram_tensors(found), exact, strict=True):
        # Sums over tokens take the roots of the weights in sixteen bits.
        assert relative_error(mine, other) < (2**-16 if mine.dim() == 1 else FLOAT32)
    assert torch.linalg.eigvalsh(found.inputs_PP).min() > 0


def test_a_fit_of_bfloat16_tokens_misses_hardly_more_than_one_of_float64_tokens():
    truth = normal(24, 8, seed=5)
    a, held = (uneven(count, 24, count, 2).bfloat16() for count in (4000, 1000))
    y = (a.double() @ truth + normal(4000, 8, seed=6)).float()
    held_y = (held.double() @ truth + normal(1000, 8, seed=7)).float()
    prior = torch.zeros(24, 8, dtype=torch.float64)
    low = ridge_fit(gram_of(a, y), gram_of(held, held_y), prior, dtype=torch.float32)
    exact = gram_of(held.double(), held_y.double())
    high = ridge_fit(gram_of(a.double(), y.double()), exact, prior)
    exact = gram_of(held.double(), held_y.double())
    missed = [squared_error(exact, fit.solution_PQ, None) for fit in (low, high)]
    assert missed[0] == pytest.approx(missed[1], rel=1e-3)


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("intercept", [False, True])
def test_a_float32_factor_solves_as_well_as_bfloat16_can_tell(ridge, intercept):
    a, y = uneven(3000, 60), normal(3000, 20, seed=1).float()
    gram, prior = gram_of(a.double(), y.double()), normal(60, 20, seed=2)
    exact, constant, _ = ridge_solution(gram, prior, ridge, intercept)
    found, its_constant, used = ridge_solution(gram, prior, ridge, intercept, torch.float32)
    assert used == ridge
    # By what the errors do, as the fit weighs them: a direction that nothing sees is free.
    missed = ((found - exact) * (gram.inputs_PP @ (found - exact))).sum()
    assert missed < 1e-9 * (exact * (gram.inputs_PP @ exact)).sum()
    if intercept:
        assert relative_error(its_constant, constant) < 1e-3


def test_where_float32_finds_no_factor_float64_does():
    """Two inputs that differ in the ninth digit."""
    a = normal(200, 6)
    a[:, 1] = a[:, 0] * (1 + 1e-9) + 1e-9 * normal(200, seed=1)
    gram, prior = gram_of(a, normal(200, 3, seed=2)), torch.zeros(6, 3, dtype=torch.float64)
    assert float32_factor(gram.inputs_PP, 0.0)[0] is None
    exact, _, used = ridge_solution(gram, prior, 0.0, False)
    found, _, its = ridge_solution(gram, prior, 0.0, False, torch.float32)
    assert torch.equal(found, exact)
    assert its == used == 0.0


@pytest.mark.parametrize("best", [*RIDGES, float("inf")])
@pytest.mark.parametrize("start", [None, *RIDGES, float("inf")])
def test_the_search_finds_the_best_ridge_wherever_it_begins(best, start):
    """An error with one valley, as a function of the ridge."""
    asked = []

    def try_all(ridges):
        asked.extend(ridges)
        place = {ridge: index for index, ridge in enumerate((*RIDGES, float("inf")))}
        miss = {ridge: abs(place[ridge] - place[best]) for ridge in ridges}
        return {
            ridge: (ridge, miss[ridge] - abs(place[float("inf")] - place[best])) for ridge in ridges
        }

    tried = search_ridge(try_all, start)
    assert len(asked) == len(set(asked)) == len(tried)
    if best != float("inf"):
        assert min(tried, key=lambda ridge: tried[ridge][1]) == best
    else:
        assert all(more >= 0 for _, more in tried.values())
    if start == best:
        assert len(asked) <= 3


def test_ridges_are_compared_by_combinations_of_many_outputs_as_by_all_of_them(monkeypatch):
    truth, prior = normal(40, 300, seed=1), normal(40, 300, seed=2)
    a, held = normal(90, 40, seed=3), normal(60, 40, seed=4)
    grams = [
        gram_of(x, x @ (prior + 0.2 * truth) + 2 * normal(len(x), 300, seed=5 + len(x)))
        for x in (a, held)
    ]
    few = ridge_errors(*grams, prior, None, RIDGES)
    monkeypatch.setattr("sp3llm.maths.ridge._SKETCH", 300)
    exact = ridge_errors(*grams, prior, None, RIDGES)
    best = min(exact, key=lambda ridge: exact[ridge][1])
    assert min(few, key=lambda ridge: few[ridge][1]) == best
    spread = max(more for _, more in exact.values()) - exact[best][1]
    for ridge in RIDGES:
        assert few[ridge][1] == pytest.approx(exact[ridge][1], abs=0.1 * spread)


@pytest.mark.parametrize("unit", [1, 4])
def test_what_dropped_units_cost_is_what_a_refit_without_them_misses(unit):
    a, y = normal(500, 24), normal(500, 6, seed=1)
    gram, prior = gram_of(a, y), torch.zeros(24, 6, dtype=torch.float64)
    whole = torch.linalg.lstsq(a, y).solution
    missed = (y - a @ whole).square().sum(0)
    rounds = list(drop_units(gram, prior, 2, unit, 0.0))
    stays = torch.ones(24 // unit, dtype=torch.bool)
    for gone, grown in rounds:
        assert stays[gone].all()
        stays[gone] = False
        kept = (stays.nonzero() * unit + torch.arange(unit)).reshape(-1)
        part = torch.linalg.lstsq(a[:, kept], y).solution
        expected = (y - a[:, kept] @ part).square().sum(0) - missed
        assert torch.allclose(grown, expected, rtol=1e-9)
    assert stays.sum() == 2


def test_units_are_judged_by_some_outputs_and_told_of_all():
    a, y = normal(500, 24), normal(500, 6, seed=1)
    prior = torch.zeros(24, 6, dtype=torch.float64)
    by_some = list(drop_units(gram_of(a, y), prior, 2, 1, 0.0, judging=4))
    alone = list(drop_units(gram_of(a, y[:, :4]), prior[:, :4], 2, 1, 0.0))
    for (gone, grown), (expected, four) in zip(by_some, alone, strict=True):
        assert torch.equal(gone, expected)
        assert torch.allclose(grown[:4], four)
        assert (grown[4:] > 0).all()


def test_units_are_chosen_in_float32_as_in_float64():
    a, y = uneven(3000, 80), normal(3000, 20, seed=1).float()
    gram, prior = gram_of(a, y), normal(80, 20, seed=2)
    exact = select_units(gram, prior, 40, 1, "obs", 1e-4)
    assert torch.equal(select_units(gram, prior, 40, 1, "obs", 1e-4, torch.float32), exact)
