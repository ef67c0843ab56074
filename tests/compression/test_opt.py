"""OPT as stock OPT: LayerNorm, learned positions, square attention, tables that stay tied."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sp3llm.compression.basis_choice import choose_basis
from sp3llm.compression.building import refitted_groups, refitted_side_by_side
from sp3llm.compression.measuring import measure_dense
from sp3llm.compression.refitter import Refitter
from sp3llm.errors import UserError
from sp3llm.maths.basis import mean_free_frame
from sp3llm.models import families
from sp3llm.models.checkpoint import check_tensors, open_checkpoint, with_prefix
from sp3llm.models.families import count_parameters, family_of
from sp3llm.models.shapes import Shape, resized_config
from sp3llm.planning.candidates import candidates
from sp3llm.planning.limits import Limits
from tests.conftest import (
    disk_tensors,
    family_of_model,
    logits_of,
    random_orthogonal,
    relative_error,
    save_model,
    stock_model,
    tiny_model,
)
from tests.helpers import EXECUTION, compress_tiny, confine_stream, cut_model

OPT_125M = {
    "model_type": "opt",
    "architectures": ["OPTForCausalLM"],
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "ffn_dim": 3072,
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "word_embed_proj_dim": 768,
    "do_layer_norm_before": True,
}


@pytest.mark.parametrize("width", [2, 7, 48])
def test_the_mean_free_frame_is_orthonormal_and_mean_free(width):
    frame = mean_free_frame(width, torch.device("cpu"))
    assert relative_error(frame.T @ frame, torch.eye(width - 1).double()) < 1e-14
    assert frame.sum(0).abs().max() < 1e-13


def compressed(checkpoint, family, shape, tokens, folder, refit):
    """The small model's config and tensors, in float64, written and read back."""
    moments, _ = measure_dense(checkpoint, family, tokens, None, "normalised", "pca", EXECUTION)
    _, projection = choose_basis(checkpoint, family, moments, shape, tokens)
    return cut_model(checkpoint, family, shape, projection, tokens, folder, refit)


def confine_heads(model, kept: int) -> None:
    """Let every head's queries, keys and values live in `kept` dimensions, along no axis."""
    heads, full = model.config.num_attention_heads, model.config.hidden_size // 4
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            for seed, reader in enumerate(("q_proj", "k_proj", "v_proj")):
                frame = random_orthogonal(full, seed)[:, :kept]
                projector = torch.block_diag(*[frame @ frame.T] * heads)
                module = getattr(layer.self_attn, reader)
                module.weight.copy_(projector @ module.weight)
                module.bias.copy_(projector @ module.bias)


@pytest.mark.parametrize("refit", [False, True], ids=["plain", "refit"])
@pytest.mark.parametrize("variant", ["opt", "opt-projected", "opt-untied"])
def test_heads_shrink_without_loss_where_they_hold_no_more(variant, refit, tokens, tmp_path):
    """Stream in 31 dimensions and its mean, heads in 8: at 4 heads of 8 nothing is lost."""
    model = tiny_model(variant)
    confine_heads(model, 8)
    confine_stream(model, 32)
    checkpoint = save_model(model, tmp_path / "dense")
    family = family_of_model(model)
    dense = Shape.of(family, checkpoint.config)
    options = {"num_key_value_heads": 4, "num_attention_heads": 4, "head_dim": 8}
    shape = Shape(32, dense.intermediate_size, **options, word_embed_proj_dim=dense.
                  word_embed_proj_dim, tie_word_embeddings=dense.tie_word_embeddings)  # fmt: skip
    if variant == "opt-projected":  # as wide as the new stream, so the tie must go
        shape = shape.untied()
    shape = shape if shape.tie_word_embeddings else shape.untied()
    config, tensors = compressed(checkpoint, family, shape, tokens, tmp_path / "small", refit)
    small = stock_model(config, tensors, exact=True)
    whole = stock_model(checkpoint.config, disk_tensors(checkpoint, family), exact=True)
    unseen = (tokens + 31) % 96
    assert relative_error(logits_of(small, unseen), logits_of(whole, unseen)) < 1e-9


