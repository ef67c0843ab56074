"""What the dense pass predicts a shape to lose: curves, streams, tables, heads."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from sp3llm.compression.basis_choice import choose_basis
from sp3llm.compression.measuring import measure_dense
from sp3llm.compression.predicting import predicted_losses, projection_loss
from sp3llm.compression.shape_search import _shares, _trial_windows
from sp3llm.models import families
from sp3llm.models.families import FAMILIES
from sp3llm.models.objectives.causal_lm import CAUSAL_LM
from sp3llm.models.shapes import Shape
from sp3llm.runtime.devices import Execution
from tests.conftest import family_of_model, relative_error, save_model, tiny_model
from tests.helpers import EXECUTION

LEAST = {families.FFN: 8, families.QUERY: 1}


@pytest.fixture
def measured(tmp_path, tokens):
    """Everything that predictions of a model need, and the function that predicts."""

    def measure(model, least, execution=EXECUTION):
        checkpoint, family = save_model(model, tmp_path), family_of_model(model)
        arguments = (checkpoint, family, tokens, None, "normalised", "gradient", execution)
        moments, _ = measure_dense(*arguments, least_units=least, predicts=True)

        def predict(shape):
            _, projection = choose_basis(checkpoint, family, moments, shape, tokens)
            lost = projection_loss(checkpoint, family, moments, projection, tokens)
            return predicted_losses(moments, shape, lost)

        return moments, predict, Shape.of(family, checkpoint.config)

    return measure


def silenced(model, neurons: int) -> None:
    """The first neurons of every FFN write nothing."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, :neurons] = 0


def test_curves_rise_from_nothing_as_units_go(measured):
    moments, _, dense = measured(tiny_model("llama"), LEAST)
    for axis, most in (
        (families.FFN, dense.intermediate_size),
        (families.QUERY, dense.num_key_value_heads),
    ):
        counts, nats = moments.curves[axis].T
        assert counts[0] == most
        assert counts[-1] == LEAST[axis]
        assert nats[0] == 0
        assert (counts.diff() < 0).all()
        assert (nats.diff() >= 0).all()


def test_neurons_that_write_nothing_are_predicted_to_cost_nothing(measured):
    model = tiny_model("llama")
    silenced(model, 16)
    _, predict, dense = measured(model, LEAST)
    with_fewer = partial(Shape, dense.hidden_size, num_attention_heads=4, num_key_value_heads=2)
    kept = with_fewer(intermediate_size=dense.intermediate_size - 16, head_dim=dense.head_dim)
    cut = with_fewer(intermediate_size=dense.intermediate_size - 24, head_dim=dense.head_dim)
    assert predict(kept).units < 1e-6 * predict(cut).units
    assert predict(kept).stream < 1e-3 * predict(dense.with_width(40)).stream


def test_a_narrower_stream_loses_more(measured):
    _, predict, dense = measured(tiny_model("llama"), {})
    losses = [predict(dense.with_width(width)).stream for width in (48, 40, 32, 24)]
    assert losses == sorted(losses)
    assert losses[0] < 1e-3 * losses[1]


def test_a_tied_head_which_is_not_refitted_loses_more_than_one_of_its_own(measured):
    _, predict, dense = measured(tiny_model("qwen2-tied"), {})
    narrow = dense.with_width(32)
    assert predict(narrow).stream > predict(narrow.untied()).stream > 0


def test_smaller_heads_and_a_narrower_table_of_an_opt_lose_more(measured):
    _, predict, dense = measured(tiny_model("opt"), {families.HEAD_DIM: 4})
    from dataclasses import replace

    narrow = replace(dense, hidden_size=dense.num_attention_heads * 8, head_dim=8)
    wide = replace(narrow, word_embed_proj_dim=dense.word_embed_proj_dim)
    tables = [replace(wide, word_embed_proj_dim=width) for width in (48, 40, 24)]
    assert [predict(shape).stream for shape in tables] == sorted(
        predict(shape).stream for shape in tables
    )
    assert predict(narrow).units > 0


@pytest.mark.parametrize("variant", ["llama", "gpt-neox", "granite"])
def test_predictions_in_bfloat16_are_those_in_float32_but_for_rounding(variant, measured):
    model = tiny_model(variant, torch.float32)
    least = {families.FFN: 8}
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        execution = Execution(torch.device("cpu"), dtype)
        moments, _, _ = measured(model, least, execution)
        found.append(moments.curves[families.FFN][:, 1])
    assert relative_error(found[1], found[0]) < 0.1


@pytest.mark.parametrize("width", [64, 256, 1024])
@pytest.mark.parametrize("length", [16, 512])
def test_every_number_of_windows_leaves_trials_some_to_fit_choose_and_tell(width, length):
    config = {"hidden_size": width, "intermediate_size": 8 * width, "num_attention_heads": 8}
    dense = SimpleNamespace(config=config)
    job = SimpleNamespace(family=FAMILIES["llama"], dense=dense, objective=CAUSAL_LM)
    for count in (*range(4, 300), 4000):
        shares = _shares(job, torch.zeros(count, length, dtype=torch.int64))
        assert min(shares) >= 1
        assert sum(shares) <= count


@pytest.mark.parametrize("count", [4, 20, 128])
def test_trials_tell_by_the_last_windows_and_fit_to_the_first(count):
    config = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 8}
    dense = SimpleNamespace(config=config)
    job = SimpleNamespace(family=FAMILIES["llama"], dense=dense, objective=CAUSAL_LM)
    calibration = torch.arange(count)[:, None].expand(count, 512)
    windows, held_from, unseen_from = _trial_windows(
        SimpleNamespace(job=job, calibration=calibration)
    )
    numbers = windows[:, 0]
    assert torch.equal(numbers[:unseen_from], torch.arange(unseen_from))
    assert 0 < held_from < unseen_from < len(numbers)
    assert torch.equal(numbers[unseen_from:], torch.arange(count)[unseen_from - len(numbers) :])
