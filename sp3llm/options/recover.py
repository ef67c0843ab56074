"""Settings of `sp3llm recover`."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sp3llm.errors import UserError
from sp3llm.options.checks import check_fields, check_out, check_recovery_device
from sp3llm.options.choices import PRECISIONS, TEACHER_DTYPES, TRACKERS
from sp3llm.options.compress import CompressConfig
from sp3llm.options.field import MOST_SEED, flag, option, same_as

# What names text, of which a task has its own.
_OF_TEXT = ("train", "stop_text", "eval_text", "teacher_logits")


@dataclass(frozen=True)
class RecoverConfig:
    """Settings of `sp3llm recover`."""

    command: ClassVar[str] = "recover"

    model: str = option("the compressed model: a folder or a hub id", positional=True)
    teacher: str | None = option(
        "the dense model: a folder or a hub id",
        default=None,
        shown="the one that the record of MODEL names",
        metavar="MODEL",
    )
    task: str | None = option(
        "of an encoder: the task whose training rows are learned from and whose validation rows "
        "are reported on, named like score's --task",
        default=None,
        shown="the one that MODEL was compressed with",
    )
    out: Path | None = option(
        "output folder", default=None, shown="./<model>-recovered", metavar="DIR"
    )
    train: str | None = option(
        "text to train on, named like compress's --calib",
        default=None,
        shown="the sets that MODEL was calibrated on",
        metavar="SETS",
    )
    stop_text: str | None = option(
        "text to decide on when to stop",
        default=None,
        shown="a sixteenth of the training text, kept apart",
        metavar="SETS",
    )
    eval_text: str | None = option(
        "held-out text for the perplexity",
        default=None,
        shown="as for the compression",
        metavar="SETS",
    )
    eval_samples: int = same_as(CompressConfig, "eval_samples")
    steps: int | None = option(
        "optimizer steps",
        default=None,
        shown="300; of an encoder those of 5 epochs",
        least=1,
    )
    batch: int = option("windows a step, over all processes", default=16, least=1)
    micro_batch: int | None = option(
        "windows that a process runs at once",
        default=None,
        shown="2048 tokens' worth, one at least",
        least=1,
    )
    seq_len: int | None = same_as(CompressConfig, "seq_len")
    lr: float | None = option(
        "peak learning rate",
        default=None,
        shown="by the hidden size and the divergence",
        above=0,
        most=1_000,
    )
    warmup: float = option(
        "fraction of the steps over which it rises; it then falls as a cosine to 0", default=0.05
    )
    weight_decay: float = option("AdamW's, on matrices", default=0.0, least=0)
    clip: float = option("largest norm of the gradient", default=1.0, above=0)
    temperature: float | None = option(
        "temperature at which model and teacher are compared",
        default=None,
        shown="1, of an encoder 2",
        above=0,
        most=10_000,
    )
    kl_weight: float | None = option(
        "weight of the divergence from the teacher",
        default=None,
        shown="1, of an encoder 0.3",
        least=0,
    )
    lm_weight: float = option(
        "weight of the loss on the text's own tokens, which also learns its manner, or on a task's "
        "labels",
        default=0.0,
        least=0,
    )
    hidden_weight: float | None = option(
        "weight of the error of the residual stream, seen through the basis that compress stores",
        default=None,
        shown="0, of an encoder 0.7",
        least=0,
    )
    lora: int | None = option(
        "train adapters of this rank, merged in the end",
        default=None,
        shown="all weights",
        metavar="RANK",
        least=1,
    )
    lora_alpha: float | None = option(
        "scale of the adapters", default=None, shown="twice the rank", above=0
    )
    teacher_dtype: str = option(
        "format of the teacher's weights; auto is as in its checkpoint, or float32 on a CPU that "
        "has no units for that; int8 and nf4 are bitsandbytes'",
        default="auto",
        choices=TEACHER_DTYPES,
    )
    teacher_memory: float | None = option(
        "GB of the device that the teacher may take; the rest is offloaded, to the host, then to "
        "disk",
        default=None,
        shown="no limit",
        metavar="GB",
        above=0,
        most=1_000_000,
    )
    teacher_logits: Path | None = option(
        "compute the teacher's largest logits once into this folder, or use those in it",
        default=None,
        shown="the teacher runs beside the model",
        metavar="DIR",
    )
    top_k: int = option("how many logits a token --teacher-logits holds", default=64, least=1)
    precision: str = option(
        "dtype of the arithmetic; auto is bfloat16, by autocast, on a GPU, and for a bfloat16 "
        "model on a CPU that has units for it",
        default="auto",
        choices=PRECISIONS,
    )
    gradient_checkpointing: bool = option(
        "compute activations again in the backward pass instead of keeping them", default=False
    )
    stop_windows: int | None = option(
        "windows, or rows of a task, that the held-out loss is taken on",
        default=None,
        shown="32, of a task 512 at most",
        least=1,
    )
    check_every: int | None = option(
        "steps between held-out losses", default=None, shown="a tenth of all", least=1
    )
    patience: int | None = option(
        "checks without a better loss before training stops; the best weights are kept",
        default=None,
        shown="5, of a task 10",
        least=1,
    )
    checkpoint_every: int | None = option(
        "steps between checkpoints", default=None, shown="a tenth of all", least=1
    )
    track: str | None = option("follow the run in a tracker", default=None, choices=TRACKERS)
    device: str = option("auto, which is what accelerate finds, cuda or cpu", default="auto")
    seed: int = option(
        "orders the training windows and starts the adapters", default=0, least=0, most=MOST_SEED
    )

    def __post_init__(self) -> None:
        check_fields(self)
        check_out(self.out)
        if not 0 <= self.warmup < 1:
            raise UserError(
                f"Expected --warmup between 0 and 1, the fraction of steps, found {self.warmup:g}: "
                "give a fraction such as 0.05."
            )
        if self.kl_weight == self.lm_weight == self.hidden_weight == 0:
            raise UserError(
                "Expected something to learn from, found --kl-weight, --lm-weight and "
                "--hidden-weight all 0: raise one of them."
            )
        if self.lora_alpha is not None and self.lora is None:
            raise UserError(
                "Expected --lora with --lora-alpha, which scales adapters, found none: add --lora "
                "16, or leave it out."
            )
        if self.teacher_logits is not None and self.hidden_weight:
            raise UserError(
                "Expected the teacher itself for --hidden-weight, found --teacher-logits, which "
                "holds no hidden states: leave one out."
            )
        if self.task is not None and self.of_text is not None:
            raise UserError(
                f"Expected no {self.of_text} with --task, whose rows are learned from, decide "
                "when to stop and are reported on, found both: leave one out."
            )
        check_recovery_device(self.device)

    @property
    def of_text(self) -> str | None:
        """The first option that was given of those that are about text; None: none was."""
        given = (flag(name) for name in _OF_TEXT if getattr(self, name) is not None)
        return next(given, None)

    @property
    def checked_every(self) -> int:
        """`check_every`, resolved, where the steps are."""
        return self.check_every or max(1, (self.steps or 0) // 10)

    @property
    def saved_every(self) -> int:
        """`checkpoint_every`, resolved, where the steps are."""
        return self.checkpoint_every or max(1, (self.steps or 0) // 10)
