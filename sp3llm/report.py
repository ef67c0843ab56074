"""What a run tells its user: progress, the closing table, what to do next."""

import os
import platform
import resource
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from sp3llm.compress import Result
    from sp3llm.config import CompressConfig
    from sp3llm.families import Family
    from sp3llm.plan import Limits, Needs, Plan, Shape


def progress_bars(console: Console) -> Progress:
    """Progress bars with the time left."""
    return Progress(
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def versions() -> dict[str, str]:
    """Versions of everything that a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("sp3llm", "torch", "transformers", "tokenizers", "safetensors", "accelerate"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine(device: str) -> dict[str, Any]:
    """The machine a number was measured on."""
    found = {"processor": platform.machine(), "cpus": os.cpu_count(), "device": device}
    if device.startswith("cuda"):
        import torch

        found["device_name"] = torch.cuda.get_device_name(device)
    return found


def provenance(record: Mapping[str, Any]) -> str:
    """One line: the machine and the versions that a record names."""
    hardware = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    software = ", ".join(f"{key} {value}" for key, value in record["versions"].items())
    return f"Machine: {hardware}; {software}."


def peak_memory() -> int:
    """Largest resident set of this process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_memory(device: str) -> int:
    """Most memory that torch ever held on an accelerator, bytes; 0 on a CPU."""
    if not device.startswith("cuda"):
        return 0
    import torch

    return torch.cuda.max_memory_allocated(device)


def human_bytes(count: float) -> str:
    """`15.8 MB`: decimal units, as disks and model hubs count."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} TB"


def human_time(seconds: float) -> str:
    """`42 s`, `3 min 5 s`, `2 h 10 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


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
            for key, before, after in _sizes(plan["dense_shape"], plan["shape"])
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


def _sizes(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Sizes of two shapes: the main ones, and any other that changes."""
    main = ("hidden_size", "intermediate_size", "num_key_value_heads")
    changed = [key for key in after if before[key] != after[key] and key != "tie_word_embeddings"]
    return [(key, before[key], after[key]) for key in after if key in (*main, *changed)]


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


def plan_line(name: str, plan: "Plan") -> str:
    """One line: what becomes what."""
    changes = [
        f"{key} {before} -> {after}"
        for key, before, after in _sizes(asdict(plan.dense_shape), asdict(plan.shape))
        if before != after
    ]
    return (
        f"{name}: {plan.dense_parameters:,} -> {plan.parameters:,} parameters "
        f"({100 * plan.keep_params:.2f} %), {', '.join(changes)}"
    )


def next_steps(result: "Result", has_page: bool) -> str:
    """What was written, report.html among it or not, and what to do with it."""
    raised = [fit["name"] for fit in result.fits if fit["raised"]]
    warning = (
        f"{len(raised)} fits had a singular Gram matrix and raised their ridge, {raised[0]} first: "
        "more --samples would help.\n"
        if raised
        else ""
    )
    page = ", report.html" if has_page else ""
    return warning + (
        f"Written to {result.out} (stock {result.architecture}; README.md{page}; the record is "
        "sp3llm.json). Next:\n"
        f"  AutoModelForCausalLM.from_pretrained({str(result.out)!r})   in transformers\n"
        f"  vllm serve {result.out}"
    )


def plan_table(
    name: str, family: "Family", config: dict[str, Any], limits: "Limits", shapes: list["Shape"]
) -> Table:
    """Candidate shapes beside the dense one, and what each costs."""
    from sp3llm.plan import Shape, cost_of

    table = Table(title=Text(f"{name}: shapes that keep {limits.keep:g} of the {limits.of}"))
    dense = Shape.of(family, config)
    columns = ["width", "FFN", "heads/KV", "parameters", "kept", "weights", "FLOPs", "cache"]
    if dense.tie_word_embeddings:
        # In 80 columns there is room for one of the two.
        columns[columns.index("weights")] = "table"
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    table.caption = "FLOPs and KV cache are those of one token"
    whole = cost_of(family, config, dense, limits.context, limits.itemsize)
    for shape in [dense, *shapes]:
        cost = cost_of(family, config, shape, limits.context, limits.itemsize)
        tie = "tied" if shape.tie_word_embeddings else "untied"
        width = shape.word_embed_proj_dim if shape.tie_word_embeddings else None
        table.add_row(
            str(shape.hidden_size),
            str(shape.intermediate_size),
            f"{shape.num_attention_heads}/{shape.num_key_value_heads}",
            f"{cost.params / 1e6:,.1f} M",
            f"{100 * cost.of(limits.of) / whole.of(limits.of):.1f} %",
            f"{tie} {width or ''}".strip()
            if dense.tie_word_embeddings
            else human_bytes(cost.bytes),
            f"{cost.flops / 1e9:.2g}G" if cost.flops < 1e9 else f"{cost.flops / 1e9:.1f}G",
            human_bytes(cost.kv_cache),
            end_section=shape == dense,
        )
    return table


def needs_line(settings: "CompressConfig", seq_len: int, needs: "Needs") -> str:
    """What a run of these settings will need."""
    return (
        f"A run with {settings.samples} + {settings.eval_samples} windows of {seq_len} tokens "
        f"needs about {human_bytes(needs.streams)} for the streams (on the GPU, the host or the "
        f"disk: --streams) and {human_bytes(needs.working)} of memory for a layer and its Gram "
        "matrices, in float32 arithmetic; on a GPU the streams take half. On disk the result takes "
        f"{human_bytes(needs.disk)}, and the run {human_bytes(needs.kept)} until it is done."
    )


def closing_table(record: dict[str, Any]) -> Table:
    """The table printed at the end of a run."""
    table = Table(title=Text(f"{record['model']}, compressed"))
    table.add_column("")
    table.add_column("dense", justify="right")
    table.add_column("compressed", justify="right")
    for row in rows(record):
        table.add_row(*map(Text, row))
    evaluated, device = record["evaluation"], record["device_memory_bytes"]
    table.caption = (
        f"{evaluated['samples'] * evaluated['seq_len']:,} held-out tokens in "
        f"{evaluated['samples']} windows"
        + f", {evaluated['dropped_documents']} documents dropped as calibrated on"
        + f"\ntime {human_time(record['seconds'])}, peak memory "
        + human_bytes(record["peak_memory_bytes"])
        + (f", GPU {human_bytes(device)}" if device else "")
    )
    return table
