"""What a model is written as: the same, counted, and left alone where no other class is exact."""

from pathlib import Path

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sp3llm.errors import UserError
from sp3llm.models.export import with_zeros
from sp3llm.models.families import (
    FAMILIES,
    RESIDUAL,
    count_parameters,
    groups,
    is_square,
    parameter_shapes,
)
from sp3llm.models.families.sizes import layer_table
from sp3llm.models.served import check_export, export_of, refused_at, refused_by
from sp3llm.models.shapes import Shape, cost_of, resized_config
from sp3llm.options import RecoverConfig
from sp3llm.planning.candidates import candidates
from sp3llm.planning.limits import Limits, cost_within, plan_of
from sp3llm.planning.needs import Workload, needs_of
from sp3llm.planning.recovery_needs import recovery_needs_of
from sp3llm.reporting.serving import loading_lines, servers_refusing
from tests.conftest import (
    TINY,
    disk_tensors,
    logits_of,
    relative_error,
    save_model,
    stock_model,
    tiny_model,
)

QWEN2 = FAMILIES["qwen2"]
NO_WINDOWS = {"use_sliding_window": False, "sliding_window": None}
SERVED_AS = [family for family in FAMILIES.values() if family.served_as]


def narrow_qwen2(**overrides):
    """`config.json` of a tiny Qwen2 whose heads are wider than the stream over them."""
    config = tiny_model("qwen2", **{**NO_WINDOWS, **overrides}).config.to_dict()
    shape = Shape.of(QWEN2, config)
    return resized_config(QWEN2, config, shape.with_width(40))


@pytest.mark.parametrize("family", SERVED_AS, ids=lambda family: family.model_type)
def test_the_tables_say_the_same_but_for_the_zeros(family):
    served_as = family.served_as
    target = FAMILIES[served_as.model_type]
    own = layer_table(family, {}, sparse=False)
    others = layer_table(target, served_as.config, sparse=False)
    assert others == {**own, **dict.fromkeys(served_as.zeros, (RESIDUAL,))}
    for name in ("embeddings", "head", "final_norm", "layer_prefix", "norm_offset", "eps"):
        assert getattr(target, name) == getattr(family, name)


