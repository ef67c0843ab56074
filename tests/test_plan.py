"""A budget is a number of parameters, never exceeded, and every width is one that tools accept."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sp3llm.errors import UserError
from sp3llm.families import FAMILIES, count_parameters
from sp3llm.plan import Shape, plan_width, resized_config, width_multiple

LLAMA_2_7B = {"model_type": "llama", "num_attention_heads": 32}
SMOLLM = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def test_llama_2_7b_counts_what_it_has():
    assert count_parameters(FAMILIES["llama"], LLAMA_2_7B) == 6_738_415_616


def test_three_quarters_of_llama_2_7b():
    plan = plan_width(FAMILIES["llama"], LLAMA_2_7B, 0.75)
    assert plan.shape.hidden_size == 3072
    assert plan.keep_params <= 0.75
    assert plan.keep_params > 0.749


def test_tied_weights_count_once():
    untied = {**SMOLLM, "tie_word_embeddings": False}
    family = FAMILIES["llama"]
    difference = count_parameters(family, untied) - count_parameters(family, SMOLLM)
    assert difference == 49152 * 576


@given(
    keep=st.floats(0.3, 0.99),
    heads=st.sampled_from([1, 2, 4, 6, 8, 9, 12, 14, 28, 32, 40, 64]),
    head_dim=st.sampled_from([8, 16, 64, 128]),
    tied=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_budget_is_never_exceeded_and_the_next_width_would(keep, heads, head_dim, tied):
    config = {
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "intermediate_size": 3 * heads * head_dim,
        "num_hidden_layers": 2,
        "vocab_size": 1000,
        "tie_word_embeddings": tied,
    }
    family = FAMILIES["llama"]
    try:
        plan = plan_width(family, config, keep)
    except UserError:
        multiple = width_multiple(heads * head_dim, heads)
        if multiple < heads * head_dim:
            smallest = count_parameters(
                family,
                resized_config(family, config, Shape.of(family, config).with_width(multiple)),
            )
            assert smallest > keep * count_parameters(family, config)
        return
    assert plan.parameters <= keep * plan.dense_parameters
    assert plan.shape.hidden_size % heads == 0
    assert plan.shape.hidden_size % plan.multiple_of == 0
    assert plan.shape.hidden_size < plan.dense_shape.hidden_size
    wider = plan.shape.hidden_size + plan.multiple_of
    if wider < plan.dense_shape.hidden_size:
        count = count_parameters(
            family, resized_config(family, config, plan.shape.with_width(wider))
        )
        assert count > keep * plan.dense_parameters


@pytest.mark.parametrize(
    ("hidden_size", "heads", "expected"),
    [(4096, 32, 256), (8192, 64, 256), (5120, 40, 320), (3584, 28, 448), (2048, 32, 256),
     (256, 4, 8), (576, 9, 72), (768, 12, 24)],
)  # fmt: skip
def test_width_multiple(hidden_size, heads, expected):
    assert width_multiple(hidden_size, heads) == expected
    assert expected % heads == 0


def test_heads_must_divide_a_multiple_given_by_hand():
    with pytest.raises(UserError, match="9 attention heads"):
        plan_width(FAMILIES["llama"], SMOLLM, 0.75, multiple_of=8)
    plan = plan_width(FAMILIES["llama"], SMOLLM, 0.75, multiple_of=9)
    assert plan.shape.hidden_size % 9 == 0


def test_a_budget_below_the_smallest_shape_says_what_that_is():
    with pytest.raises(UserError, match="smallest hidden size"):
        plan_width(FAMILIES["llama"], LLAMA_2_7B, 0.001)


def test_head_dim_is_written_out():
    family = FAMILIES["llama"]
    config = resized_config(family, LLAMA_2_7B, Shape.of(family, LLAMA_2_7B).with_width(3072))
    assert config["head_dim"] == 128
    assert math.prod([config["num_attention_heads"], config["head_dim"]]) == 4096