@pytest.mark.parametrize("refit", [False, True], ids=["plain", "refit"])
def test_a_table_narrows_without_loss_where_it_holds_no_more(refit, tokens, tmp_path):
    """Embeddings that lie in 20 dimensions of 32: a tied table of 20 does what it did."""
    model = tiny_model("opt-projected")
    frame = random_orthogonal(32, 3)[:, :20]
    with torch.no_grad():
        table = model.model.decoder.embed_tokens.weight
        table.copy_(table @ frame @ frame.T)
        for layer in model.model.decoder.layers:
            layer.self_attn.out_proj.weight[:, 24:] = 0
    confine_stream(model, 24)
    checkpoint = save_model(model, tmp_path / "dense")
    family = family_of_model(model)
    shape = Shape(24, 40, 2, 2, 12, word_embed_proj_dim=20, tie_word_embeddings=True)
    config, tensors = compressed(checkpoint, family, shape, tokens, tmp_path / "small", refit)
    assert tensors["model.decoder.embed_tokens.weight"].shape == (96, 20)
    small = stock_model(config, tensors, exact=True)
    assert small.lm_head.weight is small.model.decoder.embed_tokens.weight
    whole = stock_model(checkpoint.config, disk_tensors(checkpoint, family), exact=True)
    unseen = (tokens + 31) % 96
    assert relative_error(logits_of(small, unseen), logits_of(whole, unseen)) < 2e-6


def test_what_is_written_to_the_stream_has_no_mean(tokens, tmp_path):
    """Embeddings, positions, and writers with their biases: LayerNorm finds nothing to remove."""
    model = tiny_model("opt")
    checkpoint = save_model(model, tmp_path / "dense")
    family = family_of_model(model)
    shape = Shape(24, 40, 2, 2, 12, word_embed_proj_dim=48, tie_word_embeddings=True)
    _, tensors = compressed(checkpoint, family, shape, tokens, tmp_path / "small", True)
    for name, tensor in tensors.items():
        if name.endswith("embed_positions.weight"):
            assert tensor.sum(1).abs().max() < 1e-10
        elif any(part in name for part in ("out_proj", "fc2", "project_in")):
            assert tensor.sum(0).abs().max() < 1e-7, name


def test_the_output_stays_tied_and_counts_the_table_once(tmp_path):
    result = compress_tiny("opt", tmp_path, keep=0.8, tie="keep", word_embed_proj_dim=40)
    names = load_file(result.out / "model.safetensors").keys()
    assert "lm_head.weight" not in names
    model = AutoModelForCausalLM.from_pretrained(result.out)
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) == result.plan.parameters
    positions = model.model.decoder.embed_positions.weight
    assert positions.shape == (64 + 2, result.plan.shape.hidden_size)


@pytest.mark.parametrize("variant", ["llama-tied", "opt"])
def test_auto_tries_both_ties_and_says_what_the_other_costs(variant, tmp_path):
    from sp3llm.reporting.record import read_record
    from sp3llm.reporting.tables import rows

    result = compress_tiny(variant, tmp_path, keep=0.8)
    assert {shape.tie_word_embeddings for shape in result.findings.predicted} == {True, False}
    shape = result.plan.shape
    known = result.findings.tried or result.findings.predicted
    assert shape == min(known, key=known.__getitem__)
    said = {name: after for name, _, after in rows(read_record(result.out))}["embeddings and head"]
    assert said.startswith("tied" if shape.tie_word_embeddings else "untied")
    assert "would lose" in said
    assert result.plan.keep_params <= 0.8


@pytest.mark.parametrize("keep", [0.5, 0.625, 0.75, 0.9])
def test_every_candidate_is_a_stock_opt_within_the_budget(keep):
    family = family_of(OPT_125M)
    dense = count_parameters(family, OPT_125M)
    for tie in ("keep", "untie", "auto"):
        for shape in candidates(family, OPT_125M, Limits(keep, tie=tie)):
            assert shape.hidden_size == shape.num_attention_heads * shape.head_dim
            assert count_parameters(family, resized_config(family, OPT_125M, shape)) <= keep * dense
            if shape.tie_word_embeddings:
                assert shape.word_embed_proj_dim != shape.hidden_size
            else:
                assert shape.word_embed_proj_dim == shape.hidden_size


