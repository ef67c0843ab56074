"""What a recovery tells its user: the closing table, the next steps, a section of the card."""

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from sp3llm.reporting.formatting import human_bytes, human_time

if TYPE_CHECKING:
    from sp3llm.options import RecoverConfig
    from sp3llm.planning.recovery_needs import RecoveryNeeds
    from sp3llm.recovery.result import Recovery


def recovery_line(settings: "RecoverConfig", seq_len: int, needs: "RecoveryNeeds") -> str:
    """What a recovery will need of the device that trains."""
    from sp3llm.planning.recovery_needs import micro_batch_of

    what = "all weights" if settings.lora is None else f"adapters of rank {settings.lora}"
    return (
        f"Recovery of {what}, {micro_batch_of(settings, seq_len)} windows at once, needs about "
        f"{human_bytes(needs.total)} of device memory: teacher {human_bytes(needs.teacher)}, model "
        f"{human_bytes(needs.weights)}, gradients and moments {human_bytes(needs.optimizer)}, "
        f"activations {human_bytes(needs.activations)}, logits {human_bytes(needs.logits)}."
    )


def rows(result: "Recovery") -> list[tuple[str, str, str, str]]:
    """Name, dense, before, after."""
    return [
        (
            f"perplexity ({', '.join(result.evaluation.sources)})",
            f"{result.dense_perplexity:.3f}",
            f"{result.perplexity_before:.3f}",
            f"{result.perplexity:.3f}",
        ),
        ("excess log-perplexity", "", str(result.excess_before), str(result.excess)),
    ]


def closing_table(result: "Recovery") -> Table:
    """The table printed at the end of a run."""
    table = Table(title=Text(f"{result.name}, recovered"))
    for column in ("", "dense", "before", "recovered"):
        table.add_column(column, justify="left" if column == "" else "right")
    for row in rows(result):
        table.add_row(*map(Text, row))
    table.caption = (
        f"{result.evaluation.tokens.numel():,} held-out tokens in "
        f"{len(result.evaluation.tokens)} windows\n{_what_was_done(result)}\n"
        f"time {human_time(result.seconds)}, peak memory {human_bytes(result.peak_memory)}"
        + (f", GPU {human_bytes(result.device_memory)}" if result.device_memory else "")
    )
    return table


def next_steps(result: "Recovery") -> str:
    """What was written, and what to do with it."""
    warning = (
        "No step was better than none on the text kept for stopping; the weights are as they were: "
        "a smaller --lr or more text would help.\n"
        if result.state.best_step == 0
        else ""
    )
    return warning + (
        f"Written to {result.out} (stock {result.architecture}; the record is sp3llm.json). Next:\n"
        f"  AutoModelForCausalLM.from_pretrained({str(result.out)!r})   in transformers\n"
        f"  vllm serve {result.out}"
    )


def card(before: str, result: "Recovery") -> str:
    """README.md: that of the compressed model, and a section on the recovery."""
    head = before or (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- sp3llm\n---\n\n"
        f"# {result.name}, recovered\n"
    )
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows(result))
    return f"""{head}
## Recovered

Tuned afterwards by distillation from {result.teacher}: {_what_was_done(result)}.

| | dense | before | recovered |
|---|---|---|---|
{table}

Perplexity on {result.evaluation.tokens.numel():,} tokens of held-out text
({", ".join(result.evaluation.sources)}), which shares no document with the text trained on
({", ".join(result.training.sources)}) or the text that decided when to stop; the standard error is
paired over {len(result.evaluation.tokens)} windows.

    {result.command}
"""


def _what_was_done(result: "Recovery") -> str:
    state = result.state
    stopped = ", stopped early" if state.stopped else ""
    best = "" if state.best_step == state.step else f", best after {state.best_step}"
    return f"{state.step} steps{stopped}{best}, {result.trained_parameters:,} parameters trained"
