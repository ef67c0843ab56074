"""Draw excess log-perplexity against true parameters from files of eval/results.

python eval/benchmarks/plot_curve.py depth curve-plain curve-refit curve-search \
    --out eval/results/curve/curve.png
"""

import argparse
import json
from pathlib import Path

from common import figure, place

LABELS = {
    "depth": "drop whole blocks",
    "curve-plain": "principal components, cut",
    "curve-refit": "default basis, cut, refit",
    "curve-search": "refit, shape searched (default)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", help="names of files in eval/results, without .json")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    picture, axes = figure()
    for name, marker in zip(options.names, "xso^dv", strict=False):
        records = json.loads(Path(f"{place(name)}.json").read_text())
        records = records["runs"] if isinstance(records, dict) else records
        points = sorted(
            (100 * r["plan"]["keep_params"], r["excess_log_perplexity"]["mean"]) for r in records
        )
        x, y = zip(*points, strict=True)
        axes.plot(x, y, marker=marker, markersize=4, label=LABELS.get(name, name))
    axes.set(
        xlabel="parameters kept (%)",
        ylabel="excess log-perplexity (nats a token)",
        yscale="log",
        title="The bundled Llama, held-out text, no tuning",
    )
    axes.invert_xaxis()
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    picture.savefig(options.out, dpi=120)


if __name__ == "__main__":
    main()
