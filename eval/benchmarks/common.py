"""What the scripts of this folder share: where results go, what is said with them, contestants."""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sp3llm.evaluation.perplexity import measure_losses
from sp3llm.models.checkpoint import open_checkpoint
from sp3llm.models.families import family_of
from sp3llm.runtime.devices import resolve_execution
from sp3llm.runtime.folders import RECORD
from sp3llm.runtime.machine import machine, versions

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "eval" / "results"


# --------------------------------------------------------------------------- files


def place(name: str) -> Path:
    """Where the results of that name go, without a suffix: where those of an earlier run lie, else
    into the folder that the name begins with (`curve/mine`), else into one called like it.
    """
    earlier = sorted(RESULTS.rglob(f"{name}.json"))
    if earlier:
        return earlier[0].with_suffix("")
    return RESULTS / name if "/" in name else RESULTS / name / name


def write(path: Path, **texts: str) -> None:
    """Texts by suffix, beside each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in texts.items():
        Path(f"{path}.{suffix}").write_text(text)


def as_json(record: Any) -> str:
    return json.dumps(record, indent=1) + "\n"


def halves(text: Path, folder: Path) -> tuple[Path, Path]:
    """The two halves of a text, cut at a blank line or a line's end, as files."""
    content = text.read_text(encoding="utf-8")
    middle = content.find("\n", len(content) // 2) + 1
    parts = folder / "calibration.txt", folder / "evaluation.txt"
    for path, part in zip(parts, (content[:middle], content[middle:]), strict=True):
        path.write_text(part, encoding="utf-8")
    return parts


# --------------------------------------------------------------------------- words


def command(script: str, words: Sequence[str] | None = None) -> str:
    """How a script (its `__file__`) was called in the repository, or is with these words."""
    path = Path(script).resolve().relative_to(ROOT)
    return shlex.join(["python", str(path), *(sys.argv[1:] if words is None else words)])


def with_own_names(words: Iterable[str], name: str = "") -> list[str]:
    """Words of a command with folders and files by their own names, lists and pairs of them too:
    where they lie is one machine's alone. `name`, of results, stays.
    """

    def own(word: str) -> str:
        parts = re.split("([,=])", word)
        return "".join(part if part in ",=" else Path(part).name for part in parts)

    return [own(word) if "/" in word and word != name else word for word in words]


def surroundings(device: Any, **more: str) -> dict[str, Any]:
    """Versions and machine, for a record."""
    return {"versions": versions(), "machine": {**machine(str(device)), **more}}


def hardware(machine: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in machine.items())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def shown(excess: dict[str, float]) -> str:
    """Excess log-perplexity with its error."""
    mean = round(excess["mean"], 4) + 0.0  # no -0.0000
    return f"{mean:.4f} ± {excess['paired_standard_error']:.4f}"


def figure() -> tuple[Any, Any]:
    """A matplotlib figure of the size of all, and its axes; no screen is needed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(6.4, 4), layout="constrained")


# --------------------------------------------------------------------------- contestants


def contest(parser: argparse.ArgumentParser, contestants: Iterable[str]) -> argparse.Namespace:
    """Options of a script that runs contestants by name; `--list` is answered here."""
    parser.add_argument("--work", type=Path, required=True, help="where models and states wait")
    parser.add_argument("--run", nargs="*", default=[], metavar="NAME", help="contestants")
    parser.add_argument("--list", action="store_true", help="name them and what is finished")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in options.run:
        if name not in contestants:
            parser.error(f"no contestant '{name}': see --list")
    if options.list:
        for name in contestants:
            print(name, "finished" if finished(options.work / name) else "")
        parser.exit()
    return options


def losses_of(folder: Path, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Token losses of a model, `(windows, tokens - 1)`, nats, in that arithmetic on the CPU."""
    checkpoint = open_checkpoint(folder)
    execution = resolve_execution("cpu", dtype)
    return measure_losses(checkpoint, family_of(checkpoint.config), tokens, execution)


def finished(folder: Path) -> bool:
    """Whether a model is there: a record is the last thing that is written."""
    return (folder / RECORD).is_file()


def record_of(folder: Path) -> dict[str, Any]:
    """As it is there: that of a dense model tuned holds less than `read_record` asks for."""
    return json.loads((folder / RECORD).read_text())
