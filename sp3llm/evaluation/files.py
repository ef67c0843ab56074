"""The files that `sp3llm score` leaves."""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from sp3llm.errors import UserError, reason
from sp3llm.evaluation.comparison import Comparison, markdown
from sp3llm.options import ScoreConfig, command_line, plain_values


def output_for(settings: ScoreConfig, name: str) -> Path:
    """The folder for results of the model called `name`, made if it is not there.

    Raises UserError if it cannot be.
    """
    folder = settings.output or Path(f"{Path(name).name}-score")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"Cannot write to '{folder}' ({reason(error)}): name another folder with --output."
        ) from error
    return folder


def write_comparison(
    comparison: Comparison,
    settings: ScoreConfig,
    output: Path,
    device: str,
    versions: Mapping[str, str],
) -> str:
    """Write `comparison.json` and `comparison.md`, dated as lm-eval dates its files; the name of
    the first. `versions` are those of everything that the scores depend on.
    """
    from sp3llm.runtime.machine import machine

    stem = f"comparison_{datetime.now().isoformat().replace(':', '-')}"
    record = {
        "command": command_line(settings),
        **comparison.describe(),
        "settings": plain_values(settings),
        "versions": dict(versions),
        "machine": machine(device),
    }
    text = json.dumps(record, indent=2) + "\n"
    (output / f"{stem}.json").write_text(text, encoding="utf-8")
    (output / f"{stem}.md").write_text(markdown(comparison, record), encoding="utf-8")
    return f"{stem}.json"
