"""Learned masks of encoders: gates where norms sit on the stream, learned on a task's rows."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from sp3llm.compression import learned_mask
from sp3llm.compression.basis_choice import learned_basis, nested_frame
from sp3llm.compression.gated_model import GatedModel
from sp3llm.compression.learned_mask import Learned
from sp3llm.compression.mask_budget import budget_of
from sp3llm.compression.mask_steps import MaskTraining, _descend
from sp3llm.compression.measuring import measure_dense
from sp3llm.compression.story import compress
from sp3llm.maths.gates import Gates
from sp3llm.models.checkpoint import open_model
from sp3llm.models.families import count_layer_matrices, family_of
from sp3llm.models.shapes import Shape
from sp3llm.options import CompressConfig
from sp3llm.planning.candidates import candidates
from sp3llm.planning.limits import Limits
from sp3llm.runtime.journal import NOTHING_KEPT, Journal
from tests.compression.test_encoders import ANSWERING, cut, repeated
from tests.conftest import relative_error, save_model
from tests.encoders import answers_of, encoder_config, encoder_of, padded_rows
from tests.helpers import EXECUTION, QUIET
from tests.tasks import opinion_folder, tiny_encoder

pytest.importorskip("sklearn")


def gated(model, folder, width):
    """An encoder with gates in it, its checkpoint, family, moments and frame."""
    save_model(model, folder / "dense")
    checkpoint, family = open_model(folder / "dense")
    rows = padded_rows(checkpoint.config, 400)
    moments, _ = measure_dense(checkpoint, family, rows, None, "normalised", "pca", EXECUTION)
    frame = nested_frame(family, moments, [width])
    return GatedModel(model, family, checkpoint.config, frame), checkpoint, family, moments, frame


def answers_through(gated_model, gates, batch):
    """Answers where every row has the same gates."""
    by_row = gates.map(lambda value: value.expand(len(batch), *value.shape))
    with gated_model.through(by_row) as model:
        return answers_of(model, batch)


@pytest.mark.parametrize("model_type", ANSWERING)
def test_open_gates_leave_answers_unchanged(model_type, tmp_path):
    config = encoder_config(model_type)
    model = encoder_of(config)
    with_gates, *_, frame = gated(model, tmp_path, 12)
    batch = padded_rows(config, seed=1)
    dense = answers_of(model, batch)
    whole = Gates(torch.ones(frame.shape[1]).double(), torch.ones(2, 40), torch.ones(2, 3))
    assert relative_error(answers_through(with_gates, whole, batch), dense) < 1e-12
    narrow = replace(whole, stream_C=(torch.arange(frame.shape[1]) < 11).double())
    assert relative_error(answers_through(with_gates, narrow, batch), dense) > 1e-3
    assert torch.equal(answers_of(model, batch), dense)


def test_what_is_written_is_the_gated_model(tmp_path):
    """Exact where a basis keeps all of the norms' weights, soft gates on neurons and all."""
    config = encoder_config("bert", layer_norm_eps=0.1)
    wide = encoder_of(*repeated(encoder_of(config), config))
    with_gates, checkpoint, family, moments, frame = gated(wide, tmp_path, 24)
    dense = Shape.of(family, checkpoint.config)
    shape = replace(dense, hidden_size=24, head_dim=8, intermediate_size=25)
    is_kept = torch.arange(frame.shape[1]) < 23  # and the mean, which has no gate
    generator = torch.Generator().manual_seed(1)
    neurons = torch.randn(2, 40, generator=generator) + 0.5
    log_alpha = Gates(torch.where(is_kept, 4.0, -7.0), neurons)
    learned = Learned(frame, log_alpha, shape, {}, [])
    kept_units = learned.kept_units()
    assert ((kept_units.neurons_LF > 0) & (kept_units.neurons_LF < 1)).any()
    rows = padded_rows(checkpoint.config, 400)
    _, projection = learned_basis(checkpoint, family, moments, shape, rows, *learned.stream())
    projection = replace(projection, kept_units=kept_units)
    small = encoder_of(
        *cut(checkpoint, family, shape, projection, rows, tmp_path / "small", refit=False)
    )

    batch = padded_rows(config, seed=1)
    gates = Gates(is_kept.double(), kept_units.neurons_LF)
    with with_gates.through(gates.map(lambda value: value.expand(len(batch), *value.shape))):
        expected = spread(wide, batch)
    # The units of the head are chosen by its weights, and so the stream is compared, its scale.
    assert relative_error(spread(small, batch), expected) < 1e-6
    assert relative_error(spread(wide, batch), expected) > 1e-3


