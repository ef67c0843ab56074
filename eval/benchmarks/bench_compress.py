"""What a compression costs, as a multiple of one plain forward of the dense model.

    python eval/benchmarks/bench_compress.py --samples 64 --seq-len 512
    python eval/benchmarks/bench_compress.py --name scale-7b --shape llama-2-7b --layers 2 4 \
        --samples 128 --seq-len 2048 --streams gpu
    python eval/benchmarks/bench_compress.py --name scale-70b --shape llama-2-70b --layers 1 \
        --samples 128 --seq-len 2048

Forward and compression run over the same calibration windows, in this process, on this device.
Solves (ridge fits, choice of neurons, eigenbasis), input/output, and products and factorisations
in float64 are shown apart, as parts of the stages; what is written to be continued after a kill
counts as input/output. `--shape` takes random bf16 weights and random tokens, which cost what real
ones cost. With `--layers` fewer layers than the model has are measured. Two depths give what a
layer more costs, and so what all layers would: a column of its own, which says that it was not
measured.
"""

import argparse
import functools
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, as_json, command, hardware, surroundings, table, write
from random_models import write_random_model
from rich.console import Console
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from sp3llm.compression import basis_choice, curves, predicting, refitter, writers
from sp3llm.compression.attempts import _placed
from sp3llm.compression.depth import kept_layers
from sp3llm.compression.job import Job, kept_neurons_of
from sp3llm.compression.preparing import prepare
from sp3llm.compression.shape_search import choose_shape
from sp3llm.compression.stages import build, final_basis, measure
from sp3llm.models.served import export_of
from sp3llm.models.shapes import Shape, cost_of, resized_config
from sp3llm.models.source import resolve_model
from sp3llm.options import CompressConfig
from sp3llm.planning.windows import windows_that_tell
from sp3llm.runtime.folders import MODEL
from sp3llm.runtime.journal import Journal, open_journal
from sp3llm.runtime.machine import peak_memory
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
    # To go through the same motions where there is no GPU.
    "tiny": {
        **_LLAMA,
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 8,
    },
}
# What a row says of each stage, beside its seconds, and of all together.
STAGES = ("moments", "search", "basis", "refit, write")
PARTS = ("solves", "input/output", "float64")
_TRIED, _GPU_MEMORY, _HOST_MEMORY = (
    "shapes tried",
    "peak GPU memory, GB",
    "peak host memory of the process, GB",
)
# What multiplies or factors matrices, by the names torch gives to functions.
_MATRIX_WORK = ("matmul", "mm", "bmm", "addmm", "addmm_", "einsum")


