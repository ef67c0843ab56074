"""Learned masks: what a gated model computes is what is written in the end."""

import itertools
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from sp3llm.compression import learned_mask
from sp3llm.compression.basis_choice import learned_basis, nested_frame
from sp3llm.compression.building import refitted_groups
from sp3llm.compression.gated_model import GatedModel
from sp3llm.compression.learned_mask import WAY, Learned, _at_one_shape, learn
from sp3llm.compression.mask_budget import budget_of
from sp3llm.compression.mask_steps import MaskTraining, take_step
from sp3llm.compression.measuring import measure_dense
from sp3llm.compression.projecting import plain_groups
from sp3llm.compression.refitter import Refitter
from sp3llm.compression.story import compress
from sp3llm.compression.units import gated_writers
from sp3llm.errors import UserError
from sp3llm.maths import gates
from sp3llm.maths.gates import Gates, open_probability, sampled, unevenness
from sp3llm.models.families import FAMILIES, axis_sizes, count_parameters, family_of, is_square
from sp3llm.models.shapes import Shape, cost_of, resized_config
from sp3llm.models.stock import run_layers_again
from sp3llm.options import COUNTS, CompressConfig
from sp3llm.planning.candidates import candidates
from sp3llm.planning.limits import Limits
from sp3llm.planning.search import learnable, nearest
from sp3llm.runtime.devices import Execution
from sp3llm.runtime.folders import RECORD
from sp3llm.runtime.journal import NOTHING_KEPT, open_journal
from tests.conftest import (
    TINY,
    disk_tensors,
    family_of_model,
    logits_of,
    relative_error,
    save_model,
    stock_model,
    tiny_model,
    written_model,
)
from tests.helpers import EXECUTION, QUIET


