"""`sp3llm plan`."""

from dataclasses import asdict

from sp3llm.options import PlanConfig

SETTINGS = PlanConfig
SUMMARY = "show the shapes within a budget, from config.json alone"
DESCRIPTION = """\
Show the shapes within a budget, what they cost, and what a run will need, from
config.json alone: no weights are read."""
EPILOG = None


def run(settings: PlanConfig) -> None:
    """Prints the plan, as tables or as JSON."""
    import json

    from sp3llm.models import families
    from sp3llm.models.shapes import cost_of
    from sp3llm.models.source import resolve_config
    from sp3llm.planning.candidates import candidates
    from sp3llm.planning.limits import limits_of
    from sp3llm.planning.needs import needs_of
    from sp3llm.planning.recovery_needs import recovery_needs_of
    from sp3llm.reporting.plans import needs_line, plan_table, recovery_line

    compression, recovery = settings.compression, settings.recovery
    config, name, note = resolve_config(settings.model)
    family = families.family_of(config)
    stated = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    itemsize = {"float64": 8, "float32": 4}.get(stated.removeprefix("torch."), 2)
    limits = limits_of(compression, itemsize)
    shapes = candidates(family, config, limits)
    seq_len = families.window_length(family, config, settings.seq_len)
    needs = needs_of(
        family, config, shapes[0], settings.samples, settings.eval_samples, seq_len, itemsize, 4
    )
    recovery_needs = None
    if settings.recover:
        recovery_needs = recovery_needs_of(family, config, shapes[0], recovery, seq_len, itemsize)
    if settings.json:
        rows = [
            {**asdict(shape), **asdict(cost_of(family, config, shape, limits.context, itemsize))}
            for shape in shapes
        ]
        plan = {"model": name, "limits": asdict(limits), "shapes": rows, "needs": asdict(needs)}
        if recovery_needs is not None:
            plan["recovery_needs"] = asdict(recovery_needs)
        print(json.dumps(plan, indent=2))
        return
    from rich.console import Console

    console = Console()
    if note:
        console.print(note, markup=False)
    console.print(plan_table(name, family, config, limits, shapes))
    console.print(needs_line(compression, seq_len, needs), highlight=False, markup=False)
    if recovery_needs is not None:
        line = recovery_line(recovery, seq_len, recovery_needs)
        console.print(line, highlight=False, markup=False)
