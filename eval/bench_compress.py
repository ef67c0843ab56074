"""What a compression costs, as a multiple of one plain forward of the dense model.

python eval/bench_compress.py --samples 64 --seq-len 512

Forward and compression run over the same calibration windows, in this process, on this device.
Solves (ridge fits, choice of neurons, eigenbasis) and input/output are taken out and shown apart.
"""

import argparse
import functools
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from sp3llm import checkpoint, compress, measure, rebuild, report
from sp3llm.config import CompressConfig
from sp3llm.data import calibration_windows, load_tokenizer
from sp3llm.execution import execution
from sp3llm.families import family_of
from sp3llm.plan import candidates, limits_of, resized_config

RESULTS = Path(__file__).parent / "results"


def clocked(clock: dict[str, float], key: str, function: Callable) -> Callable:
    """The function, with its time added to the clock."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            clock[key] += time.perf_counter() - started

    return run


def install_clocks(clock: dict[str, float]) -> None:
    """Time solves and input/output wherever the passes call them."""
    for module, name in (
        (rebuild, "ridge_fit"),
        (rebuild, "ridge_solution"),
        (rebuild, "choose_units"),
        (measure, "choose_basis"),
    ):
        setattr(module, name, clocked(clock, "solves", getattr(module, name)))
    checkpoint.Checkpoint.read = clocked(clock, "io", checkpoint.Checkpoint.read)
    checkpoint.write_shard = clocked(clock, "io", checkpoint.write_shard)


@torch.no_grad()
def forward_seconds(folder: Path, tokens: torch.Tensor, on) -> float:
    """One plain forward of the stock model over all windows, logits included."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=on.dtype).to(on.device).eval()
    batch = max(1, 8192 // tokens.shape[1])
    model(input_ids=tokens[:batch].to(on.device), use_cache=False)
    started = time.perf_counter()
    for rows in tokens.split(batch):
        model(input_ids=rows.to(on.device), use_cache=False)
    if on.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compress_seconds(settings: CompressConfig, folder: Path, tokens, on, clock) -> dict:
    """Seconds of each stage; evaluation of perplexity is not part of it."""
    dense = checkpoint.open_checkpoint(folder)
    family = family_of(dense.config)
    dtype = dense.dtype()
    job = compress.Job(settings, dense, family, dtype, on, tokens)
    shapes = candidates(family, dense.config, limits_of(settings, dtype.itemsize))
    seconds = {}
    clock.update(solves=0.0, io=0.0)
    with (
        tempfile.TemporaryDirectory() as target,
        report.progress_bars(Console(quiet=True)) as progress,
    ):
        started = time.perf_counter()
        moments, _ = measure.measure_dense(
            dense, family, tokens, None, settings.moments, settings.basis, on
        )
        seconds["moments"] = time.perf_counter() - started
        shape, _ = compress.choose_shape(job, shapes, moments, progress)
        seconds["search"] = time.perf_counter() - started - sum(seconds.values())
        _, _, groups = compress.compressed_groups(job, shape, moments, progress)
        config = resized_config(family, dense.config, shape)
        compress.write_model(family, config, groups, dtype, Path(target))
        seconds["basis, refit, write"] = time.perf_counter() - started - sum(seconds.values())
    seconds["total"] = sum(seconds.values())
    return {**seconds, "of which solves": clock["solves"], "of which input/output": clock["io"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder (default: the bundled Llama)")
    parser.add_argument("--keep", type=float, default=0.75)
    parser.add_argument("--calib", default="stdlib")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", nargs="*", help="names of variants, as in the table")
    options = parser.parse_args()

    from sp3llm.source import resolve_model

    folder, name, _ = resolve_model(options.model)
    on = execution(options.device, checkpoint.open_checkpoint(folder).dtype())
    windows = calibration_windows(
        options.calib, load_tokenizer(folder), options.samples, options.seq_len, seed=0
    )
    clock = {"solves": 0.0, "io": 0.0}
    install_clocks(clock)
    base = CompressConfig(
        model=options.model, keep=options.keep, samples=options.samples, report=False
    )
    variants = {
        "pca, width": replace(base, allocate="width", basis="pca"),
        "pca, search": replace(base, allocate="search", basis="pca"),
        "readers, width": replace(base, allocate="width", basis="readers"),
        "gradient, width": replace(base, allocate="width", basis="gradient"),
        "gradient, search (the default)": replace(base, allocate="search", basis="gradient"),
    }
    chosen = options.only or list(variants)
    # Caches, thread pools and the clock rate settle before anything counts; then every
    # compression stands between two plain forwards and is compared with their mean, since the
    # speed of a shared machine drifts.
    compress_seconds(variants["pca, width"], folder, windows.tokens[:16], on, clock)
    forward_seconds(folder, windows.tokens, on)
    rows = {}
    after = forward_seconds(folder, windows.tokens, on)
    for variant, settings in ((name, variants[name]) for name in chosen):
        before = after
        seconds = compress_seconds(settings, folder, windows.tokens, on, clock)
        after = forward_seconds(folder, windows.tokens, on)
        plain = (before + after) / 2
        apart = seconds["of which solves"] + seconds["of which input/output"]
        rows[variant] = {
            "plain forward": plain,
            **seconds,
            "multiple": seconds["total"] / plain,
            "multiple without solves, input/output": (seconds["total"] - apart) / plain,
        }
        print(variant, {k: round(v, 2) for k, v in rows[variant].items()}, flush=True)
    run = {
        "command": shlex.join(["python", "eval/bench_compress.py", *sys.argv[1:]]),
        "model": name,
        "keep": options.keep,
        "calibration": windows.describe(),
        "runs": rows,
        "versions": report.versions(),
        "machine": {**report.machine(str(on.device)), "dtype": str(on.dtype)},
    }
    (RESULTS / "cost.json").write_text(json.dumps(run, indent=1) + "\n")
    heads = list(rows[chosen[0]])
    lines = ["| seconds | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for variant, row in rows.items():
        lines.append(f"| {variant} | " + " | ".join(f"{v:.2f}" for v in row.values()) + " |")
    hardware = ", ".join(f"{k} {v}" for k, v in run["machine"].items())
    (RESULTS / "cost.md").write_text(
        f"""# cost

    {run["command"]}

{name} at {options.keep}, {windows.tokens.numel():,} calibration tokens in windows of
{windows.tokens.shape[1]}. A plain forward of the dense model over them is timed before and after
every row; its mean is the unit. Machine: {hardware}; torch {run["versions"]["torch"]}.

"""
        + "\n".join(lines)
        + "\n"
    )


if __name__ == "__main__":
    main()
