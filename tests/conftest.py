"""Tiny seeded models of every family, and the float64 reference they are compared in."""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sp3llm.cli import main
from sp3llm.compression.projection import Projection, norm_of, project_group
from sp3llm.compression.refitter import FinishedGroup
from sp3llm.maths.basis import mean_free_frame, tied_rotation
from sp3llm.models.checkpoint import Checkpoint, head_tensors, open_checkpoint
from sp3llm.models.export import write_model, written
from sp3llm.models.families import FAMILIES, Family, groups
from sp3llm.models.shapes import Shape
from sp3llm.models.source import bundled_model
from sp3llm.models.stock import fuse_experts
from sp3llm.runtime.journal import Journal

_COMMON = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 32,
}
# Every family, with the variants that its config allows.
TINY: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-head-dim": {"model_type": "llama", "head_dim": 20},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-rope-scaling": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "llama-9-heads": {
        "model_type": "llama",
        "hidden_size": 144,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "mistral-12-heads": {
        "model_type": "mistral",
        "hidden_size": 96,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "sliding_window": None,
    },
    "qwen2": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "gemma": {"model_type": "gemma", "head_dim": 16},
    "gemma-untied": {"model_type": "gemma", "head_dim": 16, "tie_word_embeddings": False},
    "granite": {
        "model_type": "granite",
        "residual_multiplier": 0.22,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.02,
        "logits_scaling": 8.0,
    },
    "granite-tied": {
        "model_type": "granite",
        "residual_multiplier": 0.5,
        "tie_word_embeddings": True,
    },
    "smollm3": {
        "model_type": "smollm3",
        "no_rope_layers": [1, 0, 1],
        "tie_word_embeddings": True,
    },
    "phi3": {"model_type": "phi3"},
    "phi3-longrope": {
        "model_type": "phi3",
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 5000.0,
            "short_factor": [1.0] * 6,
            "long_factor": [2.0] * 6,
            "original_max_position_embeddings": 32,
        },
    },
    "stablelm": {
        "model_type": "stablelm",
        "use_qkv_bias": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5000.0,
            "partial_rotary_factor": 0.5,
        },
    },
    "stablelm-no-biases": {
        "model_type": "stablelm",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5000.0,
            "partial_rotary_factor": 0.5,
        },
    },
    "gpt-neox": {
        "model_type": "gpt_neox",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5000.0,
            "partial_rotary_factor": 0.5,
        },
    },
    "gpt-neox-sequential": {
        "model_type": "gpt_neox",
        "use_parallel_residual": False,
        "attention_bias": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5000.0,
            "partial_rotary_factor": 0.5,
        },
    },
    "opt": {"model_type": "opt", "ffn_dim": 40, "tie_word_embeddings": True},
    "opt-projected": {
        "model_type": "opt",
        "ffn_dim": 40,
        "word_embed_proj_dim": 32,
        "tie_word_embeddings": True,
    },
    "opt-no-biases": {
        "model_type": "opt",
        "ffn_dim": 40,
        "enable_bias": False,
        "tie_word_embeddings": True,
    },
    "mixtral": {"model_type": "mixtral", **_EXPERTS},
    "mixtral-tied": {
        "model_type": "mixtral",
        **_EXPERTS,
        "sliding_window": 7,
        "output_router_logits": True,
        "tie_word_embeddings": True,
    },
    "qwen2-moe": {
        "model_type": "qwen2_moe",
        **_EXPERTS,
        "mlp_only_layers": [1],
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 2,
    },
    "qwen2-moe-tied": {
        "model_type": "qwen2_moe",
        **_EXPERTS,
        "decoder_sparse_step": 2,
        "qkv_bias": False,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
    "qwen3-moe": {"model_type": "qwen3_moe", **_EXPERTS, "head_dim": 16, "norm_topk_prob": True},
    "qwen3-moe-biases": {
        "model_type": "qwen3_moe",
        **_EXPERTS,
        "head_dim": 16,
        "attention_bias": True,
        "norm_topk_prob": False,
        "mlp_only_layers": [0],
        "tie_word_embeddings": True,
    },
    "opt-untied": {"model_type": "opt", "ffn_dim": 40, "tie_word_embeddings": False},
    "qwen3-biases-tied": {
        "model_type": "qwen3",
        "head_dim": 16,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
}


def tiny_model(variant: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> nn.Module:
    """A seeded stock model whose norm weights and biases are far from trivial."""
    settings = {**_COMMON, **TINY[variant], **overrides}
    config = CONFIG_MAPPING[settings["model_type"]](**settings)
    torch.manual_seed(sum(map(ord, variant)))
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    model = model.to(torch.float64).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
            else:
                parameter.uniform_(0.5, 1.5)
    return model.to(dtype)


def save_model(model: nn.Module, folder: Path, tokenizer: bool = False) -> Checkpoint:
    """Lay a model out as a checkpoint, with the bundled tokenizer if it needs one."""
    model.save_pretrained(folder)
    if tokenizer:
        for file in bundled_model().glob("tokenizer*"):
            shutil.copy(file, folder)
    return open_checkpoint(folder)


def family_of_model(model: nn.Module) -> Family:
    return FAMILIES[model.config.model_type]


def disk_tensors(checkpoint: Checkpoint, family: Family) -> dict[str, Tensor]:
    """Every tensor of the checkpoint."""
    return {
        name: tensor
        for group in groups(family, checkpoint.config)
        for name, tensor in checkpoint.read(group.parameters).items()
    }


def project_checkpoint(
    checkpoint: Checkpoint, family: Family, projection: Projection
) -> dict[str, Tensor]:
    """All groups through `project_group`."""
    projected: dict[str, Tensor] = {}
    for group in groups(family, checkpoint.config):
        is_head = group.name == "head"
        tensors = head_tensors(checkpoint, family) if is_head else checkpoint.read(group.parameters)
        projected |= project_group(family, group, tensors, projection)
    return projected


def written_model(
    family: Family,
    config: dict[str, Any],
    built: Iterable[FinishedGroup],
    dtype: torch.dtype,
    folder: Path,
) -> Checkpoint:
    """Groups as they come, written as a run writes them."""
    state = folder.with_name(f"{folder.name}-state")
    state.mkdir(parents=True)
    folder.mkdir(exist_ok=True)
    pairs = ((step.index, step.tensors) for step in built)
    for _ in write_model(family, config, pairs, dtype, folder, Journal(state)):
        pass
    return written(family, config, dtype, folder)


def full_width_projection(
    checkpoint: Checkpoint, family: Family, shape: Shape, rotate: bool = True
) -> Projection:
    """A random orthogonal change of basis; under LayerNorm, of the mean-free part."""
    width = shape.hidden_size
    if family.centred:
        turn = random_orthogonal(width - 1) if rotate else torch.eye(width - 1).double()
        frame = mean_free_frame(width, torch.device("cpu"))
        basis = frame @ turn @ frame.T
    else:
        basis = random_orthogonal(width) if rotate else torch.eye(width).double()
    if not shape.tie_word_embeddings:
        return Projection(basis)
    if family.projections is not None:
        embedding = random_orthogonal(shape.word_embed_proj_dim, seed=7)
        return Projection(basis, embedding_EJ=embedding)
    norm = f"{family.final_norm}.weight"
    weight, _ = norm_of(family, family.final_norm, checkpoint.read([norm]), basis)
    return Projection(*tied_rotation(basis, weight))


def exact_norms(model: nn.Module) -> nn.Module:
    """Replace Hugging Face's RMSNorms, which compute in float32, by torch's own in float64."""
    for owner in list(model.modules()):
        for name, module in list(owner.named_children()):
            if type(module).__name__.endswith("RMSNorm"):
                is_offset = hasattr(module, "eps")
                eps = module.eps if is_offset else module.variance_epsilon
                exact = nn.RMSNorm(module.weight.shape, eps=eps)
                exact.weight = nn.Parameter(module.weight + 1.0) if is_offset else module.weight
                setattr(owner, name, exact.double())
    return model


def head_module(model: nn.Module) -> str:
    """The name of the output head's module, which changes with transformers' release."""
    outputs = model.get_output_embeddings()
    return next(path for path, module in model.named_modules() if module is outputs)


def stock_model(config: dict[str, Any], tensors: dict[str, Tensor], exact: bool) -> nn.Module:
    """A stock float64 model of these tensors; `exact` makes its norms float64 too."""
    stock = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    # The default for experts is a kernel that knows no float64.
    model = AutoModelForCausalLM.from_config(stock, experts_implementation="eager").double().eval()
    head = head_module(model)
    tensors = {name.replace("embed_out.", f"{head}."): tensor for name, tensor in tensors.items()}
    for index in range(stock.num_hidden_layers):
        tensors = fuse_experts(FAMILIES[stock.model_type], index, tensors)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = {"lm_head.weight"} if stock.tie_word_embeddings else set()
    assert set(missing) <= tied
    assert not unexpected
    model.tie_weights()
    return exact_norms(model) if exact else model


@torch.no_grad()
def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def random_orthogonal(size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]


@pytest.fixture
def tokens() -> Tensor:
    """Four windows of 24 token ids."""
    return torch.randint(0, 96, (4, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `sp3llm` with words that it must refuse in one sentence; returns the sentence."""

    def refuse(*words: Any) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("sp3llm: ")
        assert error.count("\n") == 1
        return error

    return refuse
