"""The class that a compressed model is written as: its own, or one that servers load.

vLLM and llama.cpp take `hidden_size // num_attention_heads` for the head size of some families,
whatever config.json says, and cannot load a model whose width alone was cut. Where another stock
class computes the same from the same weights, the model is written as that (docs/deploy.md).
Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sp3llm.errors import UserError
from sp3llm.models.families import (
    FAMILIES,
    QUERY,
    RESIDUAL,
    Family,
    axis_sizes,
    groups,
    parameter_shapes,
    setting,
)

Zeros = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Export:
    """A compressed model as it is written."""

    family: Family
    """The one that it is written as."""
    config: dict[str, Any]
    """`config.json` of that family."""
    added: tuple[str, ...] = ()
    """Parameters of every layer, relative to its prefix, that are added as zeros."""

    def zeros(self) -> list[Zeros]:
        """Of every group of parameters, in order, the names and shapes of those that are added."""
        shapes = parameter_shapes(self.family, self.config) if self.added else {}
        return [
            {group.prefix + name: shapes[group.prefix + name] for name in self.added}
            if group.layer >= 0
            else {}
            for group in groups(self.family, self.config)
        ]


def export_of(family: Family, config: Mapping[str, Any], export_as: str) -> Export:
    """What a compressed model of a family and its `config.json` is written as.

    `export_as` is `same`, which keeps the class, `auto`, which changes it where a server could not
    load it and another class computes exactly the same, or the `model_type` of that class.

    Raises UserError where the class asked for is not exact.
    """
    check_export(family, config, export_as)
    keeps = export_as in ("same", family.model_type)
    if export_as == "auto":
        keeps = not refused_by(family, config) or _obstacle(family, config) is not None
    if keeps or family.served_as is None:
        return Export(family, dict(config))
    served_as = family.served_as
    target = FAMILIES[served_as.model_type]
    # What the original's class supplies where the file is silent is not what the other's does.
    supplied = {key: value for key, value in family.defaults.items() if key in target.defaults}
    stated = {key: value for key, value in config.items() if key not in served_as.dropped}
    changed = {
        **supplied,
        **served_as.silent,
        **stated,
        **served_as.config,
        "model_type": target.model_type,
        "architectures": [target.architecture],
    }
    # Keys that the file had keep their places in it.
    ordered = {key: changed[key] for key in config if key in changed}
    return Export(target, {**ordered, **changed}, served_as.zeros)


def check_export(family: Family, config: Mapping[str, Any], export_as: str) -> None:
    """Raise UserError if a model cannot be written as the class asked for, exactly."""
    if export_as in ("auto", "same", family.model_type):
        return
    obstacle = _obstacle(family, config)
    if family.served_as is None or family.served_as.model_type != export_as:
        obstacle = f"which computes what no {export_as} does"
    if obstacle is not None:
        raise UserError(
            f"Expected a model that can be written as a {export_as} exactly with --export-as "
            f"{export_as}, found a {family.model_type} model {obstacle}: leave the option out."
        )


def refused_by(family: Family, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of `SERVERS` that do not load the family's class at the sizes of that `config.json`."""
    sizes = axis_sizes(family, config)
    return refused_at(family, sizes[RESIDUAL], sizes[QUERY])


def refused_at(family: Family, hidden_size: int, query_size: int) -> tuple[str, ...]:
    """The same of a width, and of the rows of all heads' queries."""
    return family.square_in if hidden_size != query_size else ()


def _obstacle(family: Family, config: Mapping[str, Any]) -> str | None:
    """What of a model `Family.served_as` does not compute, as a relative clause; None: nothing."""
    if family.served_as is None:
        return "which computes what no other class does"
    for key, what in family.served_as.unlike.items():
        if config.get(key):
            return f"which {what} ({key} in config.json)"
    if _has_windows(family, config):
        return "with layers that attend to a sliding window"
    return None


def _has_windows(family: Family, config: Mapping[str, Any]) -> bool:
    """Whether any layer attends to a sliding window, as Qwen2's config class decides it, with its
    values where `config.json` is silent.
    """
    layer_types = config.get("layer_types")
    if layer_types is not None:
        return "sliding_attention" in layer_types
    is_on = config.get("use_sliding_window") and config.get("sliding_window", 4096) is not None
    return bool(is_on) and config.get("max_window_layers", 28) < setting(
        family, config, "num_hidden_layers"
    )
