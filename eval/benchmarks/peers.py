"""Structured pruning of others beside sp3llm: one model, one text, the same windows, true counts.

    python eval/benchmarks/peers.py --model DIR --text FILE --work DIR --name peers/smollm2
    python eval/benchmarks/peers.py ... --ours DIR DIR --run magnitude-ffn torch-pruning-taylor-ffn

The first half of the text calibrates, the second is held out; `--text stdlib` takes that set's own
split. Nothing is tuned, no peer refits. Each peer runs in a process of its own (peers_prune.py) and
leaves a folder; every folder is evaluated alike, paired window by window. Tied tensors count once.
Packages of peers go into WORK/packages, with nothing that they require (`--with DIR` names another
place). `--ours` are folders that sp3llm made from the same windows; else they are made here. A peer
that fails has the last line of its error in the table. What is finished is not run again.
"""

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    RESULTS,
    as_json,
    command,
    finished,
    halves,
    hardware,
    losses_of,
    shown,
    surroundings,
    table,
    with_own_names,
    write,
)
from peer_packages import packages, run_apart
from peers_prune import METHODS, token_losses
from torch import Tensor

from sp3llm.maths.paired import excess_log_perplexity
from sp3llm.models.checkpoint import open_checkpoint
from sp3llm.models.families import count_parameters, family_of
from sp3llm.models.source import resolve_model
from sp3llm.reporting.record import read_record
from sp3llm.text.tokenizer import load_tokenizer
from sp3llm.text.windows import Windows, calibration_windows, evaluation_windows

OURS = "sp3llm"
SAME = 1e-4
"""Nats that a token may differ by between a model in memory and its folder, both in float32."""


def prune(method: str, keep: float, out: Path, dense: Path, options: argparse.Namespace) -> None:
    """Run a peer in its own process; what it said of itself, or its error, goes to OUT.json."""
    script = Path(__file__).with_name("peers_prune.py")
    words = [method, str(dense), str(options.work / "windows.pt"), str(keep), str(out)]
    given = [str(folder.resolve()) for folder in options.packages or []]
    found = given or packages(method, options.work)
    error = run_apart(script, words, found, Path(f"{out}.log"))
    if error is not None:
        Path(f"{out}.json").write_text(json.dumps({"error": error}) + "\n")


def make_ours(keep: float, out: Path, dense: Path, options: argparse.Namespace) -> None:
    """The default command, with the same windows."""
    calibration, evaluation = sources(options)
    words = ["compress", str(dense), "--keep", str(keep), "--out", str(out), "--no-report"]
    words += ["--calib", calibration, "--samples", str(options.samples)]
    words += ["--eval-text", evaluation, "--eval-samples", str(options.eval_samples)]
    words += ["--seq-len", str(options.seq_len)]
    subprocess.run([sys.executable, "-m", "sp3llm", *words], check=True)


def sources(options: argparse.Namespace) -> tuple[str, str]:
    """Names of the text to calibrate on and of the one held out."""
    text = Path(options.text)
    if not text.is_file():
        return options.text, options.text
    calibration, evaluation = halves(text, options.work)
    return str(calibration), str(evaluation)


def windows_of(dense: Path, options: argparse.Namespace) -> tuple[Windows, Windows]:
    """Those that calibrate, left in a file for the peers, and those held out."""
    calibration, evaluation = sources(options)
    tokenizer = load_tokenizer(dense)
    drawn = calibration_windows(calibration, tokenizer, options.samples, options.seq_len, seed=0)
    held_out = evaluation_windows(
        evaluation, tokenizer, options.eval_samples, options.seq_len, drawn.documents
    )
    given = {"calibration": drawn.tokens, "probe": held_out.tokens[:1]}
    torch.save(given, options.work / "windows.pt")
    return drawn, held_out


def loaded(folder: Path, tokens: Tensor, expected: Tensor) -> dict[str, Any]:
    """What plain transformers makes of a folder: its class, its parameters, how far its token
    losses are from those expected, in float32.
    """
    from transformers import AutoModelForCausalLM

    model, said = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    apart = (token_losses(model.eval(), tokens) - expected).abs().max().item()
    whole = not said["missing_keys"] and not said["unexpected_keys"]
    is_stock = type(model).__module__.startswith("transformers.models.")
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return {
        "class": type(model).__name__,
        "stock": is_stock and whole and apart <= SAME,
        "largest_difference": apart,
        "parameters": sum(p.numel() for p in model.parameters()),
        "shape": {n: getattr(model.config, n) for n in (*names, "num_hidden_layers")},
    }