def test_counts_equal_the_real_model():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = family_of(OPT_125M)
    shapes = candidates(family, OPT_125M, Limits(0.6, tie="auto"))
    # One of every kind of row: whole heads or smaller ones, tied or not, by embedding width.
    picked = {
        (shape.head_dim == 64, shape.tie_word_embeddings, shape.word_embed_proj_dim): shape
        for shape in shapes
    }
    for shape in picked.values():
        config = resized_config(family, OPT_125M, shape)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["opt"].from_dict(config))
        model.tie_weights()
        assert count_parameters(family, config) == sum(p.numel() for p in model.parameters())


def test_heads_and_widths_fixed_by_hand():
    family = family_of(OPT_125M)
    (shape,) = candidates(family, OPT_125M, Limits(0.8, head_dim=48, only_width=True))
    assert (shape.hidden_size, shape.num_attention_heads) == (576, 12)
    (shape,) = candidates(family, OPT_125M, Limits(0.8, num_key_value_heads=9, only_width=True))
    assert (shape.hidden_size, shape.head_dim) == (576, 64)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"head_dim": 64}, "--head-dim"),
        ({"word_embed_proj_dim": 769}, "--word-embed-proj-dim"),
        ({"hidden_size": 500}, "--hidden-size 500"),
        ({"head_dim": 48, "num_key_value_heads": 9}, "found both"),
        ({"head_dim": 48, "hidden_size": 384}, "--hidden-size 384, --head-dim 48"),
        ({"head_dim": 48, "word_embed_proj_dim": 576}, "as wide as the stream"),
        ({"multiple_of": 100}, "--multiple-of 100"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(wrong, said):
    with pytest.raises(UserError, match=said):
        candidates(family_of(OPT_125M), OPT_125M, Limits(0.8, **wrong))


def test_a_config_that_leaves_the_table_width_out_gets_it_written():
    zeroed = {key: value for key, value in OPT_125M.items() if key != "word_embed_proj_dim"}
    family = family_of(zeroed)
    for shape in candidates(family, zeroed, Limits(0.7, tie="auto")):
        assert Shape.of(family, resized_config(family, zeroed, shape)) == shape


def test_auto_takes_the_only_tie_there_is():
    """LayerNorm without projections cannot keep a tie; tiny budgets cannot keep OPT's wide one."""
    stablelm = {"model_type": "stablelm", "tie_word_embeddings": True, "hidden_size": 48,
                "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip
    for config, keep in ((stablelm, 0.7), (OPT_125M, 0.1)):
        found = candidates(family_of(config), config, Limits(keep, tie="auto"))
        assert found
        assert not any(shape.tie_word_embeddings for shape in found)
    untied = {**OPT_125M, "tie_word_embeddings": False}
    with pytest.raises(UserError, match="--tie untie"):
        candidates(family_of(untied), untied, Limits(0.7, tie="untie"))


def test_opt_350m_is_refused_by_name_with_the_reason():
    with pytest.raises(UserError, match="opt-350m"):
        family_of({**OPT_125M, "do_layer_norm_before": False})


def test_a_file_of_the_bare_decoder_is_read_under_the_full_names(tmp_path):
    """Some of OPT's files leave out the first part of every name."""
    model = tiny_model("opt")
    save_model(model, tmp_path)
    # Copies: old releases of safetensors map the file, which is written over below.
    file = load_file(tmp_path / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in file.items()}
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    family = family_of_model(model)
    checkpoint = with_prefix(open_checkpoint(tmp_path), family)
    check_tensors(checkpoint, family)
    assert checkpoint.dtype() == torch.float64
    for name, tensor in disk_tensors(checkpoint, family).items():
        assert torch.equal(tensor, tensors[name])


def test_a_tied_layer_norm_model_without_projections_says_how_to_go_on(tmp_path):
    config = {"model_type": "stablelm", "tie_word_embeddings": True, "hidden_size": 48,
              "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip
    family = family_of(config)
    with pytest.raises(UserError, match="--tie untie"):
        candidates(family, config, Limits(0.7))
    found = candidates(family, config, Limits(0.7, tie="untie"))
    assert not any(shape.tie_word_embeddings for shape in found)


def test_phi3_is_projected_as_the_llama_of_its_parts():
    """Fused matrices are the parts' matrices, one below the other."""
    from sp3llm.compression.projection import Projection, project_group

    fused, parts = families.FAMILIES["phi3"], families.FAMILIES["llama"]
    config = {"hidden_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1,
              "intermediate_size": 10, "num_hidden_layers": 1, "vocab_size": 5}  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    group = families.groups(parts, config)[1]
    shapes = families.parameter_shapes(parts, config)
    tensors = {
        name: torch.randn(shapes[name], generator=generator, dtype=torch.float64)
        for name in group.parameters
    }

    def join(source):
        layer = dict(source)
        for whole, names in (("self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj")),
                             ("mlp.gate_up_proj", ("gate_proj", "up_proj"))):  # fmt: skip
            block = whole.partition(".")[0]
            keys = [f"model.layers.0.{block}.{name}.weight" for name in names]
            layer[f"model.layers.0.{whole}.weight"] = torch.cat([layer.pop(key) for key in keys])
        return layer

    projection = Projection(random_orthogonal(12)[:, :8])
    expected = join(project_group(parts, group, tensors, projection))
    found = project_group(fused, families.groups(fused, config)[1], join(tensors), projection)
    assert found.keys() == expected.keys()
    assert all(relative_error(found[name], expected[name]) < 1e-14 for name in found)


def test_plan_of_opt_prints_json(capsys):
    from sp3llm.planning.limits import plan_of

    family = family_of(OPT_125M)
    limits = Limits(0.7)
    plan = plan_of(family, OPT_125M, limits, candidates(family, OPT_125M, limits)[0])
    described = json.loads(json.dumps(asdict(plan)))
    assert described["shape"]["word_embed_proj_dim"] == 768
    assert described["keep_params"] <= 0.7


@pytest.fixture
def side_by_side(tokens, tmp_path, monkeypatch):
    """Refitters of an OPT with smaller heads, two of which share their projection; its layers; and
    where singular vectors are taken.
    """
    model = tiny_model("opt", torch.float64)
    checkpoint, family = save_model(model, tmp_path), family_of_model(model)
    moments, _ = measure_dense(checkpoint, family, tokens, None, "normalised", "pca", EXECUTION)
    dense = Shape.of(family, checkpoint.config)
    refitters = []
    options = {"num_key_value_heads": 4, "num_attention_heads": 4, "head_dim": 8}
    for factors in ((1, 2), (1,)):
        shape = Shape(32, dense.intermediate_size, **options).untied()
        _, projection = choose_basis(checkpoint, family, moments, shape, tokens)
        for factor in factors:
            narrow = replace(shape, intermediate_size=shape.intermediate_size // factor)
            whole = (checkpoint, family, narrow, projection, torch.float64, EXECUTION)
            refitters.append(Refitter(*whole, "obs", 3, 4, []))
    asked, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **o: asked.append(a) or svd(*a, **o))
    return refitters, checkpoint.config["num_hidden_layers"], asked


def test_heads_are_decomposed_once_a_layer_for_all_small_models(side_by_side, tokens):
    refitters, depth, asked = side_by_side
    together = list(refitted_side_by_side(refitters, tokens))
    by_side = [[one for side, one in together if side == at] for at in range(len(refitters))]
    # Scores once, values and what is written once for each of the two bases.
    assert len(asked) == depth * (1 + 2)
    for number, refitter in enumerate(refitters):
        alone = refitted_groups(replace(refitter, log=[]), tokens)
        for finished, one in zip(by_side[number], alone, strict=True):
            assert finished.tensors.keys() == one.tensors.keys()
            for name, tensor in one.tensors.items():
                assert torch.equal(finished.tensors[name], tensor), name
    assert len(asked) == depth * (1 + 2) + depth * len(refitters)  # scores not again
