"""Encoders of a task at several sizes: refitted in closed form, and recovered.

    python eval/benchmarks/encoders.py --model bert-sst2 --task sst2 --work DIR --name encoders/sst2

`--keep` is of the encoder's matrices, as papers on BERT count. Every row is the command, in closed
form first, then that many steps of distillation from the dense model; scores are the task's own on
its validation rows, which decide nothing. Latencies are of the stock class on rows of 32 tokens, as
parts of the dense model's in the same process. What is finished is not run again. `--starts` are
what the steps start from: `compressed`, as it is; `without-layers`, which matches answers alone;
`random`, the same shape with the weights that its class draws; `magnitude`, the same shape cut by
magnitude; `no-turn` and `channels`, the same shape along another basis (`encoder_starts._policy`);
`mask`, what `--mask learned` finds, and `mask-shape`, its shape in closed form. What is finished so
far is written after every row.
"""

import argparse
import statistics
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import (
    RESULTS,
    as_json,
    command,
    finished,
    hardware,
    record_of,
    surroundings,
    table,
    with_own_names,
    write,
)
from encoder_starts import DRAWN, STARTS, started_from
from rich.console import Console

from sp3llm.models.families import family_of
from sp3llm.models.shapes import Shape, cost_of
from sp3llm.models.source import read_config
from sp3llm.options import RecoverConfig
from sp3llm.recovery.story import recover

_ROW = 32  # tokens
_TIMES = 15


def latency(folders: list[Path], rows: int) -> list[float]:
    """Median seconds of a forward of each stock model over so many rows, turn by turn."""
    from transformers import AutoModelForSequenceClassification

    models = [AutoModelForSequenceClassification.from_pretrained(f).eval() for f in folders]
    tokens = torch.randint(1000, 2000, (rows, _ROW))
    taken: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for turn in range(_TIMES + 2):
            for model, seconds in zip(models, taken, strict=True):
                started = time.perf_counter()
                model(tokens)
                if turn >= 2:  # the first ones warm up
                    seconds.append(time.perf_counter() - started)
    return [statistics.median(seconds) for seconds in taken]


def flops(folder: Path) -> int:
    """Of a forward of one token among as many as latency is measured with."""
    config = read_config(folder)
    family = family_of(config)
    return cost_of(family, config, Shape.of(family, config), _ROW).flops


def run(
    options: argparse.Namespace, keep: float, start: str, seed: int, rate: float | None
) -> dict[str, Any]:
    """One size with one seed, from one start, tuned at one learning rate; None: the default."""
    console = Console(file=sys.stdout, force_terminal=False)
    found = options.work / f"{100 * keep:g}-seed{seed}"
    settings = {"model": options.model, "keep": keep, "of": "encoder", "task": options.task}
    out, begin = started_from(start, {**settings, "seed": seed}, found, console)
    record = record_of(out)
    answers = record["answers"][0]
    row = {
        "keep": keep,
        "seed": seed,
        "start": start,
        "rate": rate,
        "plan": record["plan"],
        "seconds": record["seconds"],
    }
    row |= {"metric": answers["metric"], "dense": answers["dense"], "small": answers["small"]}
    row["error of the last"] = answers["paired_standard_error"]
    if options.steps:
        way = "" if start == "compressed" else f"-{start}"
        way += "" if rate is None else f"-{rate:g}"
        tuned = options.work / f"{found.name}{way}-{options.steps}"
        if not finished(tuned):
            settings = {"task": options.task, "steps": options.steps, "seed": seed}
            if rate is not None:
                settings["lr"] = rate
            if start == "without-layers":
                settings |= {"hidden_weight": 0.0, "kl_weight": 1.0}
            recover(RecoverConfig(begin, options.model, out=tuned, **settings), console)
        score = record_of(tuned)["recoveries"][-1]["scores"][0]
        row["recovered"] = score["small"]
        row["error of the last"] = score["paired_standard_error"]
    row["FLOPs"] = flops(out) / flops(Path(options.model))
    for rows in (1, 32):
        dense, small = latency([Path(options.model), out], rows)
        row[f"latency of {rows}"] = small / dense
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the fine-tuned encoder")
    parser.add_argument("--task", required=True, help="as for sp3llm compress")
    parser.add_argument("--keep", type=float, nargs="*", default=[0.4, 0.15, 0.06])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--starts", nargs="*", default=["compressed"], choices=STARTS)
    lr = "learning rates of recovery, each tried (default: the recovery's own)"
    parser.add_argument("--lr", type=float, nargs="*", default=[None], help=lr)
    parser.add_argument("--steps", type=int, default=300, help="of recovery; 0: none")
    parser.add_argument("--work", type=Path, required=True, help="where models wait")
    parser.add_argument("--name", required=True, help="of the files under eval/results")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    ways = product(options.keep, options.starts, options.seeds, options.lr)
    rows = []
    for way in ways:
        rows.append(run(options, *way))
        publish(options, rows)


def publish(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write all rows down."""
    words = with_own_names(sys.argv[1:], options.name)
    found = {"command": command(__file__, words), "rows": rows, **surroundings("cpu")}
    cells = []
    for row in rows:
        plan, dense = row["plan"], row["dense"]
        shape = plan["shape"]
        sizes = (
            *(shape["hidden_size"], shape["intermediate_size"]),
            f"{shape['num_attention_heads']} x {shape['head_dim']}",
            shape["num_hidden_layers"],
        )
        cells.append(
            [
                *(f"{100 * plan['keep']:.2f} %", row["start"], str(row["seed"])),
                "default" if row["rate"] is None else f"{row['rate']:g}",
                ", ".join(map(str, sizes)),
                f"{plan['parameters']:,} ({100 * plan['keep_params']:.1f} %)",
                f"{100 * dense:.2f}",
                f"{100 * row['small']:.2f} ({100 * row['small'] / dense:.1f} %)"
                if row["start"] not in DRAWN
                else "",
                f"{100 * row['recovered']:.2f} ({100 * row['recovered'] / dense:.1f} %)"
                if "recovered" in row
                else "",
                f"{100 * row['error of the last']:.2f}",
                f"{row['seconds']:.0f}",
                f"{row['FLOPs']:.2f}",
                f"{row['latency of 1']:.2f}, {row['latency of 32']:.2f}",
            ]
        )
    head = [
        "encoder kept",
        "start",
        "seed",
        "learning rate",
        "width, FFN, heads, layers",
        "all parameters",
    ]
    head += [f"dense {rows[0]['metric']}", "closed form (of dense)"]
    head += [f"after {options.steps} steps", "± of the last, paired", "seconds to compress"]
    head += ["FLOPs over dense", "latency, 1 and 32 rows, over dense"]
    text = f"""# {Path(options.name).name}

    {found["command"]}

Machine: {hardware(found["machine"])}; torch {found["versions"]["torch"]}.

{table(head, cells)}
"""
    write(RESULTS / options.name, json=as_json(found), md=text)


if __name__ == "__main__":
    main()
