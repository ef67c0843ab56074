"""Settings of `sp3llm score`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sp3llm.errors import UserError
from sp3llm.options.checks import check_fields
from sp3llm.options.choices import DTYPES
from sp3llm.options.compress import CompressConfig
from sp3llm.options.field import option, same_as


@dataclass(frozen=True)
class ScoreConfig:
    """Settings of `sp3llm score`. What is None is left to lm-eval."""

    command: ClassVar[str] = "score"

    model: str = option("hub id or folder", positional=True)
    tasks: str = option(
        "comma-separated: the presets zero-shot, papers, wikitext-token and stdlib, tasks, groups "
        "and patterns of lm-eval, or YAML files of a preset or a task"
    )
    against: str | None = option(
        "hub id or folder of the dense model to compare with", default=None, metavar="DENSE"
    )
    include_path: Path | None = option(
        "folder with further lm-eval task files", default=None, metavar="DIR"
    )
    num_fewshot: int | None = option(
        "examples before each question", default=None, shown="the task's own", least=0
    )
    limit: float | None = option(
        "only the first N questions of each task, or that fraction of them if below 1; for trying "
        "out",
        default=None,
        metavar="N",
    )
    batch_size: str = option(
        "sequences at once, or auto: as many as fit on a GPU, 8 on a CPU",
        default="auto",
        metavar="N",
    )
    apply_chat_template: bool | str = option(
        "ask in the tokenizer's chat template, or in the one of that name",
        default=False,
        metavar="NAME",
    )
    device: str = same_as(CompressConfig, "device")
    dtype: str = option(
        "dtype of weights and arithmetic",
        default="auto",
        shown="as in the checkpoint",
        choices=DTYPES,
    )
    output: Path | None = option(
        "folder for results and samples", default=None, shown="./<model>-score", metavar="DIR"
    )
    seed: int | None = option("seeds all that lm-eval draws", default=None, shown="its own")
    confirm_run_unsafe_code: bool = option(
        "run tasks that execute code which the model writes", default=False
    )

    def __post_init__(self) -> None:
        if self.limit is not None and not (math.isfinite(self.limit) and self.limit > 0):
            raise UserError(
                f"Expected --limit above 0, found {self.limit:g}: give a number of questions, or a "
                "fraction of them below 1."
            )
        if self.batch_size != "auto" and not (
            self.batch_size.isdecimal() and int(self.batch_size) > 0
        ):
            raise UserError(
                f"Expected --batch-size to be auto or a number of at least 1, found "
                f"'{self.batch_size}': give one of them."
            )
        check_fields(self)
