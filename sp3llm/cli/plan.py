"""`sp3llm plan`."""

import json

from sp3llm.options import PlanConfig

SETTINGS = PlanConfig
SUMMARY = "show the shapes within a budget, from config.json alone"
DESCRIPTION = """\
Show the shapes within a budget, what they cost, and what a run will need, from
config.json alone: no weights are read."""
EPILOG = None


def run(settings: PlanConfig) -> None:
    """Prints the plan, as tables or as JSON."""
    from sp3llm.planning.overview import overview_of

    overview = overview_of(settings)
    if settings.json:
        print(json.dumps(overview.describe(), indent=2))
        return
    from rich.console import Console

    from sp3llm.models.families import count_parameters
    from sp3llm.models.shapes import Shape
    from sp3llm.reporting.plans import needs_line, plan_table, recovery_line, vocabulary_line
    from sp3llm.reporting.weights import weights_table
    from sp3llm.runtime.progress import print_line

    console = Console()
    for note in overview.notes:
        print_line(console, note)
    console.print(
        plan_table(
            overview.model, overview.family, overview.config, overview.limits, overview.shapes
        )
    )
    seq_len = overview.seq_len
    family, config = overview.family, overview.config
    console.print(weights_table(family, config, overview.limits, overview.shapes))
    if overview.vocabulary is not None:
        lines = overview.vocabulary.lines()
    elif family.task_head is not None:
        lines = []
    else:
        count = count_parameters(family, config)
        line = vocabulary_line("the dense model's", Shape.of(family, config), count)
        lines = [line] if line else []
    lines += [needs_line(settings.compression, family, seq_len, overview.needs)]
    if overview.recovery_needs is not None:
        lines.append(recovery_line(settings.recovery, seq_len, overview.recovery_needs))
    for line in lines:
        print_line(console, line)
