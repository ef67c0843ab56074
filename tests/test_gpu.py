"""The same pipeline on a CUDA device; run by `make slow` where there is one."""

import pytest
import torch

from sp3llm.compression.measuring import measure_dense
from sp3llm.runtime.devices import Execution
from tests.conftest import family_of_model, relative_error, save_model, tiny_model
from tests.helpers import compress_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_moments_on_the_gpu_equal_those_on_the_cpu(tokens, tmp_path):
    model = tiny_model("llama", torch.float32)
    checkpoint = save_model(model, tmp_path)
    family = family_of_model(model)
    cpu, gpu = (
        measure_dense(
            checkpoint, family, tokens, None, "normalised", "pca",
            Execution(torch.device(device), torch.float32),
        )[0].total().cpu()
        for device in ("cpu", "cuda")
    )  # fmt: skip
    assert relative_error(gpu, cpu) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["llama-biases", "qwen2-tied"])
def test_whole_pipeline_runs_on_the_gpu(variant, dtype, tmp_path):
    result = compress_tiny(
        variant, tmp_path, device="cuda", dtype=dtype, intermediate_size=32, basis="readers"
    )
    assert result.plan.shape.intermediate_size == 32
    assert torch.isfinite(torch.tensor(result.perplexity))
