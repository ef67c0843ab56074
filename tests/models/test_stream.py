"""Layer by layer equals all at once."""

from dataclasses import replace

import pytest
import torch

from sp3llm.compression.measuring import measure_dense
from sp3llm.errors import UserError
from sp3llm.evaluation.perplexity import measure_losses
from sp3llm.maths import losses
from sp3llm.maths.basis import eigenbasis
from sp3llm.maths.moments import add_second_moment, normalise
from sp3llm.models.families import norm_eps
from sp3llm.models.objectives.causal_lm import CAUSAL_LM
from sp3llm.models.opening import open_stream
from sp3llm.models.stream import LayeredModel, run_layer
from sp3llm.runtime.devices import Execution
from tests.conftest import TINY, family_of_model, relative_error, save_model, tiny_model

FLOAT32 = Execution(torch.device("cpu"), torch.float32)


def dense_moments(model, family, tokens, raw: bool) -> torch.Tensor:
    """The sum of second moments over read sites, from one plain forward, token by token."""
    width = model.config.hidden_size
    eps = norm_eps(family, model.config.to_dict())
    total = torch.zeros(width, width, dtype=torch.float64)

    def hook(_, args):
        x = args[0].double().reshape(-1, width)
        if not raw and family.centred:
            x = x - x.mean(-1, keepdim=True)
        n = x if raw else x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        total.add_(n.T @ n)

    prefixes = [family.layer_prefix.format(layer=index) for index in range(3)]
    norms = [f"{prefix}{site.norm}" for prefix in prefixes for site in family.sites]
    for name in [*norms, family.final_norm]:
        model.get_submodule(name).register_forward_pre_hook(hook)
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    return total / tokens.numel()


@pytest.mark.parametrize("moments", ["normalised", "raw"])
@pytest.mark.parametrize("variant", list(TINY))
def test_streamed_moments_equal_those_of_a_plain_forward(variant, moments, tokens, tmp_path):
    model = tiny_model(variant, torch.float32)
    checkpoint = save_model(model, tmp_path)
    family = family_of_model(model)
    found, _ = measure_dense(checkpoint, family, tokens, None, moments, "pca", FLOAT32)
    expected = dense_moments(model, family, tokens, moments == "raw")
    assert relative_error(found.total(), expected) < 1e-6


@pytest.mark.parametrize("variant", list(TINY))
def test_streamed_losses_equal_those_of_a_plain_forward(variant, tokens, tmp_path):
    model = tiny_model(variant, torch.float32)
    checkpoint = save_model(model, tmp_path)
    family = family_of_model(model)
    found = measure_losses(checkpoint, family, tokens, FLOAT32)
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), tokens[:, 1:], reduction="none"
    )
    assert torch.allclose(found.float(), expected, rtol=1e-5, atol=1e-5)


def test_batches_and_pieces_do_not_change_the_result(tokens, tmp_path, monkeypatch):
    """Ragged last batches and logits in pieces: the same moments and losses."""
    model = tiny_model("qwen2", torch.float32)
    checkpoint = save_model(model, tmp_path)
    family = family_of_model(model)
    whole = measure_dense(checkpoint, family, tokens, tokens, "normalised", "pca", FLOAT32)
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 5 * 96)
    ragged = replace(FLOAT32, batch_tokens=3 * tokens.shape[1])
    pieces = measure_dense(checkpoint, family, tokens, tokens, "normalised", "pca", ragged)
    assert relative_error(pieces[0].total(), whole[0].total()) < 1e-6
    assert torch.allclose(pieces[1], whole[1], atol=1e-5)


def test_only_one_layer_has_weights_at_a_time(tokens, tmp_path):
    """While a layer runs, every other parameter of the model is on the meta device."""
    model = tiny_model("llama", torch.float32)
    checkpoint = save_model(model, tmp_path)
    family = family_of_model(model)
    shell = LayeredModel.of(checkpoint.config, family, CAUSAL_LM, FLOAT32)
    real: list[set[str]] = []

    def probe(*_):
        real.append({n for n, p in shell.module.named_parameters() if p.device.type != "meta"})

    table = checkpoint.read(["model.embed_tokens.weight"])
    stream = open_stream(shell, table, tokens)
    names = [n for n in checkpoint.files if n.startswith("model.layers.1.")]
    streams = [(stream, {"input_layernorm": probe})]
    run_layer(shell, 1, checkpoint.read(names), streams)
    assert real == [set(names)]
    assert all(p.device.type == "meta" for p in shell.module.parameters())


def test_moments_do_not_depend_on_how_tokens_are_split():
    x = torch.randn(9000, 24, generator=torch.Generator().manual_seed(0))
    whole, parts = torch.zeros(2, 24, 24, dtype=torch.float64)
    add_second_moment(whole, normalise(x, 1e-5))
    for piece in x.split(777):
        add_second_moment(parts, normalise(piece, 1e-5))
    assert relative_error(parts, whole) < 1e-6


def test_eigenbasis_diagonalises_in_falling_order_with_a_fixed_sign():
    x = torch.randn(100, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moment = x.T @ x
    values, basis = eigenbasis(moment)
    assert relative_error(basis @ torch.diag(values) @ basis.T, moment) < 1e-13
    assert (values.diff() <= 0).all()
    assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()


def overflowing_stream(tokens, tmp_path, last_row: float):
    """A stream through a layer that does nothing, whose values are finite and whose sum is not."""
    model = tiny_model("llama", torch.float32)
    checkpoint = save_model(model, tmp_path)
    shell = LayeredModel.of(checkpoint.config, family_of_model(model), CAUSAL_LM, FLOAT32)
    stream = open_stream(shell, checkpoint.read(["model.embed_tokens.weight"]), tokens)
    stream.hidden.fill_(3e38)
    stream.hidden[-1] = last_row
    names = [n for n in checkpoint.files if n.startswith("model.layers.1.")]
    silent = {name: torch.zeros_like(value) for name, value in checkpoint.read(names).items()}
    return shell, silent, stream


def test_finite_values_whose_sum_overflows_are_no_fault(tokens, tmp_path):
    shell, silent, stream = overflowing_stream(tokens, tmp_path, 3e38)
    run_layer(shell, 1, silent, [(stream, {})])
    assert (stream.hidden == 3e38).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_value_that_is_not_finite_names_the_layer(value, tokens, tmp_path):
    """In the last of several batches, of the second of two streams."""
    shell, silent, stream = overflowing_stream(tokens, tmp_path, value)
    shell = replace(shell, execution=replace(FLOAT32, batch_tokens=tokens.shape[1]))
    sound = replace(stream, hidden=torch.zeros_like(stream.hidden))
    with pytest.raises(UserError, match="activations after layer 1 hold NaN or infinity"):
        run_layer(shell, 1, silent, [(sound, {}), (stream, {})])


def test_the_host_waits_once_a_layer_for_the_finite_check(tokens, tmp_path, monkeypatch):
    shell, silent, stream = overflowing_stream(tokens, tmp_path, 0.0)
    stream.hidden.zero_()
    shell = replace(shell, execution=replace(FLOAT32, batch_tokens=tokens.shape[1]))
    asked, item = [], torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda x: asked.append(x) or item(x))
    run_layer(shell, 1, silent, [(stream, {}), (stream, {})])
    assert len(asked) == 1
