"""Does cutting in several rounds lose less than cutting at once?

python eval/benchmarks/bench_rounds.py --widths 208,160 160

Each argument of `--widths` is a course of hidden sizes: the model is compressed to the first, the
result to the next, each time with a basis and a refit of its own, on the same calibration text. The
losses at the end are compared with the first dense model's, on the same held-out windows.
"""

import argparse
import tempfile
from pathlib import Path

from common import RESULTS, as_json, command, record_of, shown, surroundings, table, write
from rich.console import Console

from sp3llm.compression.story import compress
from sp3llm.evaluation.perplexity import measure_losses
from sp3llm.maths.paired import excess_log_perplexity
from sp3llm.models.checkpoint import open_checkpoint
from sp3llm.models.families import family_of
from sp3llm.models.source import resolve_model
from sp3llm.options import CompressConfig
from sp3llm.runtime.devices import resolve_execution
from sp3llm.text.sources import default_evaluation
from sp3llm.text.tokenizer import load_tokenizer
from sp3llm.text.windows import calibration_windows, evaluation_windows


def run_course(widths: list[int], samples: int, seq_len: int, folder: Path) -> Path:
    """Compress through the widths; the last model's folder."""
    model = None
    for number, width in enumerate(widths):
        out = folder / f"round{number}"
        # The budget does not bind: the width is fixed.
        settings = CompressConfig(
            model=model, hidden_size=width, keep=0.999, allocate="width", samples=samples,
            seq_len=seq_len, calib="stdlib", out=out, report=False,
        )  # fmt: skip
        compress(settings, Console(quiet=True))
        model = str(out)
    return Path(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", nargs="+", required=True, help="courses, such as 208,160")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    options = parser.parse_args()

    folder, name, _ = resolve_model(None)
    dense = open_checkpoint(folder)
    execution = resolve_execution("auto", dense.dtype())
    tokenizer = load_tokenizer(folder)
    calibration = calibration_windows("stdlib", tokenizer, options.samples, options.seq_len, 0)
    evaluation = evaluation_windows(
        default_evaluation("stdlib"), tokenizer, 128, options.seq_len, calibration.documents
    )
    before = measure_losses(dense, family_of(dense.config), evaluation.tokens, execution)
    rows = []
    for course in options.widths:
        widths = [int(width) for width in course.split(",")]
        with tempfile.TemporaryDirectory() as scratch:
            last = run_course(widths, options.samples, options.seq_len, Path(scratch))
            small = open_checkpoint(last)
            losses = measure_losses(small, family_of(small.config), evaluation.tokens, execution)
            plan = record_of(last)["plan"]
        excess = excess_log_perplexity(losses, before)
        rows.append({"widths": widths, "plan": plan, "excess_log_perplexity": excess.describe()})
        print(course, excess, flush=True)
    record = {
        "command": command(__file__),
        "model": name,
        "calibration": calibration.describe(),
        "evaluation": evaluation.describe(),
        "runs": rows,
        **surroundings(execution.device),
    }
    cells = [
        [
            " to ".join(map(str, row["widths"])),
            f"{row['plan']['parameters']:,}",
            shown(row["excess_log_perplexity"]),
        ]
        for row in rows
    ]
    made = table(["widths", "parameters", "excess log-perplexity"], cells)
    text = f"# rounds\n\n    {record['command']}\n\n{made}\n"
    write(RESULTS / "rounds" / "rounds", json=as_json(record), md=text)


if __name__ == "__main__":
    main()
