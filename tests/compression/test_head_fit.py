"""What a refitted head is given by what it says: a step of its matrix, a factor in its norm."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from sp3llm.compression import head_fit
from sp3llm.compression.basis_choice import choose_basis
from sp3llm.compression.building import refitted_groups
from sp3llm.compression.ends import dense_end, mean_divergence, on_windows, small_end
from sp3llm.compression.head_step import stepped
from sp3llm.compression.logit_scale import (
    fit_logit_scale,
    least_of_parabola,
    scaled_norm,
)
from sp3llm.compression.measuring import measure_dense
from sp3llm.compression.refitter import HeadFit, Refitter
from sp3llm.models import export
from sp3llm.models.shapes import Shape
from sp3llm.planning.windows import windows_that_tell
from sp3llm.reporting.record import read_record
from tests.conftest import (
    family_of_model,
    logits_of,
    relative_error,
    save_model,
    tiny_model,
    written_model,
)
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

    def refit(model, suits_head: bool = True, **cut: int):
        checkpoint, family = save_model(model, tmp_path), family_of_model(model)
        moments, _ = measure_dense(
            checkpoint, family, tokens, None, "normalised", "gradient", EXECUTION
        )
        shape = replace(Shape.of(family, checkpoint.config), **cut)
        _, projection = choose_basis(checkpoint, family, moments, shape)
        of_shape = (checkpoint, family, shape, projection, torch.float64, EXECUTION, "obs")
        refitter = Refitter(*of_shape, 2, 3, [], suits_head=suits_head)
        return refitter, list(refitted_groups(refitter, tokens))

    return refit


def ends_of(refitter, groups, tensors=None):
    """Both models behind their last layers; the small one with these tensors of a head."""
    head, table = groups[-1], None
    if refitter.shape.tie_word_embeddings:
        table = groups[0].tensors[refitter.family.embedding]
    small = small_end(refitter, head.tensors if tensors is None else tensors, table, head.small)
    return small, dense_end(refitter, head.dense)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_that_lost_nothing_keeps_its_head(variant, refitted):
    _, groups = refitted(tiny_model(variant))
    assert groups[-1].head_fit == HeadFit(logit_scale=1, step_gain=0)
    _, others = refitted(tiny_model(variant), suits_head=False)
    assert others[-1].head_fit is None
    assert groups[-1].tensors.keys() == others[-1].tensors.keys()
    for name, tensor in others[-1].tensors.items():
        assert torch.equal(groups[-1].tensors[name], tensor)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_too_sure_gets_back_what_it_was_given(variant, refitted):
    refitter, groups = refitted(tiny_model(variant))
    sure = {**groups[-1].tensors, **scaled_norm(refitter, groups[-1].tensors, 1 / 0.93)}
    ends = [on_windows(end, slice(3, None)) for end in ends_of(refitter, groups, sure)]
    plain = mean_divergence(refitter, *ends)
    assert fit_logit_scale(refitter, *ends, plain) == pytest.approx(0.93, abs=0.01)


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_lead_a_head_to_what_the_dense_model_says(variant, refitted):
    """From one whose rows were shifted: on the tokens that the steps are by, nearer each time."""
    refitter, groups = refitted(tiny_model(variant), suits_head=False)
    small, dense = ends_of(refitter, groups)
    name = f"{refitter.family.head}.weight"
    torch.manual_seed(0)
    table = small.head[name]
    shifted = table + 0.3 * table.std() * torch.randn(table.shape, dtype=table.dtype)
    small = replace(small, head={**small.head, name: shifted})
    ends = [small]
    for _ in range(3):
        ends.append(stepped(refitter, ends[-1], dense))
    seen = slice(0, 3)
    found = [
        mean_divergence(refitter, on_windows(end, seen), on_windows(dense, seen)) for end in ends
    ]
    assert sorted(found, reverse=True) == found
    assert found[-1] < 0.95 * found[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_factor_on_the_norm_is_one_on_the_logits(variant, refitted, tokens):
    model = tiny_model(variant)
    refitter, _ = refitted(model)
    before, tensors = logits_of(model, tokens), model.state_dict()
    model.load_state_dict(scaled_norm(refitter, tensors, 0.7), strict=False)
    assert relative_error(logits_of(model, tokens), 0.7 * before) < 1e-6  # norms are of float32


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "opt-projected"])
def test_only_the_head_differs_and_fits_do_not_see_the_windows_that_tell(variant, refitted):
    cut = {"intermediate_size": 16}
    refitter, suited = refitted(tiny_model(variant), **cut)
    _, plain = refitted(tiny_model(variant), suits_head=False, **cut)
    for one, other in zip(suited[:-1], plain[:-1], strict=True):
        assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    found, before = suited[-1].head_fit, plain[-1].tensors
    norm = f"{refitter.family.final_norm}.weight"
    assert torch.equal(suited[-1].tensors[norm], before[norm] * found.logit_scale)
    tables = {f"{refitter.family.head}.weight", refitter.family.embedding}
    changed = {n for n, t in suited[-1].tensors.items() if not torch.equal(t, before.get(n, t * 0))}
    assert changed - {n for n in before if n.startswith(refitter.family.final_norm)} <= tables
    assert bool(changed & tables) == (found.step_gain > 0)


def test_a_step_is_judged_by_windows_that_no_fit_saw(refitted, monkeypatch):
    """The divergence that the record says is won is that of the model that is written."""
    cut = {"intermediate_size": 16}
    refitter, plain = refitted(tiny_model("llama-tied"), suits_head=False, **cut)

    def shifted(_, small, __, by=0.1):
        head = dict(small.head)
        head["lm_head.weight"] = head["lm_head.weight"] * (1 + by)
        return replace(small, head=head)

    at = [on_windows(end, slice(3, None)) for end in ends_of(refitter, plain)]
    before = mean_divergence(refitter, *at)
    after = {by: mean_divergence(refitter, shifted(0, at[0], 0, by), at[1]) for by in (0.1, -0.1)}
    by = min(after, key=after.get)
    assert after[by] < before < after[-by]
    for sign, gain in ((1, before - after[by]), (-1, 0)):
        monkeypatch.setattr(head_fit, "stepped", partial(shifted, by=sign * by))
        _, groups = refitted(tiny_model("llama-tied"), **cut)
        assert groups[-1].head_fit.step_gain == pytest.approx(gain)
        table = groups[0].tensors["model.embed_tokens.weight"]
        found = groups[-1].tensors.get("model.embed_tokens.weight", table)
        assert torch.allclose(found, table * (1 + by) if gain else table)


@pytest.mark.parametrize("shard_bytes", [2000, 10**9])
def test_a_table_that_is_the_head_too_is_written_as_the_head_has_it(
    shard_bytes, refitted, tmp_path, monkeypatch
):
    monkeypatch.setattr(export, "_SHARD_BYTES", shard_bytes)
    refitter, groups = refitted(tiny_model("llama-tied"), suits_head=False)
    name = "model.embed_tokens.weight"
    table = groups[0].tensors[name] + 1
    groups[-1] = replace(groups[-1], tensors={**groups[-1].tensors, name: table})
    of_model = (refitter.family, dict(refitter.dense.config), groups, torch.float64)
    found = written_model(*of_model, tmp_path / "written")
    assert torch.equal(found.read([name])[name], table)
    for group in groups[1:-1]:
        there = found.read(group.tensors)
        assert all(torch.equal(there[n], tensor) for n, tensor in group.tensors.items())


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
    assert record.head_step_gain >= 0
    norm = weights(tmp_path / "small")["model.norm.weight"]
    assert torch.allclose(norm, torch.tensor(record.logit_scale, dtype=norm.dtype))
    AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_nothing_tells_where_no_other_text_is_left(tmp_path):
    text = tmp_path / "little.txt"
    text.write_text("word after word " * 150)
    options = {"calib": str(text), "samples": 16, "seq_len": 24, "allocate": "width"}
    compress_tiny("llama", tmp_path, **options)
    record = read_record(tmp_path / "small")
    assert record.logit_scale is None
    assert record.head_step_gain is None
