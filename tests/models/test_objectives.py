"""An objective is what the stock class computes: its loss, its batches, its figure of merit."""

import math

import pytest
import torch

from sp3llm.evaluation.perplexity import measure_losses
from sp3llm.models.families import FAMILIES
from sp3llm.models.objectives.catalogue import objective_of
from sp3llm.models.objectives.causal_lm import CAUSAL_LM
from tests.conftest import family_of_model, save_model, tiny_model
from tests.helpers import EXECUTION


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
