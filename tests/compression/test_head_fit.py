"""What a refitted head is given by what it says: a step of its matrix, a factor in its norm."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from sp3llm.compression import head_fit, head_step
from sp3llm.compression.basis_choice import choose_basis
from sp3llm.compression.building import refitted_groups
from sp3llm.compression.ends import (
    dense_end,
    mean_divergences,
    mean_of_all,
    on_windows,
    small_end,
    with_head,
)
from sp3llm.compression.head_step import stepped
from sp3llm.compression.logit_scale import (
    fit_logit_scale,
    least_of_parabola,
    scaled_norm,
)
from sp3llm.compression.measuring import measure_dense
from sp3llm.compression.refitter import FinishedGroup, HeadFit, Refitter
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
        groups: list[FinishedGroup] = []

        def finished(number: int):
            return groups[number].tensors

        refitter = Refitter(*of_shape, 2, 3, [], finished=finished if suits_head else None)
        for group in refitted_groups(refitter, tokens):
            groups.append(group)
        return refitter, groups

    refit.tokens = tokens
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
    small, dense = ends
    (plain,) = mean_divergences(refitter, [small], dense)
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
    on_seen = [on_windows(end, seen) for end in ends]
    found = mean_divergences(refitter, on_seen, on_windows(dense, seen))
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


def divergence_of_written(refitter, groups, tokens, folder) -> float:
    """Of the stock model that is written from the dense one, on tokens; its head's factor apart."""
    factor = groups[-1].head_fit.logit_scale if groups[-1].head_fit else 1
    plain = {**groups[-1].tensors, **scaled_norm(refitter, groups[-1].tensors, 1 / factor)}
    built = [*groups[:-1], replace(groups[-1], tensors=plain)]
    config = refitter.small_config
    written_model(refitter.family, config, built, torch.float64, folder)
    (folder / "config.json").write_text(json.dumps(config))
    dense, small = (
        AutoModelForCausalLM.from_pretrained(place, dtype=torch.float64)
        for place in (refitter.dense.folder, folder)
    )
    with torch.no_grad():
        wanted, said = (logits_of(model, tokens).log_softmax(-1) for model in (dense, small))
    return (wanted.exp() * (wanted - said)).sum(-1).mean().item()


@pytest.mark.parametrize(
    "variant", ["llama", "llama-tied", "gemma", "granite-tied", "opt-projected"]
)
def test_what_a_step_is_said_to_win_is_won_by_the_model_that_is_written(
    variant, refitted, tokens, tmp_path, monkeypatch
):
    """On windows that no fit saw, by the whole stock forward: a tied table is what tokens enter
    with as well.
    """
    cut = {"intermediate_size": 16}
    refitter, plain = refitted(tiny_model(variant), suits_head=False, **cut)
    name, unseen = f"{refitter.family.head}.weight", tokens[3:]
    before = divergence_of_written(refitter, plain, unseen, tmp_path / "plain")

    def turned(_, small, __, by: float):
        return with_head(refitter, small, {name: small.head[name] * (1 + by)})

    monkeypatch.setattr(head_fit, "_SURE_ENOUGH", 0)
    gains = []
    for by in (0.02, -0.02):
        monkeypatch.setattr(head_fit, "stepped", partial(turned, by=by))
        _, groups = refitted(tiny_model(variant), **cut)
        after = divergence_of_written(refitter, groups, unseen, tmp_path / str(by))
        gains.append(groups[-1].head_fit.step_gain)
        assert gains[-1] == pytest.approx(before - after, abs=1e-9)
        if refitter.shape.tie_word_embeddings:
            table = groups[0].tensors[refitter.family.embedding]
            found = groups[-1].tensors.get(refitter.family.embedding, table)
            assert torch.allclose(found, table * (1 + by) if gains[-1] else table)
    assert max(gains) > 0


