"""Encoders, whose norms sit on the stream: exact where that can be, and padding is nothing."""

import math
from dataclasses import replace

import pytest
import torch

from sp3llm.compression.basis_choice import choose_basis
from sp3llm.compression.building import refitted_groups
from sp3llm.compression.measuring import measure_dense
from sp3llm.compression.projecting import plain_groups
from sp3llm.compression.refitter import Refitter
from sp3llm.models.checkpoint import open_model
from sp3llm.models.families import ENCODERS, count_parameters
from sp3llm.models.shapes import Shape, resized_config
from tests.conftest import disk_tensors, relative_error, save_model, written_model
from tests.encoders import answers_of, encoder_config, encoder_of, family_and_shapes, padded_rows
from tests.helpers import EXECUTION

ANSWERING = ["bert", "roberta", "distilbert"]


WRITTEN = sorted({f.architecture for classes in ENCODERS.values() for f in classes.values()})


@pytest.mark.parametrize("architecture", WRITTEN)
def test_tables_predict_every_parameter_of_the_class(architecture):
    model_type = next(t for t, classes in ENCODERS.items() if architecture in classes)
    task = architecture.partition("For")
    config = encoder_config(model_type, task[1] + task[2] or "Model")
    family, shapes = family_and_shapes(config)
    model = encoder_of(config)
    assert shapes == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert count_parameters(family, config) == sum(p.numel() for p in model.parameters())


def cut(checkpoint, family, shape, projection, rows, folder, refit, layers=None):
    """Config and tensors of that shape in float64, cut or refitted, written and read back."""
    if refit:
        held = len(rows) * 7 // 8
        of_shape = (checkpoint, family, shape, projection, torch.float64, EXECUTION, "obs")
        refitter = Refitter(*of_shape, held, len(rows), [], layers=layers)
        built = refitted_groups(refitter, rows)
    else:
        of_shape = (checkpoint, family, projection, torch.float64, EXECUTION)
        built = plain_groups(*of_shape, layers=layers)
    config = resized_config(family, checkpoint.config, shape, layers)
    small = written_model(family, config, built, torch.float64, folder)
    return config, disk_tensors(small, family)


def compressed(model, shape_of, folder, refit, basis="gradient", count=48):
    """The small model, from so many rows, all of it streamed, as a run does it."""
    save_model(model, folder / "dense")
    return encoder_of(*compressed_folder(shape_of, folder, refit, basis, count))


def compressed_folder(shape_of, folder, refit, basis="gradient", count=48):
    """Config and tensors of the same, of the model in `folder / "dense"`; in `folder / "small"`."""
    checkpoint, family = open_model(folder / "dense")
    rows = padded_rows(checkpoint.config, count)
    moments, _ = measure_dense(checkpoint, family, rows, None, "normalised", basis, EXECUTION)
    shape = shape_of(Shape.of(family, checkpoint.config))
    _, projection = choose_basis(checkpoint, family, moments, shape)
    return cut(checkpoint, family, shape, projection, rows, folder / "small", refit)


@pytest.mark.parametrize("refit", [False, True], ids=["plain", "refit"])
@pytest.mark.parametrize("task", ["ForSequenceClassification", "ForQuestionAnswering", "Model"])
@pytest.mark.parametrize("model_type", ANSWERING)
def test_full_width_leaves_answers_unchanged(model_type, task, refit, tmp_path):
    config = encoder_config(model_type, task)
    model = encoder_of(config)
    basis = "pca" if task == "Model" else "gradient"
    small = compressed(model, lambda dense: dense, tmp_path, refit, basis)
    unseen = padded_rows(config, seed=1)
    assert relative_error(answers_of(small, unseen), answers_of(model, unseen)) < 1e-9


def repeated(model, config, times=2):
    """Config and tensors of a wide encoder that computes what a narrow one does: every channel of
    its stream, in some order, is one of the narrow one's, and what heads have more is zero.
    """
    width = model.config.hidden_size
    order = torch.arange(times * width) % width
    order = order[torch.randperm(times * width, generator=torch.Generator().manual_seed(4))]
    size, heads = width // model.config.num_attention_heads, model.config.num_attention_heads
    rows = torch.arange(times * width).reshape(heads, -1)[:, :size].flatten()  # in use, of heads
    wide_config = {**config, "hidden_size": times * width}
    _, wide_shapes = family_and_shapes(wide_config)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name not in wide_shapes:
            continue
        wide = tensor.new_zeros(wide_shapes[name])
        if ".self." in name:
            scale = math.sqrt(times) if ".query." in name else 1.0
            wide[rows] = tensor * scale if tensor.ndim == 1 else tensor[:, order] * scale / times
        elif name.endswith("attention.output.dense.weight"):
            wide[:, rows] = tensor[order]
        elif "word_emb" in name or "position_emb" in name or "token_type_emb" in name:
            wide = tensor[:, order]
        elif name.endswith(("pooler.dense.weight", "classifier.dense.weight")):
            wide = tensor[order][:, order] / times
        elif tensor.ndim == 2 and tensor.shape[1] == width:
            wide = tensor[:, order] / times
        elif tensor.shape[0] == width:
            wide = tensor[order]
        else:
            wide = tensor
        tensors[name] = wide
    return wide_config, tensors


