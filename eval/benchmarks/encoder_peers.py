"""A pruner of encoders beside sp3llm: one fine-tuned model, the same rows, nothing tuned.

    python eval/benchmarks/encoder_peers.py --model DIR --task sst2 --work DIR --name encoders/mine

`--keep` is of the encoder's matrices, as papers on BERT count. Both calibrate on the same training
rows, and answer the validation rows, which decide nothing; differences from the dense model are
paired by row. textpruner runs in a process of its own with the transformers 4 that it asks for
(encoder_peers_prune.py, packages under WORK/packages). Every folder is then loaded by the stock
class in fresh processes, with transformers 4 and with the one that is installed here, and asked
again. What is finished is not run again.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from common import (
    RESULTS,
    as_json,
    command,
    hardware,
    record_of,
    surroundings,
    table,
    with_own_names,
    write,
)
from encoder_peers_prune import STEPS, UNEVEN
from encoder_starts import started_from
from peer_packages import packages, run_apart
from rich.console import Console
from torch import Tensor

from sp3llm.evaluation.task_scores import reported, row_length
from sp3llm.models.source import read_config
from sp3llm.options import CompressConfig
from sp3llm.text.examples import Examples
from sp3llm.text.labels import Labels
from sp3llm.text.task_sets import drawn
from sp3llm.text.tasks import CLASSES, resolve_task, task_for
from sp3llm.text.tokenizer import load_tokenizer

OURS = "sp3llm"
SAME = 1e-4
"""What a logit may differ by between a model in memory and its folder, both in float32."""
_SCRIPT = Path(__file__).with_name("encoder_peers_prune.py")


def rows_of(options: argparse.Namespace) -> Path:
    """A file of the rows that calibrate and of those held out, the same for all."""
    config = read_config(options.model)
    names = tuple(name for _, name in sorted((int(n), s) for n, s in config["id2label"].items()))
    labels, tokenizer = Labels(CLASSES, names), load_tokenizer(options.model)
    task = task_for(options.task, CLASSES)
    length = row_length(resolve_task(options.task), config, tokenizer, None)
    held_out = reported(task, labels, tokenizer, length)
    samples = CompressConfig(options.model, task=options.task).calibrated
    calibration = drawn(
        task, tokenizer, samples, length, options.seed, held_out.documents, labels=labels
    )

    def tensors(rows: Examples) -> dict[str, Tensor]:
        return {**rows.inputs(), "labels": rows.labels}

    path = options.work / "rows.pt"
    given = {"calibration": tensors(calibration.tokens), "held_out": tensors(held_out.tokens)}
    torch.save(given, path)
    return path


def asked(words: list[str], log: Path, peer: bool) -> str | None:
    """Run the other script, with the peer's packages or without; the last line of its error."""
    found = packages("textpruner", log.parent) if peer else []
    return run_apart(_SCRIPT, words, found, log)


def loaded(folder: Path, rows: Path, expected: Tensor, peer: bool) -> dict[str, Any]:
    """What the stock class of a transformers makes of a folder: the largest difference of its
    logits from those expected, or why it does not load.
    """
    place = folder.with_name(f"{folder.name}-{4 if peer else 'here'}")
    error = asked(["answer", str(folder), str(rows), str(place)], Path(f"{place}.log"), peer)
    if error is not None:
        return {"error": error}
    apart = torch.load(f"{place}.answers.pt") - expected
    return {"largest_difference": apart.abs().max().item()}


