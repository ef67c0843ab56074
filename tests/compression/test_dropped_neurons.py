"""FFN neurons that go are chosen in the pass over the dense model; nothing is built with them."""

from dataclasses import replace

import pytest
import torch

from sp3llm.compression.basis_choice import choose_basis
from sp3llm.compression.building import refitted_groups
from sp3llm.compression.measuring import measure_dense
from sp3llm.compression.projection import KeptUnits
from sp3llm.compression.refitter import Refitter
from sp3llm.compression.trials import losses_of, trials_of
from sp3llm.compression.units import kept_neurons
from sp3llm.models import families
from sp3llm.models.shapes import Shape
from sp3llm.runtime.processes import Ranks
from tests.conftest import family_of_model, save_model, tiny_model
from tests.helpers import EXECUTION

VARIANTS = ["llama", "phi3-longrope", "opt", "gpt-neox", "granite"]


@pytest.fixture
def measured(tmp_path, tokens):
    """A checkpoint, its family and what the pass says, for a fewest number of neurons."""

    def measure(model, least: int, predicts: bool = False, tokens=tokens, judging: int = 0):
        checkpoint, family = save_model(model, tmp_path), family_of_model(model)
        arguments = (checkpoint, family, tokens, None, "normalised", "gradient", EXECUTION)
        asked = {"least_units": {families.FFN: least}, "predicts": predicts, "judging": judging}
        moments, _ = measure_dense(*arguments, **asked)
        return checkpoint, family, moments

    return measure


def test_neurons_that_write_nothing_go_first_and_cost_nothing(measured, tokens):
    model = tiny_model("llama", rms_norm_eps=0.1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, 5:21] = 0
    checkpoint, family, moments = measured(model, 8)
    assert torch.equal(
        moments.dropped_OLG[:, :, :16].sort().values,
        torch.arange(5, 21).expand(*moments.dropped_OLG.shape[:2], -1),
    )
    dense = Shape.of(family, checkpoint.config)
    shape = replace(dense, intermediate_size=24)
    _, projection = choose_basis(checkpoint, family, moments, dense)
    of_shape = (checkpoint, family, shape, projection, torch.float64, EXECUTION, "obs")
    kept = kept_neurons(moments, dense.intermediate_size, 24)
    refitter = Refitter(*of_shape, 2, 3, [], neurons_LF=kept)
    (loss,) = losses_of(trials_of([refitter], tokens))
    assert loss == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_who_goes_first_does_not_hang_on_how_many_may_or_on_predictions(variant, measured):
    model = tiny_model(variant)
    _, _, many = measured(model, 8, predicts=True)
    _, _, few = measured(model, 28)
    dropped = few.dropped_OLG.shape[2]
    assert torch.equal(few.dropped_OLG, many.dropped_OLG[:, :, :dropped])
    assert not few.curves


def test_windows_that_shapes_are_judged_by_choose_no_neurons_of_trials(measured, tokens):
    """And those of the model by all of the text, as where nothing is judged."""
    model = tiny_model("llama")
    others = tokens.clone()
    others[2:] = others[2:].flip(1)
    chosen, again, by_all, by_all_others, by_first = (
        measured(model, 8, tokens=some, judging=judging)[2].dropped_OLG
        for some, judging in (
            *((tokens, 2), (others, 2), (tokens, 0), (others, 0)),
            (tokens[:2], 0),
        )
    )
    assert len(tokens) == 4
    assert torch.equal(chosen[1], again[1])
    assert torch.equal(chosen[1], by_first[0])
    assert torch.equal(chosen[0], by_all[0])
    assert torch.equal(again[0], by_all_others[0])
    assert not torch.equal(by_all, by_all_others)
    assert len(by_all) == 1


def test_a_process_without_windows_that_judge_sends_its_own_sum_twice(
    tmp_path, tokens, monkeypatch
):
    """As the first of two, the other of which has seen the same."""
    sent = []

    def twice(_, *tensors):
        sent.extend(tensor.clone() for tensor in tensors if tensor.shape == (40, 40))
        for tensor in tensors:
            tensor.mul_(2)

    monkeypatch.setattr(Ranks, "all_reduce_", twice)
    monkeypatch.setattr(Ranks, "broadcast_", lambda *_: None)
    model = tiny_model("llama")
    checkpoint, family = save_model(model, tmp_path), family_of_model(model)
    execution = replace(EXECUTION, ranks=Ranks(0, 2), batch_tokens=tokens.shape[1])
    assert execution.local_windows(*tokens.shape).tolist() == [0, 2]
    arguments = (checkpoint, family, tokens, None, "normalised", "pca", execution)
    moments, _ = measure_dense(*arguments, least_units={families.FFN: 8}, judging=1)
    assert len(sent) == 2 * len(model.model.layers)
    for whole, before in zip(sent[::2], sent[1::2], strict=True):
        assert torch.equal(whole, before)
    assert torch.equal(*moments.dropped_OLG)


def test_as_many_neurons_stay_as_the_shape_has(measured):
    _, _, moments = measured(tiny_model("llama"), 8)
    for keep in (8, 20, 39):
        stays = kept_neurons(moments, 40, keep)
        assert (stays.sum(1) == keep).all()
    assert not (kept_neurons(moments, 40, 8) & ~kept_neurons(moments, 40, 20)).any()
    assert kept_neurons(moments, 40, 40) is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_built_without_them_is_that_which_a_mask_of_them_gives(variant, measured, tokens):
    """Which runs with all neurons until each layer's writer is fitted."""
    checkpoint, family, moments = measured(tiny_model(variant), 8)
    dense = Shape.of(family, checkpoint.config)
    shape = replace(dense, intermediate_size=24).untied()
    _, projection = choose_basis(checkpoint, family, moments, shape, tokens)
    kept = kept_neurons(moments, dense.intermediate_size, 24)
    masked = replace(projection, kept_units=KeptUnits(neurons_LF=kept.double()))
    built = []
    for of_shape, neurons in ((projection, kept), (masked, None)):
        same = (checkpoint, family, shape, of_shape, torch.float64, EXECUTION, "obs")
        refitter = Refitter(*same, 3, 4, [], neurons_LF=neurons)
        groups = refitted_groups(refitter, tokens)
        built.append({name: t for group in groups for name, t in group.tensors.items()})
    early, late = built
    assert early.keys() == late.keys()
    for name, tensor in early.items():
        assert torch.allclose(tensor, late[name], rtol=1e-6, atol=1e-9), name
