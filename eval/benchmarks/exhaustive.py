"""Does the search find the best of its candidates?

    python eval/benchmarks/exhaustive.py --keep 0.75 0.5 --name search/exhaustive-llama-8m
    python eval/benchmarks/exhaustive.py --model DIR --calib A.txt --eval-text B.txt --name ...

All candidates within a factor of the best predicted loss are refitted on all calibration text, side
by side beside one dense stream, and scored on the held-out text; the search has its usual trials.
What it chose is compared with the best there is, on the same windows.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import (
    RESULTS,
    as_json,
    command,
    hardware,
    shown,
    surroundings,
    table,
    with_own_names,
    write,
)
from rich.console import Console
from torch import Tensor

from sp3llm.compression.basis_choice import choose_basis
from sp3llm.compression.depth import kept_layers
from sp3llm.compression.job import Job, kept_neurons_of, refitter_of
from sp3llm.compression.preparing import prepare
from sp3llm.compression.refitter import held_back_from, solves_in
from sp3llm.compression.shape_search import choose_shape
from sp3llm.compression.stages import measure
from sp3llm.compression.texts import read_texts
from sp3llm.compression.trials import refitted_ends
from sp3llm.maths.paired import excess_log_perplexity
from sp3llm.models.shapes import Shape
from sp3llm.options import CompressConfig
from sp3llm.runtime.journal import NOTHING_KEPT
from sp3llm.runtime.processes import Ranks
from sp3llm.runtime.progress import progress_bars

# Shapes refitted side by side: their Grams and streams are in memory together.
_SIDE_BY_SIDE = 4


def held_out_losses(
    job: Job, moments: Any, shapes: list[Shape], calibration: Tensor, evaluation: Tensor
) -> list[Tensor]:
    """Losses of refitted shapes on the held-out windows, `(windows, tokens - 1)` each."""
    seen, refitters = len(calibration), []
    for shape in shapes:
        _, projection = choose_basis(
            *(job.dense, job.family, moments, shape, calibration, job.settings.turn),
            dtype=solves_in(job.execution),
        )
        neurons_LF = kept_neurons_of(job, moments, shape, projection)
        kept = (projection, kept_layers(moments, shape), neurons_LF)
        refitters.append(refitter_of(job, shape, *kept, held_back_from(seen), seen))
    ends, _ = refitted_ends(refitters, torch.cat([calibration, evaluation]))
    return [job.objective.losses(end.model, end.head, end.stream, evaluation) for end in ends]


def run(options: argparse.Namespace, keep: float) -> dict[str, Any]:
    """What the search says and what comes out, at one budget."""
    settings = CompressConfig(
        model=options.model,
        keep=keep,
        calib=options.calib,
        eval_text=options.eval_text,
        samples=options.samples,
        seq_len=options.seq_len,
        eval_samples=options.eval_samples,
        out=Path("exhaustive-writes-nothing"),
    )
    console = Console(file=sys.stdout, force_terminal=False)
    job = prepare(settings, Ranks(), "cpu", console)
    calibration, evaluation = (windows.tokens for windows in read_texts(job))
    with progress_bars(console) as progress:
        moments, dense = measure(job, calibration, evaluation, NOTHING_KEPT, progress)
        chosen, findings = choose_shape(job, moments, calibration, NOTHING_KEPT, progress)
    predicted = findings.predicted
    bound = options.within * min(predicted.values())
    shapes = sorted(
        (s for s in predicted if predicted[s] <= bound or s in findings.tried), key=predicted.get
    )
    losses: dict[Shape, Tensor] = {}
    for start in range(0, len(shapes), _SIDE_BY_SIDE):
        some = shapes[start : start + _SIDE_BY_SIDE]
        found = held_out_losses(job, moments, some, calibration, evaluation)
        losses.update(zip(some, found, strict=True))
        print({(s.hidden_size, s.intermediate_size): losses[s].mean().item() for s in some})
    best = min(losses, key=lambda shape: losses[shape].mean())
    excess = {s: excess_log_perplexity(loss, dense).mean for s, loss in losses.items()}
    return {
        "keep": keep,
        "candidates": len(predicted),
        "refitted": len(losses),
        "chosen above best": excess[chosen] / excess[best] - 1,
        "rows": [
            {
                "shape": asdict(s),
                "predicted": predicted[s],
                "tried": findings.tried.get(s),
                "excess": excess_log_perplexity(losses[s], dense).describe(),
                "above best": excess_log_perplexity(losses[s], losses[best]).describe(),
                "chosen": s == chosen,
            }
            for s in sorted(losses, key=excess.get)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None, help="folder or hub id (default: the bundled)")
    parser.add_argument("--calib", default="stdlib")
    parser.add_argument("--eval-text", default="stdlib")
    parser.add_argument("--keep", type=float, nargs="*", default=[0.75, 0.5])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--eval-samples", type=int, default=64)
    parser.add_argument("--within", type=float, default=2.0, help="times the best prediction")
    parser.add_argument("--name", required=True, help="of the files under the results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for them")
    options = parser.parse_args()
    runs = [run(options, keep) for keep in options.keep]
    words = with_own_names(sys.argv[1:], options.name)
    record = {"command": command(__file__, words), "runs": runs, **surroundings("cpu")}
    parts = []
    for one in runs:
        rows = [
            [
                str(row["shape"]["hidden_size"]),
                str(row["shape"]["intermediate_size"]),
                str(row["shape"]["num_key_value_heads"]),
                str(row["shape"]["num_hidden_layers"]),
                "tied" if row["shape"]["tie_word_embeddings"] else "untied",
                f"{row['predicted']:.4f}",
                "" if row["tried"] is None else f"{row['tried']:.4f}",
                shown(row["excess"]),
                shown(row["above best"]),
                "chosen" if row["chosen"] else "",
            ]
            for row in one["rows"]
        ]
        head = ["hidden", "FFN", "KV", "layers", "head", "predicted", "trial", "excess"]
        head += ["above the best", ""]
        parts.append(
            f"## {100 * one['keep']:g} %\n\n{one['candidates']} candidates, {one['refitted']} of "
            f"them within {options.within:g} times the best prediction (or tried) and refitted. "
            f"The chosen one loses {100 * one['chosen above best']:.1f} % more than the best.\n\n"
            + table(head, rows)
        )
    machine = hardware(record["machine"])
    text = f"# {Path(options.name).name}\n\n    {record['command']}\n\nMachine: {machine}.\n\n"
    write(options.results / options.name, json=as_json(record), md=text + "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
