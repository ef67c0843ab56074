"""Smaller heads say the same: exact where nothing is lost, and nothing else loses less."""

import math

import pytest
import torch

from sp3llm.maths.heads import (
    join_writer,
    project_heads,
    query_key_projection,
    split_writer,
    value_output_projection,
)
from tests.conftest import relative_error
from tests.helpers import normal

WIDTH, HEADS, HEAD_DIM, TOKENS = 24, 4, 8, 60
PARTS = ("q", "k", "v", "o")


def attention_layer(groups=HEADS):
    """Weights and biases of a small attention, by part."""
    rows = {"q": HEADS * HEAD_DIM, "k": groups * HEAD_DIM, "v": groups * HEAD_DIM, "o": WIDTH}
    columns = {"q": WIDTH, "k": WIDTH, "v": WIDTH, "o": HEADS * HEAD_DIM}
    return {
        part: (normal(rows[part], columns[part], seed=seed), 2 * normal(rows[part], seed=seed + 9))
        for seed, part in enumerate(PARTS)
    }


def confine(layer, part, subspaces_GEP, offset=0.0):
    """Put the variation of every head's queries, keys or values into a subspace, and their bias
    too, but for an offset in all directions.
    """
    weight, bias = layer[part]
    groups, full, _ = subspaces_GEP.shape
    within_GEE = subspaces_GEP @ torch.linalg.pinv(subspaces_GEP)
    weight = (within_GEE @ weight.reshape(groups, full, -1)).reshape(weight.shape)
    bias = (within_GEE @ bias.reshape(groups, full, 1)).reshape(bias.shape)
    return {**layer, part: (weight, bias + offset * normal(len(bias), seed=77))}