@pytest.mark.parametrize("variant", ["llama", "llama-tied"])
def test_a_step_that_is_not_finite_is_not_taken(variant, refitted, monkeypatch):
    _, plain = refitted(tiny_model(variant), suits_head=False, intermediate_size=16)

    def broken(_, small, __):
        return replace(small, head={name: t * float("nan") for name, t in small.head.items()})

    monkeypatch.setattr(head_fit, "stepped", broken)
    _, groups = refitted(tiny_model(variant), intermediate_size=16)
    assert groups[-1].head_fit.step_gain == 0
    assert groups[-1].tensors.keys() == plain[-1].tensors.keys()


@pytest.mark.parametrize(("noise", "taken"), [(0.001, True), (1.0, False)])
def test_a_step_is_taken_where_it_wins_more_than_chance_would(noise, taken, refitted, monkeypatch):
    found = torch.randn(1, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    won = 0.01 + noise * (found - found.mean())
    answers = [torch.ones_like(won), 1 - won]
    monkeypatch.setattr(head_fit, "divergences", lambda *_: answers)
    _, groups = refitted(tiny_model("llama"), intermediate_size=16)
    assert groups[-1].head_fit.step_gain == pytest.approx(0.01 if taken else 0, abs=1e-9)


def test_heads_side_by_side_need_modules_of_their_own(refitted):
    """Of two that stand in one, the last would speak for both."""
    refitter, groups = refitted(tiny_model("llama"), suits_head=False)
    small, dense = ends_of(refitter, groups)
    scaled = scaled_norm(refitter, small.head, 0.7)
    plain, other = mean_divergences(refitter, [small, with_head(refitter, small, scaled)], dense)
    assert plain != other
    with pytest.raises(ValueError, match="modules of their own"):
        mean_divergences(refitter, [small, replace(small, head={**small.head, **scaled})], dense)


def test_a_mean_comes_with_its_error(refitted):
    refitter, _ = refitted(tiny_model("llama"))
    values = torch.randn(2, 50, dtype=torch.float64) + 3
    mean, error = mean_of_all(refitter, values)
    assert mean == pytest.approx(values.mean().item())
    assert error == pytest.approx(values.std().item() / 10)


def test_a_table_that_a_killed_run_left_is_put_back(refitted, monkeypatch):
    """Where the step is judged otherwise this time."""
    monkeypatch.setattr(
        head_fit, "stepped", lambda refitter, small, _: with_head(refitter, small, {})
    )
    refitter, groups = refitted(tiny_model("llama-tied"), intermediate_size=16)
    name = refitter.family.embedding
    assert name not in groups[-1].tensors
    left = [replace(groups[0], tensors={name: groups[0].tensors[name] + 1}), *groups[1:]]
    refitter = replace(refitter, finished=lambda number: left[number].tensors, log=[])
    again = list(refitted_groups(refitter, refitted.tokens))
    assert torch.equal(again[-1].tensors[name], groups[0].tensors[name])


@pytest.mark.parametrize(("windows", "length"), [(3, 24), (20, 24), (60, 8)])
def test_a_step_is_by_tokens_all_over_the_windows_but_none_that_stands_first(
    windows, length, monkeypatch
):
    """As many as are wanted, or all there are; one a window at least."""
    monkeypatch.setattr(head_step, "_TOKENS", 40)
    places = range(length)[head_step.places(windows, length)]
    assert 0 not in places
    assert len(places) * windows >= min(40, (length - 1) * windows)
    assert len(places) >= 1
    assert (len(places) - 1) * windows < 2 * 40 or len(places) == 1


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


def test_what_a_killed_run_wrote_to_take_a_files_place_goes(refitted, tmp_path):
    refitter, groups = refitted(tiny_model("llama-tied"), suits_head=False)
    (tmp_path / "written").mkdir()
    left = tmp_path / "written" / "next-model.safetensors"
    left.touch()
    of_model = (refitter.family, dict(refitter.dense.config), groups, torch.float64)
    written_model(*of_model, tmp_path / "written")
    assert not left.exists()


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
