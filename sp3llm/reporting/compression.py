"""What a compression tells its user at the end."""

from pathlib import Path

from rich.table import Table

from sp3llm.reporting.plans import vocabulary_line
from sp3llm.reporting.record import Record
from sp3llm.reporting.serving import loading_lines, servers_refusing
from sp3llm.reporting.tables import held_out_line, resources_line, rows, terminal_table


def next_steps(out: Path, record: Record, has_page: bool) -> str:
    """What was written to `out`, report.html among it or not, and what to do with it."""
    raised = [fit.name for fit in record.fits if fit.raised]
    warning = (
        f"{len(raised)} fits had a singular Gram matrix and raised their ridge, {raised[0]} first: "
        "more --samples would help.\n"
        if raised
        else ""
    )
    refusing = servers_refusing(record.architecture, record.plan.shape)
    page = ", report.html" if has_page else ""
    return warning + (
        f"Written to {out} (stock {record.architecture}; README.md{page}; the record is "
        f"sp3llm.json). Next:\n{loading_lines(out, record.architecture, refusing)}"
    )


def _vocabulary_line(record: Record) -> str:
    """That the vocabulary is much of what is left, on a line of its own, where all of it stayed."""
    plan = record.plan
    if record.answers is not None:  # an encoder keeps it
        return ""
    line = vocabulary_line("these", plan.shape, plan.parameters)
    return f"\n{line}" if line and record.vocabulary is None else ""


def closing_table(record: Record) -> Table:
    """The table printed at the end of a run."""
    return terminal_table(
        f"{record.model}, compressed",
        [("", "dense", "compressed"), *rows(record)],
        f"{held_out_line(record.evaluation)}, {record.evaluation.dropped_documents} documents "
        f"dropped as calibrated on\n{resources_line(record)}{_vocabulary_line(record)}",
    )
