"""Every axis of a budget by itself and all of them together, on one text, paired window by window.

    python eval/benchmarks/axes.py --model DIR --text FILE --work DIR --name real/axes
    python eval/benchmarks/axes.py ... --keep 0.92 --vocab-from FILES --run vocabulary all

The first half of the text calibrates, the second is held out. Contestants: `before` searches over
the width, the FFN and KV groups alone; `width`, `ffn`, `depth` and `vocabulary` cut nothing else;
`shape` is the default search, depth among its axes, and `all` with a vocabulary from the first half
of the text and `--vocab-from`; `layers-go` drops the layers of `depth` and refits nothing;
`shape-float32` computes in float32 what `shape` has by default; `kv-drop` and `kv-merge` have half
of the key-value heads, or what divides them, and search for the rest. A contestant that is finished
is not run again, and tables are written anew from all that are.
"""

import argparse
import sys
from dataclasses import replace
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
from rich.console import Console
from torch import Tensor

from sp3llm.compression.story import compress
from sp3llm.maths.paired import excess_log_perplexity
from sp3llm.models.checkpoint import open_checkpoint
from sp3llm.models.families import count_parameters, family_of
from sp3llm.models.shapes import Shape, resized_config
from sp3llm.models.source import resolve_model
from sp3llm.options import CompressConfig
from sp3llm.reporting.origins import held_out_text
from sp3llm.reporting.record import read_record

CONTESTANTS = (
    *("before", "width", "ffn", "depth", "vocabulary", "shape", "all"),
    *("layers-go", "shape-float32", "kv-drop", "kv-merge"),
)


