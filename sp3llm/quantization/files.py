"""Weights in few bits: written by transformers and bitsandbytes, and loaded again."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sp3llm.errors import UserError, reason

if TYPE_CHECKING:
    import torch

    from sp3llm.models.checkpoint import Checkpoint
    from sp3llm.models.families import Family
    from sp3llm.models.objectives.schema import Objective
    from sp3llm.runtime.devices import Execution


# As large as those of `models.export`.
_SHARD = "2GB"


@dataclass(frozen=True)
class Source:
    """A model in full precision, as it lies on disk."""

    checkpoint: "Checkpoint"
    family: "Family"
    name: str

    def objective(self) -> "Objective":
        """What the model is for."""
        from sp3llm.models.objectives.catalogue import objective_of

        return objective_of(self.family.architecture)

    def linear(self) -> dict[str, tuple[int, ...]]:
        """The modules that are quantized, with the shapes of their weights."""
        from sp3llm.models.families.counts import linear_modules

        return linear_modules(self.family, self.checkpoint.config)

    def dtype(self) -> "torch.dtype":
        """Of what is not quantized: that of the checkpoint, float32 at most."""
        import torch

        dtype = self.checkpoint.dtype()
        return torch.float32 if dtype == torch.float64 else dtype


def write_quantized(model: Source, to: str, device: "torch.device", folder: Path) -> dict[str, Any]:
    """Write the weights that transformers and bitsandbytes make of a model.

    `config.json` is not written: the folder does not load until the caller says it is whole.
    Returns what it has to hold as `quantization_config`.
    Raises UserError if the model does not load.
    """
    import torch

    from sp3llm.models.export import share_file
    from sp3llm.quantization.bits import bits_config

    source, dtype = model.checkpoint.folder, model.dtype()
    arithmetic = dtype if dtype == torch.float16 else torch.bfloat16
    config = bits_config(to, arithmetic)
    with _told(source):
        quantized = (
            model.objective()
            .stock_class()
            .from_pretrained(
                source, dtype=dtype, quantization_config=config, device_map={"": device}
            )
        )
    # Before it runs: the kernel for AVX512-BF16 repacks weights and rounds their scales.
    quantized.save_pretrained(folder, max_shard_size=_SHARD)
    for path in folder.glob("*.safetensors"):
        share_file(path)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name in ("config.json", "generation_config.json"):  # the model's own are copied instead
        (folder / name).unlink(missing_ok=True)
    return dict(written["quantization_config"])


def load_quantized(
    folder: Path, model: Source, stock: Mapping[str, Any], execution: "Execution"
) -> Any:
    """The stock model of what `write_quantized` wrote; what is not quantized is computed in the
    arithmetic that models in full precision are, so that the bits are all that differs.
    """
    from transformers import GenerationConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from sp3llm.models.companions import carried_config

    config = {**carried_config(model.checkpoint.config), "quantization_config": dict(stock)}
    parsed = CONFIG_MAPPING[config["model_type"]].from_dict(deepcopy(config))
    with _told(folder):
        quantized = (
            model.objective()
            .stock_class()
            .from_pretrained(
                folder,
                config=parsed,
                generation_config=GenerationConfig(),  # there is none in the folder yet
                device_map={"": execution.device},
            )
        )
    for parameter in quantized.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(execution.dtype)
    return quantized.requires_grad_(False).eval()


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """What transformers or bitsandbytes raise, in one sentence."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(
            f"Cannot quantize '{folder}' with bitsandbytes ({type(error).__name__}: "
            f"{reason(error)}): check that it supports this device, or use --device cpu."
        ) from error


def linear_parameters(model: Source) -> int:
    """Number of weights that are quantized."""
    import math

    return sum(math.prod(shape) for shape in model.linear().values())


def weight_bytes(checkpoint: "Checkpoint") -> int:
    """Bytes of a checkpoint's files."""
    return sum(path.stat().st_size for path in set(checkpoint.files.values()))


def tensor_bytes(files: Sequence[Path]) -> dict[str, int]:
    """Bytes of every tensor in safetensors files, by name."""
    from safetensors import safe_open

    sizes = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            sizes |= {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
    return sizes
