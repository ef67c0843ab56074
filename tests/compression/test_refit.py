"""Closed form means what it says: the fits equal dense least squares and never do harm."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from sp3llm.compression import refitter as refitter_module
from sp3llm.compression.basis_choice import choose_basis
from sp3llm.compression.measuring import measure_dense
from sp3llm.compression.refitter import add_tokens
from sp3llm.maths import basis
from sp3llm.maths.basis import metric_basis
from sp3llm.maths.losses import drawn_labels
from sp3llm.maths.products import split_product
from sp3llm.maths.refit import (
    add_to_gram,
    empty_gram,
    gram_tensors,
    restricted,
    ridge_solution,
    schur_complement,
    squared_error,
    sum_grams,
)
from sp3llm.maths.ridge import ridge_fit
from sp3llm.maths.unit_selection import select_units
from sp3llm.models.backward import backward_layer
from sp3llm.models.head import backward_head
from sp3llm.models.objectives.causal_lm import CAUSAL_LM
from sp3llm.models.opening import open_stream
from sp3llm.models.stream import LayeredModel, run_layer
from tests.conftest import (
    disk_tensors,
    family_of_model,
    logits_of,
    relative_error,
    save_model,
    stock_model,
    tiny_model,
)
from tests.helpers import CPU, EXECUTION, QUIET, compress_tiny, normal


def gram_of(a, y, weight=None):
    gram = empty_gram(a.shape[1], y.shape[1], CPU)
    add_to_gram(gram, a, y, weight)
    return gram


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("intercept", [False, True])
def test_solution_equals_dense_least_squares(intercept, weighted):
    a, y = normal(200, 7), normal(200, 5, seed=1) + 3
    weight = normal(200, seed=2).abs() + 0.1 if weighted else None
    found, constant, _ = ridge_solution(gram_of(a, y, weight), torch.zeros(7, 5), 0.0, intercept)
    root = torch.ones(200, 1) if weight is None else weight.sqrt()[:, None]
    design = torch.cat([a, torch.ones(200, 1)], 1) if intercept else a
    expected = torch.linalg.lstsq(design * root, y * root).solution
    assert relative_error(found, expected[:7]) < 1e-12
    if intercept:
        assert relative_error(constant, expected[7]) < 1e-12


@pytest.mark.parametrize("intercept", [False, True])
def test_squared_error_from_the_gram_equals_that_of_the_tokens(intercept):
    a, y, x = normal(50, 4), normal(50, 3, seed=1), normal(4, 3, seed=2)
    constant = normal(3, seed=3) if intercept else None
    residual = y - a @ x - (constant if intercept else 0)
    expected = (residual.square().sum() / y.square().sum()).item()
    assert squared_error(gram_of(a, y), x, constant) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("text", "every"), [(0, 1), (79, 1), (80, 2), (160, 4), (10**9, 24)])
def test_of_much_text_a_fit_sees_one_token_in_so_many(text, every, monkeypatch):
    """The first of a window always, which is like nothing else; of windows that are held back as
    of those that are fitted to.
    """
    monkeypatch.setattr(refitter_module, "_TOKENS_AN_INPUT", 8)
    monkeypatch.setattr(refitter_module, "_LITTLE", 0)
    refitter = SimpleNamespace(held_from=3, unseen_from=4, text_tokens=text)
    a, y, weight = (normal(5, 24, *size) for size in ((5,), (3,), ()))
    weight = weight.square()
    grams, expected = ([empty_gram(5, 3, CPU) for _ in range(2)] for _ in range(2))
    add_tokens(refitter, grams, slice(0, 5), a, y, weight)
    for gram, windows in zip(expected, (slice(0, 3), slice(3, 4)), strict=True):
        add_to_gram(gram, *(one[windows, ::every] for one in (a, y, weight)))
    for gram, other in zip(grams, expected, strict=True):
        for one, two in zip(gram_tensors(gram), gram_tensors(other), strict=True):
            assert torch.equal(one, two)


def test_gram_does_not_depend_on_how_tokens_are_split():
    a, y, weight = normal(60, 6), normal(60, 4, seed=1), normal(60, seed=2).abs()
    whole = gram_of(a, y, weight)
    gram_tensors = sum_grams(
        gram_of(a[:23], y[:23], weight[:23]), gram_of(a[23:], y[23:], weight[23:])
    )
    for name in whole.__dataclass_fields__:
        assert relative_error(getattr(gram_tensors, name), getattr(whole, name)) < 1e-14


@pytest.mark.parametrize("tokens", [3, 10, 30, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_fit_never_does_worse_on_held_back_tokens_than_the_prior(tokens, seed):
    """With fewer tokens than inputs, with noise only, with plenty: the prior is the floor."""
    a, held = normal(tokens, 20, seed=seed), normal(50, 20, seed=seed + 100)
    prior, truth = normal(20, 8, seed=seed + 1), normal(20, 8, seed=seed + 2)
    for strength in (0.0, 0.1, 3.0):
        target = prior + strength * truth
        y = a @ target + normal(tokens, 8, seed=seed + 3)
        held_back = gram_of(held, held @ target + normal(50, 8, seed=seed + 4))
        fit = ridge_fit(gram_of(a, y), held_back, prior)
        plain_error, chosen = squared_error(held_back, prior, None), prior
        if fit.ridge < float("inf"):
            chosen, _, _ = ridge_solution(gram_of(a, y), prior, fit.ridge, False)
        error = squared_error(held_back, chosen, None)
        assert error <= plain_error
        assert fit.gain == pytest.approx(plain_error - error, abs=1e-12)
        assert (fit.gain == 0) == (fit.ridge == float("inf"))
        assert torch.isfinite(fit.solution_PQ).all()
        if fit.ridge == float("inf"):
            assert torch.equal(fit.solution_PQ, prior)


def test_noise_alone_keeps_the_prior():
    prior = normal(40, 6)
    a, held = normal(8, 40, seed=1), normal(400, 40, seed=2)
    y, held_y = a @ prior + 5 * normal(8, 6, seed=3), held @ prior
    fit = ridge_fit(gram_of(a, y), gram_of(held, held_y), prior)
    assert fit.ridge == float("inf")


def test_a_singular_gram_raises_the_ridge_and_stays_finite():
    a = normal(30, 4).repeat(1, 3)
    solution, _, used = ridge_solution(gram_of(a, a[:, :2]), torch.zeros(12, 2), 1e-18, False)
    assert used > 1e-18
    assert torch.isfinite(solution).all()
    assert relative_error(a @ solution, a[:, :2]) < 1e-3


def refitted_loss(gram, kept):
    part = restricted(gram, kept)
    prior = torch.zeros(len(kept), part.cross_PQ.shape[1])
    solution, _, _ = ridge_solution(part, prior.double(), 0.0, False)
    return squared_error(part, solution, None)


@pytest.mark.parametrize("unit", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_obs_drops_the_unit_that_a_refit_misses_least(unit, seed):
    """Brute force over every unit: the one dropped is the one whose loss after a refit is least."""
    units = 6
    a = normal(300, units * unit, seed=seed) @ normal(units * unit, units * unit, seed=seed + 9)
    y = a @ normal(units * unit, 5, seed=seed + 20)
    gram = gram_of(a, y)
    kept = select_units(gram, torch.zeros_like(gram.cross_PQ), units - 1, unit, "obs", 0.0)
    rest = [
        torch.tensor([i for i in range(units * unit) if i // unit != dropped])
        for dropped in range(units)
    ]
    best = min(rest, key=lambda index: refitted_loss(gram, index))
    assert torch.equal(kept, best)


def test_obs_sees_what_energy_does_not():
    """Two equal loud neurons: one of them is free to go; its energy says the opposite."""
    quiet = 0.1 * normal(500, 3)
    loud = normal(500, 1, seed=1)
    a = torch.cat([loud, loud + 1e-3 * normal(500, 1, seed=2), quiet], 1)
    y = a @ torch.ones(5, 4, dtype=torch.float64)
    gram = gram_of(a, y)
    prior = torch.zeros(5, 4).double()
    by_refit = select_units(gram, prior, 4, 1, "obs", 1e-9)
    by_energy = select_units(gram, prior, 4, 1, "energy", 1e-9)
    assert set(by_refit.tolist()) >= {2, 3, 4}
    assert set(by_energy.tolist()) >= {0, 1}
    assert refitted_loss(gram, by_refit) < 1e-3 * refitted_loss(gram, by_energy)


@pytest.mark.parametrize(
    ("variant", "sizes"),
    [
        ("llama-biases", {"intermediate_size": 24}),
        ("mistral-12-heads", {"num_key_value_heads": 2, "intermediate_size": 32}),
        ("qwen3-biases-tied", {"num_key_value_heads": 1}),
        ("qwen2", {"num_key_value_heads": 1, "intermediate_size": 16}),
    ],
)
def test_neurons_and_groups_are_cut_and_the_output_is_stock(variant, sizes, tmp_path):
    from transformers import AutoModelForCausalLM

    result = compress_tiny(variant, tmp_path, keep=0.9, **sizes)
    model, info = AutoModelForCausalLM.from_pretrained(result.out, output_loading_info=True)
    assert not any(info.values())
    assert sum(p.numel() for p in model.parameters()) == result.plan.parameters
    for name, size in sizes.items():
        assert getattr(model.config, name) == size


def test_dropping_dead_neurons_and_groups_costs_nothing(tmp_path, tokens):
    """What writes nothing is what goes, with its query heads, keys, values, gate and up."""
    from sp3llm.compression.refitter import Refitter
    from sp3llm.compression.trials import losses_of, trials_of
    from sp3llm.models import families
    from sp3llm.models.shapes import Shape

    model = tiny_model("llama", rms_norm_eps=0.1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, :24] = 0
            layer.mlp.down_proj.weight[:, 5:21] = 0
    checkpoint = save_model(model, tmp_path)
    family = family_of_model(model)
    moments, _ = measure_dense(checkpoint, family, tokens, None, "normalised", "pca", EXECUTION)
    dense = Shape.of(family, checkpoint.config)
    assert (dense.num_key_value_heads, dense.intermediate_size) == (2, 40)
    shape = Shape(dense.hidden_size, 24, 2, 1, dense.head_dim)
    _, projection = choose_basis(checkpoint, family, moments, dense)
    for unit_selection in ("obs", "energy"):
        refitter = Refitter(
            checkpoint,
            family,
            shape,
            projection,
            torch.float64,
            EXECUTION,
            unit_selection,
            2,
            3,
            [],
        )
        (loss,) = losses_of(trials_of([refitter], tokens))
        assert loss == pytest.approx(0, abs=1e-6)
    assert families.RESIDUAL == "hidden_size"


@pytest.mark.parametrize("variant", ["mixtral", "qwen2-moe"])
def test_of_experts_the_readers_are_fitted_and_the_writers_stay(variant, tmp_path):
    """Every site and attention's writers; an FFN's writer where the layer has no experts."""
    from sp3llm.models.families import groups

    result = compress_tiny(variant, tmp_path, allocate="width")
    fitted = [fit["name"] for fit in result.fits]
    model = tiny_model(variant, vocab_size=4096)
    for group in groups(family_of_model(model), model.config.to_dict())[1:-1]:
        names = ["input_layernorm", "self_attn.o_proj", "post_attention_layernorm"]
        names += [] if group.sparse else ["mlp.down_proj"]
        assert [n.removeprefix(group.prefix) for n in fitted if n.startswith(group.prefix)] == names


def metric_cost(moments, metrics, basis):
    """`sum tr(A Q C Q)` for the subspace that a basis gives up."""
    away = torch.eye(len(basis), dtype=torch.float64) - basis @ basis.T
    return sum((a @ away @ c @ away).trace() for a, c in zip(metrics, moments, strict=True)).item()


@pytest.mark.parametrize("kept", [1, 5, 11])
def test_metric_basis_costs_less_than_pca_and_is_orthonormal(kept):
    moments = tuple(m @ m.T for m in (normal(12, 12, seed=s) for s in range(3)))
    metrics = tuple(m @ m.T for m in (normal(12, 3, seed=s) for s in range(10, 13)))
    vectors = torch.linalg.eigh(sum(moments))[1].flip(1)
    found = metric_basis(moments, metrics, vectors, kept)
    cost = metric_cost(moments, metrics, found)
    assert cost < 0.9 * metric_cost(moments, metrics, vectors[:, :kept])
    assert relative_error(found.T @ found, torch.eye(kept, dtype=torch.float64)) < 1e-12
    assert found.shape == (12, kept)


@pytest.mark.parametrize("on_units", [False, True], ids=["float32", "split"])
@pytest.mark.parametrize("seed", [0, 1])
def test_metric_basis_by_rounded_products_costs_as_little(seed, on_units, monkeypatch):
    """In float32, and as GPUs take such products, of an ill-conditioned stream."""
    moments, metrics = (
        tuple(
            turn @ torch.logspace(0, -decades, 96, dtype=torch.float64).diag() @ turn.T
            for turn in (torch.linalg.qr(normal(96, 96, seed=at + 10 * seed))[0] for at in those)
        )
        for decades, those in ((6, (0, 1, 2)), (3, (3, 4, 5)))
    )
    vectors = torch.linalg.eigh(sum(moments))[1].flip(1)
    exact = metric_cost(moments, metrics, metric_basis(moments, metrics, vectors, 72))
    if on_units:
        monkeypatch.setattr(
            basis,
            "multiply",
            lambda left, right: split_product(
                left.mT, right, lambda one, other: one.float() @ other.float()
            ),
        )
    found = metric_basis(moments, metrics, vectors, 72, dtype=torch.float32)
    assert metric_cost(moments, metrics, found) < 1.05 * exact
    assert exact < 0.8 * metric_cost(moments, metrics, vectors[:, :72])


def test_metric_basis_gives_up_exactly_what_nobody_reads():
    """A metric that sees 5 directions of 12, none of them loud: keeping those 5 costs nothing."""
    moment = torch.eye(12, dtype=torch.float64) + 0.05 * normal(12, 12) @ normal(12, 12).T
    read = normal(12, 5, seed=3)
    vectors = torch.linalg.eigh(moment)[1].flip(1)
    found = metric_basis((moment,), (read @ read.T,), vectors, 5, steps=2000)
    start = metric_cost((moment,), (read @ read.T,), vectors[:, :5])
    assert metric_cost((moment,), (read @ read.T,), found) < 1e-6 * start


def test_metric_basis_at_full_width_and_without_any_cost_is_the_start():
    moment, nothing = normal(6, 6) @ normal(6, 6).T, torch.zeros(6, 6, dtype=torch.float64)
    vectors = torch.linalg.qr(normal(6, 6, seed=1))[0]
    assert metric_basis((moment,), (moment,), vectors, 6) is vectors
    found = metric_basis((moment @ moment.T,), (nothing,), vectors, 2)
    assert relative_error(found @ found.T, vectors[:, :2] @ vectors[:, :2].T) < 1e-12


def test_symmetric_product_is_the_product():
    from sp3llm.maths.products import symmetric_product

    for width in (1, 3, 4, 17):
        x, weight = normal(50, width), normal(50, 1, seed=1).abs()
        product = symmetric_product(x * weight, x)
        assert relative_error(product, (x * weight).T @ x) < 1e-14
        assert relative_error(product, product.T) < 1e-14


@pytest.mark.parametrize("variant", ["qwen2", "mixtral", "qwen2-moe"])
def test_streamed_gradients_equal_those_of_a_whole_backward(variant, tmp_path, tokens):
    """Layer by layer from the head down: the same gradients as autograd through all at once."""
    model = tiny_model(variant)
    checkpoint = save_model(model, tmp_path)
    family = family_of_model(model)
    shell = LayeredModel.of(checkpoint.config, family, CAUSAL_LM, EXECUTION)
    table = checkpoint.read([family.embedding])
    stream = open_stream(shell, table, tokens)
    inputs = []
    for index in range(3):
        names = [n for n in checkpoint.files if n.startswith(f"model.layers.{index}.")]
        inputs.append(stream.hidden.clone())
        run_layer(shell, index, checkpoint.read(names), [(stream, {})])
    head = checkpoint.read(["model.norm.weight", "lm_head.weight"])
    upstream, at_final = backward_head(shell, head, stream, range(len(tokens)))
    streamed = {"model.norm": at_final}
    for index in (2, 1, 0):
        names = [n for n in checkpoint.files if n.startswith(f"model.layers.{index}.")]
        at = type(stream)(inputs[index], stream.calls)
        taken = backward_layer(shell, index, checkpoint.read(names), at, upstream)
        by_window = [found.by_site for _, found in taken]
        for site, gradients in zip(family.sites, zip(*by_window, strict=True), strict=True):
            streamed[f"model.layers.{index}.{site.norm}"] = torch.cat(gradients)

    seen = {}
    for name in streamed:
        model.get_submodule(name).register_forward_hook(
            lambda _m, _a, out, name=name: seen.setdefault(name, out)
        )
    embedded = model.model.embed_tokens(tokens).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits.float()
    labels = [
        drawn_labels(row, torch.Generator().manual_seed(window))
        for window, row in enumerate(logits.detach())
    ]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.cat(labels), reduction="sum"
    )
    expected = torch.autograd.grad(loss, [embedded, *seen.values()])
    assert relative_error(upstream, expected[0]) < 1e-5
    for name, gradient in zip(seen, expected[1:], strict=True):
        assert relative_error(streamed[name], gradient) < 1e-5, name


@pytest.mark.parametrize("basis", ["readers", "gradient"])
@pytest.mark.parametrize("variant", ["llama", "qwen2-tied"])
def test_other_bases_give_stock_models_too(basis, variant, tmp_path):
    result = compress_tiny(variant, tmp_path, basis=basis, allocate="width")
    assert result.plan.keep_params <= 0.7
    assert torch.isfinite(torch.tensor(result.perplexity))


@pytest.mark.parametrize(
    ("variant", "into", "out_of"),
    [
        ("llama", "up_proj", "down_proj"),
        ("gpt-neox", "dense_h_to_4h", "dense_4h_to_h"),
    ],
)
def test_neurons_whose_squares_overflow_are_refused_not_looped_over(
    variant, into, out_of, tmp_path
):
    """Every layer's output is finite, but not the Gram of what the FFN's writer reads."""
    from sp3llm.compression.story import compress
    from sp3llm.errors import UserError
    from sp3llm.options import CompressConfig

    model = tiny_model(variant, torch.float32, vocab_size=4096)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{into}." in name:
                parameter *= 1e20
            elif name.endswith(f".{out_of}.weight"):
                parameter *= 1e-20
    save_model(model, tmp_path / "dense", tokenizer=True)
    config = CompressConfig(
        model=str(tmp_path / "dense"), out=tmp_path / "small", keep=0.9, intermediate_size=24,
        calib="stdlib", samples=4, seq_len=32, eval_samples=4, basis="pca", report=False,
    )  # fmt: skip
    with pytest.raises(UserError, match="hold NaN or infinity"):
        compress(config, QUIET)
    assert not (tmp_path / "small").exists()


def test_inputs_that_never_fire_can_be_cut():
    gram = gram_of(torch.zeros(9, 6, dtype=torch.float64), normal(9, 2))
    kept = select_units(gram, torch.zeros(6, 2).double(), 4, 1, "obs", 1e-4)
    assert len(set(kept.tolist())) == 4


def test_a_site_that_costs_nothing_does_not_stop_the_others(tmp_path, tokens):
    """Readers of zeros have no relative error to speak of: they get no say, and nothing is NaN."""
    model = tiny_model("llama")
    with torch.no_grad():
        for reader in ("gate_proj", "up_proj"):
            getattr(model.model.layers[1].mlp, reader).weight.zero_()
    checkpoint = save_model(model, tmp_path)
    family = family_of_model(model)
    moments, _ = measure_dense(checkpoint, family, tokens, None, "normalised", "readers", EXECUTION)
    assert all(metric.isfinite().all() for metric in moments.metrics_DD)
    assert sum(metric.trace() for metric in moments.metrics_DD) > 0


def test_moments_of_a_basis_do_not_grow_with_depth(tmp_path, tokens):
    for depth in (3, 6):
        model = tiny_model("llama", num_hidden_layers=depth)
        checkpoint = save_model(model, tmp_path / str(depth))
        family = family_of_model(model)
        pca, _ = measure_dense(checkpoint, family, tokens, None, "normalised", "pca", EXECUTION)
        found, _ = measure_dense(
            checkpoint, family, tokens, None, "normalised", "gradient", EXECUTION
        )
        assert len(found.sites_DD) == len(found.metrics_DD) == 4
        assert relative_error(found.total(), pca.total()) < 1e-12


def test_ridge_map_equals_numpy_and_tends_to_the_prior():
    import numpy

    a, y, prior = normal(300, 9), normal(300, 4, seed=1), normal(9, 4, seed=2)
    gram = gram_of(a, y)
    least_squares = torch.from_numpy(numpy.linalg.lstsq(a.numpy(), y.numpy(), rcond=None)[0])
    found, _, _ = ridge_solution(gram, prior, 0.0, False)
    assert relative_error(found, least_squares) < 1e-12
    distances = [
        relative_error(ridge_solution(gram, prior, ridge, False)[0], prior)
        for ridge in (1.0, 1e3, 1e6, 1e9)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-8


def test_a_duplicated_neuron_goes_free_of_loss():
    a = normal(400, 6)
    a = torch.cat([a, a[:, :1]], 1)
    gram = gram_of(a, a @ normal(7, 3, seed=1))
    kept = select_units(gram, torch.zeros(7, 3).double(), 6, 1, "obs", 1e-10)
    assert len({0, 6} & set(kept.tolist())) == 1
    assert refitted_loss(gram, kept) < 1e-12


@pytest.mark.parametrize(
    "variant",
    ["llama-biases", "mistral", "qwen2-tied", "qwen3", "gemma", "granite", "phi3", "stablelm"],
)
def test_refit_at_full_width_returns_the_dense_model(variant, tokens, tmp_path):
    """Nothing is lost, so nothing may be changed: logits of the refitted model are the dense's."""
    from sp3llm.compression.building import refitted_groups
    from sp3llm.compression.refitter import Refitter
    from sp3llm.models.shapes import Shape, resized_config

    model = tiny_model(variant)
    checkpoint = save_model(model, tmp_path)
    family = family_of_model(model)
    shape = Shape.of(family, checkpoint.config)
    moments, _ = measure_dense(checkpoint, family, tokens, None, "normalised", "pca", EXECUTION)
    _, projection = choose_basis(checkpoint, family, moments, shape)
    refitter = Refitter(
        checkpoint, family, shape, projection, torch.float64, EXECUTION, "obs", 3, 4, []
    )
    tensors = {}
    for built in refitted_groups(refitter, tokens):
        tensors |= built.tensors
    small = stock_model(resized_config(family, checkpoint.config, shape), tensors, exact=True)
    dense = stock_model(checkpoint.config, disk_tensors(checkpoint, family), exact=True)
    unseen = (tokens + 31) % 96
    assert relative_error(logits_of(small, unseen), logits_of(dense, unseen)) < 2e-6


