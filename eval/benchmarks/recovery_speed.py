"""Tokens a second and memory of a recovery with adapters, by the format of the teacher's weights.

    python eval/benchmarks/random_pair.py pair --hidden-size 4096 --intermediate-size 11008 \
        --layers 8 --heads 32 --vocab-size 32000 --dtype bfloat16 --device cuda --tokenizer
    python eval/benchmarks/recovery_speed.py --pair pair --teachers bfloat16 nf4

The real `sp3llm recover` on a dense model and a small one of random weights: what it costs, and
nothing of what it is good for. A teacher in few bits is skipped, with a line, where there is no
bitsandbytes.
"""

import argparse
import importlib.util
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, as_json, command, hardware, record_of, surroundings, table, write
from rich.console import Console

from sp3llm.models.checkpoint import open_checkpoint
from sp3llm.models.families import count_parameters, family_of
from sp3llm.options import RecoverConfig
from sp3llm.recovery.story import recover
from sp3llm.reporting.formatting import human_bytes


def recovered(options: argparse.Namespace, teacher_dtype: str) -> dict[str, Any]:
    """What one recovery took."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        settings = RecoverConfig(
            model=str(options.pair / "small"), teacher=str(options.pair / "dense"), out=out,
            train="stdlib", eval_text="stdlib", eval_samples=1, steps=options.steps,
            batch=options.batch, seq_len=options.seq_len, stop_windows=1, lora=options.lora,
            check_every=options.steps, checkpoint_every=options.steps, teacher_dtype=teacher_dtype,
            precision="bfloat16", device=options.device,
        )  # fmt: skip
        recover(settings, Console(quiet=True))
        (entry,) = record_of(out)["recoveries"]
    return {
        "teacher": teacher_dtype,
        "parameters trained": entry["trained_parameters"],
        "tokens a second": options.steps * options.batch * options.seq_len
        / entry["training_seconds"],
        "seconds of training": entry["training_seconds"],
        "GPU memory, bytes": entry["device_memory_bytes"],
        "host memory, bytes": entry["peak_memory_bytes"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="recovery-speed", help="name of the files")
    parser.add_argument("--results", type=Path, default=RESULTS / "recovery")
    parser.add_argument("--pair", type=Path, required=True, help="folder with dense and small")
    parser.add_argument("--teachers", nargs="+", default=["bfloat16", "nf4"])
    parser.add_argument("--lora", type=int, default=16, metavar="RANK")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()

    rows, skipped = [], []
    for teacher in options.teachers:
        if teacher in ("nf4", "int8") and importlib.util.find_spec("bitsandbytes") is None:
            skipped.append(f"Skipped: a teacher in {teacher}, which needs bitsandbytes.")
            print(skipped[-1], flush=True)
            continue
        rows.append(recovered(options, teacher))
        print(rows[-1], flush=True)
    dense, small = (open_checkpoint(options.pair / name).config for name in ("dense", "small"))
    counts = [count_parameters(family_of(config), config) for config in (dense, small)]
    device = "cuda" if torch.cuda.is_available() and options.device != "cpu" else "cpu"
    run = {"command": command(__file__), "parameters": counts, "runs": rows, **surroundings(device)}
    cells = [
        [
            row["teacher"],
            f"{row['parameters trained']:,}",
            f"{row['tokens a second']:,.0f}",
            f"{row['seconds of training']:.1f}",
            human_bytes(row["GPU memory, bytes"]),
            human_bytes(row["host memory, bytes"]),
        ]
        for row in rows
    ]
    head = ["teacher", "parameters trained", "tokens a second", "seconds", "GPU memory"]
    versions, skips = run["versions"], "\n\n".join(skipped)
    about = f"""A Llama of width {small["hidden_size"]}, {small["num_hidden_layers"]} layers,
{counts[1]:,} parameters, recovered by adapters of rank {options.lora} against one of width
{dense["hidden_size"]}, {counts[0]:,} parameters, both of random weights: {options.steps} steps of
{options.batch} windows of {options.seq_len} tokens, the first of which warms up. Memory is the
most held at any time, that of the host since the script began.
Machine: {hardware(run["machine"])}; torch {versions["torch"]}, transformers
{versions["transformers"]}."""
    made = table([*head, "host memory"], cells)
    parts = [f"# {options.name}", f"    {run['command']}", textwrap.fill(about, 100), made, skips]
    text = "\n\n".join(parts)
    write(options.results / options.name, json=as_json(run), md=f"{text.strip()}\n")


if __name__ == "__main__":
    main()
