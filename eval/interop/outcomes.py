"""What a tool made of a model, from the tool's environment into ours: imports nothing of theirs."""

import json
import os
import subprocess
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


def print_outcomes(runs: Iterable[tuple[str, Callable[[], tuple[dict[str, Any], str]]]]) -> None:
    """Run every format by its name, and print a line of JSON with a row for each; what a run
    returns is what was found and a note.
    """
    found = []
    for kind, run in runs:
        try:
            theirs, note = run()
            row = {"loads": True, "note": note, **theirs}
        except Exception as error:  # the reason is the result
            traceback.print_exc()
            text = " ".join(str(error).split())
            row = {"loads": False, "note": f"{type(error).__name__}: {text}"[:300]}
        found.append({"format": kind, **row})
    print(json.dumps(found))


def outcomes_of(
    words: list[str],
    work: Path,
    hidden: Iterable[Path],
    variables: Mapping[str, str],
    timeout: float | None = None,
) -> list[dict[str, Any]]:
    """The rows that a script prints by `print_outcomes`, and its log in `work`; paths that are
    `hidden` are in no note.
    """
    run = subprocess.run(
        words, capture_output=True, text=True, timeout=timeout, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **variables},
    )  # fmt: skip
    (work / "log.txt").write_text(run.stderr)
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no word"])[-1]
        return [{"format": "", "loads": False, "note": f"exit code {run.returncode}: {last}"}]
    rows = json.loads(run.stdout.strip().splitlines()[-1])
    for row in rows:
        for path in hidden:
            row["note"] = row["note"].replace(str(path), path.name)
    return rows
