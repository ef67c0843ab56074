"""What a compression tells its user at the end."""

from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from sp3llm.reporting.formatting import human_bytes, human_time
from sp3llm.reporting.tables import rows

if TYPE_CHECKING:
    from sp3llm.compression.job import Result


def next_steps(result: "Result", has_page: bool) -> str:
    """What was written, report.html among it or not, and what to do with it."""
    raised = [fit["name"] for fit in result.fits if fit["raised"]]
    warning = (
        f"{len(raised)} fits had a singular Gram matrix and raised their ridge, {raised[0]} first: "
        "more --samples would help.\n"
        if raised
        else ""
    )
    page = ", report.html" if has_page else ""
    return warning + (
        f"Written to {result.out} (stock {result.architecture}; README.md{page}; the record is "
        "sp3llm.json). Next:\n"
        f"  AutoModelForCausalLM.from_pretrained({str(result.out)!r})   in transformers\n"
        f"  vllm serve {result.out}"
    )


def closing_table(record: dict[str, Any]) -> Table:
    """The table printed at the end of a run."""
    table = Table(title=Text(f"{record['model']}, compressed"))
    table.add_column("")
    table.add_column("dense", justify="right")
    table.add_column("compressed", justify="right")
    for row in rows(record):
        table.add_row(*map(Text, row))
    evaluated, device = record["evaluation"], record["device_memory_bytes"]
    table.caption = (
        f"{evaluated['samples'] * evaluated['seq_len']:,} held-out tokens in "
        f"{evaluated['samples']} windows"
        + f", {evaluated['dropped_documents']} documents dropped as calibrated on"
        + f"\ntime {human_time(record['seconds'])}, peak memory "
        + human_bytes(record["peak_memory_bytes"])
        + (f", GPU {human_bytes(device)}" if device else "")
    )
    return table
