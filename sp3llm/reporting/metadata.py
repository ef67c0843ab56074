"""The metadata of a model card: the YAML that the hub reads of a compressed or tuned model."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sp3llm.models.objectives.catalogue import objective_of
from sp3llm.reporting.record import (
    QuantizationEntry,
    Record,
    RecoveryEntry,
    SameText,
    Scores,
    TextSet,
)
from sp3llm.reporting.tables import perplexity_of

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

# Metadata that holds for the compressed model because it holds for the dense one.
_CARRIED = ("license", "license_name", "license_link", "language")
# What a source of text ends in where it is a file and no data set of the hub.
_FILE_ENDINGS = (".txt", ".jsonl", ".parquet", ".gz")
# What the hub calls the task; also the tag by which it finds the model a widget.
_TASK = "text-generation"
# The hub wants an address beside the name of a score's source.
_HARNESS = "https://github.com/EleutherAI/lm-evaluation-harness"


def carried_metadata(folder: Path | None) -> dict[str, Any]:
    """What the card in a folder says that holds for a model made from that one too: licence and
    language; nothing where there is no card.
    """
    from huggingface_hub.repocard import metadata_load

    if folder is None or not (folder / "README.md").is_file():
        return {}
    try:
        metadata = metadata_load(folder / "README.md")
    except ValueError:  # somebody's README that only looks like a card
        return {}
    metadata = metadata if isinstance(metadata, dict) else {}
    return {key: metadata[key] for key in _CARRIED if metadata.get(key)}


def compressed_metadata(record: Record, carried: dict[str, Any]) -> str:
    """The YAML block, between its rules, of a model that sp3llm compressed; `carried` is metadata
    of the dense model's card.
    """
    return _block(
        carried,
        model_name=_model_name(record),
        eval_results=[*_perplexity_of(record), *_scores(record.scores)],
        base_model=record.base_model,
        is_quantized=record.quantization is not None,
        tags=["sp3llm", "pruned", *(["bitsandbytes"] if record.quantization else [])],
        pipeline=objective_of(record.architecture).pipeline,
        datasets=_dataset_ids(record.calibration.sources) or None,
    )


def tuned_metadata(
    model: str,
    entry: RecoveryEntry,
    base_model: str | None,
    carried: dict[str, Any],
    pipeline: str = _TASK,
) -> str:
    """The YAML block, between its rules, of a model that sp3llm tuned and did not compress.

    `model` is its name, `base_model` its hub id (None: it was a folder), `carried` metadata of its
    card from before, and `pipeline` what the hub calls what it is for.
    """
    return _block(
        carried,
        model_name=f"{model}, recovered",
        eval_results=_measured(entry),
        base_model=base_model,
        is_quantized=False,
        pipeline=pipeline,
        tags=["sp3llm"],
    )


def tuned_again(card: str, model: str, entry: RecoveryEntry) -> str:
    """A card of a tuned model, its results replaced by those of a later recovery."""
    from huggingface_hub import ModelCard

    parsed = ModelCard(card, ignore_metadata_errors=True)
    results = _measured(entry)
    parsed.data.model_name = f"{model}, recovered" if results else None
    parsed.data.eval_results = results or None
    return str(parsed)


def _block(
    carried: dict[str, Any],
    *,
    model_name: str,
    eval_results: "list[EvalResult]",
    base_model: str | None,
    is_quantized: bool,
    pipeline: str,
    **entries: Any,
) -> str:
    from huggingface_hub import ModelCardData

    relation = "quantized" if is_quantized else "finetune"
    metadata = ModelCardData(
        **carried,
        base_model=base_model,
        # The hub guesses where a card does not say, by files and tags, and may guess wrong.
        base_model_relation=relation if base_model else None,
        library_name="transformers",
        pipeline_tag=pipeline,
        # A name without results would be metadata that the hub does not know.
        model_name=model_name if eval_results else None,
        eval_results=eval_results or None,
        **entries,
    )
    return f"---\n{metadata.to_yaml()}\n---\n"


def _model_name(record: Record) -> str:
    bits = f", in {record.quantization.bits}" if record.quantization else ""
    return f"{record.model}, compressed to {100 * record.plan.keep_params:.1f} %{bits}"


# --------------------------------------------------------------------------- results


def _perplexity_of(record: Record) -> "list[EvalResult]":
    """The perplexity of the weights that lie beside the record: of what was done to them last."""
    last: Record | RecoveryEntry | QuantizationEntry = record
    if record.quantization:
        last = record.quantization
    elif record.recoveries:
        last = record.recoveries[-1]
    if isinstance(last, QuantizationEntry):  # measured on the windows of the compression
        perplexity = last.models.small_quantized.perplexity
        return _perplexity(perplexity, record.evaluation, last.same_text)
    return _measured(last)


def _measured(run: Record | RecoveryEntry) -> "list[EvalResult]":
    """What a run measured its weights to be worth: a perplexity, or figures on a task."""
    from huggingface_hub import EvalResult

    figures = run.answers if isinstance(run, Record) else run.scores
    if figures is None:
        return _perplexity(run.perplexity, run.evaluation, run.same_text)
    return [
        EvalResult(
            task_type="text-classification",
            dataset_name=figure.task,
            dataset_type=figure.task,
            metric_type=figure.metric.lower().replace(" ", "_"),
            metric_name=f"{figure.metric} (sp3llm, {figure.samples} rows)",
            metric_value=figure.small,
        )
        for figure in figures
    ]


def _perplexity(
    value: float | None, text: TextSet, same_text: SameText | None = None
) -> "list[EvalResult]":
    """One result; none where the value is no number, which the hub would refuse."""
    from huggingface_hub import EvalResult

    if value is None or not math.isfinite(value):
        return []
    return [
        EvalResult(
            task_type=_TASK,
            **_dataset_of(text),
            metric_type="perplexity",
            metric_name=f"{perplexity_of(same_text)} (sp3llm, windows of {text.seq_len} tokens)",
            metric_value=value,
        )
    ]


def _scores(scores: Scores | None) -> "list[EvalResult]":
    """The compressed model's scores by lm-eval, one for every metric that has a number."""
    from huggingface_hub import EvalResult

    if scores is None:
        return []
    return [
        EvalResult(
            task_type=_TASK,
            dataset_type=row.task,
            dataset_name=row.task,
            metric_type=row.metric.partition(",")[0],
            metric_name=row.metric.removesuffix(",none"),
            metric_value=row.small,
            source_name=scores.command,
            source_url=_HARNESS if scores.command else None,
        )
        for row in scores.rows
        if row.small is not None and math.isfinite(row.small)
    ]