@pytest.mark.parametrize("refit", [False, True], ids=["plain", "refit"])
def test_cut_is_exact_where_channels_repeat_each_other(refit, tmp_path):
    """The stream and all norm weights lie in a subspace that a basis can be found for: at K < D the
    answers are exact too, with an epsilon that shows a wrong scale.
    """
    config = encoder_config("bert", layer_norm_eps=0.1)
    narrow = encoder_of(config)
    wide = encoder_of(*repeated(narrow, config))
    unseen = padded_rows(config, seed=1)
    assert relative_error(answers_of(wide, unseen), answers_of(narrow, unseen)) < 1e-12

    def small_shape(dense):
        return replace(dense, hidden_size=24, head_dim=8)

    small = compressed(wide, small_shape, tmp_path, refit, "pca", 400)
    found, expected = answers_of(small, unseen), answers_of(wide, unseen)
    if not refit:  # the units of the head are chosen by the answer's weights, not refitted
        found, expected = (
            m.bert(**unseen.inputs()).last_hidden_state.std(-1, correction=0) for m in (small, wide)
        )
    assert relative_error(found, expected) < 1e-4


def test_padding_counts_for_nothing(tmp_path):
    """Rows with more padding give the same moments and the same small model."""
    config = encoder_config("bert")
    save_model(encoder_of(config), tmp_path / "dense")
    checkpoint, family = open_model(tmp_path / "dense")
    rows = padded_rows(checkpoint.config)
    longer = replace(
        rows,
        **{
            name: torch.nn.functional.pad(getattr(rows, name), (0, 5))
            for name in ("input_ids", "attention_mask", "token_type_ids")
        },
    )
    shape = replace(Shape.of(family, checkpoint.config), hidden_size=12, head_dim=4)
    found = []
    for name, batch in (("short", rows), ("long", longer)):
        measured = (checkpoint, family, batch, None, "normalised", "gradient", EXECUTION)
        moments, _ = measure_dense(*measured)
        _, projection = choose_basis(checkpoint, family, moments, shape)
        small = cut(checkpoint, family, shape, projection, batch, tmp_path / name, True)
        found.append(answers_of(encoder_of(*small), padded_rows(config, seed=1)))
    assert relative_error(found[1], found[0]) < 1e-6


@pytest.mark.parametrize("model_type", ANSWERING)
def test_layers_that_write_nothing_go_without_a_trace(model_type, tmp_path):
    """A layer whose blocks add nothing, and whose norms change nothing, costs nothing."""
    config = encoder_config(model_type, num_hidden_layers=3)
    model = encoder_of(config)
    layer = model.base_model.encoder.layer[1] if model_type != "distilbert" else None
    layer = layer or model.base_model.transformer.layer[1]
    before = model.base_model.encoder.layer[0] if model_type != "distilbert" else None
    before = before or model.base_model.transformer.layer[0]
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.rpartition(".")[0] in ("attention.output.dense", "output.dense") or (
                "out_lin" in name or "lin2" in name
            ):
                parameter.zero_()
        norms = [m for m in layer.modules() if isinstance(m, torch.nn.LayerNorm)]
        last = [m for m in before.modules() if isinstance(m, torch.nn.LayerNorm)][-1]
        for norm in (last, *norms):
            norm.weight.fill_(0.7)
            norm.bias.zero_()
    save_model(model, tmp_path / "dense")
    checkpoint, family = open_model(tmp_path / "dense")
    rows = padded_rows(checkpoint.config)
    measured = (checkpoint, family, rows, None, "normalised", "pca", EXECUTION)
    moments, _ = measure_dense(*measured)
    shape = replace(Shape.of(family, checkpoint.config), num_hidden_layers=2)
    _, projection = choose_basis(checkpoint, family, moments, shape)
    small = cut(checkpoint, family, shape, projection, rows, tmp_path / "small", True, (0, 2))
    unseen = padded_rows(config, seed=1)
    error = relative_error(answers_of(encoder_of(*small), unseen), answers_of(model, unseen))
    assert error < 1e-6