def settings_of(
    name: str, keep: float, dense: dict[str, Any], vocab_from: str | None
) -> dict[str, Any] | None:
    """Options of a contestant; None where its axis alone does not reach the budget."""
    family = family_of(dense)
    whole = Shape.of(family, dense)
    parameters = count_parameters(family, dense)
    every_layer = {"num_hidden_layers": whole.num_hidden_layers}
    only_ffn = {"hidden_size": whole.hidden_size, "num_key_value_heads": whole.num_key_value_heads}
    uncut = {**only_ffn, "intermediate_size": whole.intermediate_size}
    if name in ("depth", "layers-go"):
        for layers in range(whole.num_hidden_layers - 1, 0, -1):
            small = resized_config(family, dense, replace(whole, num_hidden_layers=layers))
            if count_parameters(family, small) <= keep * parameters:
                depth = {**uncut, "num_hidden_layers": layers}
                return {**depth, "refit": False} if name == "layers-go" else depth
        return None
    if name == "vocabulary":
        a_token = whole.hidden_size * (1 if whole.tie_word_embeddings else 2)
        rows = whole.vocab_size - -(-(1 - keep) * parameters // a_token)
        rows = int(rows) // 64 * 64
        if vocab_from is None or rows < 1024:
            return None
        return {**uncut, **every_layer, "vocab_from": vocab_from, "vocab_size": rows}
    if name == "all" and vocab_from is None:
        return None
    groups = whole.num_key_value_heads
    fewer = max((n for n in range(1, groups) if groups % n == 0), default=None)
    if name in ("kv-drop", "kv-merge"):
        if fewer is None:
            return None
        return {"num_key_value_heads": fewer, "kv_heads": name.removeprefix("kv-")}
    return {
        "before": every_layer,
        "width": {"allocate": "width", **every_layer},
        "ffn": {**only_ffn, **every_layer},
        "shape": {},
        "shape-float32": {"compute_dtype": "float32"},
        "all": {"vocab_from": vocab_from},
    }[name]


def excess_by_window(folder: Path, dense: Path, losses: dict[str, Tensor]) -> Tensor:
    """Nats a token of the dense model that a compressed one loses, a row a window; `losses` keeps
    the dense model's, by the text's hash.
    """
    record = read_record(folder)
    held_out = held_out_text(record, folder, dense)
    text = record.evaluation.sha256
    if text not in losses:
        losses[text] = losses_of(dense, held_out.tokens, torch.bfloat16)
    small = held_out.small_nats(losses_of(folder, held_out.small_tokens, torch.bfloat16))
    return small.mean(1) - held_out.dense_nats(losses[text]).mean(1)


def run(options: argparse.Namespace) -> None:
    """Run what is asked for and not there, and keep what each loses in each window beside it."""
    dense, _, _ = resolve_model(options.model)
    config = open_checkpoint(dense).config
    calibration, evaluation = halves(options.text, options.work)
    vocab_from = None if options.vocab_from is None else f"{calibration},{options.vocab_from}"
    losses: dict[str, Tensor] = {}
    for keep in options.keep:
        for name in options.run:
            out = options.work / f"{100 * keep:g}-{name}"
            chosen = settings_of(name, keep, config, vocab_from)
            if chosen is None:
                print(f"{name} alone does not come to {100 * keep:g} %")
                continue
            if not finished(out):
                settings = CompressConfig(
                    model=options.model,
                    keep=keep,
                    calib=str(calibration),
                    eval_text=str(evaluation),
                    samples=options.samples,
                    eval_samples=options.eval_samples,
                    seq_len=options.seq_len,
                    out=out,
                    report=False,
                    **chosen,
                )
                compress(settings, Console(file=sys.stdout, force_terminal=False))
            kept = options.work / f"{out.name}.losses.pt"
            if not kept.exists():
                torch.save(excess_by_window(out, dense, losses), kept)


def report(options: argparse.Namespace) -> None:
    """Write the table of all that are finished."""
    rows, cells = [], []
    places = [
        (keep, name, options.work / f"{100 * keep:g}-{name}")
        for keep in sorted(options.keep, reverse=True)
        for name in CONTESTANTS
        if (options.work / f"{100 * keep:g}-{name}.losses.pt").exists()
    ]
    for keep, name, out in places:
        record = read_record(out)
        lost = torch.load(options.work / f"{out.name}.losses.pt")
        base = options.work / f"{100 * keep:g}-{options.against}.losses.pt"
        excess = excess_log_perplexity(lost[:, None], torch.zeros(len(lost), 1)).describe()
        against = None
        if base.exists() and name != options.against:
            against = excess_log_perplexity(lost[:, None], torch.load(base)[:, None]).describe()
        shape = record.plan.shape
        sizes = {
            size: getattr(shape, size)
            for size in (
                *("hidden_size", "intermediate_size", "num_key_value_heads"),
                *("num_hidden_layers", "vocab_size"),
            )
        }
        rows.append(
            {
                "keep": keep,
                "contestant": name,
                "kept": record.plan.keep_params,
                "shape": sizes,
                "excess": excess,
                "against": against,
                "seconds": record.seconds,
                "compute_dtype": record.compute_dtype,
            }
        )
        cells.append(
            [
                *(f"{100 * keep:g} %", name, f"{100 * record.plan.keep_params:.2f} %"),
                ", ".join(map(str, sizes.values())),
                shown(excess),
                "" if against is None else shown(against),
            ]
        )
    words = with_own_names(sys.argv[1:], options.name)
    found = {"command": command(__file__, words), "rows": rows, **surroundings("cpu")}
    head = ["keep", "axes", "parameters kept", "hidden, FFN, KV, layers, tokens"]
    head += ["excess, nats a token of the dense model", f"over `{options.against}`"]
    text = f"""# {Path(options.name).name}

    {found["command"]}

{options.samples} windows of {options.seq_len} tokens of the first half of the text to calibrate on,
{options.eval_samples} of the second half held out; differences are paired window by window.
Machine: {hardware(found["machine"])}; torch {found["versions"]["torch"]}.

{table(head, cells)}
"""
    write(RESULTS / options.name, json=as_json(found), md=text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--text", type=Path, required=True, help="one file, read in two halves")
    parser.add_argument("--vocab-from", help="files, comma-separated, beside the first half")
    parser.add_argument("--keep", type=float, nargs="*", default=[0.92, 0.75])
    parser.add_argument("--run", nargs="*", default=[], choices=CONTESTANTS)
    parser.add_argument("--against", default="before", choices=CONTESTANTS)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--eval-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--work", type=Path, required=True, help="where models wait")
    parser.add_argument("--name", required=True, help="of the files under eval/results")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    run(options)
    report(options)


if __name__ == "__main__":
    main()
