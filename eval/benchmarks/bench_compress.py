"""What a compression costs, as a multiple of one plain forward of the dense model.

    python eval/benchmarks/bench_compress.py --samples 64 --seq-len 512
    python eval/benchmarks/bench_compress.py --name scale-7b --shape llama-2-7b --work DIR \
        --samples 128 --seq-len 2048 --streams gpu
    python eval/benchmarks/bench_compress.py --name scale-7b-10gib --shape llama-2-7b --work DIR \
        --samples 128 --seq-len 2048 --streams host --max-memory 0=10GiB
    python eval/benchmarks/bench_compress.py --name scale-70b --shape llama-2-70b --layers 1 \
        --work DIR --samples 128 --seq-len 2048

Forward and compression run over the same calibration windows, in this process, on this device.
Solves (ridge fits, choice of neurons, eigenbasis) and input/output are taken out and shown apart;
what is written to be continued after a kill counts as input/output. `--shape` takes random bf16
weights and random tokens, which cost what real ones cost; with `--layers` fewer than the model has,
so that one layer of each stage is measured and the rest extrapolated, labelled so.
"""

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from common import RESULTS, as_json, command, hardware, surroundings, table, write
from random_models import write_random_model
from rich.console import Console
from transformers import AutoModelForCausalLM

from sp3llm.compression import basis_choice, refitter, writers
from sp3llm.compression.attempts import _placed
from sp3llm.compression.job import Job, prepare
from sp3llm.compression.measuring import measure_dense
from sp3llm.compression.shape_search import choose_shape
from sp3llm.compression.stages import build, final_basis
from sp3llm.models.shapes import Shape, cost_of, resized_config
from sp3llm.models.source import resolve_model
from sp3llm.options import CompressConfig
from sp3llm.runtime.folders import MODEL
from sp3llm.runtime.journal import Journal, open_journal
from sp3llm.runtime.processes import Ranks
from sp3llm.runtime.progress import progress_bars
from sp3llm.text.tokenizer import load_tokenizer
from sp3llm.text.windows import calibration_windows

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
SHAPES = {
    "llama-2-7b": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "num_hidden_layers": 32,
    },
    "llama-2-70b": {
        **_LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "num_hidden_layers": 80,
    },
}


def clocked(clock: dict[str, float], key: str, function: Callable) -> Callable:
    """The function, with its time added to the clock."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            settle()
            clock[key] += time.perf_counter() - started

    return run


def settle() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def install_clocks(clock: dict[str, float]) -> None:
    """Time solves and input/output wherever the passes call them. Reading ahead and writing behind
    cost what of them the passes wait for.
    """
    for module, name in (
        (refitter, "ridge_fit"),
        (refitter, "ridge_errors"),
        (writers, "ridge_solution"),
        (writers, "choose_units"),
        (basis_choice, "choose_basis"),
    ):
        setattr(module, name, clocked(clock, "solves", getattr(module, name)))
    Journal.save = clocked(clock, "io", Journal.save)


@torch.no_grad()
def forward_seconds(folder: Path, tokens: torch.Tensor, execution) -> float:
    """One plain forward of the stock model over all windows, logits included; the whole model
    stands on the GPU for it, whatever `--max-memory` lets a compression take.
    """
    if execution.device.type == "cuda":  # `prepare` sets it again
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, execution.device)
    model = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=execution.dtype)
        .to(execution.device)
        .eval()
    )
    batch = max(1, 8192 // tokens.shape[1])
    model(input_ids=tokens[:batch].to(execution.device), use_cache=False)
    settle()
    started = time.perf_counter()
    for rows in tokens.split(batch):
        model(input_ids=rows.to(execution.device), use_cache=False)
    settle()
    return time.perf_counter() - started


def ceiling(execution) -> float:
    """Multiplications and additions a second of a large matrix product in the run's arithmetic."""
    size = 8192 if execution.device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=execution.device).to(execution.dtype) for _ in range(2))
    a @ b
    settle()
    started, repeats = time.perf_counter(), 10
    for _ in range(repeats):
        a @ b
    settle()
    return 2 * size**3 * repeats / (time.perf_counter() - started)


