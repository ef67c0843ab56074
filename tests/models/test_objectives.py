"""An objective is what the stock class computes: its loss, its batches, its figure of merit."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sp3llm.evaluation.perplexity import measure_losses
from sp3llm.maths.losses import distribution_divergences
from sp3llm.models.families import FAMILIES
from sp3llm.models.head import End
from sp3llm.models.objectives.catalogue import objective_of
from sp3llm.models.objectives.causal_lm import CAUSAL_LM
from sp3llm.models.objectives.question_answering import QUESTION_ANSWERING
from sp3llm.models.stream import Stream
from sp3llm.models.task_head import pooled_distances
from tests.conftest import family_of_model, save_model, tiny_model
from tests.encoders import padded_rows
from tests.helpers import EXECUTION, normal


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.model_type)
def test_every_family_has_an_objective_and_loads_by_it(family):
    objective = objective_of(family.architecture)
    assert objective is CAUSAL_LM
    assert objective.stock_class().__name__ == "AutoModelForCausalLM"


@pytest.mark.parametrize("variant", ["llama", "opt", "gpt-neox-sequential"])
def test_losses_in_memory_streamed_and_of_the_stock_class_are_one(variant, tokens, tmp_path):
    model = tiny_model(variant)
    checkpoint, family = save_model(model, tmp_path), family_of_model(model)
    streamed = measure_losses(checkpoint, family, tokens, EXECUTION)
    in_memory = [
        CAUSAL_LM.losses_in_memory(model, window, torch.device("cpu")) for window in tokens
    ]
    with torch.no_grad():
        logits = model(**CAUSAL_LM.inputs(tokens)).logits
        stock = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    assert torch.allclose(streamed, torch.stack(in_memory), atol=1e-5)
    assert streamed.mean().item() == pytest.approx(stock.item(), rel=1e-5)
    learned = CAUSAL_LM.learning_loss(CAUSAL_LM.scored(logits), tokens)
    assert learned.item() == pytest.approx(stock.item(), rel=1e-5)
    assert CAUSAL_LM.merit(streamed) == pytest.approx(math.exp(stock.item()), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_no_answer_begins_in_padding_in_any_dtype(dtype):
    batch = padded_rows({"model_type": "bert"})
    shape, generator = batch.input_ids.shape, torch.Generator().manual_seed(0)
    two = [
        SimpleNamespace(
            start_logits=torch.randn(shape, generator=generator).to(dtype),
            end_logits=torch.randn(shape, generator=generator).to(dtype),
        )
        for _ in range(2)
    ]
    answers = [QUESTION_ANSWERING.logits(output, batch) for output in two]
    padding = (batch.attention_mask == 0)[:, None].expand_as(answers[0])
    assert all((answer.float().softmax(-1)[padding] == 0).all() for answer in answers)
    assert torch.isfinite(distribution_divergences(answers[:1], answers[1])[0]).all()


def test_how_far_cosines_are_does_not_depend_on_what_runs_at_once():
    config = {"model_type": "bert"}
    real = padded_rows(config, rows=9).attention_mask.bool()
    streams = [Stream(normal(9, 12, width, seed=width), {}, real) for width in (8, 6)]
    found = []
    for at_once in (12, 24, 1200):
        execution = replace(EXECUTION, batch_tokens=at_once)
        dense, small = (End(SimpleNamespace(execution=execution), {}, one) for one in streams)
        found.append(pooled_distances([small], dense)[0])
        assert (pooled_distances([dense], dense)[0] == 0).all()
    assert (found[0] > 0).all()
    assert all(torch.allclose(one, found[0]) for one in found)
