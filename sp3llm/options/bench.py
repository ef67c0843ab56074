"""Settings of `sp3llm bench`."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sp3llm.errors import UserError
from sp3llm.options.checks import check_fields
from sp3llm.options.compress import CompressConfig
from sp3llm.options.field import MOST_SEED, option, same_as
from sp3llm.options.score import ScoreConfig


@dataclass(frozen=True)
class BenchConfig:
    """Settings of `sp3llm bench`."""

    command: ClassVar[str] = "bench"

    model: str = option("hub id or folder of the compressed model", positional=True)
    against: str = option("hub id or folder of the dense model", metavar="DENSE")
    batch_sizes: tuple[int, ...] = option("sequences at once", default=(1, 8), least=1)
    prompt_lengths: tuple[int, ...] = option("tokens of each prompt", default=(128, 512), least=1)
    # The first new token comes with the prompt; the rate of the others needs one.
    new_tokens: int = option("tokens generated after each prompt", default=32, least=2)
    repeats: int = option("measurements of each figure, after a warm-up", default=9, least=1)
    compile: bool = option("run both through torch.compile, with a static cache", default=False)
    device: str = same_as(CompressConfig, "device")
    dtype: str = same_as(ScoreConfig, "dtype")
    output: Path | None = option(
        ".json file for the figures; the table goes beside it as .md",
        default=None,
        shown="only printed",
        metavar="FILE",
    )
    seed: int = option("chooses the prompts' tokens", default=0, least=0, most=MOST_SEED)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.output is not None and self.output.suffix != ".json":
            raise UserError(
                f"Expected --output to name a .json file, found '{self.output}': the table goes "
                "beside it as .md."
            )
