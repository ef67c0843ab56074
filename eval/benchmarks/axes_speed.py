"""How fast models decode that have lost as many parameters, each by another axis alone.

    python eval/benchmarks/axes_speed.py --model DIR --keep 0.92 0.75 --work DIR --name speed/axes

Speed hangs on shapes, not on weights: those are drawn. Every model takes turns with the dense one,
`sp3llm bench`'s own measurement. An axis that does not reach a size alone is left out.
"""

import argparse
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import (
    RESULTS,
    as_json,
    command,
    hardware,
    surroundings,
    table,
    with_own_names,
    write,
)
from random_models import write_random_model

from sp3llm.evaluation.speed import Pair, measure_cell
from sp3llm.evaluation.speed_run import load
from sp3llm.models.families import count_parameters, family_of
from sp3llm.models.shapes import Shape, resized_config
from sp3llm.models.source import read_config
from sp3llm.options import BenchConfig

# By axis the field of a shape, and the steps in which it is cut.
_AXES = {
    "width": ("hidden_size", 8),
    "FFN": ("intermediate_size", 32),
    "depth": ("num_hidden_layers", 1),
    "vocabulary": ("vocab_size", 64),
}


def largest(config: Mapping[str, Any], axis: str, keep: float) -> dict[str, Any] | None:
    """The config with the most of an axis within the budget, all else whole; None: it is not
    reached.
    """
    family, (name, step) = family_of(config), _AXES[axis]
    whole, most = Shape.of(family, config), keep * count_parameters(family, config)
    if axis == "width":  # as configs want it
        step = math.lcm(step, whole.num_attention_heads)
    for size in range(getattr(whole, name) // step * step, 0, -step):
        small = resized_config(family, config, replace(whole, **{name: size}))
        if count_parameters(family, small) <= most:
            return small if size >= getattr(whole, name) // 4 else None
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the dense model")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.92, 0.75])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", type=Path, required=True, help="where models wait")
    parser.add_argument("--name", required=True, help="of the files under eval/results")
    options = parser.parse_args()
    device, config = torch.device("cpu"), read_config(Path(options.model))
    dense = load(options.model, "auto", device)
    settings = BenchConfig(
        options.model,
        against=options.model,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
    )
    rows = []
    for keep in options.keep:
        for axis in _AXES:
            small = largest(config, axis, keep)
            if small is None:
                continue
            folder = options.work / f"{axis}-{100 * keep:g}"
            parameters = write_random_model(folder, small, dense.dtype, tokenizer=False)
            pair = Pair(dense, load(str(folder), "auto", device))
            cell = measure_cell(pair, settings, 1, options.prompt, lambda: None)
            size = getattr(Shape.of(family_of(small), small), _AXES[axis][0])
            rows.append(
                {
                    "keep": keep,
                    "axis": axis,
                    "size": size,
                    "parameters": parameters,
                    "kept": parameters / dense.parameters,
                    **cell.describe(),
                }
            )
            publish(options, rows, dense.dtype)


def publish(options: argparse.Namespace, rows: list[dict[str, Any]], dtype: torch.dtype) -> None:
    """Write the table."""

    def over(ratio: Mapping[str, Any]) -> str:
        measured = ratio["measured"]
        return f"{measured['median']:.2f} ({measured['low']:.2f} to {measured['high']:.2f})"

    cells = [
        [
            f"{100 * row['keep']:g} %",
            f"{row['axis']} {row['size']}",
            f"{100 * row['kept']:.2f} %",
            over(row["prefill"]),
            over(row["decode"]),
            f"{row['decode']['promised']:.2f}",
        ]
        for row in rows
    ]
    words = with_own_names(sys.argv[1:], options.name)
    run = {"command": command(__file__, words), "rows": rows, **surroundings("cpu")}
    head = ["keep", "what is cut", "parameters kept", "prefill over dense", "decoding over dense"]
    head += ["what its bytes promise"]
    text = f"""# {Path(options.name).name}

    {run["command"]}

One prompt of {options.prompt} tokens and {options.new_tokens} after it, plain transformers in
{str(dtype).removeprefix("torch.")}; tokens a second over the dense model's, medians and quartiles
of {options.repeats} pairs. Weights are drawn. Machine: {hardware(run["machine"])}; torch
{run["versions"]["torch"]}.

{table(head, cells)}
"""
    write(RESULTS / options.name, json=as_json(run), md=text)


if __name__ == "__main__":
    main()