def row_of(name: str, keep: float, rows: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All of a contestant, made if it is not there."""
    out = options.work / f"{100 * keep:g}-{name}"
    row: dict[str, Any] = {"keep": keep, "contestant": name}
    if name == OURS:
        settings = {"model": str(options.model), "keep": keep, "of": "encoder"}
        settings |= {"task": options.task, "seed": options.seed}
        started_from("compressed", settings, out, Console(file=sys.stdout, force_terminal=False))
        record = record_of(out)
        shape = record["plan"]["shape"]
        row |= {"seconds": record["seconds"], "peak_memory_bytes": record["peak_memory_bytes"]}
        row |= {"parameters": record["plan"]["parameters"], "kept": record["plan"]["keep"]}
        row |= {"hidden_size": shape["hidden_size"], "head_dim": shape["head_dim"]}
        row |= {"heads": [shape["num_attention_heads"]] * shape["num_hidden_layers"]}
        row["intermediate_size"] = shape["intermediate_size"]
        words = ["answer", str(out), str(rows), str(out)]
        error = asked(words, Path(f"{out}.log"), peer=False)
    elif not Path(f"{out}.json").exists():
        words = ["prune", name, str(options.model), str(rows), str(keep), str(out)]
        error = asked(words, Path(f"{out}.log"), peer=True)
    else:
        error = None
    if error is not None:
        return {**row, "error": error}
    if name != OURS:
        row |= {**json.loads(Path(f"{out}.json").read_text()), **peer_sizes(options.model)}
        row["kept"] = matrices(row) / matrices(dense_sizes(options.model))
    answers = torch.load(f"{out}.answers.pt")
    row["in transformers 4"] = loaded(out, rows, answers, peer=True)
    row["in transformers here"] = loaded(out, rows, answers, peer=False)
    told = torch.load(rows)["held_out"]["labels"]
    right, dense_right = (
        (said.argmax(1) == told).double()
        for said in (answers, torch.load(options.work / "dense.answers.pt"))
    )
    apart = right - dense_right
    row |= {"accuracy": right.mean().item(), "difference": apart.mean().item()}
    return {**row, "paired_standard_error": apart.std().item() / len(apart) ** 0.5}


def dense_sizes(folder: Path) -> dict[str, Any]:
    """The sizes of the dense model by the names of a row."""
    config = read_config(folder)
    heads = [config["num_attention_heads"]] * config["num_hidden_layers"]
    return {
        "heads": heads,
        "intermediate_size": config["intermediate_size"],
        **peer_sizes(folder),
    }


def peer_sizes(folder: Path) -> dict[str, int]:
    """The sizes that textpruner leaves as they are."""
    config = read_config(folder)
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    return {"hidden_size": config["hidden_size"], "head_dim": head_dim}


def matrices(row: dict[str, Any]) -> int:
    """Entries of the matrices of all layers, as papers on BERT count an encoder."""
    width = row["hidden_size"]
    attention = 4 * width * row["head_dim"] * sum(row["heads"])
    return attention + 2 * width * row["intermediate_size"] * len(row["heads"])


def shown_loading(found: dict[str, Any]) -> str:
    """A cell on what a transformers makes of a folder."""
    if "error" in found:
        return f"**no**: `{found['error']}`"
    apart = found["largest_difference"]
    return f"{'yes' if apart <= SAME else '**other answers**'}, {apart:.0e}"


def publish(
    options: argparse.Namespace, rows: list[dict[str, Any]], calibrated: int, dense: Tensor
) -> None:
    """Write all rows down; `dense` is 1 for every row that the dense model answers right."""
    words = with_own_names(sys.argv[1:], options.name)
    found = {"command": command(__file__, words), "rows": rows, **surroundings("cpu")}
    head = ["encoder kept", "contestant", "width, FFN, heads, layers", "all parameters"]
    head += [f"accuracy (dense {100 * dense.mean():.2f})", "difference, paired by row", "seconds"]
    head += ["peak memory, GB", "stock class of transformers 4.57.6, largest difference of a logit"]
    head += [f"of transformers {found['versions']['transformers']}"]
    cells = []
    for row in rows:
        first = [f"{100 * row['keep']:g} %", row["contestant"]]
        if "error" in row:
            cells.append([*first, *[""] * 6, f"does not run: `{row['error']}`", ""])
            continue
        heads = sorted(set(row["heads"]))
        heads = str(heads[0]) if len(heads) == 1 else f"{heads[0]} to {heads[-1]}"
        cells.append(
            [
                *(f"{100 * row['kept']:.2f} %", row["contestant"]),
                f"{row['hidden_size']}, {row['intermediate_size']}, {heads} x {row['head_dim']}, "
                f"{len(row['heads'])}",
                f"{row['parameters']:,}",
                f"{100 * row['accuracy']:.2f}",
                f"{100 * row['difference']:.2f} ± {100 * row['paired_standard_error']:.2f}",
                f"{row['seconds']:.0f}" + ("" if options.timed else " (shared)"),
                f"{row['peak_memory_bytes'] / 1e9:.2f}",
                shown_loading(row["in transformers 4"]),
                shown_loading(row["in transformers here"]),
            ]
        )
    text = f"""# {Path(options.name).name}

    {found["command"]}

{calibrated} training rows to calibrate on, {len(dense)} validation rows, nothing
tuned; seed {options.seed}. textpruner 1.1.post2 takes heads and FFN neurons away by the gradients
of the task's loss in {STEPS} steps. Seconds with "(shared)" were taken beside other work and say no
more than the order. Machine: {hardware(found["machine"])}; torch {found["versions"]["torch"]}.

{table(head, cells)}
"""
    write(RESULTS / options.name, json=as_json(found), md=text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a fine-tuned BERT")
    parser.add_argument("--task", required=True, help="as for sp3llm compress")
    parser.add_argument("--keep", type=float, nargs="*", default=[0.4, 0.15])
    parser.add_argument("--run", nargs="*", default=list(UNEVEN), choices=UNEVEN, metavar="PEER")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timed", action="store_true", help="nothing else runs: seconds count")
    parser.add_argument("--work", type=Path, required=True, help="where models wait")
    parser.add_argument("--name", required=True, help="of the files under eval/results")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    path = rows_of(options)
    dense = options.work / "dense"
    error = asked(
        ["answer", str(options.model), str(path), str(dense)], dense.with_suffix(".log"), False
    )
    if error is not None:
        raise SystemExit(error)
    rows = torch.load(path)
    right = torch.load(f"{dense}.answers.pt").argmax(1) == rows["held_out"]["labels"]
    calibrated = len(rows["calibration"]["labels"])
    found = []
    for keep in options.keep:
        for name in (OURS, *options.run):
            found.append(row_of(name, keep, path, options))
            publish(options, found, calibrated, right.double())


if __name__ == "__main__":
    main()
