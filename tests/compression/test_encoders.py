"""Encoders, whose norms sit on the stream: exact where the policy is, padding counts for nothing."""

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


@pytest.mark.parametrize("architecture", [a for c in ENCODERS.values() for a in c])
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


def compressed(model, shape_of, folder, refit, basis="gradient"):
    """Model and small model, all of it streamed, as a run does it."""
    save_model(model, folder / "dense")
    checkpoint, family = open_model(folder / "dense")
    rows = padded_rows(checkpoint.config)
    moments, _ = measure_dense(checkpoint, family, rows, None, "normalised", basis, EXECUTION)
    shape = shape_of(Shape.of(family, checkpoint.config))
    _, projection = choose_basis(checkpoint, family, moments, shape)
    small = cut(checkpoint, family, shape, projection, rows, folder / "small", refit)
    return encoder_of(*small)


@pytest.mark.parametrize("refit", [False, True], ids=["plain", "refit"])
@pytest.mark.parametrize("task", ["ForSequenceClassification", "ForQuestionAnswering", "Model"])
@pytest.mark.parametrize("model_type", ANSWERING)
def test_full_width_leaves_answers_unchanged(model_type, task, refit, tmp_path):
    if task == "Model" and refit is False and model_type == "roberta":
        pytest.skip("as bert's")
    config = encoder_config(model_type, task)
    model = encoder_of(config)
    basis = "pca" if task == "Model" else "gradient"
    small = compressed(model, lambda dense: dense, tmp_path, refit, basis)
    unseen = padded_rows(config, seed=1)
    assert relative_error(answers_of(small, unseen), answers_of(model, unseen)) < 1e-9
