"""Stand-ins: what a model may ask of the module whose place they take."""

import pytest
import torch
from torch import nn

from sp3llm.models.hooks import Injector, Recorder, replaced


class _Layer(nn.Linear):
    attention_type = "sliding_attention"


@pytest.mark.parametrize("stand_in", [Recorder, lambda stock: Injector(stock, torch.zeros(1, 4))])
def test_a_stand_in_has_the_attributes_of_the_stock_module(stand_in):
    model = nn.Sequential(_Layer(4, 4))
    stock = model[0]
    with replaced(model, "0", stand_in(stock)):
        assert model[0].attention_type == "sliding_attention"  # read by releases of transformers
        assert model[0].weight is stock.weight
        assert not list(model.parameters())  # and none of them becomes the stand-in's own
        assert not hasattr(model[0], "no_such_attribute")
    assert model[0] is stock
