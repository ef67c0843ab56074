"""The model card, README.md: what the hub and its readers need to know of a compressed model."""

import shutil
from pathlib import Path
from typing import Any

from sp3llm.reporting.tables import (
    part_rows,
    quantization_rows,
    recovery_rows,
    rows,
    score_rows,
    speed_rows,
    what_was_done,
)

# Metadata that holds for the compressed model because it holds for the dense one.
_CARRIED = ("license", "license_name", "license_link", "language")
# Texts that licences ask to be passed on.
_LICENCES = ("LICEN[CS]E*", "NOTICE*", "USE_POLICY*")


def write_card(folder: Path, record: dict[str, Any], dense: Path | None) -> None:
    """Write README.md into a folder, from the record and the card of the `dense` model.

    Where the dense model is not at hand, what an earlier card in the folder says of the licence
    stays. Texts of licences in the dense model's folder are copied.
    """
    carried = {}
    for origin in (folder, dense, _cached_card(record["base_model"])):
        carried |= _metadata(origin)
    for pattern in _LICENCES if dense else ():
        for path in sorted(dense.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    (folder / "README.md").write_text(model_card(record, carried), encoding="utf-8")


def _cached_card(base_model: str | None) -> Path | None:
    """Folder of a hub model's card, if it is in the hub cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(base_model, "README.md") if base_model else None
    return Path(found).parent if isinstance(found, str) else None


def _metadata(folder: Path | None) -> dict[str, Any]:
    """What a card in a folder says that holds for the compressed model too."""
    from huggingface_hub.repocard import metadata_load

    if folder is None or not (folder / "README.md").is_file():
        return {}
    try:
        found = metadata_load(folder / "README.md")
    except ValueError:  # somebody's README that only looks like a card
        return {}
    found = found if isinstance(found, dict) else {}
    return {key: found[key] for key in _CARRIED if found.get(key)}


def model_card(record: dict[str, Any], carried: dict[str, Any]) -> str:
    """README.md of the compressed model; `carried` is metadata of the dense model's card."""
    from huggingface_hub import ModelCardData

    plan, evaluation, calibration = record["plan"], record["evaluation"], record["calibration"]
    table = "\n".join(f"| {name} | {dense} | {small} |" for name, dense, small in rows(record))
    metadata = ModelCardData(
        **carried,
        base_model=record["base_model"],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["sp3llm", "pruned", *(["bitsandbytes"] if "quantization" in record else [])],
        datasets=_datasets(calibration["sources"]) or None,
    )
    licence = carried.get("license_name") or carried.get("license")
    licence = f" ({licence})" if licence else ""
    return f"""---
{metadata.to_yaml()}
---

# {record["model"]}, compressed to {100 * plan["keep_params"]:.1f} % of its parameters

A stock `{record["architecture"]}`: it loads with plain transformers, and with every tool that
loads the original. Made by sp3llm ([the method](https://arxiv.org/abs/2308.16475)):
{what_was_done(record)}. The licence{licence} and the limits of the original apply.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

| | dense | compressed |
|---|---|---|
{table}

Perplexity on {evaluation["samples"] * evaluation["seq_len"]:,} tokens of held-out text
({", ".join(evaluation["sources"])}), the standard error paired over
{evaluation["samples"]} windows. Calibrated on {calibration["samples"]} windows of
{calibration["seq_len"]} tokens from {", ".join(calibration["sources"])}. Everything needed to
repeat it is in `sp3llm.json`.
{_parts(record)}{_recovery(record)}{_quantization(record)}{_scores(record)}{_speed(record)}
## How it was made

    {record["command"]}

sp3llm {record["versions"]["sp3llm"]}, torch {record["versions"]["torch"]}, transformers
{record["versions"]["transformers"]}.
"""


def _datasets(sources: list[str]) -> list[str]:
    """Hub ids of the calibration sets, where they have one."""
    from sp3llm.text.sources import manifest

    named = manifest()
    ids = [named[name].dataset if name in named else name for name in sources]
    is_file = (".txt", ".jsonl", ".parquet", ".gz")
    return [
        name.partition(":")[0]
        for name in ids
        if name and name.count("/") == 1 and not name.startswith((".", "/"))
        and not name.endswith(is_file)
    ]  # fmt: skip


def _table(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows]
    return "\n".join([head, f"|{'---|' * len(rows[0])}", *body])


def _parts(record: dict[str, Any]) -> str:
    parts = [["parameters", "dense", "compressed", "kept"]]
    parts += [[name, f"{dense:,}", f"{small:,}", kept] for name, dense, small, kept in
              part_rows(record)]  # fmt: skip
    return f"\n{_table(parts)}\n"


def _recovery(record: dict[str, Any]) -> str:
    table = recovery_rows(record)
    if not table:
        return ""
    latest = record["recoveries"][-1]
    return (
        f"\n## Recovered\n\nTuned afterwards by distillation from "
        f"{latest['settings']['teacher']}, {latest['steps']} steps.\n\n{_table(table)}\n\n"
        f"    {latest['command']}\n"
    )


def _quantization(record: dict[str, Any]) -> str:
    table = quantization_rows(record)
    if not table:
        return ""
    entry = record["quantization"]
    return (
        f"\n## Quantized\n\nThe weights in this folder are in {entry['bits']}, as bitsandbytes has "
        "it; loading them needs `pip install bitsandbytes`. Embeddings, head, norms and experts "
        "are as they were. All four models on the same held-out tokens, errors paired over "
        f"windows:\n\n{_table(table)}\n\n    {entry['command']}\n"
    )


def _scores(record: dict[str, Any]) -> str:
    table = score_rows(record)
    return (
        f"\n## Scores\n\nBy lm-eval, the error that of the paired difference.\n\n{_table(table)}\n"
        if table
        else ""
    )


def _speed(record: dict[str, Any]) -> str:
    table = speed_rows(record)
    return f"\n## Speed\n\n{_table(table)}\n" if table else ""
