"""Settings of `sp3llm quantize`."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sp3llm.options.checks import check_bits
from sp3llm.options.choices import BITS
from sp3llm.options.compress import CompressConfig
from sp3llm.options.field import option, same_as


@dataclass(frozen=True)
class QuantizeConfig:
    """Settings of `sp3llm quantize`."""

    command: ClassVar[str] = "quantize"

    model: str = option("the compressed model: a folder or a hub id", positional=True)
    to: str = option(
        "format, as bitsandbytes has it; on a CPU nf4 wants widths in multiples of 64",
        choices=BITS,
    )
    dense: str | None = option(
        "the dense model, a folder or a hub id, to quantize alike and compare with",
        default=None,
        shown="the one that the record of MODEL names",
        metavar="MODEL",
    )
    out: Path | None = option(
        "output folder", default=None, shown="<model>-<bits>, beside it", metavar="DIR"
    )
    device: str = same_as(CompressConfig, "device")

    def __post_init__(self) -> None:
        check_bits("to", self.to)
