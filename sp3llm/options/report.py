"""Settings of `sp3llm report`."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sp3llm.errors import UserError
from sp3llm.options.field import option


@dataclass(frozen=True)
class ReportConfig:
    """Settings of `sp3llm report`."""

    command: ClassVar[str] = "report"

    folder: Path = option("what sp3llm compress wrote", metavar="DIR", positional=True)
    dense: str | None = option(
        "the dense model, to make samples anew with",
        default=None,
        shown="the samples there are, or the model that the record names, if it is at hand",
        metavar="MODEL",
    )
    device: str = option("where samples are made: auto, cpu, cuda, ...", default="auto")
    add: tuple[Path, ...] = option(
        "put what sp3llm score (comparison_<date>.json) or sp3llm bench (its --output) found into "
        "the record",
        default=(),
        metavar="FILE",
    )
    push_to_hub: str | None = option(
        "upload the folder to this repository (owner/name) of the Hugging Face hub, which is made "
        "if it does not exist",
        default=None,
        metavar="REPO_ID",
    )
    private: bool = option("only into a private repository", default=False)

    def __post_init__(self) -> None:
        if self.private and self.push_to_hub is None:
            raise UserError(
                "Expected --push-to-hub with --private, found none: say where to, or leave it out."
            )
