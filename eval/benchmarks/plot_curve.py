"""Draw excess log-perplexity against true parameters from files of eval/results.

python eval/benchmarks/plot_curve.py depth curve-plain curve-refit curve-search \
    --out eval/results/curve/curve.png
python eval/benchmarks/plot_curve.py real/axes-step 'real/axes:earlier' peers/smollm2 \
    --leave-out kv-drop --title 'SmolLM2-135M, nothing tuned' --out eval/results/real/axes.png

A file is the runs of one curve, or a table with a contestant a row, each of which is a curve;
curves of one name in several files are one, unless words behind a colon tell them apart.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Collection
from itertools import product
from pathlib import Path
from typing import Any

from common import figure, place

LABELS = {
    "depth": "drop whole blocks",
    "curve-plain": "principal components, cut",
    "curve-refit": "default basis, cut, refit",
    "curve-search": "refit, shape searched (default)",
}
CONTESTANTS = {
    "before": "width, FFN, KV groups",
    "shape": "width, FFN, KV groups, layers (default)",
    "all": "all axes, the vocabulary too",
    "shape-float32": "the default in float32",
    "kv-drop": "fewer KV heads, others dropped",
    "kv-merge": "fewer KV heads, merged",
    "width": "width alone",
    "ffn": "FFN alone",
    "depth": "layers alone, bridged",
    "layers-go": "layers alone, no refit",
    "vocabulary": "vocabulary alone",
    "block-influence": "layers by block influence",
    "torch-pruning-magnitude-ffn": "torch-pruning, FFN magnitudes",
    "torch-pruning-taylor-ffn": "torch-pruning, FFN by Taylor scores",
}

# More curves than that have no room for their names between them.
_FEW = 6

Points = list[tuple[float, float]]


def curves_of(name: str, found: Any, without: Collection[str]) -> dict[str, Points]:
    """Per cent of the parameters kept, and nats a token lost, by the label of the curve; `without`
    some contestants of a table.
    """
    curves: dict[str, Points] = defaultdict(list)
    if isinstance(found, dict) and "rows" in found:
        for row in found["rows"]:
            # sp3llm's own folders are in the tables of peers only to be compared with.
            is_drawn = row["contestant"] not in without
            if row.get("excess") and is_drawn and not row["contestant"].startswith("sp3llm"):
                label = CONTESTANTS.get(row["contestant"], row["contestant"])
                curves[label].append((100 * row["kept"], row["excess"]["mean"]))
    else:
        for run in found["runs"] if isinstance(found, dict) else found:
            point = 100 * run["plan"]["keep_params"], run["excess_log_perplexity"]["mean"]
            curves[LABELS.get(name, name)].append(point)
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", help="files in eval/results, without .json")
    parser.add_argument("--leave-out", nargs="*", default=[], help="contestants not to draw")
    parser.add_argument("--title", default="The bundled Llama, held-out text, no tuning")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    curves: dict[str, Points] = defaultdict(list)
    for words in options.names:
        name, _, which = words.partition(":")
        record = json.loads(Path(f"{place(name)}.json").read_text())
        for label, points in curves_of(name, record, options.leave_out).items():
            curves[f"{label} ({which})" if which else label] += points
    picture, axes = figure()
    styles = product(("-", "--"), range(10))  # colours come ten at a time
    for (label, points), marker, (line, colour) in zip(
        curves.items(), "xso^dvP*+<>h", styles, strict=False
    ):
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, line, color=f"C{colour}", marker=marker, markersize=4, label=label)
    axes.set(
        xlabel="parameters kept (%)",
        ylabel="excess log-perplexity (nats a token)",
        yscale="log",
        title=options.title,
    )
    axes.invert_xaxis()
    axes.grid(alpha=0.3, which="both")
    beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(curves) > _FEW else {}
    axes.legend(frameon=False, fontsize="small", **beside)
    picture.savefig(options.out, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
