"""Merged heads give what heads that can be merged give, and elsewhere the least error there is."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sp3llm.maths.merging import Attention, merge_heads

E, D = 8, 12


def attention(heads, groups, seed):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Attention(
        random(heads * E, D), random(groups * E, D), random(groups * E, D), random(10, heads * E)
    ), random(D, 40)


def rotated(x_ET, angle):
    """Rotary embedding as the stock classes turn a head's dimensions at a position."""
    frequency = torch.exp(-torch.arange(E // 2, dtype=torch.float64)).repeat(2) * angle
    half = torch.cat([-x_ET[E // 2 :], x_ET[: E // 2]])
    return x_ET * frequency.cos()[:, None] + half * frequency.sin()[:, None]


def outputs(layer, x_DT):
    """What attention adds to the stream, causal, with rotary embedding."""
    heads, groups = len(layer.query_QD) // E, len(layer.key_CD) // E
    tokens = x_DT.shape[1]

    def turned(head_ET):
        return torch.cat([rotated(head_ET[:, t : t + 1], t) for t in range(tokens)], 1)

    given = []
    for head in range(heads):
        group = head // (heads // groups)
        query = turned(layer.query_QD[head * E : head * E + E] @ x_DT)
        key = turned(layer.key_CD[group * E : group * E + E] @ x_DT)
        scores = (query.T @ key / math.sqrt(E)).tril()
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        given.append(layer.value_CD[group * E : group * E + E] @ x_DT @ scores.softmax(1).T)
    return layer.writer_NQ @ torch.cat(given)


@given(
    seed=st.integers(0, 99),
    groups=st.sampled_from([2, 4, 6]),
    queries=st.integers(1, 3),
    data=st.data(),
)
@settings(max_examples=30, deadline=None)
def test_heads_that_are_turned_and_scaled_copies_merge_exactly(seed, groups, queries, data):
    """In planes of keys, and through any matrix of values."""
    kept = data.draw(st.sampled_from([n for n in range(1, groups) if groups % n == 0]))
    layer, x_DT = attention(groups * queries, groups, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    keys, values = [], []
    for group in range(groups):
        source = group % kept  # members of one head do not lie side by side
        parts = layer.key_CD[source * E : source * E + E].unflatten(0, (2, E // 2))
        factor = torch.randn(2, E // 2, 1, generator=generator, dtype=torch.float64)
        re = factor[0] * parts[0] - factor[1] * parts[1]
        im = factor[1] * parts[0] + factor[0] * parts[1]
        keys.append(torch.cat([re, im]))
        mixing = torch.randn(E, E, generator=generator, dtype=torch.float64)
        values.append(mixing @ layer.value_CD[source * E : source * E + E])
    copies = Attention(layer.query_QD, torch.cat(keys), torch.cat(values), layer.writer_NQ)
    merged = merge_heads(copies, x_DT @ x_DT.T / x_DT.shape[1], E, kept)
    assert len(merged.key_CD) == kept * E
    assert len(merged.query_QD) == len(copies.query_QD)
    torch.testing.assert_close(
        outputs(merged, x_DT[:, :9]), outputs(copies, x_DT[:, :9]), rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize("seed", range(3))
def test_no_other_key_or_value_near_loses_less(seed):
    layer, x_DT = attention(4, 2, seed)
    moment = x_DT @ x_DT.T / x_DT.shape[1]
    merged = merge_heads(layer, moment, E, 1)
    half = E // 2

    def planes(rows):
        return torch.complex(rows[:half], rows[half:])

    def lost(key, value):
        """Of scores plane by plane, and of outputs, with the best factors for what is shared."""
        scores = total = 0.0
        shared = planes(key @ x_DT)
        for group in range(2):
            own = planes(layer.key_CD[group * E : group * E + E] @ x_DT)
            weight = sum(
                planes(layer.query_QD[h * E : h * E + E] @ x_DT).abs().square().mean(1)
                for h in (2 * group, 2 * group + 1)
            )
            factor = (own * shared.conj()).sum(1) / shared.abs().square().sum(1)
            missed = (own - factor[:, None] * shared).abs().square().mean(1)
            scores += (weight * missed).sum().item()
        stacked = [
            layer.writer_NQ[:, h * E : h * E + E]
            @ layer.value_CD[(h // 2) * E : (h // 2) * E + E]
            @ x_DT
            for h in range(4)
        ]
        kept = value @ x_DT
        for written in stacked:
            fit = written @ kept.T @ torch.linalg.inv(kept @ kept.T)
            total += (written - fit @ kept).square().sum().item()
        return scores, total

    best = lost(merged.key_CD, merged.value_CD)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(20):
        other = [
            tensor + 0.05 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            for tensor in (merged.key_CD, merged.value_CD)
        ]
        found = lost(*other)
        assert best[0] <= found[0] * (1 + 1e-9)
        assert best[1] <= found[1] * (1 + 1e-9)


def test_planes_and_values_that_nothing_reads_cost_nothing():
    layer, x_DT = attention(4, 2, 0)
    quiet = Attention(
        layer.query_QD * 0, layer.key_CD, layer.value_CD, torch.zeros_like(layer.writer_NQ)
    )
    merged = merge_heads(quiet, x_DT @ x_DT.T, E, 1)
    assert all(torch.isfinite(tensor).all() for tensor in vars(merged).values())
