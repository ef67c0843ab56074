"""What a quantization tells its user: the closing table and the next steps."""

from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from sp3llm.reporting.formatting import human_bytes, human_time
from sp3llm.reporting.tables import quantization_rows


def closing_table(record: dict[str, Any]) -> Table:
    """The table printed at the end of a run."""
    entry, evaluated = record["quantization"], record["evaluation"]
    head, *body = quantization_rows(record)
    table = Table(title=Text(f"{record['model']}, compressed, in {entry['bits']}"))
    for column in head:
        table.add_column(column, justify="left" if column == "" else "right")
    for row in body:
        table.add_row(*map(Text, row))
    device = entry["device_memory_bytes"]
    table.caption = (
        f"{evaluated['samples'] * evaluated['seq_len']:,} held-out tokens in "
        f"{evaluated['samples']} windows\n{_share(entry)}\n"
        f"time {human_time(entry['seconds'])}, peak memory "
        + human_bytes(entry["peak_memory_bytes"])
        + (f", GPU {human_bytes(device)}" if device else "")
    )
    return table


def _share(entry: dict[str, Any]) -> str:
    share = entry["quantized_parameters"] / entry["parameters"]
    return f"{100 * share:.0f} % of the compressed model's parameters are quantized"


def next_steps(out: Path, record: dict[str, Any]) -> str:
    """What was written, and what to do with it."""
    entry = record["quantization"]
    unfit = entry["dense_runs_elsewhere_only"]
    note = (
        f"The dense model in {entry['bits']} does not run on a CPU ({unfit}); it was measured with "
        "its weights dequantized block by block, as a GPU does.\n"
        if unfit
        else ""
    )
    return note + (
        f"Written to {out} (stock {record['architecture']}, needs bitsandbytes; the record is "
        "sp3llm.json). Next:\n"
        f"  AutoModelForCausalLM.from_pretrained({str(out)!r})   in transformers"
    )
