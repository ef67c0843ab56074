"""What a quantization tells its user: the closing table, the next steps, a section of the card."""

from pathlib import Path

from rich.table import Table

from sp3llm.reporting.record import QuantizationEntry, TextSet
from sp3llm.reporting.tables import (
    held_out_line,
    markdown_table,
    quantization_rows,
    resources_line,
    terminal_table,
)


def closing_table(model: str, evaluation: TextSet, entry: QuantizationEntry) -> Table:
    """The table printed at the end of a run; `model` is the dense one's name."""
    share = entry.quantized_parameters / entry.parameters
    return terminal_table(
        f"{model}, compressed, in {entry.bits}",
        quantization_rows(entry),
        f"{held_out_line(evaluation)}\n"
        f"{100 * share:.0f} % of the compressed model's parameters are quantized\n"
        f"{resources_line(entry)}",
    )


def next_steps(out: Path, architecture: str, entry: QuantizationEntry) -> str:
    """What was written to `out`, and what to do with it."""
    unfit = entry.dense_runs_elsewhere_only
    note = (
        f"The dense model in {entry.bits} does not run on a CPU ({unfit}); it was measured with "
        "its weights dequantized block by block, as a GPU does.\n"
        if unfit
        else ""
    )
    return note + (
        f"Written to {out} (stock {architecture}, needs bitsandbytes; the record is "
        "sp3llm.json). Next:\n"
        f"  AutoModelForCausalLM.from_pretrained({str(out)!r})   in transformers"
    )


def card_section(entry: QuantizationEntry) -> str:
    """The section of a model card on the quantization, after an empty line."""
    return (
        f"\n## Quantized\n\nThe weights in this folder are in {entry.bits}, as bitsandbytes has "
        "it; loading them needs `pip install bitsandbytes`. Embeddings, head, norms and experts "
        "are as they were. All four models on the same held-out tokens, errors paired over "
        f"windows:\n\n{markdown_table(quantization_rows(entry))}\n\n    {entry.command}\n"
    )