# --------------------------------------------------------------------------- data sets


def _dataset_of(text: TextSet) -> dict[str, str | None]:
    """Name, type (the hub's id, where it has one), config, split and revision of held-out text, as
    arguments of `EvalResult`. Text from several sources has only the first two.
    """
    datasets = [_evaluation_dataset(name) for name in text.sources]
    if len(datasets) == 1:
        return datasets[0]
    return {
        key: ", ".join(dataset[key] or "" for dataset in datasets)
        for key in ("dataset_name", "dataset_type")
    }


def _evaluation_dataset(name: str) -> dict[str, str | None]:
    """What `EvalResult` has of one source, as `--eval-text` names it."""
    from sp3llm.text.sources import hub_source, manifest

    source = manifest().get(name)
    if source is None and _is_hub_id(name):
        source = hub_source(name)
    if source is None:  # a file: where it lies is nobody's business
        return {"dataset_name": Path(name).name, "dataset_type": Path(name).name}
    split = "evaluation" if source.stdlib else source.evaluation_split or source.split
    return {
        "dataset_name": name,
        "dataset_type": source.dataset or name,
        "dataset_config": source.config,
        "dataset_split": split,
        "dataset_revision": source.revision,
    }


def _dataset_ids(sources: tuple[str, ...]) -> list[str]:
    """Hub ids of text sets, where they have one."""
    from sp3llm.text.sources import manifest

    named = manifest()
    ids = [named[name].dataset if name in named else name for name in sources]
    return [name.partition(":")[0] for name in ids if name and _is_hub_id(name)]


def _is_hub_id(name: str) -> bool:
    name = name.partition(":")[0]  # a configuration, or a file's column
    is_path = name.startswith((".", "/")) or name.endswith(_FILE_ENDINGS)
    return name.count("/") == 1 and not is_path
