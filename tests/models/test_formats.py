"""What a shape weighs in each format is what the tools that write the formats make of it."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sp3llm.models.families import FAMILIES, count_parameters, family_of
from sp3llm.models.formats import format_bytes
from sp3llm.models.shapes import Shape
from sp3llm.planning.limits import Limits, plan_of
from sp3llm.reporting.weights import blocks_line

SMOLLM = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
# Bytes of files in Q8_0 by llama.cpp's converter (eval/results/serving/smollm2-llama-cpp.json).
WRITTEN = {
    144_810_912: {},
    177_949_952: {"hidden_size": 432},
    122_934_464: {"intermediate_size": 880},
    107_158_208: {"num_hidden_layers": 20},
}


def weights(**sizes):
    config = {**SMOLLM, **sizes}
    return format_bytes(family_of(config), config)


@given(
    hidden=st.integers(1, 8), ffn=st.integers(1, 8), layers=st.integers(1, 9), tied=st.booleans()
)
@settings(max_examples=50, deadline=None)
def test_sizes_in_steps_of_256_take_the_bits_of_the_format(hidden, ffn, layers, tied):
    config = {
        **SMOLLM,
        "hidden_size": 256 * hidden,
        "intermediate_size": 256 * ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": tied,
    }
    family = family_of(config)
    norms = (2 * layers + 1) * 256 * hidden
    matrices = count_parameters(family, config) - norms
    sizes = format_bytes(family, config)
    assert sizes["Q8_0"] == matrices * 34 // 32 + 4 * norms
    assert 4.5 * matrices / 8 <= sizes["Q4_K_M"] - 4 * norms <= 6.5625 * matrices / 8
    assert sizes["nf4"] < sizes["int8"] < sizes["bf16"] == 2 * (matrices + norms)


@pytest.mark.parametrize("bits", ["Q8_0", "Q4_K_M"])
def test_rows_of_other_lengths_stay_in_16_bits(bits):
    family = FAMILIES["llama"]
    config = {**SMOLLM, "hidden_size": 588, "intermediate_size": 1540, "head_dim": 68}
    norms = 61 * 588
    assert format_bytes(family, config)[bits] == 2 * count_parameters(family, config) + 2 * norms


def test_files_of_llama_cpp_hold_that_and_the_tokenizer():
    rests = [written - weights(**sizes)["Q8_0"] for written, sizes in WRITTEN.items()]
    assert all(math.isclose(rest, rests[0], abs_tol=50_000) for rest in rests)  # names, offsets


def test_formats_are_those_that_take_the_class():
    mixture = {"model_type": "mixtral", "num_local_experts": 4, "hidden_size": 64}
    assert list(format_bytes(family_of(mixture), mixture)) == ["bf16"]
    assert list(format_bytes(FAMILIES["opt"], {"model_type": "opt"})) == ["bf16", "int8", "nf4"]


@pytest.mark.parametrize(("hidden_size", "says"), [(504, True), (576, False)])
def test_a_cut_that_blocks_eat_up_is_told(hidden_size, says):
    family, limits = family_of(SMOLLM), Limits(0.8)
    shape = replace(Shape.of(family, SMOLLM), hidden_size=hidden_size, num_hidden_layers=22)
    line = blocks_line(family, SMOLLM, limits, plan_of(family, SMOLLM, limits, shape))
    assert (line is not None and "Q8_0" in line) is says
