"""The tables that reports, cards and terminals show, from a record."""

from typing import Any

from sp3llm.reporting.formatting import human_bytes
from sp3llm.reporting.plans import changed_sizes


def rows(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The before/after table: name, dense, compressed."""
    plan = record["plan"]
    return [
        ("parameters", f"{plan['dense_parameters']:,}", f"{plan['parameters']:,}"),
        ("of the dense model", "100 %", f"{100 * plan['keep_params']:.2f} %"),
        (
            "weights",
            human_bytes(record["dense_weight_bytes"]),
            human_bytes(record["weight_bytes"]),
        ),
        *[
            (key, str(before), str(after))
            for key, before, after in changed_sizes(plan["dense_shape"], plan["shape"])
        ],
        *_tie(record),
        (
            f"perplexity ({', '.join(record['evaluation']['sources'])})",
            f"{record['dense_perplexity']:.3f}",
            f"{record['perplexity']:.3f}",
        ),
        ("excess log-perplexity", "", excess(record)),
    ]


def excess(record: dict[str, Any]) -> str:
    """Log-perplexity over the dense model's, with its standard error where that is known."""
    found = record["excess_log_perplexity"]
    error = found["paired_standard_error"]
    return f"{found['mean']:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _tie(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What became of tied embeddings, and what the other choice would have lost in the trials."""
    if not record["plan"]["dense_shape"]["tie_word_embeddings"]:
        return []
    kept = record["plan"]["shape"]["tie_word_embeddings"]
    losses = {
        tied: [t["trial_loss"] for t in record["trials"] if t["tie_word_embeddings"] == tied]
        for tied in (True, False)
    }
    chosen = "tied" if kept else "untied"
    if losses[True] and losses[False]:
        difference = abs(min(losses[True]) - min(losses[False]))
        other = "untied" if kept else "tied"
        chosen += f" ({other} would lose {difference:.4f} more in trials)"
    return [("embeddings and head", "tied", chosen)]


def part_rows(record: dict[str, Any]) -> list[tuple[str, int, int, str]]:
    """Parameters by part: its name, dense, compressed, and the share kept."""
    dense, small = record["parameters"]["dense"], record["parameters"]["small"]
    return [
        (name, count, small[name], f"{100 * small[name] / count:.1f} %" if count else "new")
        for name, count in dense.items()
        if count or small[name]
    ]


def score_rows(record: dict[str, Any]) -> list[list[str]]:
    """The table of `scores`, its head first; nothing where there are none."""
    found = [
        [
            row["task"],
            row["metric"].removesuffix(",none"),
            f"{row['samples']:,}",
            *(_figure(row.get(key)) for key in ("dense", "small")),
            _figure(row.get("difference"), "+.4f"),
            _figure(row.get("paired_standard_error")),
        ]
        for row in record.get("scores", {}).get("rows", [])
    ]
    head = ["task", "metric", "samples", "dense", "compressed", "difference", "standard error"]
    return [head, *found] if found else []


def _figure(value: float | None, form: str = ".4f") -> str:
    return "" if value is None else f"{value:{form}}"


def recovery_rows(record: dict[str, Any]) -> list[list[str]]:
    """The table of the latest of `recoveries`, its head first; nothing where there are none."""
    if not record.get("recoveries"):
        return []
    latest = record["recoveries"][-1]
    before = {"excess_log_perplexity": latest["excess_log_perplexity_before"]}
    return [
        ["", "dense", "before", "recovered"],
        [
            f"perplexity ({', '.join(latest['evaluation']['sources'])})",
            *(f"{latest[key]:.3f}" for key in ("dense_perplexity", "perplexity_before")),
            f"{latest['perplexity']:.3f}",
        ],
        ["excess log-perplexity", "", excess(before), excess(latest)],
    ]


def quantization_rows(record: dict[str, Any]) -> list[list[str]]:
    """The table of `quantization`, its head first; nothing where there is none."""
    entry = record.get("quantization")
    if not entry:
        return []
    bits, columns = entry["bits"], ("dense", "dense_quantized", "small", "small_quantized")
    models = [entry["models"][name] for name in columns]
    costs = {f"{name}_quantized": cost for name, cost in entry["cost"].items()}
    return [
        ["", "dense", f"dense {bits}", "compressed", f"compressed {bits}"],
        ["perplexity", *(f"{model['perplexity']:.3f}" for model in models)],
        ["excess log-perplexity", "", *(excess(model) for model in models[1:])],
        [
            f"cost of {bits}",
            *(excess({"excess_log_perplexity": costs[name]}) if name in costs else ""
              for name in columns),
        ],
        ["weights", *(human_bytes(model["weight_bytes"]) for model in models)],
        ["linear layers alone", *(human_bytes(model["linear_bytes"]) for model in models)],
    ]  # fmt: skip


def speed_rows(record: dict[str, Any]) -> list[list[str]]:
    """The table of `speed`, its head first; nothing where there is none."""
    found = record.get("speed") or []
    columns = list(dict.fromkeys(column for row in found for column in row))
    body = [["" if row.get(name) is None else _shown(row[name]) for name in columns]
            for row in found]  # fmt: skip
    return [columns, *body] if found else []


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def what_was_done(record: dict[str, Any]) -> str:
    """The steps of the compression, in words, separated by commas."""
    dense, small = record["plan"]["dense_shape"], record["plan"]["shape"]
    settings = record["settings"]
    basis = {
        "pca": "principal components",
        "readers": "directions that its readers need",
        "gradient": "directions that the loss depends on",
    }[settings["basis"]]
    steps = []
    if small["hidden_size"] < dense["hidden_size"]:
        steps.append(
            f"the residual stream was projected onto {small['hidden_size']} of "
            f"{dense['hidden_size']} {basis}"
        )
    for key, what in (
        ("intermediate_size", "{} of {} FFN neurons kept"),
        ("num_key_value_heads", "{} of {} KV groups kept"),
        ("head_dim", "heads projected onto {} of {} dimensions"),
    ):
        if small[key] < dense[key]:
            steps.append(what.format(small[key], dense[key]))
    if dense["tie_word_embeddings"] and not small["tie_word_embeddings"]:
        steps.append("the head untied from the embeddings")
    if "mask" in record:
        tokens = settings["mask_steps"] * settings["mask_batch"] * settings["seq_len"]
        steps.append(f"by a mask learned on {tokens:,} tokens")
    if settings.get("turn") == "hadamard":
        steps.append("the kept basis turned by a Hadamard matrix")
    if settings["refit"]:
        steps.append("what is left refitted in closed form")
    return ", ".join(steps)
