"""Tiny encoders, and rows for them."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sp3llm.models.families import Family, family_of, parameter_shapes
from sp3llm.text.examples import Examples

_SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "vocab_size": 96,
    "max_position_embeddings": 40,
}
_NAMES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
}
ENCODER_TYPES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}


def encoder_config(model_type: str, task: str = "ForSequenceClassification", **sizes: Any) -> Any:
    """`config.json` of a tiny encoder; sizes by BERT's names."""
    settings = {**_SIZES, **sizes}
    if model_type == "distilbert":
        settings = {_NAMES.get(name, name): size for name, size in settings.items()}
    config = CONFIG_MAPPING[model_type](**settings).to_dict()
    return {**config, "architectures": [f"{ENCODER_TYPES[model_type]}{task}"]}


def encoder_of(config: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> nn.Module:
    """A stock float64 encoder, of random weights whose norms are far from trivial, or of these."""
    stock = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    model = getattr(transformers, config["architectures"][0])(stock).double().eval()
    if tensors is not None:
        model.load_state_dict(tensors)
        return model
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.3 if parameter.ndim == 2 else 0.2)
    return model


def family_and_shapes(config: dict[str, Any]) -> tuple[Family, dict[str, tuple[int, ...]]]:
    """What the tables say of an encoder."""
    family = family_of(config)
    return family, parameter_shapes(family, config)


def padded_rows(config: dict[str, Any], rows: int = 48, seed: int = 0) -> Examples:
    """Random rows of 4 to 12 tokens, padded."""
    generator = torch.Generator().manual_seed(seed)
    pad = config.get("pad_token_id") or 0
    ids = torch.randint(5, 96, (rows, 12), generator=generator)
    lengths = torch.randint(4, 13, (rows, 1), generator=generator)
    mask = (torch.arange(12) < lengths).long()
    labels = torch.randint(0, 2, (rows,), generator=generator)
    types = None if config["model_type"] == "distilbert" else torch.zeros_like(ids)
    ids = torch.where(mask == 1, ids, pad)
    return Examples(ids, mask, types, labels, frozenset({f"{seed}"}))


@torch.no_grad()
def answers_of(model: nn.Module, batch: Examples) -> Tensor:
    """Logits, or the stream behind the last layer where there is no head, of real tokens alone."""
    output = model(**batch.inputs())
    first = output[0]
    is_stream = first.ndim == 3
    return first[batch.attention_mask.bool()] if is_stream else first