@pytest.mark.parametrize("variant", ["llama-biases", "mistral-12-heads", "qwen3"])
def test_the_small_stream_is_what_the_stock_model_computes(variant, tokens, tmp_path):
    """Fits see a stream moved on writer by writer: it is the stock small model's own."""
    from sp3llm.compression.building import refitted_groups
    from sp3llm.compression.refitter import Refitter
    from sp3llm.models.shapes import Shape, resized_config

    model = tiny_model(variant)
    checkpoint = save_model(model, tmp_path)
    family = family_of_model(model)
    dense = Shape.of(family, checkpoint.config)
    shape = dense.with_width(24).with_groups(1)
    moments, _ = measure_dense(
        checkpoint, family, tokens, None, "normalised", "gradient", EXECUTION
    )
    _, projection = choose_basis(checkpoint, family, moments, shape)
    refitter = Refitter(
        checkpoint, family, shape, projection, torch.float64, EXECUTION, "obs", 3, 4, []
    )
    tensors, streams = {}, []
    for built in refitted_groups(refitter, tokens):
        tensors |= built.tensors
        streams.append(built.small.hidden.clone())
    small = stock_model(resized_config(family, checkpoint.config, shape), tensors, exact=False)
    seen = []
    small.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits_of(small, tokens)
    assert relative_error(streams[-1], seen[0]) < 1e-12