def compress_seconds(job: Job, tokens: torch.Tensor, clock: dict[str, float]) -> dict:
    """Seconds of each stage; evaluation of perplexity is not part of it."""
    seconds = {}
    clock.update(solves=0.0, io=0.0)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with (
        tempfile.TemporaryDirectory(dir=job.out.parent) as target,
        progress_bars(Console(quiet=True)) as progress,
    ):
        folder = Path(target)
        model = folder / MODEL
        model.mkdir()
        journal = open_journal(folder / "state-0", {}, Ranks(), print)
        job = _placed(job, journal, folder, job.settings)
        settings, started = job.settings, time.perf_counter()
        moments, _ = measure_dense(
            job.dense, job.family, tokens, None, settings.moments, settings.basis, job.execution,
            None,
            journal,
        )  # fmt: skip
        settle()
        seconds["moments"] = time.perf_counter() - started
        shape, _ = choose_shape(job, moments, tokens, journal, progress)
        settle()
        seconds["search"] = time.perf_counter() - started - sum(seconds.values())
        _, projection = final_basis(job, shape, moments, tokens, journal)
        settle()
        seconds["basis"] = time.perf_counter() - started - sum(seconds.values())
        config = resized_config(job.family, job.dense.config, shape)
        build(job, shape, projection, tokens, config, model, journal, progress)
        settle()
        seconds["refit, write"] = time.perf_counter() - started - sum(seconds.values())
    seconds["total"] = sum(seconds.values())
    found = {**seconds, "of which solves": clock["solves"], "of which input/output": clock["io"]}
    if torch.cuda.is_available():
        found["peak GPU memory, GB"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def extrapolated(row: dict, layers: int, whole: int) -> dict:
    """Every stage's seconds for all layers, from those of a few: an upper bound, as what happens
    once (embeddings, head, basis) is multiplied too.
    """
    return {
        f"{key}, extrapolated": row[key] * whole / layers for key in ("moments", "refit, write")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="cost", help="name of the files in eval/results/cost")
    parser.add_argument("--model", help="folder (default: the bundled Llama)")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="random weights of a true shape")
    parser.add_argument("--layers", type=int, help="of the shape (default: all)")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--keep", type=float, default=0.75)
    parser.add_argument("--calib", default="stdlib")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--streams", default="auto")
    parser.add_argument("--max-memory")
    parser.add_argument("--only", nargs="*", help="names of variants, as in the table")
    options = parser.parse_args()

    model = options.model
    if options.shape:
        config = dict(SHAPES[options.shape])
        whole = config["num_hidden_layers"]
        config["num_hidden_layers"] = options.layers or whole
        model = str(options.work / f"{options.shape}-{config['num_hidden_layers']}")
        if not (Path(model) / "config.json").exists():
            write_random_model(Path(model), config, torch.bfloat16)
    base = CompressConfig(
        model=model,
        keep=options.keep,
        samples=options.samples,
        eval_samples=1,
        seq_len=options.seq_len,
        device=options.device,
        streams=options.streams,
        max_memory=options.max_memory,
        out=options.work / "bench-compress-result",
        report=False,
    )
    variants = {
        "pca, width": replace(base, allocate="width", basis="pca"),
        "pca, search": replace(base, allocate="search", basis="pca"),
        "readers, width": replace(base, allocate="width", basis="readers"),
        "gradient, width": replace(base, allocate="width", basis="gradient"),
        "gradient, search (the default)": replace(base, allocate="search", basis="gradient"),
    }

    def job_of(settings: CompressConfig) -> Job:
        return prepare(settings, Ranks(), settings.device, Console(quiet=True))

    folder, name, _ = resolve_model(model)
    execution = job_of(base).execution
    if options.shape:
        generator = torch.Generator().manual_seed(0)
        shape = (options.samples, options.seq_len)
        tokens = torch.randint(3, config["vocab_size"], shape, generator=generator)
        about = {"random tokens": list(shape)}
    else:
        windows = calibration_windows(
            options.calib, load_tokenizer(folder), options.samples, options.seq_len, seed=0
        )
        tokens, about = windows.tokens, windows.describe()
    clock = {"solves": 0.0, "io": 0.0}
    install_clocks(clock)
    chosen = options.only or list(variants)
    # Caches, thread pools and the clock rate settle before anything counts; then every
    # compression stands between two plain forwards and is compared with their mean, since the
    # speed of a shared machine drifts.
    if not options.shape:
        compress_seconds(job_of(variants["pca, width"]), tokens[:16], clock)
    forward_seconds(folder, tokens, execution)
    rows = {}
    after = forward_seconds(folder, tokens, execution)
    peak = ceiling(execution)
    for variant in chosen:
        before = after
        row = compress_seconds(job_of(variants[variant]), tokens, clock)
        after = forward_seconds(folder, tokens, execution)
        plain = (before + after) / 2
        apart = row["of which solves"] + row["of which input/output"]
        rows[variant] = {
            "plain forward": plain,
            **row,
            "multiple": row["total"] / plain,
            "multiple without solves, input/output": (row["total"] - apart) / plain,
        }
        if options.shape and options.layers:
            rows[variant] |= extrapolated(row, options.layers, whole)
        print(variant, {k: round(v, 2) for k, v in rows[variant].items()}, flush=True)
    job = job_of(base)
    dense = Shape.of(job.family, job.dense.config)
    flops = (
        cost_of(job.family, job.dense.config, dense, options.seq_len // 2).flops * tokens.numel()
    )
    run = {
        "command": command(__file__),
        "model": name,
        "keep": options.keep,
        "calibration": about,
        "ceiling, FLOP/s": peak,
        "one forward, FLOP": flops,
        "runs": rows,
        **surroundings(execution.device, dtype=str(execution.dtype)),
    }
    cells = [[variant, *(f"{v:.2f}" for v in row.values())] for variant, row in rows.items()]
    plain = sum(row["plain forward"] for row in rows.values()) / len(rows)
    machine = hardware(run["machine"])
    text = f"""# {options.name}

    {run["command"]}

{name} at {options.keep}, {tokens.numel():,} calibration tokens in windows of {options.seq_len}. A
plain forward of the dense model over them is timed before and after every row; its mean is the
unit. It runs at {flops / plain / 1e12:.2f} TFLOP/s, {100 * flops / plain / peak:.0f} % of what a
large matrix product reaches here. Machine: {machine}; torch {run["versions"]["torch"]}.

{table(["seconds", *rows[chosen[0]]], cells)}
"""
    write(RESULTS / "cost" / options.name, json=as_json(run), md=text)


if __name__ == "__main__":
    main()