class Float64Clock(TorchFunctionMode):
    """Adds up what products and factorisations of float64 matrices take."""

    def __init__(self, clock: dict[str, float]) -> None:
        super().__init__()
        self.clock = clock

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        call = functools.partial(func, *args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        is_work = name in _MATRIX_WORK or name.startswith(("linalg_", "cholesky_"))
        tensors = (arg for arg in args if isinstance(arg, torch.Tensor))
        if not is_work or all(tensor.dtype != torch.float64 for tensor in tensors):
            return call()
        settle()  # or work queued before would count
        return clocked(self.clock, "float64", call)()


def clocked(clock: dict[str, float], key: str, function: Callable) -> Callable:
    """The function, with its time added to the clock."""

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
    drop_units = curves.drop_units
    curves.drop_units = lambda *arguments: list(drop_units(*arguments))  # no work is left for later
    for module, name in (
        (refitter, "ridge_fit"),
        (refitter, "ridge_errors"),
        (writers, "select_units"),
        (writers, "schur_complement"),
        (curves, "drop_units"),
        (predicting, "projection_loss"),
        (basis_choice, "choose_basis"),
    ):
        setattr(module, name, clocked(clock, "solves", getattr(module, name)))
    Journal.save = clocked(clock, "input/output", Journal.save)


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


def compress_seconds(job: Job, tokens: torch.Tensor, clock: dict[str, float]) -> dict[str, float]:
    """Seconds of each stage and of its parts; evaluation of perplexity is not part of it. `tokens`
    are the windows of `--samples`, and those behind them that tell how sure the model may be.
    """
    row: dict[str, float] = {}
    clock.update(dict.fromkeys(PARTS, 0.0))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    last = time.perf_counter()

    def passed(stage: str) -> None:
        nonlocal last
        settle()
        now = time.perf_counter()
        row[stage], last = now - last, now
        for part in PARTS:
            row[f"{stage}: {part}"], clock[part] = clock[part], 0.0

    with (
        tempfile.TemporaryDirectory(dir=job.out.parent) as target,
        progress_bars(Console(quiet=True)) as progress,
        Float64Clock(clock),
    ):
        folder = Path(target)
        model = folder / MODEL
        model.mkdir()
        journal = open_journal(folder / "state-0", {}, Ranks(), print)
        job = _placed(job, journal, folder, job.settings)
        last = time.perf_counter()
        runs = {} if job.execution.keeps_dense else None
        moments, _ = measure(job, tokens, None, journal, runs=runs)
        passed("moments")
        shape, findings = choose_shape(job, moments, tokens, journal, progress)
        passed("search")
        _, projection = final_basis(job, shape, moments, tokens, journal)
        passed("basis")
        layers = kept_layers(moments, shape)
        config = resized_config(job.family, job.dense.config, shape, layers)
        export = export_of(job.family, config, job.settings.export_as)
        of_shape = (shape, projection, layers, kept_neurons_of(job, moments, shape, projection))
        fitted = job.settings.samples
        build(job, *of_shape, tokens, fitted, export, model, journal, progress, runs or None)
        passed("refit, write")
    row[_TRIED] = len(findings.tried)
    if torch.cuda.is_available():
        row[_GPU_MEMORY] = torch.cuda.max_memory_allocated() / 1e9
    row[_HOST_MEMORY] = peak_memory() / 1e9
    return row


def with_totals(row: dict[str, float]) -> dict[str, float]:
    """A row with what its stages come to, in seconds and in plain forwards."""
    total, plain = sum(row[stage] for stage in STAGES), row["plain forward"]
    parts = {f"of which {part}": sum(row[f"{stage}: {part}"] for stage in STAGES) for part in PARTS}
    apart = parts["of which solves"] + parts["of which input/output"]
    return {
        **row,
        "total": total,
        **parts,
        "of which float64, %": 100 * parts["of which float64"] / total,
        "multiple": total / plain,
        "multiple without solves, input/output": (total - apart) / plain,
    }


def a_layer_more(rows: dict[int, dict[str, float]]) -> dict[str, float]:
    """What a layer takes, from the rows of the least and the most layers: what is there once
    (embeddings, head, basis) is in both.

    A search is taken by the shape that it tries, of which there may be more at one depth than at
    another, and then as many as at the greatest.
    """
    few, many = min(rows), max(rows)
    slope = {}
    for key in _timed(rows[many]):
        tries = {
            n: max(1, row[_TRIED]) if key.startswith("search") else 1 for n, row in rows.items()
        }
        each = {n: row[key] / tries[n] for n, row in rows.items()}
        slope[key] = tries[many] * (each[many] - each[few]) / (many - few)
    return with_totals(slope)


def extrapolated(row: dict[str, float], a_layer: dict[str, float], layers: int) -> dict[str, float]:
    """A row with so many layers more."""
    return with_totals({key: row[key] + layers * a_layer[key] for key in _timed(row)})


def _timed(row: dict[str, float]) -> list[str]:
    """What of a row is seconds that were measured, not a sum of others."""
    return [key for key in row if key.partition(":")[0] in ("plain forward", *STAGES)]


def measured(
    settings: CompressConfig, tokens: torch.Tensor, clock: dict[str, float]
) -> dict[str, float]:
    """A compression between two plain forwards, whose mean is the unit: the speed of a shared
    machine drifts.
    """
    job, fitted = job_of(settings), tokens[: settings.samples]
    before = forward_seconds(job.folder, fitted, job.execution)
    row = compress_seconds(job, tokens, clock)
    after = forward_seconds(job.folder, fitted, job.execution)
    return with_totals({"plain forward": (before + after) / 2, **row})


def variants_of(base: CompressConfig) -> dict[str, CompressConfig]:
    """What is compared, by name."""
    return {
        "pca, width": replace(base, allocate="width", basis="pca"),
        "pca, search": replace(base, allocate="search", basis="pca"),
        "readers, width": replace(base, allocate="width", basis="readers"),
        "gradient, width": replace(base, allocate="width", basis="gradient"),
        "gradient, search (the default)": replace(base, allocate="search", basis="gradient"),
    }


def model_of(shape: str, layers: int, work: Path, device: str) -> str:
    """A checkpoint of random weights of that shape and so many layers, made once."""
    folder = work / f"{shape}-{layers}"
    if not (folder / "config.json").exists():
        config = {**SHAPES[shape], "num_hidden_layers": layers}
        write_random_model(folder, config, torch.bfloat16, device)
        if device == "cuda":
            torch.cuda.empty_cache()  # or what made the weights would count as taken
    return str(folder)


def text_of(options: argparse.Namespace, model: str | None) -> tuple[torch.Tensor, dict[str, Any]]:
    """Calibration windows, with those that tell, and what is said of them: random tokens for random
    weights.
    """
    count = options.samples + windows_that_tell(options.samples, options.seq_len)
    if options.shape:
        generator = torch.Generator().manual_seed(0)
        size, vocab_size = (count, options.seq_len), SHAPES[options.shape]["vocab_size"]
        tokens = torch.randint(3, vocab_size, size, generator=generator)
        return tokens, {"random tokens": list(size)}
    folder, _, _ = resolve_model(model)
    windows = calibration_windows(
        options.calib, load_tokenizer(folder), count, options.seq_len, seed=0
    )
    return windows.tokens, windows.describe()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="cost", help="name of the files")
    parser.add_argument("--results", type=Path, default=RESULTS / "cost", help="folder for them")
    parser.add_argument("--model", help="folder (default: the bundled Llama)")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="random weights of a true shape")
    parser.add_argument("--layers", type=int, nargs="+", help="of the shape (default: all)")
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

    base = CompressConfig(
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
    whole = SHAPES[options.shape]["num_hidden_layers"] if options.shape else 0
    weights_on = "cuda" if torch.cuda.is_available() else "cpu"
    models = {0: options.model}
    if options.shape:
        models = {
            layers: model_of(options.shape, layers, options.work, weights_on)
            for layers in options.layers or [whole]
        }
    tokens, about = text_of(options, options.model)
    clock = dict.fromkeys(PARTS, 0.0)
    install_clocks(clock)
    # Caches, thread pools, kernels and the clock rate settle before anything counts; on a small
    # shape where there is a choice: a large one's solves alone take long.
    few = min(16, options.samples)
    first = replace(variants_of(base)["pca, width"], model=models[min(models)], samples=few)
    some = tokens[: few + windows_that_tell(few, options.seq_len)]
    if options.shape:
        first = replace(first, model=model_of("tiny", 2, options.work, weights_on))
        some = some % SHAPES["tiny"]["vocab_size"]
    job = job_of(first)
    compress_seconds(job, some, clock)
    peak = ceiling(job.execution)
    rows: dict[str, dict[str, float]] = {}
    for variant in options.only or list(variants_of(base)):
        by_layers = {}
        for layers, model in models.items():
            settings = replace(variants_of(base)[variant], model=model)
            by_layers[layers] = measured(settings, tokens, clock)
            label = f"{variant}; {layers} of {whole} layers" if options.shape else variant
            rows[label] = by_layers[layers]
            print(label, {k: round(v, 2) for k, v in rows[label].items()}, flush=True)
            if len(by_layers) > 1:
                most, a_layer = max(by_layers), a_layer_more(by_layers)
                rows[f"{variant}; a layer more"] = a_layer
                if most < whole:
                    row = extrapolated(by_layers[most], a_layer, whole - most)
                    rows[f"{variant}; {whole} layers, EXTRAPOLATED"] = row
            # As early as can be: who runs this may stop it.
            publish(options, rows, label, peak, job_of(settings), about)


def job_of(settings: CompressConfig) -> Job:
    """What a compression needs, found."""
    return prepare(settings, Ranks(), settings.device, Console(quiet=True))


def publish(
    options: argparse.Namespace,
    rows: dict[str, dict[str, float]],
    last: str,
    peak: float,
    job: Job,
    about: dict[str, Any],
) -> None:
    """Write all down; `last` is the row of the job."""
    dense = Shape.of(job.family, job.dense.config)
    cost = cost_of(job.family, job.dense.config, dense, options.seq_len // 2)
    flops = cost.flops * options.samples * options.seq_len
    name = options.shape or job.name
    streams = options.streams if options.streams != "auto" else "wherever there is room"
    run = {
        "command": command(__file__),
        "model": name,
        "keep": options.keep,
        "calibration": about,
        "ceiling, FLOP/s": peak,
        "one forward, FLOP": flops,
        "runs": rows,
        **surroundings(job.execution.device, dtype=str(job.execution.dtype)),
    }
    plain = rows[last]["plain forward"]
    keys = dict.fromkeys(key for row in rows.values() for key in row)
    # What the totals say well enough is left to the file of all digits.
    keys = [key for key in keys if not key.endswith((": solves", ": input/output"))]
    cells = [[key, *(f"{row[key]:.2f}" if key in row else "" for row in rows.values())]
             for key in keys]  # fmt: skip
    versions = run["versions"]
    about_all = f"""{name} at {options.keep}, {options.samples * options.seq_len:,} calibration
        tokens in windows of {options.seq_len}, streams on {streams}. A plain forward of the dense
        model over them is timed before and after every compression; its mean is the unit. The last
        runs at {flops / plain / 1e12:.2f} TFLOP/s, {100 * flops / plain / peak:.0f} % of what a
        large matrix product reaches here. Machine: {hardware(run["machine"])}; torch
        {versions["torch"]}, transformers {versions["transformers"]}."""
    about_line = """**Not measured: the columns that say EXTRAPOLATED.** They lie on the line
        through the least and the greatest depth measured, whose slope is what a layer more takes;
        a search is taken to try as many shapes as at the greatest. Memory is left out: it hardly
        grows with depth (`bench_memory.py`)."""
    paragraphs = [about_all]
    if any("EXTRAPOLATED" in label for label in rows):
        paragraphs.append(about_line)
    filled = "\n\n".join(textwrap.fill(" ".join(text.split()), 100) for text in paragraphs)
    text = f"""# {options.name}

    {run["command"]}

{filled}

{table(["seconds", *rows], cells)}
"""
    write(options.results / options.name, json=as_json(run), md=text)


if __name__ == "__main__":
    main()
