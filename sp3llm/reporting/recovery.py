"""What a recovery tells its user: the closing table, the next steps, a section of the card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from sp3llm.reporting.metadata import tuned_metadata
from sp3llm.reporting.record import RecoveryEntry
from sp3llm.reporting.serving import loading_lines
from sp3llm.reporting.tables import (
    held_out_line,
    markdown_table,
    recovery_rows,
    resources_line,
    same_text_line,
    terminal_table,
)


def closing_table(model: str, entry: RecoveryEntry) -> Table:
    """The table printed at the end of a run; `model` is the name of the one that was tuned."""
    return terminal_table(
        f"{model}, recovered",
        recovery_rows(entry),
        f"{held_out_line(entry.evaluation)}\n{_what_was_done(entry)}\n{resources_line(entry)}",
    )


def next_steps(out: Path, architecture: str, refusing: Sequence[str], entry: RecoveryEntry) -> str:
    """What was written to `out`, and what to do with it; `refusing`: servers that do not."""
    warning = (
        "No step was better than none on the text kept for stopping; the weights are as they were: "
        "a smaller --lr or more text would help.\n"
        if entry.best_step == 0
        else ""
    )
    return warning + (
        f"Written to {out} (stock {architecture}; the record is sp3llm.json). Next:\n"
        f"{loading_lines(out, architecture, refusing)}"
    )


def card_section(entry: RecoveryEntry) -> str:
    """The section of a model card on the recovery, after an empty line."""
    return f"""
## Recovered

Tuned afterwards by distillation from {entry.settings["teacher"]}: {_what_was_done(entry)}.

{markdown_table(recovery_rows(entry))}

{_what_was_measured(entry)}

    {entry.command}
"""


def _what_was_measured(entry: RecoveryEntry) -> str:
    evaluation = entry.evaluation
    if entry.scores is not None:
        return f"""On the {evaluation.samples:,} rows of the task's validation split
({", ".join(evaluation.sources)}), of which none was trained on and none decided when to stop; the
standard error is paired over rows."""
    return f"""Perplexity on {evaluation.tokens:,} tokens of held-out text
({", ".join(evaluation.sources)}), which shares no document with the text trained on
({", ".join(entry.training.sources)}) or the text that decided when to stop; the standard error is
paired over {evaluation.samples} windows. {same_text_line(entry.same_text)}"""


def tuned_card(
    model: str,
    entry: RecoveryEntry,
    base_model: str | None,
    carried: dict[str, Any],
    pipeline: str = "text-generation",
) -> str:
    """README.md of a tuned model that sp3llm did not compress; the arguments are those of
    `metadata.tuned_metadata`.
    """
    metadata = tuned_metadata(model, entry, base_model, carried, pipeline)
    return f"{metadata}\n# {model}, recovered\n{card_section(entry)}"


def _what_was_done(entry: RecoveryEntry) -> str:
    stopped = ", stopped early" if entry.stopped_early else ""
    best = "" if entry.best_step == entry.steps else f", best after {entry.best_step}"
    return f"{entry.steps} steps{stopped}{best}, {entry.trained_parameters:,} parameters trained"