def test_beside_leaves_what_the_other_inputs_do_not_explain():
    """Residual moments, and a solution that is the members' part of the joint one."""
    a, y = normal(300, 7) @ normal(7, 7, seed=1), normal(300, 3, seed=2)
    gram, kept = gram_of(a, y), torch.tensor([1, 4, 5])
    others = a[:, [0, 2, 3, 6]]
    residual = a[:, kept] - others @ torch.linalg.lstsq(others, a[:, kept]).solution
    found = schur_complement(gram, kept, 0.0)
    assert relative_error(found.inputs_PP, residual.T @ residual) < 1e-10
    joint = torch.linalg.lstsq(a, y).solution[kept]
    alone, _, _ = ridge_solution(found, torch.zeros_like(joint), 0.0, False)
    assert relative_error(alone, joint) < 1e-9


@pytest.mark.parametrize("variant", ["llama", "opt", "granite", "mixtral", "gpt-neox"])
def test_inputs_that_wait_for_their_writer_give_what_running_its_block_again_does(
    variant, tmp_path, monkeypatch
):
    from sp3llm.compression import attempts

    placed, weights = attempts._placed, []
    for keeps in (True, False):

        def place(*arguments, keeps=keeps):
            job = placed(*arguments)
            return replace(job, execution=replace(job.execution, keeps_inputs=keeps))

        monkeypatch.setattr(attempts, "_placed", place)
        out = tmp_path / str(keeps)
        result = compress_tiny(variant, out, compute_dtype="float32")
        weights.append(load_file(result.out / "model.safetensors"))
    kept, again = weights
    assert kept.keys() == again.keys()
    for name, tensor in kept.items():
        assert (tensor - again[name]).norm() <= 1e-5 * again[name].norm(), name


