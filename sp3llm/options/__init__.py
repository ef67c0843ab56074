"""What a run is asked to do, checked where it enters.

Every command has one frozen dataclass. Its fields hold all there is to say about the options: from
them come the parser, `--help`, the recorded command line and `docs/options.md` (`derive`).
"""

from sp3llm.options.bench import BenchConfig
from sp3llm.options.choices import COUNTS, DTYPES
from sp3llm.options.compress import CompressConfig
from sp3llm.options.derive import command_line, plain_values
from sp3llm.options.plan import PlanConfig
from sp3llm.options.quantize import QuantizeConfig
from sp3llm.options.recover import RecoverConfig
from sp3llm.options.report import ReportConfig
from sp3llm.options.score import ScoreConfig

__all__ = [
    "COUNTS",
    "DTYPES",
    "BenchConfig",
    "CompressConfig",
    "PlanConfig",
    "QuantizeConfig",
    "RecoverConfig",
    "ReportConfig",
    "ScoreConfig",
    "command_line",
    "plain_values",
]
