"""`--square`: the width stays heads times head size, for tools that derive one from the other."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sp3llm.cli import main
from sp3llm.errors import UserError
from sp3llm.models.families import FAMILIES, family_of
from sp3llm.models.shapes import Shape, cost_of
from sp3llm.options import CompressConfig
from sp3llm.planning.candidates import candidates, without_trials
from sp3llm.planning.limits import Limits, plan_of
from sp3llm.planning.square import SERVED_HEAD_DIMS
from tests.conftest import TINY
from tests.helpers import LOAD_ELSEWHERE, compress_tiny
from tests.planning.test_plan import LLAMA_2_7B, LLAMA_3_8B, MIXTRAL_8X7B

LLAMA = FAMILIES["llama"]
QWEN3_4B = {
    "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "tie_word_embeddings": True,
}  # fmt: skip
OPT_6_7B = {
    "model_type": "opt", "hidden_size": 4096, "ffn_dim": 16384, "num_hidden_layers": 32,
    "num_attention_heads": 32, "word_embed_proj_dim": 4096, "vocab_size": 50272,
    "max_position_embeddings": 2048, "do_layer_norm_before": True, "tie_word_embeddings": True,
}  # fmt: skip
OPT_1_3B = OPT_6_7B | {"hidden_size": 2048, "word_embed_proj_dim": 2048, "ffn_dim": 8192,
                       "num_hidden_layers": 24}  # fmt: skip
BERT = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}


@given(
    keep=st.floats(0.35, 0.95),
    config=st.sampled_from([LLAMA_2_7B, LLAMA_3_8B, MIXTRAL_8X7B, QWEN3_4B]),
    only_width=st.booleans(),
    tensor_parallel=st.sampled_from([1, 2]),
)
@settings(max_examples=60, deadline=None)
def test_every_candidate_is_square_and_within_the_budget(keep, config, only_width, tensor_parallel):
    family = FAMILIES[config["model_type"]]
    limits = Limits(
        keep, square=True, tie="auto", only_width=only_width, tensor_parallel=tensor_parallel
    )
    dense = Shape.of(family, config)
    whole = cost_of(family, config, dense).params
    try:
        found = candidates(family, config, limits)
    except UserError:  # widths are coarse: not every budget has one
        return
    for shape in found:
        assert shape.hidden_size == shape.num_attention_heads * shape.head_dim
        assert shape.head_dim == dense.head_dim
        groups = dense.num_attention_heads // dense.num_key_value_heads
        assert shape.num_attention_heads == groups * shape.num_key_value_heads
        assert shape.num_key_value_heads % tensor_parallel == 0
        assert shape.hidden_size <= dense.hidden_size
        assert cost_of(family, config, shape).params <= keep * whole
        plan = plan_of(family, config, limits, shape)
        assert plan.shape.hidden_size % plan.multiple_of == 0
    if only_width or family.experts is not None:
        assert {shape.intermediate_size for shape in found} == {dense.intermediate_size}


def test_wider_shapes_spend_the_budget_on_less_ffn():
    found = candidates(LLAMA, LLAMA_2_7B, Limits(0.75, square=True, num_hidden_layers=32))
    assert len(found) > 3
    widths = [shape.hidden_size for shape in found]
    ffn = [shape.intermediate_size for shape in found]
    assert widths == sorted(set(widths))
    assert ffn == sorted(set(ffn), reverse=True)
    assert ffn[0] == 11008


def test_heads_wider_than_the_stream_are_cut_down_to_it():
    """Qwen3's 32 heads of 128 make 4096 on a stream of 2560: 20 heads are the most."""
    found = candidates(FAMILIES["qwen3"], QWEN3_4B, Limits(0.9, square=True, tie="keep"))
    assert max(shape.hidden_size for shape in found) == 2560


@pytest.mark.parametrize("variant", ["opt", "stablelm", "gpt-neox"])
def test_families_that_are_square_anyway_plan_the_same(variant):
    config = {**TINY[variant], "num_hidden_layers": 2, "hidden_size": 128,
              "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip
    family = FAMILIES[config["model_type"]]
    plain, square = (
        candidates(family, config, Limits(0.9, square=square)) for square in (False, True)
    )
    assert plain == square


@given(keep=st.floats(0.3, 0.97))
@settings(max_examples=20, deadline=None)
def test_large_heads_shrink_to_sizes_that_servers_take_unless_asked(keep):
    opt = FAMILIES["opt"]

    def head_dims(config, keep, **asked):
        limits = Limits(keep, every_layer=True, **asked)
        return {shape.head_dim for shape in candidates(opt, config, limits)}

    assert head_dims(OPT_6_7B, keep) <= set(SERVED_HEAD_DIMS)
    assert head_dims(OPT_6_7B, 0.75, head_dim=104) == {104}
    assert 104 in head_dims(OPT_6_7B, 0.75, hidden_size=104 * 32)
    assert 56 in head_dims(OPT_1_3B, 0.75)


@pytest.mark.parametrize("config", [OPT_1_3B | {"tie_word_embeddings": False}, BERT])
def test_where_fewer_layers_are_enough_no_head_shrinks_untried(config):
    family = family_of(config)
    dense = Shape.of(family, config)
    limits = Limits(0.9, only_width=True, num_hidden_layers=dense.num_hidden_layers // 2)
    taken = without_trials(candidates(family, config, limits))
    assert taken == replace(dense, num_hidden_layers=dense.num_hidden_layers // 2)
    shrunk = without_trials(candidates(family, config, Limits(0.7, only_width=True)))
    assert shrunk.head_dim < dense.head_dim


def test_a_budget_that_no_square_shape_fits_says_which_does():
    with pytest.raises(UserError, match=r"No square shape keeps 0\.02 .* keeps (0\.\d+)") as error:
        candidates(LLAMA, LLAMA_2_7B, Limits(0.02, square=True, only_width=True))
    least = float(str(error.value).split("keeps ")[-1].split(";")[0])
    assert candidates(LLAMA, LLAMA_2_7B, Limits(least, square=True, only_width=True))
    with pytest.raises(UserError, match="No shape is allowed by --square, --hidden-size 1000"):
        candidates(LLAMA, LLAMA_2_7B, Limits(0.5, square=True, hidden_size=1000))


def test_choosing_heads_needs_the_refit():
    with pytest.raises(UserError, match="needs the refit"):
        CompressConfig(square=True, refit=False)


def test_plan_takes_it(capsys):
    main(["plan", "--keep", "0.5", "--square", "--json"])
    (shape,) = json.loads(capsys.readouterr().out)["shapes"]
    assert (shape["hidden_size"], shape["num_attention_heads"], shape["head_dim"]) == (128, 2, 64)


def test_the_export_is_square_and_loads_stock(tmp_path):
    """Where the heads' size is the quotient of width and heads, no config needs to state it."""
    folders = [tmp_path / variant for variant in ("llama-head-dim", "qwen2-tied")]
    for folder in folders:
        compress_tiny(folder.name, folder, square=True, keep=0.8, samples=8)
        config = json.loads((folder / "small" / "config.json").read_text())
        assert config["hidden_size"] == config["num_attention_heads"] * config["head_dim"]
        record = json.loads((folder / "small" / "sp3llm.json").read_text())
        assert record["plan"]["keep"] <= 0.8
        assert "--square" in record["command"]
    words = [str(folder / "small") for folder in folders]
    run = subprocess.run(
        [sys.executable, "-c", LOAD_ELSEWHERE, *words], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
