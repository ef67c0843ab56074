"""Peak memory of a compression against the depth of the model.

    python eval/benchmarks/bench_memory.py --layers 4 8 16 32

Llamas of one width with random float32 weights, written to `--work` a layer at a time, are
compressed by a process of their own. What counts is anonymous memory (RssAnon: shards and streams
that are mapped from files can be dropped by the kernel at any time), sampled while it runs, above
what the process has once everything is imported. Weights are noise, so nothing is said of quality.
"""

import argparse
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from common import RESULTS, as_json, command, hardware, surroundings, table, write
from random_models import write_random_model

from sp3llm.reporting.formatting import human_bytes

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1280,
    "intermediate_size": 3456,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
# The child says when it has imported everything, and starts when it is told to.
CHILD = """
import sys
import torch, transformers, accelerate, tokenizers
import transformers.models.llama.modeling_llama
import sp3llm.compression.story, sp3llm.compression.building, sp3llm.compression.measuring
from sp3llm.cli import main
print("ready", flush=True)
sys.stdin.readline()
main(sys.argv[1:])
"""


def anonymous(pid: int) -> int:
    """RssAnon of a process, bytes; 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = [line for line in status.splitlines() if line.startswith("RssAnon")]
    return int(found[0].split()[1]) * 1024 if found else 0


def peak_of(arguments: list[str]) -> dict:
    """Run `sp3llm` with these arguments; its peak above the import baseline, and where it was."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "ready\n"
    baseline = anonymous(child.pid)
    threading.Thread(target=child.stdout.read, daemon=True).start()
    child.stdin.write("go\n")
    child.stdin.flush()
    peak, started = baseline, time.monotonic()
    while child.poll() is None:
        peak = max(peak, anonymous(child.pid))
        time.sleep(0.01)
    if child.returncode:
        raise SystemExit(f"sp3llm {shlex.join(arguments)} ended with {child.returncode}")
    return {
        "baseline": baseline,
        "peak above baseline": peak - baseline,
        "seconds": time.monotonic() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--work", type=Path, required=True, help="folder for models and results")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--streams", default="host")
    parser.add_argument("--allocate", default="width")
    parser.add_argument("--basis", default="gradient")
    options = parser.parse_args()
    rows = []
    for layers in options.layers:
        folder = options.work / f"llama-{layers}"
        config, dtype = {**CONFIG, "num_hidden_layers": layers}, torch.float32
        size = write_random_model(folder, config, dtype) * dtype.itemsize
        words = ["compress", folder, "--out", options.work / f"small-{layers}", "--fresh"]
        words += ["--calib", "stdlib", "--samples", options.samples, "--seq-len", options.seq_len]
        words += ["--eval-samples", options.samples, "--allocate", options.allocate, "--no-report"]
        words += ["--basis", options.basis, "--streams", options.streams, "--device", "cpu"]
        found = peak_of([str(word) for word in words])
        rows.append({"layers": layers, "weights": size, **found})
        print(rows[-1], flush=True)
    deepest = max(row["weights"] for row in rows)
    for row in rows:
        row["of deepest"] = row["peak above baseline"] / deepest
    run = {
        "command": command(__file__),
        "config": CONFIG,
        "runs": rows,
        **surroundings("cpu"),
    }
    head = ["layers", "weights", "peak memory", "of the deepest model's weights", "seconds"]
    cells = [
        [
            str(row["layers"]),
            human_bytes(row["weights"]),
            human_bytes(row["peak above baseline"]),
            f"{100 * row['of deepest']:.1f} %",
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
    text = f"""# memory

    {run["command"]}

Llamas of width {CONFIG["hidden_size"]}, FFN {CONFIG["intermediate_size"]}, random float32 weights,
{options.samples} + {options.samples} windows of {options.seq_len} tokens, streams on
{options.streams}, basis {options.basis}. Peak anonymous memory above what the process has after its
imports. Machine: {hardware(run["machine"])}; torch
{run["versions"]["torch"]}. Other work ran beside: seconds are no measurement.

{table(head, cells)}
"""
    write(RESULTS / "memory" / "memory", json=as_json(run), md=text)


if __name__ == "__main__":
    main()
