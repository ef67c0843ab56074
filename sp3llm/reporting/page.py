"""`report.html`: everything the record knows of a compressed model, on one page without network."""

from pathlib import Path
from typing import Any

from sp3llm.models import families
from sp3llm.models.families import Family
from sp3llm.models.source import read_config
from sp3llm.reporting.formatting import human_bytes, human_time
from sp3llm.reporting.plots import Line, layers_plot, parts_plot, spectrum_plot
from sp3llm.reporting.tables import (
    excess,
    part_rows,
    quantization_rows,
    recovery_rows,
    rows,
    score_rows,
    speed_rows,
    what_was_done,
)

PAGE = "report.html"


def write_page(folder: Path, record: dict[str, Any], no_samples: str | None = None) -> Path:
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
    record: dict[str, Any], config: dict[str, Any], no_samples: str | None
) -> dict[str, Any]:
    """What the template shows; `config` is that of the compressed model."""
    family = families.family_of(config)
    plan, evaluation = record["plan"], record["evaluation"]
    kept = plan["shape"]["hidden_size"] - family.centred
    parts = part_rows(record)
    present = [record, *record.get("recoveries", [])][-1]
    mean, sign, error = excess(present).partition("±")
    return {
        "excess": excess(record),
        "name": record["model"],
        "architecture": record["architecture"],
        "percent": f"{100 * plan['keep_params']:.1f} %",
        "done": what_was_done(record),
        "facts": [
            ("parameters", _short(plan["parameters"]), f"of {_short(plan['dense_parameters'])}"),
            (
                "weights",
                human_bytes(record["weight_bytes"]),
                f"of {human_bytes(record['dense_weight_bytes'])}",
            ),
            (
                "perplexity",
                f"{present['perplexity']:.2f}",
                f"dense {present['dense_perplexity']:.2f}",
            ),
            ("excess log-perplexity", mean, f"{sign} {error} nats a token".strip()),
        ],
        "rows": rows(record),
        "parts": [(name, f"{dense:,}", f"{small:,}", share) for name, dense, small, share in parts],
        "parts_plot": parts_plot(parts),
        "spectrum_plot": spectrum_plot(record["eigenvalues"], kept),
        "kept": kept,
        "directions": len(record["eigenvalues"]),
        "energy_kept": f"{100 * record['energy_kept']:.2f} %",
        "energy_most": f"{100 * _share(record['eigenvalues'], kept):.2f} %",
        "basis": record["settings"]["basis"],
        "moments": record["settings"]["moments"],
        "layer_plots": _layer_plots(record, family, config),
        "trials": _trial_rows(record),
        "evaluation": evaluation,
        "evaluation_tokens": f"{evaluation['samples'] * evaluation['seq_len']:,}",
        "perplexity": f"{record['perplexity']:.2f}, dense {record['dense_perplexity']:.2f}",
        "recovery": recovery_rows(record),
        "recoveries": record.get("recoveries", []),
        "quantization": quantization_rows(record),
        "bits": record.get("quantization", {}),
        "scores": score_rows(record),
        "speed": speed_rows(record),
        "samples": record.get("samples"),
        "no_samples": no_samples,
        "command": record["command"],
        "settings": [(key, _plain(value)) for key, value in record["settings"].items()],
        "environment": [
            *record["versions"].items(),
            *[(key, _plain(value)) for key, value in record["machine"].items()],
            ("time", human_time(record["seconds"])),
            ("peak memory", human_bytes(record["peak_memory_bytes"])),
            *[("GPU memory", human_bytes(n)) for n in [record["device_memory_bytes"]] if n],
            ("compute dtype", record["compute_dtype"]),
        ],
        "text_rows": [
            [
                use,
                ", ".join(text["sources"]),
                str(text["samples"]),
                str(text["seq_len"]),
                str(text["documents"]),
                text["sha256"][:16],
            ]
            for use, text in (("calibration", record["calibration"]), ("evaluation", evaluation))
        ],
    }


def _short(count: int) -> str:
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return str(count)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def _share(eigenvalues: list[float], kept: int) -> float:
    """The most energy that so many directions can hold."""
    return sum(eigenvalues[:kept]) / sum(eigenvalues)


def _trial_rows(record: dict[str, Any]) -> list[list[str]]:
    """The table of shapes tried in the search, its head first, best first; or nothing."""
    trials = sorted(record["trials"], key=lambda trial: trial["trial_loss"])
    if not trials:
        return []
    shown = ["hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"]
    for key in ("head_dim", "word_embed_proj_dim", "tie_word_embeddings"):
        if len({trial[key] for trial in trials}) > 1:
            shown.append(key)
    best = trials[0]["trial_loss"]
    body = [
        [*(_plain(trial[key]) for key in shown), f"{trial['trial_loss']:.4f}",
         f"{trial['trial_loss'] - best:+.4f}"]
        for trial in trials
    ]  # fmt: skip
    return [[*shown, "loss", "over the best"], *body]


def _layer_plots(
    record: dict[str, Any], family: Family, config: dict[str, Any]
) -> list[tuple[str, str]]:
    """Caption and picture of what the readers get and what the writers miss, layer by layer."""
    fits = {fit["name"]: fit for fit in record["fits"]}
    layers = [group for group in families.groups(family, config) if group.prefix]
    reads: list[tuple[float, dict[str, Any]]] = []
    writes: list[list[tuple[float, dict[str, Any]]]] = [[] for _ in family.writers]
    for group in layers:
        for number, site in enumerate(group.sites):
            if fit := fits.get(f"{group.prefix}{site.norm}"):
                reads.append((group.layer + number / len(group.sites), fit))
        names = [f"{group.prefix}{writer}" for writer in group.writers]
        if fit := fits.get(" + ".join(names)):  # parallel blocks are fitted together
            writes[0].append((group.layer, fit))
        for number, name in enumerate(names[: len(writes)]):
            if fit := fits.get(name):
                writes[number].append((group.layer, fit))
    if fit := fits.get(family.final_norm):
        reads.append((len(layers), fit))
    found = []
    if reads:
        lines = [
            _line(label, reads, lambda fit, key=key: 1 - fit[key], key == "error", "o")
            for label, key in (("projected", "plain_error"), ("refitted", "error"))
        ]
        picture = layers_plot(lines, "energy kept, %", "reads", percent=True)
        found.append(("Energy kept, layer by layer", picture))
    is_parallel = bool(writes[0]) and " + " in writes[0][0][1]["name"]
    blocks = ["both"] if is_parallel else ["attention", "FFN"]
    lines = [
        _line(f"{block}, {label}", made, lambda fit, key=key: fit[key], key == "error", marker)
        for block, made, marker in zip(blocks, writes, "os", strict=False)
        for label, key in (("projected", "plain_error"), ("refitted", "error"))
        if made
    ]
    if lines:
        found.append(
            ("Refit error, layer by layer", layers_plot(lines, "relative squared error", "writes"))
        )
    return found


def _line(label: str, fits: list[tuple[float, dict[str, Any]]], value: Any, refitted: bool,
          marker: str) -> Line:  # fmt: skip
    return label, [at for at, _ in fits], [value(fit) for _, fit in fits], refitted, marker