@pytest.mark.parametrize("variant", ["llama", "opt", "granite", "mixtral", "gpt-neox"])
def test_what_dense_layers_leave_is_kept_where_there_is_room_and_changes_no_byte(
    variant, tmp_path, monkeypatch
):
    """The first pass keeps it for the refit, and the first round of trials for the others."""
    from sp3llm.compression import attempts, sequential

    placed, recorded, found = attempts._placed, sequential.recorded, []
    for keeps in (True, False):
        runs = []

        def place(*arguments, keeps=keeps):
            job = placed(*arguments)
            return replace(job, execution=replace(job.execution, keeps_dense=keeps))

        def record(model, config, index, *rest, runs=runs):
            runs.append(index)
            return recorded(model, config, index, *rest)

        monkeypatch.setattr(attempts, "_placed", place)
        monkeypatch.setattr(sequential, "recorded", record)
        result = compress_tiny(variant, tmp_path / str(keeps), compute_dtype="float32")
        layers, trials = range(max(runs, default=-1) + 1), result.findings.tried
        assert sorted(runs) == sorted(set(runs)) if keeps else len(runs) >= len(layers)
        assert bool(runs) == bool(trials) or not keeps
        found.append((result.out / "model.safetensors").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "opt-untied", "gemma"])
def test_a_stream_that_is_not_cut_keeps_its_channels(variant, tmp_path):
    """What is not to be changed is not turned, and so not rounded: tables keep every bit, and so
    does the norm in front of a tied head; under LayerNorm the stream loses its mean alone.
    """
    model = tiny_model(variant, torch.float32, vocab_size=4096)
    width = model.config.hidden_size
    half = {"hidden_size": width, "num_hidden_layers": model.config.num_hidden_layers}
    tie = {"tie": "keep"} if model.config.tie_word_embeddings else {}
    result = compress_tiny(variant, tmp_path, keep=0.985, **half, **tie)
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    small = load_file(result.out / "model.safetensors")
    name = next(name for name in dense if name.endswith("embed_tokens.weight"))
    if variant == "opt-untied":
        dense[name] = dense[name] - dense[name].double().mean(1, keepdim=True)
        assert relative_error(small[name], dense[name]) < 1e-6
        return
    assert torch.equal(small[name], dense[name])
    if variant != "llama":
        assert torch.equal(small["model.norm.weight"], dense["model.norm.weight"])