def gated_and_checkpoint(variant, folder, tokens, **overrides):
    """A tiny model in float64 with gates in it, its checkpoint, moments and frame."""
    model = tiny_model(variant, **overrides)
    checkpoint, family = save_model(model, folder), family_of_model(model)
    stock = stock_model(checkpoint.config, disk_tensors(checkpoint, family), exact=True)
    moments, _ = measure_dense(checkpoint, family, tokens, None, "normalised", "readers", EXECUTION)
    shape = Shape.of(family, checkpoint.config)
    frame = nested_frame(family, moments, [shape.hidden_size // 2])
    return GatedModel(stock, family, checkpoint.config, frame), checkpoint, family, moments, frame


def open_gates(checkpoint, family, frame, windows, seed=None):
    """Gates of a mask over everything that may go: all 1, or drawn."""
    generator = torch.Generator().manual_seed(seed or 0)
    shape = Shape.of(family, checkpoint.config)
    layers = checkpoint.config["num_hidden_layers"]
    sizes = {
        "stream_C": (frame.shape[1],),
        "neurons_LF": (layers, shape.intermediate_size),
        "groups_LG": (layers, shape.num_key_value_heads),
    }
    return Gates(
        **{
            name: torch.ones(windows, *size, dtype=torch.float64)
            if seed is None
            else torch.rand(windows, *size, dtype=torch.float64, generator=generator)
            for name, size in sizes.items()
        }
    )


@pytest.mark.parametrize("variant", list(TINY))
def test_open_gates_leave_logits_unchanged(variant, tokens, tmp_path):
    gated, checkpoint, family, _, frame = gated_and_checkpoint(variant, tmp_path, tokens)
    dense = logits_of(gated.model, tokens)
    every = open_gates(checkpoint, family, frame, len(tokens))
    with gated.through(every) as model:
        assert relative_error(logits_of(model, tokens), dense) < 1e-12
    fewer = torch.linspace(0, 1, frame.shape[1]).double().expand_as(every.stream_C)
    with gated.through(replace(every, stream_C=fewer)) as model:
        assert relative_error(logits_of(model, tokens), dense) > 1e-6  # the gates are there
    assert torch.equal(logits_of(gated.model, tokens), dense)


def test_every_window_has_gates_of_its_own(tokens, tmp_path):
    for variant in ("llama", "opt"):
        folder = tmp_path / variant
        gated, checkpoint, family, _, frame = gated_and_checkpoint(variant, folder, tokens)
        gates = open_gates(checkpoint, family, frame, len(tokens), seed=5)
        with gated.through(gates) as model:
            together = logits_of(model, tokens)
        for row in range(len(tokens)):
            with gated.through(gates.map(lambda value, row=row: value[row : row + 1])) as model:
                alone = logits_of(model, tokens[row : row + 1])
            assert relative_error(together[row : row + 1], alone) < 1e-12


@pytest.mark.parametrize("variant", ["llama", "opt", "mixtral", "gpt-neox"])
def test_layers_that_run_again_for_their_gradients_see_the_same_gates(variant, tokens, tmp_path):
    """On a GPU only what enters a layer is kept."""
    gated, checkpoint, family, _, frame = gated_and_checkpoint(
        variant, tmp_path, tokens, dropout=0.0
    )
    drawn = open_gates(checkpoint, family, frame, len(tokens), seed=5)
    found = []
    for again in (False, True):
        if again:
            run_layers_again(gated.model)
            gated.model.train()
        gates = drawn.map(lambda value: value.clone().requires_grad_())
        with gated.through(gates) as model:
            model(input_ids=tokens, use_cache=False).logits.logsumexp(-1).sum().backward()
        gradients = {name: gate.grad for name, gate in gates.named().items()}
        found.append({name: grad for name, grad in gradients.items() if grad is not None})
    assert found[0].keys() == found[1].keys()  # of experts no neurons are gated
    assert "stream_C" in found[0]
    for name, gradient in found[0].items():
        assert torch.allclose(found[1][name], gradient, rtol=1e-9, atol=1e-9)


def small_shape(family, config):
    """Half of the stream, some of the neurons, and where the class lets them go, of the groups."""
    shape = Shape.of(family, config)
    heads = shape.num_attention_heads
    if is_square(family, config) and not family.rotary:
        return replace(shape, intermediate_size=24).untied()  # heads are not the mask's there
    small = shape.with_groups(shape.num_key_value_heads // 2)
    small = small.with_width(shape.hidden_size // 2 // heads * heads)
    if is_square(family, config):
        small = small.with_width(small.num_attention_heads * shape.head_dim)
    if family.experts is None:
        small = replace(small, intermediate_size=24)
    return small.untied() if shape.tie_word_embeddings else small


@pytest.mark.parametrize("variant", list(TINY))
def test_winners_with_gates_folded_are_the_gated_model(variant, tokens, tmp_path):
    """Soft gates and all: what was learned is exactly what is written without a refit."""
    gated, checkpoint, family, moments, frame = gated_and_checkpoint(
        variant, tmp_path / "dense", tokens
    )
    shape = small_shape(family, checkpoint.config)
    dense = Shape.of(family, checkpoint.config)
    if is_square(family, checkpoint.config) and any(
        f"{writer}.bias" in family.layer or family.optional for writer in family.writers[:1]
    ):
        shape = replace(shape, hidden_size=dense.hidden_size).with_groups(dense.num_key_value_heads)
    generator = torch.Generator().manual_seed(1)
    whole = open_gates(checkpoint, family, frame, 1)
    log_alpha = whole.map(
        lambda value: torch.randn(value.shape[1:], generator=generator).float() + 0.5
    )
    is_cut = {
        "stream_C": shape.hidden_size != dense.hidden_size,
        "neurons_LF": shape.intermediate_size != dense.intermediate_size,
        "groups_LG": shape.num_key_value_heads != dense.num_key_value_heads,
    }
    log_alpha = Gates(**{n: a for n, a in log_alpha.named().items() if is_cut[n]})
    learned = Learned(frame, log_alpha, shape, {}, [])
    columns, stream_gates = learned.stream()
    kept_units = learned.kept_units()
    _, projection = learned_basis(checkpoint, family, moments, shape, tokens, columns, stream_gates)
    projection = replace(projection, kept_units=kept_units)
    config = resized_config(family, checkpoint.config, shape)
    built = plain_groups(checkpoint, family, projection, torch.float64, EXECUTION)
    small = written_model(family, config, built, torch.float64, tmp_path / "small")
    found = logits_of(stock_model(config, disk_tensors(small, family), exact=True), tokens)

    stream = None
    if log_alpha.stream_C is not None:
        kept = gates.top_indices(log_alpha.stream_C, columns.shape[1])
        stream = torch.zeros(frame.shape[1], dtype=torch.float64)
        stream[kept] = stream_gates
    kept_gates = Gates(stream, kept_units.neurons_LF, kept_units.groups_LG)
    kept_gates = kept_gates.map(lambda value: value.expand(len(tokens), *value.shape))
    with gated.through(kept_gates) as model:
        expected = logits_of(model, tokens)
    soft = [g for g in kept_gates.named().values() if ((g > 0) & (g < 1)).any()]
    assert len(soft) == sum(is_cut.values())
    assert relative_error(found, expected) < 1e-10


def test_the_refit_keeps_the_winners_of_every_layer(tokens, tmp_path):
    """At full width the readers' map is the identity, so rows that are kept can be recognised."""
    _, checkpoint, family, moments, frame = gated_and_checkpoint("llama", tmp_path, tokens)
    shape = replace(Shape.of(family, checkpoint.config), intermediate_size=24).with_groups(1)
    generator = torch.Generator().manual_seed(1)
    log_alpha = Gates(
        neurons_LF=torch.randn(3, 40, generator=generator),
        groups_LG=torch.randn(3, 2, generator=generator),
    )
    kept_units = Learned(frame, log_alpha, shape, {}, []).kept_units()
    _, projection = learned_basis(
        checkpoint, family, moments, shape, tokens, torch.eye(48).double(), None
    )
    refitter = Refitter(
        checkpoint, family, shape, replace(projection, kept_units=kept_units),
        torch.float64, EXECUTION, "obs", 3, 4, [],
    )  # fmt: skip
    dense, norm = disk_tensors(checkpoint, family), "post_attention_layernorm.weight"
    first = next(itertools.islice(refitted_groups(refitter, tokens), 1, None))
    found = first.tensors["model.layers.0.mlp.gate_proj.weight"]
    whole = dense["model.layers.0.mlp.gate_proj.weight"] * dense[f"model.layers.0.{norm}"]
    kept = log_alpha.neurons_LF[0].topk(24).indices.sort().values
    nearest_rows = torch.cdist(found, whole).argmin(1)
    assert torch.equal(nearest_rows, kept)
    group = log_alpha.groups_LG[0].argmax()
    rows = (
        dense["model.layers.0.self_attn.k_proj.weight"]
        * dense["model.layers.0.input_layernorm.weight"]
    )
    found = first.tensors["model.layers.0.self_attn.k_proj.weight"]
    assert relative_error(found, rows[12 * group : 12 * (group + 1)]) < 1e-5


@pytest.mark.parametrize("of", COUNTS)
@pytest.mark.parametrize("variant", list(TINY))
def test_the_expected_count_is_the_count(variant, of):
    """At sizes that are whole numbers the polynomial is what a plan counts."""
    config = tiny_model(variant).config.to_dict()
    family = FAMILIES[config["model_type"]]
    for tie in ("keep", "untie"):
        try:
            shapes = candidates(family, config, Limits(keep=0.85, of=of, tie=tie))
        except UserError:
            continue
        limits = Limits(keep=0.85, of=of)
        budget = budget_of(family, config, limits, shapes)
        dense = cost_of(family, config, budget.dense).of(of)
        for shape in budget.shapes:
            sizes = {
                name: torch.tensor(float(getattr(shape, name)), dtype=torch.float64)
                for name in ("hidden_size", "intermediate_size", "num_key_value_heads")
            }
            counted = cost_of(family, config, shape).of(of) / dense
            assert budget.cost(sizes).item() == pytest.approx(counted, abs=1e-12)


def test_a_mask_chooses_among_shapes_of_one_kind():
    config = tiny_model("opt").config.to_dict()
    family = FAMILIES["opt"]
    shapes = candidates(family, config, Limits(keep=0.85, tie="auto"))
    found = learnable(family, config, shapes)
    assert len({shape.tie_word_embeddings for shape in found}) == 1
    assert len({shape.word_embed_proj_dim for shape in found}) == 1
    sizes = {"hidden_size": found[-1].hidden_size + 0.3}
    sizes["intermediate_size"] = found[-1].intermediate_size * 1.01
    assert nearest(found, sizes) == found[-1]


def test_gates_are_what_their_probabilities_say():
    log_alpha = torch.linspace(-4, 4, 9)
    uniform = torch.rand(40000, 9, generator=torch.Generator().manual_seed(0))
    gates = sampled(log_alpha, uniform.clamp(1e-6, 1 - 1e-6))
    assert gates.min() == 0
    assert gates.max() == 1
    opened = (gates > 0).double().mean(0)
    assert torch.allclose(opened, open_probability(log_alpha).double(), atol=0.01)


def test_layers_are_brought_to_the_same_number():
    uneven = unevenness(torch.tensor([[1.0, 1.0], [0.5, 0.0]]))
    assert torch.allclose(uneven, torch.tensor([0.375, -0.375]))


# --------------------------------------------------------------------------- learning


def lesson(tmp_path, tokens, variant="llama", keep=0.6, steps=60):
    """Arguments of `learn.learn` for a tiny model."""
    model = tiny_model(variant, torch.float32)
    checkpoint, family = save_model(model, tmp_path / variant), family_of_model(model)
    execution = Execution(torch.device("cpu"), torch.float32)
    moments, _ = measure_dense(checkpoint, family, tokens, None, "normalised", "readers", execution)
    shapes = candidates(family, checkpoint.config, Limits(keep=keep))
    budget = budget_of(family, checkpoint.config, Limits(keep=keep), shapes)
    return {
        "dense": checkpoint, "family": family, "budget": budget,
        "frame_of": partial(nested_frame, family, moments),
        "training": MaskTraining(tokens, 4, steps, 0), "execution": execution, "progress": None,
        "journal": NOTHING_KEPT,
    }  # fmt: skip


@pytest.mark.parametrize("variant", ["llama", "stablelm", "opt-projected", "gpt-neox"])
def test_a_mask_comes_down_to_the_budget_in_every_layer(variant, tokens, tmp_path):
    options = lesson(tmp_path, tokens, variant, keep=0.7, steps=40)
    learned, budget = learn(**options), options["budget"]
    opened = learned.log_alpha.map(lambda alpha: open_probability(alpha.double()))
    for entry in learned.history:
        assert entry["expected"] == pytest.approx(entry["target"], abs=2e-3)
    falling = [entry["target"] for entry in learned.history if entry["step"] <= 24]
    assert falling[-1] == pytest.approx(budget.keep, abs=1e-9)
    assert budget.keep <= 0.7
    for open_LU in (opened.neurons_LF, opened.groups_LG):
        if open_LU is not None:
            assert unevenness(open_LU).abs().max() < 2e-3
    _, sizes = replace(budget, shapes=[learned.shape]).violated(opened, 1.0)
    for name, size in sizes.items():  # in the end at exactly the shape's sizes
        difference = abs(size.item() - getattr(learned.shape, name))
        assert difference < 2e-3 * getattr(budget.dense, name)
    if budget.square and "num_key_value_heads" in sizes:
        share = sizes["num_key_value_heads"] / budget.dense.num_key_value_heads
        width = sizes["hidden_size"] / budget.dense.hidden_size
        assert share == pytest.approx(width.item(), abs=2e-3)  # groups go in step with the width
    assert learned.shape in budget.shapes


@pytest.mark.parametrize("variant", ["llama", "opt", "stablelm"])
def test_the_shape_fixed_begins_with_what_its_width_keeps_best(variant, tokens, tmp_path):
    """Exactly so many coordinates, one less under LayerNorm, are open: those that come first."""
    options, taken = lesson(tmp_path, tokens, variant, keep=0.7, steps=3), {}
    if variant == "llama":
        family, config = options["family"], options["dense"].config
        limits = Limits(keep=0.9, hidden_size=24)
        shapes = candidates(family, config, limits)
        options["budget"] = budget_of(family, config, limits, shapes)

    def at_one_shape(run, frame_of, real=_at_one_shape):
        taken["run"] = real(run, frame_of)
        taken["open"] = taken["run"].log_alpha.stream_C.detach().clone() > 0
        return taken["run"]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(learned_mask, "_at_one_shape", at_one_shape)
        learned = learn(**options)
    width, coordinates = learned.frame_DC.shape
    kept = learned.shape.hidden_size - (width - coordinates)
    assert taken["open"].nonzero()[:, 0].tolist() == list(range(kept))


def test_winners_of_a_narrow_stream_are_open(tokens, tmp_path):
    """What is closed takes no room from what is kept, where most is closed."""
    options = lesson(tmp_path, tokens, steps=40)
    family, config = options["family"], options["dense"].config
    limits = Limits(keep=0.2, hidden_size=4, intermediate_size=40, num_key_value_heads=2)
    budget = budget_of(family, config, limits, candidates(family, config, limits))
    learned = learn(**options | {"budget": budget})
    assert learned.history[-1]["expected"] == pytest.approx(budget.keep, abs=2e-3)
    opened = open_probability(learned.log_alpha.stream_C)
    assert opened.topk(4).values.mean() > 0.9


def test_sizes_fixed_by_hand_are_met(tokens, tmp_path):
    options = lesson(tmp_path, tokens, steps=30)
    family, config = options["family"], options["dense"].config
    limits = Limits(keep=0.8, hidden_size=40, num_key_value_heads=1)
    budget = budget_of(family, config, limits, candidates(family, config, limits))
    learned = learn(**options | {"budget": budget})
    assert learned.shape.hidden_size == 40


def test_what_is_at_once_in_memory_does_not_matter(tokens, tmp_path):
    options = lesson(tmp_path, tokens, steps=3)
    at_once = learn(**options)
    one_by_one = learn(**options | {"execution": replace(options["execution"], batch_tokens=1)})
    for name, alpha in at_once.log_alpha.named().items():
        difference = (alpha - one_by_one.log_alpha.named()[name]).abs().max()
        assert difference < 1e-5 * WAY  # of how far they can move


def test_a_resumed_mask_is_the_uninterrupted_one(tokens, tmp_path, monkeypatch):
    options = lesson(tmp_path, tokens, steps=10)
    whole = learn(**options)

    def begun():
        ranks = options["execution"].ranks
        journal = open_journal(tmp_path / "state", {}, ranks, lambda line: None)
        monkeypatch.setattr(type(journal), "due", lambda self: True)
        return journal

    real, taken = take_step, []

    def dying(run, step):
        if step == 6 and len(taken) == 6:
            raise KeyboardInterrupt
        taken.append(step)
        return real(run, step)

    monkeypatch.setattr(learned_mask, "take_step", dying)
    with pytest.raises(KeyboardInterrupt):
        learn(**options | {"journal": begun()})
    taken.append(-1)
    resumed = learn(**options | {"journal": begun()})
    assert taken == [*range(6), -1, *range(6, 10)]
    again = learn(**options | {"journal": begun()})  # from what it came to
    assert len(taken) == 11
    for found in (resumed, again):
        assert found.shape == whole.shape
        assert found.history == whole.history
        for name, alpha in whole.log_alpha.named().items():
            assert torch.equal(found.log_alpha.named()[name], alpha)


def test_learning_finds_what_is_dead(tokens, tmp_path):
    """Half of the neurons write nothing: gates on them cost nothing, so they go first."""
    options = lesson(tmp_path, tokens, steps=40)
    model = tiny_model("llama", torch.float32)
    dead = torch.arange(40) % 2 == 0
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, dead] = 0
    folder = tmp_path / "dead"
    checkpoint, family = save_model(model, folder), family_of_model(model)
    limits = Limits(keep=0.95, hidden_size=48, num_key_value_heads=2, intermediate_size=24)
    budget = budget_of(
        family, checkpoint.config, limits, candidates(family, checkpoint.config, limits)
    )
    learned = learn(**options | {"dense": checkpoint, "budget": budget})
    kept = learned.kept_units().neurons_LF > 0
    assert learned.shape.intermediate_size == 24
    assert kept[:, ~dead].all()


# --------------------------------------------------------------------------- the whole run


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """The tiny Llama by a learned mask, through everything."""
    folder = tmp_path_factory.mktemp("mask")
    save_model(tiny_llama(), folder / "dense", tokenizer=True)
    settings = settings_for(folder / "dense", folder / "small")
    compress(settings, QUIET)
    return folder


def tiny_llama():
    return tiny_model("llama", torch.float32, vocab_size=4096)


def settings_for(dense: Path, out: Path, **changes) -> CompressConfig:
    options = {
        "keep": 0.85, "out": out, "calib": "stdlib", "samples": 8, "seq_len": 32,
        "eval_samples": 8, "mask": "learned", "mask_steps": 20, "mask_batch": 4, "device": "cpu",
        "report": False,
    } | changes  # fmt: skip
    return CompressConfig(model=str(dense), **options)


def test_the_record_says_what_was_learned(result):
    record = json.loads((result / "small" / RECORD).read_text())
    config = json.loads((result / "small" / "config.json").read_text())
    family = family_of(config)
    assert count_parameters(family, config) == record["plan"]["parameters"]
    assert record["plan"]["keep"] <= 0.85
    assert record["mask"]["history"][-1]["step"] == 20
    assert record["mask"]["training"]["samples"] == 80
    assert "--mask learned" in record["command"]
    card = (result / "small" / "README.md").read_text()
    assert "by a mask learned on 2,560 tokens" in " ".join(card.split())
    expected = record["mask"]["expected"]
    assert expected["hidden_size"] > 0


def test_without_a_refit_the_mask_cuts_by_itself(result, tmp_path):
    found = compress(
        settings_for(result / "dense", tmp_path / "plain", refit=False, mask_steps=4), QUIET
    )
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    sizes = axis_sizes(FAMILIES["llama"], config)
    assert found.plan.shape.intermediate_size == sizes["intermediate_size"]
    assert found.fits == []


def test_too_little_memory_is_said_before_any_work(result, tmp_path):
    with pytest.raises(UserError, match="room for the whole dense model for --mask learned"):
        compress(settings_for(result / "dense", tmp_path / "no", max_memory="cpu=1MB"), QUIET)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask": "guessed"}, "--mask to be one of closed-form, learned, found 'guessed'"),
        ({"mask_steps": 1}, "--mask-steps of at least 2, found 1"),
        ({"mask_batch": -1}, "--mask-batch of at least 1, found -1"),
    ],
)
def test_bad_settings_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        settings_for(Path("x"), Path("y"), **changes)


def test_every_family_says_which_writers_are_gated():
    for variant in TINY:
        config = tiny_model(variant).config.to_dict()
        family = FAMILIES[config["model_type"]]
        from sp3llm.models.families import groups

        for group in groups(family, config):
            writers = [writer for writer, _ in gated_writers(family, group)]
            assert set(writers) <= set(group.writers)
            assert bool(group.prefix) == bool(writers)
