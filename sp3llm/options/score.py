"""Settings of `sp3llm score`."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from sp3llm.errors import UserError
from sp3llm.options.checks import check_fields
from sp3llm.options.choices import DTYPES
from sp3llm.options.compress import CompressConfig
from sp3llm.options.field import MOST_SEED, flag, option, same_as

# What lm-eval alone knows.
_NOT_OF_TASK = (
    *("include_path", "num_fewshot", "limit", "apply_chat_template", "seed"),
    "confirm_run_unsafe_code",
)


@dataclass(frozen=True)
class ScoreConfig:
    """Settings of `sp3llm score`. What is None is left to lm-eval, where that scores."""

    command: ClassVar[str] = "score"

    model: str = option("hub id or folder", positional=True)
    tasks: str | None = option(
        "of a decoder, comma-separated: the presets zero-shot, papers, wikitext-token and stdlib, "
        "tasks, groups and patterns of lm-eval, or YAML files of a preset or a task",
        default=None,
    )
    task: str | None = option(
        "of an encoder: a task of GLUE (cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli) or "
        "squad, sst2=FOLDER for a copy of one, or a file with its columns, as "
        "train.jsonl:sentence,label, the label last",
        default=None,
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
    seq_len: int | None = option(
        "tokens a row of --task at most",
        default=None,
        shown="128, of answers in a text 384",
        least=1,
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
    seed: int | None = option(
        "seeds all that lm-eval draws", default=None, shown="its own", least=0, most=MOST_SEED
    )
    confirm_run_unsafe_code: bool = option(
        "run tasks that execute code which the model writes", default=False
    )

    def __post_init__(self) -> None:
        if (self.task is None) == (self.tasks is None):
            found = "neither" if self.task is None else "both"
            raise UserError(
                f"Expected --tasks, for a decoder, or --task, for an encoder, found {found}: give "
                "one of them."
            )
        others = _NOT_OF_TASK if self.tasks is None else ("seq_len",)
        given = [f for f in fields(self) if getattr(self, f.name) != f.default]
        for field in given:
            if field.name in others:
                raise UserError(
                    f"Expected {flag(field.name)} with "
                    f"{'--tasks' if self.tasks is None else '--task'} only, found it with the "
                    "other: leave it out."
                )
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
