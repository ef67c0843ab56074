"""Causal attention in blocks is causal attention."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sp3llm.models import causal_blocks
from sp3llm.models.causal_blocks import CausalBlocks, causal_attention
from tests.conftest import relative_error


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr(causal_blocks, "_QUERIES", 8)


def heads(tokens: int, count: int = 4, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """As stock layers have them: `(windows, heads, tokens, channels)`, tokens first in memory."""
    return torch.randn(2, tokens, count, 16).transpose(1, 2).to(dtype)


@pytest.mark.parametrize("tokens", [3, 8, 16, 21])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_blocks_give_what_the_whole_gives(tokens, groups, scale):
    sizes = [(tokens, count, torch.float64) for count in (4, groups, groups)]
    query, key, value = (heads(*of_one) for of_one in sizes)
    how = {"is_causal": True, "enable_gqa": groups < 4, "scale": scale}
    whole = scaled_dot_product_attention(query, key, value, **how)
    blocks = causal_attention(query, key, value, scale)
    assert relative_error(blocks, whole) < 1e-14
    assert blocks.transpose(1, 2).is_contiguous()


def test_values_may_have_other_channels():
    query, key = heads(20), heads(20)
    value = torch.randn(2, 4, 20, 5).bfloat16()
    wide = [x.double() for x in (query, key, value)]
    whole = scaled_dot_product_attention(*wide, is_causal=True)
    assert relative_error(causal_attention(*wide), whole) < 1e-14


@pytest.mark.parametrize("groups", [4, 2])
def test_bfloat16_goes_in_blocks_while_they_are_on(groups, monkeypatch):
    query, key, value = heads(20), heads(20, groups), heads(20, groups)
    how = {"is_causal": True, "enable_gqa": groups < 4}
    exact = scaled_dot_product_attention(query.double(), key.double(), value.double(), **how)
    whole = scaled_dot_product_attention(query, key, value, **how)
    calls = []
    monkeypatch.setattr(
        causal_blocks,
        "causal_attention",
        lambda *args: calls.append(1) or causal_attention(*args),
    )
    with CausalBlocks():
        blocks = scaled_dot_product_attention(query, key, value, **how)
    assert len(calls) == 1
    assert blocks.dtype == torch.bfloat16
    assert relative_error(blocks, exact) < 3 * relative_error(whole, exact)


@pytest.mark.parametrize(
    ("tokens", "dtype", "how"),
    [
        (8, torch.bfloat16, {"is_causal": True}),
        (20, torch.float32, {"is_causal": True}),
        (20, torch.bfloat16, {}),
        (20, torch.bfloat16, {"attn_mask": torch.ones(20, 20, dtype=torch.bool).tril(3)}),
    ],
)
def test_anything_else_is_left_to_torch(tokens, dtype, how):
    query, key, value = (heads(tokens, dtype=dtype) for _ in range(3))
    whole = scaled_dot_product_attention(query, key, value, **how)
    with CausalBlocks():
        assert torch.equal(scaled_dot_product_attention(query, key, value, **how), whole)


def gradients_of(attention, inputs, **how):
    inputs = [x.detach().requires_grad_() for x in inputs]
    attended = attention(*inputs, **how)
    torch.manual_seed(1)
    upper = torch.randn(attended.shape, dtype=torch.float64).to(attended)
    return torch.autograd.grad(attended, inputs, upper)


@pytest.mark.parametrize("groups", [4, 2])
def test_gradients_through_blocks_are_those_through_the_whole(groups):
    inputs = [heads(21, count, torch.float64) for count in (4, groups, groups)]
    how = {"is_causal": True, "enable_gqa": groups < 4}
    of_whole = gradients_of(scaled_dot_product_attention, inputs, **how)
    for found, expected in zip(gradients_of(causal_attention, inputs), of_whole, strict=True):
        assert relative_error(found, expected) < 1e-14


def test_gradients_in_bfloat16_are_as_near_as_those_of_torch():
    inputs, how = [heads(40) for _ in range(3)], {"is_causal": True}
    wide = [x.double() for x in inputs]
    exact = gradients_of(scaled_dot_product_attention, wide, **how)
    whole = gradients_of(scaled_dot_product_attention, inputs, **how)
    with CausalBlocks():
        blocks = gradients_of(scaled_dot_product_attention, inputs, **how)
    for found, of_torch, expected in zip(blocks, whole, exact, strict=True):
        assert not torch.equal(found, of_torch)
        assert relative_error(found, expected) < 3 * relative_error(of_torch, expected)


def test_gradients_of_long_windows_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(causal_blocks, "_MOST_FOR_GRADIENTS", 19)
    query = heads(20).requires_grad_()
    with CausalBlocks():
        found = scaled_dot_product_attention(query, query, query, is_causal=True)
    found.sum().backward()
    assert query.grad is not None
    assert torch.equal(found, scaled_dot_product_attention(query, query, query, is_causal=True))
