"""`report.html`: everything the record knows of a compressed model, on one page without network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sp3llm.models import families
from sp3llm.models.source import read_config
from sp3llm.reporting.formatting import human_bytes, human_count, plain
from sp3llm.reporting.layers import layer_plots
from sp3llm.reporting.plots import parts_plot, spectrum_plot
from sp3llm.reporting.record import Record
from sp3llm.reporting.tables import (
    considered,
    part_rows,
    perplexity_of,
    quantization_rows,
    recovery_rows,
    rows,
    same_text_line,
    score_rows,
    sizes_of,
    speed_rows,
    what_was_done,
)
from sp3llm.runtime.progress import human_time

PAGE = "report.html"
# Enough of a hash to tell texts apart by eye.
_HASH_LETTERS = 16


def write_page(folder: Path, record: Record, no_samples: str | None = None) -> Path:
    """Write report.html into a folder that `sp3llm compress` wrote; returns its path.

    `no_samples` says why the record has none.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("sp3llm.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html")
    path = folder / PAGE
    # A quantized model has the shapes of the one that it was made from.
    config = {k: v for k, v in read_config(folder).items() if k != "quantization_config"}
    content = page_content(record, config, no_samples)
    path.write_text(template.render(content), encoding="utf-8")
    return path


def page_content(
    record: Record, config: Mapping[str, Any], no_samples: str | None
) -> dict[str, Any]:
    """What the template shows; `config` is that of the compressed model."""
    return {
        **_head(record),
        **_comparison(record),
        **_spectrum(record, config),
        "trials": _trial_rows(record),
        **_scores(record),
        "speed": speed_rows(record),
        "samples": record.samples,
        "no_samples": no_samples,
        **_origin(record),
    }


def _head(record: Record) -> dict[str, Any]:
    """What the model is, and the figures at the top: those of the weights as they are."""
    plan = record.plan
    return {
        "name": record.model,
        "architecture": record.architecture,
        "percent": f"{100 * plan.keep_params:.1f} %",
        "done": what_was_done(record),
        "facts": [
            (
                "parameters",
                human_count(plan.parameters),
                f"of {human_count(plan.dense_parameters)}",
            ),
            (
                "weights",
                human_bytes(record.weight_bytes),
                f"of {human_bytes(record.dense_weight_bytes)}",
            ),
            *_figures(record),
        ],
    }


def _figures(record: Record) -> list[tuple[str, str, str]]:
    """What the weights as they are were measured to be worth: perplexities, or a task's figures."""
    present = record.recoveries[-1] if record.recoveries else record
    if record.answers is not None:
        figures = present.scores if record.recoveries else record.answers
        return [
            (f"{one.task}, {one.metric}", f"{one.small:.4f}", f"dense {one.dense:.4f}")
            for one in figures
        ]
    mean, sign, error = str(present.excess_log_perplexity).partition("±")
    return [
        (
            perplexity_of(present.same_text),
            f"{present.perplexity:.2f}",
            f"dense {present.dense_perplexity:.2f}",
        ),
        ("excess log-perplexity", mean, f"{sign} {error} nats a token".strip()),
    ]


def _comparison(record: Record) -> dict[str, Any]:
    """Before and after, and the parameters by part."""
    parts = part_rows(record)
    return {
        "rows": rows(record),
        "parts": [(part.name, f"{part.dense:,}", f"{part.small:,}", part.kept) for part in parts],
        "parts_plot": parts_plot(parts),
    }


def _spectrum(record: Record, config: Mapping[str, Any]) -> dict[str, Any]:
    """The residual stream's energy, what of it is kept, and how well each layer does with that."""
    family = families.family_of(config)
    eigenvalues = record.eigenvalues
    # Under LayerNorm the direction of the mean is no direction of the basis.
    kept = record.plan.shape.hidden_size - family.centred
    most = sum(eigenvalues[:kept]) / sum(eigenvalues)
    return {
        "spectrum_plot": spectrum_plot(eigenvalues, kept),
        "kept": kept,
        "directions": len(eigenvalues),
        "energy_kept": f"{100 * record.energy_kept:.2f} %",
        "energy_most": f"{100 * most:.2f} %",
        "basis": record.settings["basis"],
        "moments": record.settings["moments"],
        "layer_plots": layer_plots(record.fits, family, config),
    }


def _trial_rows(record: Record) -> list[list[str]]:
    """The table of shapes considered in the search, its head first, best first; or nothing."""
    shapes = [shape for shape, _ in considered(record)]
    if not shapes:
        return []
    shown = ["hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"]
    optional = ("head_dim", "word_embed_proj_dim", "tie_word_embeddings", "num_hidden_layers")
    for key in (*optional, "vocab_size"):
        if len({getattr(shape, key) for shape in shapes}) > 1:
            shown.append(key)
    figures = {
        "predicted": {sizes_of(one): one.predicted_loss for one in record.predictions},
        "tried": {sizes_of(one): one.trial_loss for one in record.trials},
    }
    figures = {name: losses for name, losses in figures.items() if losses}
    return [
        [*shown, *figures],
        *(
            [
                *(plain(getattr(shape, key)) for key in shown),
                *(f"{losses[shape]:.4f}" if shape in losses else "" for losses in figures.values()),
            ]
            for shape in shapes
        ),
    ]


def _scores(record: Record) -> dict[str, Any]:
    """Perplexity, tasks, and what recovery and quantization did to the former."""
    recoveries, quantization = record.recoveries, record.quantization
    return {
        "evaluation": record.evaluation,
        "evaluation_tokens": f"{record.evaluation.tokens:,}",
        "perplexity": None
        if record.answers is not None
        else f"{record.perplexity:.2f}, dense {record.dense_perplexity:.2f}",
        "excess": str(record.excess_log_perplexity),
        "same_text": same_text_line(record.same_text),
        "recovery": recovery_rows(recoveries[-1]) if recoveries else [],
        "recoveries": recoveries,
        "quantization": quantization_rows(quantization) if quantization else [],
        "bits": quantization,
        "scores": score_rows(record),
    }


def _origin(record: Record) -> dict[str, Any]:
    """The command, its settings, the text, and where it ran."""
    gpu = record.device_memory_bytes
    return {
        "command": record.command,
        "settings": [(key, plain(value)) for key, value in record.settings.items()],
        "environment": [
            *record.versions.items(),
            *[(key, plain(value)) for key, value in record.machine.items()],
            ("time", human_time(record.seconds)),
            ("peak memory", human_bytes(record.peak_memory_bytes)),
            *([("GPU memory", human_bytes(gpu))] if gpu else []),
            ("compute dtype", record.compute_dtype),
        ],
        "text_rows": [
            [
                use,
                ", ".join(text.sources),
                str(text.samples),
                str(text.seq_len),
                str(text.documents),
                text.sha256[:_HASH_LETTERS],
            ]
            for use, text in (
                ("calibration", record.calibration),
                ("evaluation", record.evaluation),
            )
        ],
    }
