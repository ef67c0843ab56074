"""`python -m sp3llm.options.reference > docs/options.md`: the page of all options."""

from sp3llm.options import (
    BenchConfig,
    CompressConfig,
    PlanConfig,
    QuantizeConfig,
    RecoverConfig,
    ReportConfig,
    ScoreConfig,
)
from sp3llm.options.derive import markdown_table

_INTRODUCTION = """# Options

Every option of every command, as `sp3llm COMMAND --help` has them too. This page is made from the
settings in `sp3llm/options/` by `make docs`: change those.
"""


def page() -> str:
    """The page, in Markdown."""
    commands = (
        *(CompressConfig, PlanConfig, RecoverConfig, QuantizeConfig),
        *(ScoreConfig, BenchConfig, ReportConfig),
    )
    sections = (f"## sp3llm {kind.command}\n\n{markdown_table(kind)}\n" for kind in commands)
    return "\n".join([_INTRODUCTION, *sections])


if __name__ == "__main__":
    print(page(), end="")