@pytest.mark.parametrize("family", SERVED_AS, ids=lambda family: family.model_type)
def test_what_the_file_does_not_say_is_what_the_original_supplies(family):
    """A config.json that says sizes only: both config classes then hold the same."""
    sizes = {"hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
    original = CONFIG_MAPPING[family.model_type].from_dict(dict(sizes))
    export = export_of(family, {**sizes, "model_type": family.model_type}, "auto")
    written = CONFIG_MAPPING[export.family.model_type].from_dict(dict(export.config))
    differing = {
        key
        for key, value in original.to_dict().items()
        if key not in family.served_as.dropped and written.to_dict().get(key) != value
    }
    assert differing <= {"model_type", "architectures"}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rope", [None, "yarn"])
def test_logits_are_those_of_the_original_class(tied, rope, tokens, tmp_path):
    overrides = {"tie_word_embeddings": tied, "head_dim": 20, **NO_WINDOWS}
    if rope:
        overrides["rope_parameters"] = {
            "rope_type": "yarn",
            "rope_theta": 5000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    model = tiny_model("qwen2", **overrides)
    checkpoint = save_model(model, tmp_path)
    export = export_of(QWEN2, checkpoint.config, "auto")
    assert export.family.model_type == "llama"
    tensors = disk_tensors(checkpoint, QWEN2)
    for added in export.zeros():
        tensors = with_zeros(tensors, added, torch.float64)
    llama = stock_model(export.config, tensors, exact=False)
    assert type(llama).__name__ == "LlamaForCausalLM"
    assert relative_error(logits_of(llama, tokens), logits_of(model, tokens)) < 1e-12
    shapes = parameter_shapes(export.family, export.config)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    assert count_parameters(export.family, export.config) == sum(
        p.numel() for p in llama.parameters()
    )


def test_zeros_are_named_group_by_group():
    export = export_of(QWEN2, narrow_qwen2(), "auto")
    assert len(export.zeros()) == len(groups(QWEN2, export.config))
    assert export.zeros()[1] == {"model.layers.0.self_attn.o_proj.bias": (40,)}
    assert export.zeros()[0] == export.zeros()[-1] == {}


def test_who_loads_which_class_cut():
    """As it was found by running them (eval/results/served-classes.md)."""
    both, gguf = ("vLLM", "llama.cpp"), ("llama.cpp",)
    refusing = {"qwen2": both, "qwen2_moe": both, "phi3": gguf, "granite": gguf}
    for family in FAMILIES.values():
        assert refused_at(family, 200, 256) == refusing.get(family.model_type, ())
        assert refused_at(family, 256, 256) == ()


@pytest.mark.parametrize(
    ("architecture", "serves", "line"),
    [
        ("GraniteForCausalLM", True, "not in llama.cpp, where GraniteForCausalLM takes the width"),
        ("Qwen2MoeForCausalLM", False, "not in vLLM and llama.cpp, where Qwen2MoeForCausalLM"),
        ("LlamaForCausalLM", True, None),
    ],
)
def test_next_steps_are_ones_that_work(architecture, serves, line):
    shape = Shape(200, 448, 8, 2, 32)
    lines = loading_lines(Path("small"), architecture, servers_refusing(architecture, shape))
    assert ("  vllm serve small" in lines.splitlines()) == serves
    assert (line in lines) if line else ("not in" not in lines)


def test_auto_changes_the_class_where_servers_need_it():
    square = tiny_model("qwen2", **NO_WINDOWS).config.to_dict()
    narrow = narrow_qwen2()
    assert refused_by(QWEN2, square) == ()
    assert refused_by(QWEN2, narrow) == ("vLLM", "llama.cpp")
    assert export_of(QWEN2, square, "auto").family is QWEN2
    assert export_of(QWEN2, square, "llama").family.model_type == "llama"
    same = export_of(QWEN2, narrow, "same")
    assert (same.family, same.config, any(same.zeros())) == (QWEN2, narrow, False)


@pytest.mark.parametrize("variant", [v for v in TINY if TINY[v]["model_type"] != "qwen2"])
def test_other_families_stay_as_they_are(variant):
    config = tiny_model(variant).config.to_dict()
    family = FAMILIES[config["model_type"]]
    shape = Shape.of(family, config)
    if not is_square(family, config):
        config = resized_config(family, config, shape.with_width(shape.hidden_size // 2))
    export = export_of(family, config, "auto")
    assert (export.family, export.config) == (family, config)


@pytest.mark.parametrize(
    "window",
    [
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {"dual_chunk_attention_config": {"chunk_size": 8}},
    ],
)
def test_other_attention_keeps_the_class(window):
    config = {**narrow_qwen2(), "layer_types": None, **window}
    export = export_of(QWEN2, config, "auto")
    assert (export.family, export.config) == (QWEN2, config)
    with pytest.raises(UserError, match="with --export-as llama, found a qwen2 model w"):
        export_of(QWEN2, config, "llama")


def test_windows_that_no_layer_has_do_not_matter():
    """Qwen2.5's config.json names a window from a layer on that there is not."""
    settings = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3}
    config = {**narrow_qwen2(), "layer_types": None, **settings}
    export = export_of(QWEN2, config, "auto")
    assert export.family.model_type == "llama"
    assert not {*settings, "layer_types"} & set(export.config)


def test_a_llama_may_be_asked_for_by_a_llama():
    check_export(FAMILIES["llama"], {}, "llama")
    with pytest.raises(UserError, match="a mixtral model which computes what no llama does"):
        check_export(FAMILIES["mixtral"], {}, "llama")


@pytest.mark.parametrize("export_as", ["auto", "llama"])
def test_plans_count_the_zeros(export_as):
    config = tiny_model("qwen2", **NO_WINDOWS, vocab_size=4096).config.to_dict()
    limits = Limits(keep=0.7, export_as=export_as)
    dense = Shape.of(QWEN2, config)
    whole = cost_within(QWEN2, config, limits, dense).params
    assert whole == count_parameters(QWEN2, config)
    shapes = candidates(QWEN2, config, limits)
    for shape in shapes:
        plan = plan_of(QWEN2, config, limits, shape)
        export = export_of(QWEN2, resized_config(QWEN2, config, shape), export_as)
        assert plan.parameters == count_parameters(export.family, export.config) <= 0.7 * whole
        bare = cost_of(QWEN2, config, shape).params
        added = 3 * shape.hidden_size if export.family is not QWEN2 else 0
        assert plan.parameters == bare + added
    assert any(
        export_of(QWEN2, resized_config(QWEN2, config, shape), "auto").added for shape in shapes
    )


def test_needs_count_the_zeros():
    """Three layers' biases of 40: on disk in float32, and trained, with all that AdamW keeps."""
    config = tiny_model("qwen2", **NO_WINDOWS).config.to_dict()
    shape = Shape.of(QWEN2, config).with_width(40)
    workload = Workload(samples=4, eval_samples=4, seq_len=32, weight_itemsize=4)
    same, auto = (needs_of(QWEN2, config, shape, workload, name) for name in ("same", "auto"))
    assert auto.disk - same.disk == auto.kept - same.kept == 3 * 40 * 4
    settings = RecoverConfig(model="small", batch=2)
    same, auto = (
        recovery_needs_of(QWEN2, config, shape, settings, 32, 4, name) for name in ("same", "auto")
    )
    assert auto.weights - same.weights == 3 * 40 * (4 + 2)
    assert auto.optimizer - same.optimizer == 3 * 40 * 12
    assert (auto.teacher, auto.activations) == (same.teacher, same.activations)