def row_of(
    name: str, keep: float, out: Path, held_out: Windows, dense: dict[str, Any]
) -> dict[str, Any]:
    """All of a contestant that is there."""
    row: dict[str, Any] = {"keep": keep, "contestant": name}
    probe = held_out.tokens[:1]
    if finished(out):
        record = read_record(out)
        if record.evaluation.sha256 != held_out.sha256:
            raise SystemExit(f"'{out}' was made with other held-out text: {record.evaluation}")
        row |= {"seconds": record.seconds, "peak_memory_bytes": record.peak_memory_bytes}
        expected = losses_of(out, probe, torch.float32)
    else:
        row |= json.loads(Path(f"{out}.json").read_text())
        if "error" in row:
            return row
        expected = torch.load(f"{out}.probe.pt")
    row |= loaded(out, probe, expected)
    row["kept"] = row["parameters"] / dense["parameters"]
    losses = losses_of(out, held_out.tokens, torch.bfloat16)
    row["excess"] = excess_log_perplexity(losses, dense["losses"]).describe()
    row["windows"] = (losses - dense["losses"]).mean(1).tolist()
    return row


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Every contestant at every budget; a row that is finished waits beside its folder."""
    dense_folder, _, _ = resolve_model(options.model)
    drawn, held_out = windows_of(dense_folder, options)
    config = open_checkpoint(dense_folder).config
    parameters = count_parameters(family_of(config), config)
    kept = options.work / f"dense-{held_out.sha256[:12]}.pt"
    if not kept.exists():
        torch.save(losses_of(dense_folder, held_out.tokens, torch.bfloat16), kept)
    dense = {"parameters": parameters, "losses": torch.load(kept)}
    rows = []
    for keep in options.keep:
        ours = {
            f"{OURS}: {folder.name}": folder
            for folder in options.ours
            if abs(read_record(folder).plan.keep_asked - keep) < 1e-9
        }
        places = ours or {OURS: options.work / f"{100 * keep:g}-{OURS}"}
        makers = dict.fromkeys(places, make_ours)
        for method in options.run:
            places[method] = options.work / f"{100 * keep:g}-{method}"
            makers[method] = partial(prune, method)
        for name, out in places.items():
            waiting = options.work / f"{100 * keep:g}-{out.name}.row.json"
            if not waiting.exists():
                print(f"{100 * keep:g} %: {name}", flush=True)
                if not finished(out) and not Path(f"{out}.json").exists():
                    makers[name](keep, out, dense_folder, options)
                row = row_of(name, keep, out, held_out, dense)
                row["timed"] = options.timed
                waiting.write_text(as_json(row))
            rows.append(json.loads(waiting.read_text()))
    return {
        "dense": {"parameters": dense["parameters"], "loss": dense["losses"].mean().item()},
        "calibration": {k: v for k, v in drawn.describe().items() if k != "sources"},
        "evaluation": {k: v for k, v in held_out.describe().items() if k != "sources"},
        "rows": rows,
    }


def cells_of(row: dict[str, Any], ours: list[float] | None) -> list[str]:
    """A line of the table; `ours` are the excesses of sp3llm's windows at that budget."""
    first = [f"{100 * row['keep']:g} %", row["contestant"]]
    if "error" in row:
        return [*first, "", "", "", "", "", "", f"does not run: `{row['error']}`"]
    over = ""
    if ours is not None and not row["contestant"].startswith(OURS):
        apart = torch.tensor(row["windows"]) - torch.tensor(ours)
        over = shown(excess_log_perplexity(apart[:, None], torch.zeros(len(apart), 1)).describe())
    seconds = f"{row['seconds']:.0f}" + ("" if row["timed"] else " (shared)")
    return [
        *first,
        f"{row['parameters']:,} ({100 * row['kept']:.2f} %)",
        ", ".join(map(str, row["shape"].values())),
        shown(row["excess"]),
        over,
        seconds,
        f"{row['peak_memory_bytes'] / 1e9:.2f}",
        f"{'yes' if row['stock'] else '**no**'}, {row['class']}, {row['largest_difference']:.0e}",
    ]


def report(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Write the table."""
    words = with_own_names(sys.argv[1:], options.name)
    found = {"command": command(__file__, words), **found, **surroundings("cpu")}
    head = ["keep", "contestant", "parameters", "hidden, FFN, heads, KV, layers"]
    head += ["excess, nats a token of the dense model", f"over the first {OURS}", "seconds"]
    head += ["peak memory, GB", "plain transformers, largest difference of a token's loss"]
    lines = []
    for row in found["rows"]:
        mine = [r for r in found["rows"] if r["keep"] == row["keep"] and "windows" in r]
        first = next((r["windows"] for r in mine if r["contestant"].startswith(OURS)), None)
        lines.append(cells_of(row, first))
    text = f"""# {Path(options.name).name}

    {found["command"]}

{options.samples} windows of {options.seq_len} tokens to calibrate on, {options.eval_samples} held
out, evaluated in bfloat16; differences are paired window by window. Dense:
{found["dense"]["loss"]:.4f} nats a token, {found["dense"]["parameters"]:,} parameters; tied tensors
count once everywhere. No peer refits and nothing is tuned; peers prune in float32. Seconds and
memory are of the part that compresses; those of sp3llm contain its two evaluations. Seconds with
"(shared)" were taken beside other work and say no more than the order. Machine:
{hardware(found["machine"])}; torch {found["versions"]["torch"]}, transformers
{found["versions"]["transformers"]}.

{table(head, lines)}
"""
    write(RESULTS / options.name, json=as_json(found), md=text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub id; left out: the bundled one")
    parser.add_argument("--text", required=True, help="one file, read in two halves, or a set")
    parser.add_argument("--keep", type=float, nargs="*", default=[0.92, 0.75])
    parser.add_argument("--run", nargs="*", default=list(METHODS), choices=METHODS, metavar="PEER")
    parser.add_argument("--ours", type=Path, nargs="*", default=[], help="made by sp3llm already")
    parser.add_argument("--with", dest="packages", type=Path, nargs="*", help="peers' packages")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--eval-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--timed", action="store_true", help="nothing else runs: seconds count")
    parser.add_argument("--work", type=Path, required=True, help="where models wait")
    parser.add_argument("--name", required=True, help="of the files under eval/results")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    report(options, run(options))


if __name__ == "__main__":
    main()
