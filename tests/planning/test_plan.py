"""A budget is a number of parameters, never exceeded, and every width is one that tools accept."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sp3llm.errors import UserError
from sp3llm.evaluation.task_scores import row_length
from sp3llm.models.families import (
    FAMILIES,
    count_largest_layer,
    count_parameters,
    family_of,
)
from sp3llm.models.shapes import Shape, cost_of, resized_config
from sp3llm.planning.candidates import candidates
from sp3llm.planning.fewer_rows import rows_alone, with_fewer_rows
from sp3llm.planning.limits import Limits, Plan, plan_of, width_multiple
from sp3llm.planning.search import Losses, choose, expected, shapes_to_try
from sp3llm.planning.windows import window_length
from sp3llm.text.tasks import CLASSES, SPAN, task_for

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


def width_plan(family, config, keep, **limits) -> Plan:
    """All of the budget spent on the hidden size."""
    limits = Limits(keep, only_width=True, **limits)
    (shape,) = candidates(family, config, limits)
    return plan_of(family, config, limits, shape)


def test_llama_2_7b_counts_what_it_has():
    assert count_parameters(FAMILIES["llama"], LLAMA_2_7B) == 6_738_415_616


def test_three_quarters_of_llama_2_7b():
    plan = width_plan(FAMILIES["llama"], LLAMA_2_7B, 0.75)
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
        plan = width_plan(family, config, keep)
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
    assert plan.shape.hidden_size <= plan.dense_shape.hidden_size
    wider = plan.shape.hidden_size + plan.multiple_of
    if wider < plan.dense_shape.hidden_size:
        count = count_parameters(
            family, resized_config(family, config, plan.shape.with_width(wider))
        )
        assert count > keep * plan.dense_parameters


@pytest.mark.parametrize(
    ("hidden_size", "heads", "expected"),
    [(4096, 32, 256), (8192, 64, 256), (5120, 40, 320), (3584, 28, 448), (2048, 32, 256),
     (256, 4, 8), (576, 9, 72), (768, 12, 96), (1024, 16, 32), (896, 14, 56)],
)  # fmt: skip
def test_width_multiple(hidden_size, heads, expected):
    assert width_multiple(hidden_size, heads) == expected
    assert expected % heads == 0


def test_heads_must_divide_a_multiple_given_by_hand():
    with pytest.raises(UserError, match="9 attention heads"):
        width_plan(FAMILIES["llama"], SMOLLM, 0.75, multiple_of=8)
    plan = width_plan(FAMILIES["llama"], SMOLLM, 0.75, multiple_of=9)
    assert plan.shape.hidden_size % 9 == 0


@pytest.mark.parametrize(
    ("task", "kind"), [("SequenceClassification", CLASSES), ("QuestionAnswering", SPAN)]
)
@pytest.mark.parametrize(("model_type", "name"), [("bert", "Bert"), ("distilbert", "DistilBert")])
def test_memory_is_planned_for_rows_as_long_as_those_that_are_read(model_type, name, task, kind):
    config = {"model_type": model_type, "architectures": [f"{name}For{task}"]}
    planned = window_length(family_of(config), config, None)
    asked = task_for("sst2" if kind == CLASSES else "squad", kind)
    assert planned == row_length(asked, config, SimpleNamespace(model_max_length=512), None)


def test_a_budget_below_the_smallest_shape_says_what_that_is():
    with pytest.raises(UserError, match="smallest that the limits allow"):
        width_plan(FAMILIES["llama"], LLAMA_2_7B, 0.001)


def test_head_dim_is_written_out():
    family = FAMILIES["llama"]
    config = resized_config(family, LLAMA_2_7B, Shape.of(family, LLAMA_2_7B).with_width(3072))
    assert config["head_dim"] == 128
    assert math.prod([config["num_attention_heads"], config["head_dim"]]) == 4096


LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}


@pytest.mark.parametrize("of", ["params", "bytes", "flops", "kv-cache"])
@pytest.mark.parametrize("keep", [0.9, 0.75, 0.5])
def test_every_candidate_keeps_within_the_budget_of_what_it_counts(of, keep):
    family = FAMILIES["llama"]
    limits = Limits(keep, of=of)
    dense = cost_of(family, LLAMA_3_8B, Shape.of(family, LLAMA_3_8B)).of(of)
    found = candidates(family, LLAMA_3_8B, limits)
    assert len(found) > 1
    for shape in found:
        assert cost_of(family, LLAMA_3_8B, shape).of(of) <= keep * dense
        assert shape.hidden_size % shape.num_attention_heads == 0
        assert shape.num_attention_heads == 4 * shape.num_key_value_heads
        assert plan_of(family, LLAMA_3_8B, limits, shape).keep <= keep


def test_kv_cache_alone_costs_no_width():
    """Half the cache: half the groups, and the hidden size stays whole."""
    family = FAMILIES["llama"]
    first = candidates(family, LLAMA_3_8B, Limits(0.5, of="kv-cache"))[0]
    assert (first.hidden_size, first.num_key_value_heads) == (4096, 4)


@pytest.mark.parametrize("layers", [1, 20, 31])
def test_a_model_with_fewer_layers_costs_what_one_of_so_many_costs(layers):
    family = FAMILIES["llama"]
    shape = replace(Shape.of(family, LLAMA_3_8B), num_hidden_layers=layers)
    shallow = {**LLAMA_3_8B, "num_hidden_layers": layers}
    whole = cost_of(family, shallow, Shape.of(family, shallow))
    assert cost_of(family, LLAMA_3_8B, shape) == whole


def test_tensor_parallel_divides_everything():
    family = FAMILIES["llama"]
    for shape in candidates(family, LLAMA_3_8B, Limits(0.6, tensor_parallel=4)):
        assert shape.num_key_value_heads % 4 == 0
        assert shape.num_attention_heads % 4 == 0
        assert shape.intermediate_size % 4 == 0
        assert shape.hidden_size % 4 == 0


def test_sizes_fixed_by_hand_stay():
    family = FAMILIES["llama"]
    limits = Limits(0.6, intermediate_size=10000, num_key_value_heads=6)
    found = candidates(family, LLAMA_3_8B, limits)
    for shape in found:
        assert (shape.intermediate_size, shape.num_key_value_heads) == (10000, 6)
        assert shape.num_attention_heads == 24
    # Where fewer layers buy no width, they are not tried.
    assert [(shape.hidden_size, shape.num_hidden_layers) for shape in found] == [
        (3072, 32), (3840, 26)
    ]  # fmt: skip
    limits = replace(limits, num_hidden_layers=26)
    assert candidates(family, LLAMA_3_8B, limits) == found[1:]
    for wrong in ({"hidden_size": 5000}, {"hidden_size": 1001}, {"intermediate_size": 0}):
        with pytest.raises(UserError):
            candidates(family, LLAMA_3_8B, Limits(0.6, **wrong))


def test_flops_of_llama_2_7b_are_two_a_parameter_and_attention():
    family = FAMILIES["llama"]
    shape = Shape.of(family, LLAMA_2_7B)
    cost = cost_of(family, LLAMA_2_7B, shape, context=0)
    norms = 65 * 4096
    assert cost.flops == 2 * (cost.params - 32000 * 4096 - norms)
    assert cost.kv_cache == 2 * 32 * 4096 * 2
    more = cost_of(family, LLAMA_2_7B, shape, context=100)
    assert more.flops - cost.flops == 4 * 32 * 4096 * 100


def _predictions(shapes: list[Shape], layers: float = 8) -> dict[Shape, Losses]:
    """Losses that grow faster than what is taken away, as measured ones do."""
    dense = Shape.of(FAMILIES["llama"], LLAMA_3_8B)
    return {
        shape: Losses(
            stream=(1 - shape.hidden_size / dense.hidden_size) ** 1.5,
            units=(1 - shape.intermediate_size / dense.intermediate_size) ** 2
            + 3 * (1 - shape.num_key_value_heads / dense.num_key_value_heads) ** 2,
            depth=layers * (1 - shape.num_hidden_layers / dense.num_hidden_layers) ** 1.5,
        )
        for shape in shapes
    }


SHAPES = candidates(FAMILIES["llama"], LLAMA_3_8B, Limits(0.7, multiple_of=32))


@given(
    *[st.floats(0.8, 1.25)] * 2,
    st.floats(0.55, 1.7),
    st.floats(0.1, 3),
    st.sampled_from([0.5, 2, 8]),
)
@settings(max_examples=50, deadline=None)
def test_a_few_trials_find_the_best_where_predictions_are_roughly_right(
    stream, units, depth, common, layers
):
    """Losses that are the predicted ones, each part times a factor that nobody knows."""
    scales = [stream * common, units * common, depth * common]
    predicted = _predictions(SHAPES, layers)
    losses = {
        shape: sum(scale * part for scale, part in zip(scales, found.parts, strict=True))
        for shape, found in predicted.items()
    }
    tried: dict[Shape, float] = {}
    while wanted := shapes_to_try(predicted, tried):
        assert not tried.keys() & set(wanted)
        tried |= {shape: losses[shape] for shape in wanted}
    assert losses[choose(predicted, tried)] <= 1.02 * min(losses.values())
    assert len(tried) <= 5 < len(SHAPES)


def test_without_trials_the_best_prediction_is_chosen():
    predicted = _predictions(candidates(FAMILIES["llama"], LLAMA_3_8B, Limits(0.7)))
    best = choose(predicted, {})
    assert sum(predicted[best].parts) == min(sum(found.parts) for found in predicted.values())


def test_a_trial_that_loses_nothing_leaves_the_scales_as_they_are():
    predicted = _predictions(candidates(FAMILIES["llama"], LLAMA_3_8B, Limits(0.7)))
    one = next(iter(predicted))
    assert expected(predicted, {one: 0.0}) == expected(predicted, {})


def test_a_candidate_far_ahead_of_all_others_needs_no_trial():
    first, second, third = candidates(FAMILIES["llama"], LLAMA_3_8B, Limits(0.7))[:3]
    predicted = {first: Losses(0.1, 0.1), second: Losses(0.3, 0.1), third: Losses(0.05, 0.4)}
    assert shapes_to_try(predicted, {}) == []
    assert choose(predicted, {}) == first
    predicted[second] = Losses(0.11, 0.1)
    assert shapes_to_try(predicted, {}) == [first, second]


def test_of_trials_that_cannot_tell_the_widest_stream_is_taken():
    """Unless another is better by more than such trials can tell."""
    wide, narrow, deep = (replace(SHAPES[0], hidden_size=width) for width in (48, 40, 44))
    tried = {narrow: 0.5, deep: 0.502, wide: 0.504}
    assert choose({}, tried) == wide
    assert choose({}, {**tried, wide: 0.52}) == deep
    assert choose({}, {**tried, narrow: 0.48}) == narrow
    assert choose({}, {narrow: 0.001, wide: -0.0004}) == wide


def test_at_one_width_trials_tell_however_close_they_are():
    whole, thin = (replace(SHAPES[0], intermediate_size=size) for size in (120, 96))
    tried = {whole: 0.5, thin: 0.499}
    assert choose({}, tried) == thin
    assert choose({}, {**tried, replace(thin, hidden_size=thin.hidden_size - 8): 0.498}) == thin


def test_a_candidate_that_promises_to_be_as_good_as_the_best_trial_gets_one():
    first, second = candidates(FAMILIES["llama"], LLAMA_3_8B, Limits(0.7))[:2]
    predicted = {first: Losses(0.1, 0.1), second: Losses(0.1, 0.103)}
    assert shapes_to_try(predicted, {first: 0.2}) == [second]
    predicted[second] = Losses(0.1, 0.11)
    assert shapes_to_try(predicted, {first: 0.2}) == []


def test_the_ffn_takes_up_the_remainder():
    """With coarse widths the budget is still spent to within one step of the FFN."""
    family = FAMILIES["llama"]
    found = candidates(family, LLAMA_3_8B, Limits(0.7))
    dense = cost_of(family, LLAMA_3_8B, Shape.of(family, LLAMA_3_8B)).params
    for shape in found[1:]:
        if shape.intermediate_size < LLAMA_3_8B["intermediate_size"]:
            assert cost_of(family, LLAMA_3_8B, shape).params > 0.685 * dense


def test_every_candidate_is_one_that_its_own_heads_divide():
    """A width fixed by hand leaves out numbers of KV groups whose heads do not divide it."""
    family = FAMILIES["llama"]
    config = {
        "hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 12,
        "intermediate_size": 2048, "num_hidden_layers": 2, "vocab_size": 1000,
    }  # fmt: skip
    found = candidates(family, config, Limits(0.7, hidden_size=576))
    assert found
    assert all(shape.hidden_size % shape.num_attention_heads == 0 for shape in found)
    with pytest.raises(UserError, match="multiple of 132"):
        candidates(family, config, Limits(0.9, hidden_size=768, num_key_value_heads=11))


def test_null_kv_heads_means_as_many_as_heads():
    config = {"num_key_value_heads": None}
    assert Shape.of(FAMILIES["mistral"], config).num_key_value_heads == 32
    assert Shape.of(FAMILIES["mistral"], {}).num_key_value_heads == 8


MIXTRAL_8X7B = {
    "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
QWEN3_30B = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
    "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 128,
    "num_experts_per_tok": 8,
}  # fmt: skip


def test_experts_count_all_as_parameters_and_the_active_ones_as_flops():
    """46.7 billion parameters, of which a token meets 12.9; 30.5 and 3.3."""
    mixtral, qwen = FAMILIES["mixtral"], FAMILIES["qwen3_moe"]
    assert count_parameters(mixtral, MIXTRAL_8X7B) == 46_702_792_704
    assert count_parameters(qwen, QWEN3_30B) == 30_532_122_624
    for family, config, active in ((mixtral, MIXTRAL_8X7B, 12.9e9), (qwen, QWEN3_30B, 3.3e9)):
        cost = cost_of(family, config, Shape.of(family, config), context=0)
        met = cost.flops / 2 + config["vocab_size"] * config["hidden_size"]
        assert met == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize("of", ["params", "flops"])
@pytest.mark.parametrize("config", [MIXTRAL_8X7B, QWEN3_30B], ids=["mixtral", "qwen3_moe"])
def test_of_experts_only_width_and_groups_are_cut(config, of):
    family = FAMILIES[config["model_type"]]
    dense = Shape.of(family, config)
    found = candidates(family, config, Limits(0.7, of=of, multiple_of=32))
    for shape in found:
        same = shape.with_width(dense.hidden_size).with_groups(dense.num_key_value_heads)
        assert replace(same, num_hidden_layers=dense.num_hidden_layers) == dense
        assert cost_of(family, config, shape).of(of) <= 0.7 * cost_of(family, config, dense).of(of)
    assert len(found) > 1
    for depth in {shape.num_hidden_layers for shape in found}:
        widths = [shape.hidden_size for shape in found if shape.num_hidden_layers == depth]
        assert widths == sorted(set(widths))  # fewer groups buy width, or are not tried
    with pytest.raises(UserError, match="no --intermediate-size"):
        candidates(family, config, Limits(0.7, intermediate_size=1024))


def test_memory_is_that_of_the_largest_layer():
    """A dense layer among layers of experts is neither the largest nor left out of the count."""
    family = FAMILIES["qwen3_moe"]
    mixed = {**QWEN3_30B, "mlp_only_layers": [0], "decoder_sparse_step": 2}
    assert count_largest_layer(family, mixed) == count_largest_layer(family, QWEN3_30B)
    per_expert, dense_ffn = 3 * 2048 * 768, 3 * 2048 * 6144
    difference = count_parameters(family, QWEN3_30B) - count_parameters(family, mixed)
    assert difference == 24 * (128 * (per_expert + 2048) - dense_ffn)
    only_dense = {**QWEN3_30B, "decoder_sparse_step": 100}
    assert count_largest_layer(family, only_dense) < dense_ffn * 2


COUNTED = ["llama", "mistral-12-heads", "qwen2-tied", "qwen3", "mixtral", "qwen2-moe-tied",
           "qwen3-moe"]  # fmt: skip


@pytest.mark.parametrize("variant", COUNTED)
def test_counts_equal_those_of_the_real_model(variant):
    """Parameters, FLOPs as torch counts them, and bytes of the cache that a forward leaves."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from tests.conftest import family_of_model, tiny_model

    model = tiny_model(variant, torch.float32)
    model.set_attn_implementation("eager")
    family, config = family_of_model(model), model.config.to_dict()
    tokens = 24
    cost = cost_of(family, config, Shape.of(family, config), context=tokens, itemsize=4)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cache = model(input_ids=torch.zeros(1, tokens, dtype=torch.int64)).past_key_values
    assert sum(p.numel() for p in model.parameters()) == cost.params
    # Old releases of transformers make the angles of the positions by a product.
    angles = sum(
        sum(counts.values())
        for module, counts in counter.get_flop_counts().items()
        if module.endswith("rotary_emb")
    )
    assert counter.get_total_flops() - angles == cost.flops * tokens
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert held == cost.kv_cache * tokens