@torch.no_grad()
def spread(model, batch):
    """Standard deviation of every token behind the last layer."""
    return model.bert(**batch.inputs()).last_hidden_state.std(-1, correction=0)


def test_a_step_is_the_same_however_its_rows_are_dealt_out(tmp_path):
    """Rows of 4 to 12 tokens, each by itself and all at once: what is compared counts tokens."""
    model = encoder_of(encoder_config("bert"))
    save_model(model, tmp_path)
    checkpoint, family = open_model(tmp_path)
    rows = padded_rows(checkpoint.config)
    moments, _ = measure_dense(checkpoint, family, rows, None, "normalised", "pca", EXECUTION)
    limits = Limits(keep=0.5, of="encoder")
    shapes = candidates(family, checkpoint.config, limits)
    budget = budget_of(family, checkpoint.config, limits, shapes)
    found = []
    for tokens in (1, 2**20):
        run = learned_mask._begin(
            checkpoint, family, budget, partial(nested_frame, family, moments),
            MaskTraining(rows, 16, 10, 0), replace(EXECUTION, batch_tokens=tokens), NOTHING_KEPT,
        )  # fmt: skip
        loss = _descend(run, 3)
        found.append((loss, [alpha.grad for alpha in run.log_alpha.named().values()]))
    (one, by_row), (other, at_once) = found
    assert one == pytest.approx(other, rel=1e-5)
    for gradient, expected in zip(by_row, at_once, strict=True):
        assert relative_error(gradient, expected) < 1e-4


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny encoder and a task."""
    folder = tmp_path_factory.mktemp("masks")
    tiny_encoder(folder / "dense")
    opinion_folder(folder / "task")
    return folder


def settings(place, out, **changes):
    base = {"keep": 0.4, "of": "encoder", "report": False, "task": f"sst2={place / 'task'}"}
    base |= {"mask": "learned", "mask_steps": 10, "mask_batch": 4}
    return CompressConfig(**{"model": str(place / "dense"), "out": out, **base, **changes})


def test_a_run_learns_from_rows_and_stays_within_the_budget(place, tmp_path):
    compress(settings(place, tmp_path / "small"), QUIET)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    dense = json.loads((place / "dense" / "config.json").read_text())
    family = family_of(config)
    assert count_layer_matrices(family, config) <= 0.4 * count_layer_matrices(family, dense)
    assert config["num_hidden_layers"] == dense["num_hidden_layers"]
    mask = json.loads((tmp_path / "small" / "sp3llm.json").read_text())["mask"]
    assert mask["history"][-1]["step"] == 10
    assert mask["training"]["samples"] == 40
    assert mask["expected"]["hidden_size"] > 0
    card = (tmp_path / "small" / "README.md").read_text()
    assert "by a mask learned on 40 rows" in " ".join(card.split())


def test_a_mask_that_stopped_goes_on_to_the_same_bytes(place, tmp_path, monkeypatch):
    monkeypatch.setattr(Journal, "due", lambda self: True)
    compress(settings(place, tmp_path / "whole"), QUIET)
    real = learned_mask.take_step

    def dies(run, step):
        if step == 7:
            raise KeyboardInterrupt
        return real(run, step)

    with monkeypatch.context() as patch:
        patch.setattr(learned_mask, "take_step", dies)
        with pytest.raises(KeyboardInterrupt):
            compress(settings(place, tmp_path / "again"), QUIET)
    compress(settings(place, tmp_path / "again"), QUIET)
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_sentence_encoder_learns_from_its_stream(place, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    AutoModel.from_pretrained(place / "dense").save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(place / "dense").save_pretrained(tmp_path / "dense")
    compress(settings(place, tmp_path / "small", model=str(tmp_path / "dense"), keep=0.6), QUIET)
    record = json.loads((tmp_path / "small" / "sp3llm.json").read_text())
    assert record["mask"]["history"][-1]["divergence"] > 0
    assert record["answers"][0]["metric"] == "Pearson of cosines"