def heads_of(layer, part, x_ND):
    """Queries, keys or values, `(heads, N, E)` of whatever head dim the layer has."""
    rows = x_ND @ layer[part][0].T + layer[part][1]
    width = layer["o"][0].shape[1] if part == "v" else layer["q"][0].shape[0]
    return rows.reshape(len(x_ND), -1, width // HEADS).transpose(0, 1)


def attend(layer, x_ND):
    """Outputs of the heads, `(H, N, E)`, and of the layer, `(N, D)`: stock causal attention."""
    q, k, v = (heads_of(layer, part, x_ND) for part in "qkv")
    k, v = (t.repeat_interleave(HEADS // len(t), 0) for t in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    later = torch.ones(len(x_ND), len(x_ND)).triu(1).bool()
    outputs = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
    return outputs, outputs.transpose(0, 1).flatten(1) @ layer["o"][0].T + layer["o"][1]


def second_moment(samples_NE, centred=False):
    if centred:
        samples_NE = samples_NE - samples_NE.mean(-2, keepdim=True)
    return samples_NE.mT @ samples_NE / samples_NE.shape[-2]


def shrunk(layer, x_ND, kept, parts=("qk", "vo"), centred=True):
    """The layer with heads of `kept` dims, from moments of its own activations."""
    small, groups = dict(layer), len(layer["k"][1]) // HEAD_DIM
    if "qk" in parts:
        queries = second_moment(heads_of(layer, "q", x_ND)).unflatten(0, (groups, -1)).sum(1)
        keys = second_moment(heads_of(layer, "k", x_ND), centred=True)
        for part, maps in zip("qk", query_key_projection(queries, keys, kept), strict=True):
            small[part] = tuple(project_heads(tensor, maps) for tensor in layer[part])
    if "vo" in parts:
        pooled = attend(layer, x_ND)[0].reshape(groups, -1, HEAD_DIM)
        maps, writer, constant = value_output_projection(
            second_moment(pooled, centred),
            split_writer(layer["o"][0], HEAD_DIM, groups),
            kept,
            pooled.mean(1) if centred else None,
        )
        small["v"] = tuple(project_heads(tensor, maps) for tensor in layer["v"])
        joined, added = join_writer(writer, constant, WIDTH)
        small["o"] = (joined, layer["o"][1] + added)
    return small


def frobenius(factor_EP):
    return factor_EP.square().sum().item()


def product_error(query_moment, key_moment, product_EE):
    """`E|q^T (I - M) k|^2` of independent queries and keys."""
    away = torch.eye(len(product_EE), dtype=torch.float64) - product_EE
    return (query_moment @ away @ key_moment @ away.T).trace().item()


def written_error(moment, writer, product):
    """`E|W a - W M^T a|^2`, `product` being `W M^T`."""
    away = writer - product
    return (away @ moment @ away.T).trace().item()


def skewed(samples, size, seed):
    """Samples with a mean and a spectrum that falls."""
    falling = torch.logspace(0, -2, size, dtype=torch.float64)
    return (normal(samples, size, seed=seed) * falling) @ normal(
        size, size, seed=seed + 1
    ) + normal(size, seed=seed + 2)


def principal(moment, kept):
    return torch.linalg.eigh(moment)[1][:, -kept:]


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize("seen", [3, TOKENS])
def test_attention_at_full_head_dim_is_unchanged(seen, groups, centred):
    """Whatever the moments are, those of 3 tokens in 8 dims included."""
    x, layer = normal(TOKENS, WIDTH, seed=5), attention_layer(groups)
    small = shrunk(layer, x[:seen], HEAD_DIM, centred=centred)
    assert relative_error(attend(small, x)[1], attend(layer, x)[1]) < 1e-12


@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize(("part", "offset"), [("q", 0.0), ("k", 0.0), ("k", 100.0)])
def test_attention_is_exact_where_queries_or_keys_are_confined(part, offset, groups):
    """The other side is free; of keys only the variation matters, whatever they share."""
    heads = HEADS if part == "q" else groups
    subspaces = normal(groups, HEAD_DIM, 5, seed=6).repeat_interleave(heads // groups, 0)
    x, layer = normal(TOKENS, WIDTH, seed=5), confine(attention_layer(groups), part, subspaces)
    layer = confine(layer, part, subspaces, offset)
    small = shrunk(layer, x, 5, parts=("qk",))
    assert small["q"][0].shape == (HEADS * 5, WIDTH)
    assert small["k"][1].shape == (groups * 5,)
    unseen = normal(TOKENS, WIDTH, seed=15)
    assert relative_error(attend(small, unseen)[1], attend(layer, unseen)[1]) < 1e-10
    smaller = shrunk(layer, x, 4, parts=("qk",))
    assert relative_error(attend(smaller, unseen)[1], attend(layer, unseen)[1]) > 1e-3


def test_attention_is_exact_for_any_scale_of_queries_and_keys():
    subspaces = normal(HEADS, HEAD_DIM, 5, seed=6)
    x, layer = normal(TOKENS, WIDTH, seed=5), confine(attention_layer(), "k", subspaces, 1.0)
    for loud, quiet in (("q", "k"), ("k", "q")):
        uneven = {
            **layer,
            loud: tuple(1e6 * tensor for tensor in layer[loud]),
            quiet: tuple(1e-6 * tensor for tensor in layer[quiet]),
        }
        small = shrunk(uneven, x, 5, parts=("qk",))
        assert relative_error(attend(small, x)[1], attend(layer, x)[1]) < 1e-10
        assert small["q"][0].norm() / small["k"][0].norm() == pytest.approx(1, rel=0.9)


@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_attention_is_exact_where_values_vary_in_a_subspace(offset, groups):
    """The constant goes into the writer's bias; without one it takes a dimension."""
    subspaces = normal(groups, HEAD_DIM, 5, seed=6)
    x, layer = normal(TOKENS, WIDTH, seed=5), attention_layer(groups)
    layer = confine(layer, "v", subspaces, offset)
    small = shrunk(layer, x, 5, parts=("vo",))
    assert small["v"][0].shape == (groups * 5, WIDTH)
    assert small["o"][0].shape == (WIDTH, HEADS * 5)
    unseen = normal(TOKENS, WIDTH, seed=15)
    dense = attend(layer, unseen)[1]
    assert relative_error(attend(small, unseen)[1], dense) < 1e-10
    one_more = shrunk(layer, x, 6, parts=("vo",), centred=False)
    assert relative_error(attend(one_more, unseen)[1], dense) < 1e-10
    if offset:
        uncentred = shrunk(layer, x, 5, parts=("vo",), centred=False)
        assert relative_error(attend(uncentred, unseen)[1], dense) > 1e-4


@pytest.mark.parametrize("kept", [1, 4, 7])
def test_error_of_products_is_that_of_the_singular_values_dropped(kept):
    """Brute force over all pairs of queries and keys, in the stock model's own scaling."""
    q, k = skewed(50, HEAD_DIM, 1), skewed(40, HEAD_DIM, 11)
    k = k - k.mean(0)
    query_moment, key_moment = second_moment(q), second_moment(k)
    query_map, key_map = query_key_projection(query_moment, key_moment, kept)
    found = (q @ query_map) @ (k @ key_map).T / math.sqrt(kept)
    error = (q @ k.T / math.sqrt(HEAD_DIM) - found).square().mean().item()
    squares = torch.linalg.eigvals(query_moment @ key_moment).real.sort().values
    assert error == pytest.approx(squares[:-kept].sum().item() / HEAD_DIM, rel=1e-9)


def test_queries_and_keys_are_balanced():
    query_moment, key_moment = second_moment(skewed(50, 8, 1)), second_moment(skewed(40, 8, 11))
    query_map, key_map = query_key_projection(query_moment, key_moment, 5)
    of_queries = query_map.T @ query_moment @ query_map * 8 / 5
    of_keys = key_map.T @ key_moment @ key_map
    assert relative_error(of_queries, of_keys) < 1e-10
    assert relative_error(of_keys, of_keys.diagonal().diag()) < 1e-10


@pytest.mark.parametrize("kept", [1, 4, 7])
@pytest.mark.parametrize("seed", range(3))
def test_products_are_kept_no_worse_than_by_other_projections(seed, kept):
    query_moment = second_moment(skewed(50, HEAD_DIM, seed))
    key_moment = second_moment(skewed(50, HEAD_DIM, seed + 20), centred=True)
    query_map, key_map = query_key_projection(query_moment, key_moment, kept)
    query_map = query_map * math.sqrt(HEAD_DIM / kept)
    best = product_error(query_moment, key_moment, query_map @ key_map.T)
    others = [principal(moment, kept) for moment in (query_moment, key_moment)]
    others += [torch.linalg.qr(normal(HEAD_DIM, kept, seed=s))[0] for s in range(20)]
    for basis in others:
        assert best < product_error(query_moment, key_moment, basis @ basis.T)
    for s in range(20):
        moved = query_map + 1e-3 * normal(HEAD_DIM, kept, seed=s)
        assert best < product_error(query_moment, key_moment, moved @ key_map.T)
        moved = key_map + 1e-3 * normal(HEAD_DIM, kept, seed=s)
        assert best < product_error(query_moment, key_moment, query_map @ moved.T)


def test_no_query_head_of_a_group_would_rather_have_a_map_of_its_own():
    query_moments = [second_moment(skewed(50, HEAD_DIM, seed)) for seed in (1, 2, 3)]
    key_moment = second_moment(skewed(50, HEAD_DIM, 20), centred=True)
    query_map, key_map = query_key_projection(sum(query_moments), key_moment, 5)
    query_map = query_map * math.sqrt(HEAD_DIM / 5)
    for query_moment in query_moments:
        root = torch.linalg.cholesky(query_moment)
        target, design = key_moment @ root, key_moment @ key_map
        own = torch.linalg.solve(key_map.T @ design, key_map.T @ target) @ root.inverse()
        assert relative_error(query_map.T, own) < 1e-9


@pytest.mark.parametrize("kept", [1, 4, 7])
@pytest.mark.parametrize("centred", [False, True])
def test_error_written_is_that_of_the_singular_values_dropped(centred, kept):
    a, writer = skewed(50, HEAD_DIM, 1), normal(WIDTH, HEAD_DIM, seed=4)
    moment, mean = second_moment(a, centred), a.mean(0) if centred else None
    maps, new_writer, constant = value_output_projection(moment, writer, kept, mean)
    written = a @ maps @ new_writer.T + constant
    error = (a @ writer.T - written).square().sum(1).mean().item()
    squares = torch.linalg.eigvals(moment @ writer.T @ writer).real.sort().values
    assert error == pytest.approx(squares[:-kept].sum().item(), rel=1e-9)
    assert bool(constant.any()) == centred


@pytest.mark.parametrize("kept", [1, 4, 7])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_written_is_kept_no_worse_than_by_principal_components(seed, kept):
    """Not even with the writer fitted again to them."""
    a, writer = skewed(50, HEAD_DIM, seed), normal(WIDTH, HEAD_DIM, seed=seed + 20)
    moment = second_moment(a)
    maps, new_writer, _ = value_output_projection(moment, writer, kept)
    best = written_error(moment, writer, new_writer @ maps.T)
    others = [principal(moment, kept), principal(second_moment(a, centred=True), kept)]
    others += [torch.linalg.qr(normal(HEAD_DIM, kept, seed=s))[0] for s in range(20)]
    for basis in others:
        assert best < written_error(moment, writer, writer @ basis @ basis.T)
        seen = moment @ basis
        refitted = torch.linalg.solve(basis.T @ seen, (writer @ seen).T).T
        assert best < written_error(moment, writer, refitted @ basis.T)
    around_mean = second_moment(a, centred=True)
    maps, new_writer, _ = value_output_projection(around_mean, writer, kept, a.mean(0))
    assert written_error(around_mean, writer, new_writer @ maps.T) <= best


def test_the_values_of_a_group_are_best_for_all_its_writers_together():
    """Outputs alike in their moments: no other map leaves its two heads less to lose."""
    moment, writer = second_moment(skewed(50, HEAD_DIM, 1)), normal(WIDTH, 2 * HEAD_DIM, seed=4)
    writers = writer.reshape(WIDTH, 2, HEAD_DIM).unbind(1)
    maps, stacked, _ = value_output_projection(moment, split_writer(writer, HEAD_DIM, 1)[0], 3)
    new_writers = join_writer(stacked[None], stacked.new_zeros(1, 2 * WIDTH), WIDTH)[0].split(3, 1)
    best = sum(
        written_error(moment, old, new @ maps.T)
        for old, new in zip(writers, new_writers, strict=True)
    )
    for seed in range(20):
        other = maps + 1e-2 * normal(HEAD_DIM, 3, seed=seed)
        seen = moment @ other
        fitted = [torch.linalg.solve(other.T @ seen, (old @ seen).T).T for old in writers]
        assert best < sum(
            written_error(moment, old, new @ other.T)
            for old, new in zip(writers, fitted, strict=True)
        )


@pytest.mark.parametrize("kept", [1, 5, 7, 8])
@pytest.mark.parametrize("noise", [0.0, 1e-18, 1e-15, 1e-12, 1e-8])
@pytest.mark.parametrize(
    ("query_rank", "key_rank"), [(3, 8), (8, 3), (3, 3), (0, 8), (8, 0), (0, 0)]
)
def test_singular_moments_give_small_finite_maps(query_rank, key_rank, noise, kept):
    """Dead directions, with rounding errors of either sign on them or without."""
    error = normal(HEAD_DIM, HEAD_DIM, seed=3)
    moments = []
    for seed, rank in ((1, query_rank), (2, key_rank)):
        samples = normal(30, rank, seed=seed) @ normal(rank, HEAD_DIM, seed=seed + 10)
        moment = second_moment(samples)
        moments.append(moment + noise * moment.trace() * (error + error.T))
    maps = query_key_projection(*moments, kept)
    assert all(torch.isfinite(found).all() and found.norm() < 1e4 for found in maps)
    assert (maps[0] @ maps[1].T).norm() < 1e2
    writer = normal(WIDTH, HEAD_DIM, seed=4)
    for mean in (None, normal(HEAD_DIM, seed=5)):
        for weight in (writer, torch.zeros_like(writer)):
            for moment in moments:
                for found in value_output_projection(moment, weight, kept, mean):
                    assert torch.isfinite(found).all()
                    assert found.norm() < 1e2


def test_dead_directions_cost_nothing():
    """Moments of rank 3 are served exactly by any head dim from 3 up."""
    samples = normal(30, 3, seed=1) @ normal(3, HEAD_DIM, seed=2)
    moment, other = second_moment(samples), second_moment(skewed(30, HEAD_DIM, 3))
    for kept in range(3, HEAD_DIM):
        for moments in ((moment, other), (other, moment), (moment, moment)):
            query_map, key_map = query_key_projection(*moments, kept)
            product = math.sqrt(HEAD_DIM / kept) * query_map @ key_map.T
            assert abs(product_error(*moments, product)) < 1e-12 * moment.trace() ** 2


@pytest.mark.parametrize("kept", [3, HEAD_DIM])
def test_batched_equals_one_by_one(kept):
    """A dead head among them: a cutoff is relative to its own head."""
    queries = torch.stack([second_moment(skewed(50, HEAD_DIM, seed)) for seed in range(5)])
    keys = torch.stack([second_moment(skewed(50, HEAD_DIM, seed)) for seed in range(20, 25)])
    queries[1], keys[2] = 0, 1e-30 * keys[2]
    writers, means = normal(5, WIDTH, HEAD_DIM, seed=7), normal(5, HEAD_DIM, seed=8)
    maps = query_key_projection(queries, keys, kept)
    written = value_output_projection(queries, writers, kept, means)
    assert maps[1][2].any()
    for head in range(5):
        query_map, key_map = query_key_projection(queries[head], keys[head], kept)
        torch.testing.assert_close(maps[0][head] @ maps[1][head].T, query_map @ key_map.T)
        value_map, writer, constant = value_output_projection(
            queries[head], writers[head], kept, means[head]
        )
        torch.testing.assert_close(written[1][head] @ written[0][head].T, writer @ value_map.T)
        torch.testing.assert_close(written[2][head], constant)


def test_weights_of_any_dtype_come_back_in_float64():
    layer = {part: tuple(t.bfloat16() for t in layer) for part, layer in attention_layer(2).items()}
    maps = normal(2, HEAD_DIM, 3)
    assert torch.equal(
        project_heads(layer["q"][0], maps), project_heads(layer["q"][0].double(), maps)
    )
    moments = second_moment(normal(2, 30, HEAD_DIM, seed=1))
    stacked = split_writer(layer["o"][0], HEAD_DIM, 2)
    for found in value_output_projection(moments, stacked, 3, normal(2, HEAD_DIM).float()):
        assert found.dtype == torch.float64


@pytest.mark.parametrize("groups", [1, 2, HEADS])
def test_a_writer_split_and_joined_is_the_writer(groups):
    writer = attention_layer()["o"][0]
    split = split_writer(writer, HEAD_DIM, groups)
    assert split.shape == (groups, WIDTH * HEADS // groups, HEAD_DIM)
    joined, added = join_writer(split, torch.ones_like(split[..., 0]), WIDTH)
    assert torch.equal(joined, writer)
    assert torch.equal(added, torch.full((WIDTH,), HEADS, dtype=torch.float64))