def test_fewer_rows_are_spent_on_what_would_be_cut():
    family, limits = FAMILIES["llama"], Limits(keep=0.6, vocab_rows=64_000)
    shapes = candidates(family, LLAMA_3_8B, limits)
    fewer = with_fewer_rows(family, LLAMA_3_8B, limits, shapes, [48_000, 32_000])
    assert {shape.vocab_size for shape in shapes} == {64_000}
    assert {shape.vocab_size for shape in fewer} == {48_000, 32_000}
    dense = cost_of(family, LLAMA_3_8B, Shape.of(family, LLAMA_3_8B)).params
    by_size = {replace(shape, intermediate_size=0, vocab_size=0): shape for shape in shapes}
    for shape in fewer:  # of the same widths, so that bases are shared
        assert cost_of(family, LLAMA_3_8B, shape).params <= 0.6 * dense
        before = by_size[replace(shape, intermediate_size=0, vocab_size=0)]
        assert shape.intermediate_size > before.intermediate_size


def test_nothing_else_is_cut_where_rows_are_enough():
    family, dense = FAMILIES["llama"], Shape.of(FAMILIES["llama"], LLAMA_3_8B)
    limits = Limits(keep=0.95, vocab_rows=110_000)
    shapes = candidates(family, LLAMA_3_8B, limits)
    assert replace(dense, vocab_size=110_000) not in shapes
    found = with_fewer_rows(family, LLAMA_3_8B, limits, shapes, [70_000, 60_000])
    assert found == [replace(dense, vocab_size=70_000)]
    limits = replace(limits, vocab_rows=70_000)
    assert candidates(family, LLAMA_3_8B, limits) == found
    assert with_fewer_rows(family, LLAMA_3_8B, limits, found, [60_000]) == []
    by_hand = candidates(family, LLAMA_3_8B, replace(limits, hidden_size=3840))
    assert {shape.hidden_size for shape in by_hand} == {3840}


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("keep", [0.95, 0.999])
def test_rows_alone_are_as_many_as_the_budget_has_room_for(tie, keep):
    family, config = FAMILIES["llama"], {**LLAMA_3_8B, "tie_word_embeddings": tie}
    dense = Shape.of(family, config)
    rows = rows_alone(family, config, Limits(keep=keep))
    counts = [
        cost_of(family, config, replace(dense, vocab_size=count)).params
        for count in (rows, rows + 1, dense.vocab_size)
    ]
    assert counts[0] <= keep * counts[2] < counts[1]
    assert rows_alone(family, config, Limits(keep=keep, hidden_size=3840)) == 0


def test_known_losses_of_tokens_are_added_as_they_are():
    few, many = (Shape(64, 128, 4, 4, 16, vocab_size=rows) for rows in (100, 200))
    predicted = {few: Losses(0.1, 0.1, vocabulary=0.05), many: Losses(0.2, 0.1)}
    assert expected(predicted, {})[few] == pytest.approx(1.3 * 0.1 + 0.1 + 0.05)
    halved = {few: 0.1 + 0.05, many: 0.15}
    assert expected(predicted, halved)[few] == pytest.approx(0.15, abs=1e-3)
    assert expected(predicted, halved)[many] == pytest.approx(0.15, abs=1e-3)
