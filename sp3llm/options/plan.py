"""Settings of `sp3llm plan`: what it shares with `compress` and `recover`, and how it is shown."""

from dataclasses import dataclass, fields
from typing import ClassVar

from sp3llm.errors import UserError
from sp3llm.options.compress import CompressConfig
from sp3llm.options.field import option, same_as
from sp3llm.options.recover import RecoverConfig

# Settings of a recovery that its memory depends on.
_OF_RECOVERY = (
    "lora",
    "teacher_dtype",
    "teacher_memory",
    "batch",
    "micro_batch",
    "gradient_checkpointing",
)


@dataclass(frozen=True)
class PlanConfig:
    """Settings of `sp3llm plan`."""

    command: ClassVar[str] = "plan"

    model: str | None = same_as(CompressConfig, "model")
    keep: float = same_as(CompressConfig, "keep")
    of: str = same_as(CompressConfig, "of")
    task: str | None = same_as(CompressConfig, "task")
    vocab_from: str | None = same_as(CompressConfig, "vocab_from")
    vocab_size: int | None = same_as(CompressConfig, "vocab_size")
    allocate: str | None = same_as(CompressConfig, "allocate")
    tie: str = same_as(CompressConfig, "tie")
    hidden_size: int | None = same_as(CompressConfig, "hidden_size")
    intermediate_size: int | None = same_as(CompressConfig, "intermediate_size")
    num_key_value_heads: int | None = same_as(CompressConfig, "num_key_value_heads")
    kv_heads: str = same_as(CompressConfig, "kv_heads")
    num_hidden_layers: int | None = same_as(CompressConfig, "num_hidden_layers")
    head_dim: int | None = same_as(CompressConfig, "head_dim")
    word_embed_proj_dim: int | None = same_as(CompressConfig, "word_embed_proj_dim")
    square: bool = same_as(CompressConfig, "square")
    tensor_parallel: int = same_as(CompressConfig, "tensor_parallel")
    multiple_of: int | None = same_as(CompressConfig, "multiple_of")
    export_as: str = same_as(CompressConfig, "export_as")
    samples: int | None = same_as(CompressConfig, "samples")
    eval_samples: int = same_as(CompressConfig, "eval_samples")
    seq_len: int | None = same_as(CompressConfig, "seq_len")
    json: bool = option("print JSON for machines", default=False)
    recover: bool = option(
        "estimate the device memory of sp3llm recover too; what follows is as there",
        default=False,
    )
    lora: int | None = same_as(RecoverConfig, "lora")
    teacher_dtype: str = same_as(RecoverConfig, "teacher_dtype")
    teacher_memory: float | None = same_as(RecoverConfig, "teacher_memory")
    batch: int = same_as(RecoverConfig, "batch")
    micro_batch: int | None = same_as(RecoverConfig, "micro_batch")
    gradient_checkpointing: bool = same_as(RecoverConfig, "gradient_checkpointing")

    def __post_init__(self) -> None:
        if not self.recover and self.recovery != RecoverConfig(model=""):
            raise UserError(
                "Expected --recover with the options of a recovery, found them alone: add it, or "
                "leave them out."
            )
        _ = self.compression  # refuses what `compress` would

    @property
    def compression(self) -> CompressConfig:
        """The compression that is planned."""
        shared = {field.name for field in fields(CompressConfig)} & {
            field.name for field in fields(self)
        }
        return CompressConfig(**{name: getattr(self, name) for name in shared})

    @property
    def recovery(self) -> RecoverConfig:
        """The recovery after it, of interest where `recover` asks for it."""
        return RecoverConfig(model="", **{name: getattr(self, name) for name in _OF_RECOVERY})
