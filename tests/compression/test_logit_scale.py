"""How sure a refitted model may be: a factor in its final norm, from windows that no fit saw."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from sp3llm.compression.basis_choice import choose_basis
from sp3llm.compression.building import refitted_groups
from sp3llm.compression.logit_scale import (
    fit_logit_scale,
    least_of_parabola,
    scaled_norm,
)
from sp3llm.compression.measuring import measure_dense
from sp3llm.compression.refitter import Refitter
from sp3llm.models.shapes import Shape
from sp3llm.planning.windows import windows_that_tell
from sp3llm.reporting.record import read_record
from tests.conftest import family_of_model, logits_of, relative_error, save_model, tiny_model
from tests.helpers import EXECUTION, compress_tiny, weights

VARIANTS = [
    "llama",
    "llama-tied",
    "gemma",
    "granite-tied",
    "opt-untied",
    "opt-projected",
    "gpt-neox",
]


@pytest.fixture
def refitted(tmp_path, tokens):
    """A refitter whose fits see the first three of four windows, and what it makes."""

    def refit(model, scales_logits: bool = True, **cut: int):
        checkpoint, family = save_model(model, tmp_path), family_of_model(model)
        moments, _ = measure_dense(
            checkpoint, family, tokens, None, "normalised", "gradient", EXECUTION
        )
        shape = replace(Shape.of(family, checkpoint.config), **cut)
        _, projection = choose_basis(checkpoint, family, moments, shape)
        of_shape = (checkpoint, family, shape, projection, torch.float64, EXECUTION, "obs")
        refitter = Refitter(*of_shape, 2, 3, [], scales_logits=scales_logits)
        return refitter, list(refitted_groups(refitter, tokens))

    return refit


def table_of(refitter, groups):
    """The small model's embeddings where they are its head."""
    if not refitter.shape.tie_word_embeddings:
        return None
    return groups[0].tensors[refitter.family.embedding]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_that_lost_nothing_is_as_sure_as_it_was(variant, refitted):
    _, groups = refitted(tiny_model(variant))
    assert groups[-1].logit_scale == 1
    _, others = refitted(tiny_model(variant), scales_logits=False)
    assert others[-1].logit_scale is None
    for name, tensor in others[-1].tensors.items():
        assert torch.equal(groups[-1].tensors[name], tensor)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_too_sure_gets_back_what_it_was_given(variant, refitted):
    refitter, groups = refitted(tiny_model(variant))
    head = groups[-1]
    sure = {**head.tensors, **scaled_norm(refitter, head.tensors, 1 / 0.93)}
    streams = (table_of(refitter, groups), head.dense, head.small)
    assert fit_logit_scale(refitter, sure, *streams) == pytest.approx(0.93, abs=0.01)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_factor_on_the_norm_is_one_on_the_logits(variant, refitted, tokens):
    model = tiny_model(variant)
    refitter, _ = refitted(model)
    before, tensors = logits_of(model, tokens), model.state_dict()
    model.load_state_dict(scaled_norm(refitter, tensors, 0.7), strict=False)
    assert relative_error(logits_of(model, tokens), 0.7 * before) < 1e-6  # norms are of float32


def test_only_the_head_differs_and_fits_do_not_see_the_windows_that_tell(refitted, tokens):
    cut = {"intermediate_size": 16}
    _, scaled = refitted(tiny_model("llama"), **cut)
    _, plain = refitted(tiny_model("llama"), scales_logits=False, **cut)
    for one, other in zip(scaled[:-1], plain[:-1], strict=True):
        assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    assert 0 < scaled[-1].logit_scale <= 1
    assert torch.equal(
        scaled[-1].tensors["model.norm.weight"],
        plain[-1].tensors["model.norm.weight"] * scaled[-1].logit_scale,
    )


def test_the_least_of_a_parabola_is_found_within_bounds():
    def found(at: float, bend: float = 3.0) -> float:
        places = (1.0, 0.95, 0.9)
        return least_of_parabola(places, [bend * (place - at) ** 2 for place in places])

    assert found(0.93) == pytest.approx(0.93)
    assert found(0.99) == pytest.approx(0.99)
    assert found(1.2) == 1
    assert found(0.5) == 0.8
    assert found(0.93, bend=-1) == 1
    assert found(0.93, bend=float("nan")) == 1


def test_windows_that_tell_are_few_beside_those_that_are_fitted():
    assert [windows_that_tell(*of) for of in ((15, 512), (16, 512), (48, 512), (128, 512))] == [
        *(0, 1, 3, 4)
    ]
    assert windows_that_tell(128, 2048) == 1


def test_the_record_says_what_the_stock_model_has_in_its_norm(tmp_path):
    compress_tiny("llama", tmp_path, samples=20, allocate="width", recover_steps=0)
    record = read_record(tmp_path / "small")
    assert record.calibration.samples == 20
    assert 0.8 <= record.logit_scale <= 1
    norm = weights(tmp_path / "small")["model.norm.weight"]
    assert torch.allclose(norm, torch.tensor(record.logit_scale, dtype=norm.dtype))
    AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_nothing_tells_where_no_other_text_is_left(tmp_path):
    text = tmp_path / "little.txt"
    text.write_text("word after word " * 150)
    options = {"calib": str(text), "samples": 16, "seq_len": 24, "allocate": "width"}
    compress_tiny("llama", tmp_path, **options)
    assert read_record(tmp_path / "small").logit_scale is None
