"""The model card, README.md: what the hub and its readers need to know of a compressed model."""

import shutil
from pathlib import Path
from typing import Any

from sp3llm.models.objectives.catalogue import objective_of
from sp3llm.reporting import quantization, recovery
from sp3llm.reporting.metadata import carried_metadata, compressed_metadata
from sp3llm.reporting.record import Record
from sp3llm.reporting.serving import servers_refusing
from sp3llm.reporting.tables import (
    markdown_table,
    part_rows,
    rows,
    same_text_line,
    score_rows,
    speed_rows,
    what_was_done,
)

# Texts that licences ask to be passed on.
_LICENCES = ("LICEN[CS]E*", "NOTICE*", "USE_POLICY*")

_USAGE = """\
```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```"""


def write_card(folder: Path, record: Record, dense: Path | None) -> None:
    """Write README.md into a folder, from the record and the card of the `dense` model.

    Where the dense model is not at hand, what an earlier card in the folder says of the licence
    stays. Texts of licences in the dense model's folder are copied.
    """
    carried = {}
    for origin in (folder, dense, _cached_card(record.base_model)):
        carried |= carried_metadata(origin)
    for pattern in _LICENCES if dense else ():
        for path in sorted(dense.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    (folder / "README.md").write_text(model_card(record, carried), encoding="utf-8")


def _cached_card(base_model: str | None) -> Path | None:
    """Folder of a hub model's card, if it is in the hub cache."""
    from huggingface_hub import try_to_load_from_cache

    card = try_to_load_from_cache(base_model, "README.md") if base_model else None
    return Path(card).parent if isinstance(card, str) else None


def model_card(record: Record, carried: dict[str, Any]) -> str:
    """README.md of the compressed model; `carried` is metadata of the dense model's card."""
    sections = (
        _introduction(record, carried),
        f"\n{_USAGE.format(auto_class=objective_of(record.architecture).auto_class)}\n",
        _comparison(record),
        _parts(record),
        recovery.card_section(record.recoveries[-1]) if record.recoveries else "",
        quantization.card_section(record.quantization) if record.quantization else "",
        _scores(record),
        _speed(record),
        _origin(record),
    )
    return compressed_metadata(record, carried) + "".join(sections)


def _introduction(record: Record, carried: dict[str, Any]) -> str:
    licence = carried.get("license_name") or carried.get("license")
    licence = f" ({licence})" if licence else ""
    loads = "and with every tool that\nloads the original"
    if record.is_exported:
        loads = (
            "and with every tool that\nloads this class. The original's is "
            f"{record.dense_architecture}, which computes the same: the biases that\nthis one has "
            "in addition were written as zeros"
        )
    elif refusing := servers_refusing(record.architecture, record.plan.shape):
        loads = (
            f"but not with\n{' and '.join(refusing)}, where this class takes the width over the "
            "heads for the head size"
        )
    return f"""
# {record.model}, compressed to {100 * record.plan.keep_params:.1f} % of its parameters

A stock `{record.architecture}`: it loads with plain transformers, {loads}. Made by sp3llm ([the method](https://arxiv.org/abs/2308.16475)):
{what_was_done(record)}. The licence{licence} and the limits of the original apply.
"""


def _comparison(record: Record) -> str:
    evaluation, calibration = record.evaluation, record.calibration
    table = "\n".join(f"| {name} | {dense} | {small} |" for name, dense, small in rows(record))
    same_text = f"{line}\n" if (line := same_text_line(record.same_text)) else ""
    measured = f"""Perplexity on {evaluation.tokens:,} tokens of held-out text
({", ".join(evaluation.sources)}), the standard error paired over
{evaluation.samples} windows. {same_text}Calibrated on {calibration.samples} windows of
{calibration.seq_len} tokens from {", ".join(calibration.sources)}."""
    if record.answers is not None:
        measured = f"""Measured on the {evaluation.samples:,} validation rows of
{", ".join(evaluation.sources)}, the standard error paired over rows. Calibrated on
{calibration.samples:,} of its training rows."""
    return f"""
| | dense | compressed |
|---|---|---|
{table}

{measured} Everything needed to
repeat it is in `sp3llm.json`.
"""


def _parts(record: Record) -> str:
    table = [
        ["parameters", "dense", "compressed", "kept"],
        *(
            [part.name, f"{part.dense:,}", f"{part.small:,}", part.kept]
            for part in part_rows(record)
        ),
    ]
    return f"\n{markdown_table(table)}\n"


def _scores(record: Record) -> str:
    table = score_rows(record)
    if not table:
        return ""
    said = "By lm-eval, the error that of the paired difference."
    return f"\n## Scores\n\n{said}\n\n{markdown_table(table)}\n"


def _speed(record: Record) -> str:
    table = speed_rows(record)
    return f"\n## Speed\n\n{markdown_table(table)}\n" if table else ""


def _origin(record: Record) -> str:
    versions = record.versions
    return f"""
## How it was made

    {record.command}

sp3llm {versions["sp3llm"]}, torch {versions["torch"]}, transformers
{versions["transformers"]}.
"""
