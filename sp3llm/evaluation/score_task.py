"""`sp3llm score --task`: an encoder on the task it was fine-tuned on, and against the dense one."""

import gc
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sp3llm.errors import UserError
from sp3llm.evaluation.comparison import Comparison, table
from sp3llm.evaluation.files import output_for, write_comparison
from sp3llm.options import ScoreConfig

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from sp3llm.evaluation.task_scores import Answers, Reported
    from sp3llm.models.objectives.schema import Objective

# Rows at once, where nothing else is said.
BATCH = 32


@dataclass(frozen=True)
class _Model:
    """A model to score, and what it is asked."""

    name: str
    folder: Path
    objective: "Objective"
    reported: "Reported"


def score_task(settings: ScoreConfig, console: "Console") -> Comparison:
    """Score a model on its task, and the one it is compared with; answers and table are written.

    Raises UserError for anything the user can mend.
    """
    import torch

    from sp3llm.evaluation.task_metrics import check_installed
    from sp3llm.evaluation.task_scores import score_rows
    from sp3llm.runtime.devices import resolve_execution
    from sp3llm.runtime.progress import print_line

    check_installed()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "Expected one process for --task, found several: leave accelerate launch out."
        )
    device = resolve_execution(settings.device, torch.float32).device
    models = _models(settings)
    output = output_for(settings, models[0].name)
    answers = [_answers(settings, model, device, console) for model in models]
    asked = models[0].reported
    rows = score_rows(asked, answers[0], answers[1] if len(answers) > 1 else None)
    against = models[1].name if len(models) > 1 else None
    hashes = {name: one.examples.sha256 for name, one in asked.splits.items()}
    comparison = Comparison(models[0].name, against, rows, [], hashes)
    written = write_comparison(comparison, settings, output, str(device), versions())
    _write_answers(output / written.replace("comparison", "answers", 1), asked, answers)
    console.print(table(comparison))
    further = "" if against else " Add --against DENSE to learn what was lost."
    print_line(console, f"Written to {output}: {written} and .md, and all answers.{further}")
    return comparison


def _models(settings: ScoreConfig) -> list[_Model]:
    """What is scored, and what it is compared with, asked the same."""
    from sp3llm.evaluation.task_scores import reported, row_length
    from sp3llm.models.objectives.catalogue import task_objective
    from sp3llm.models.source import read_config, resolve_model
    from sp3llm.text.tasks import task_for
    from sp3llm.text.tokenizer import load_row_tokenizer

    found = []
    for model in filter(None, (settings.model, settings.against)):
        folder, name, _ = resolve_model(model)
        config, tokenizer = read_config(folder), load_row_tokenizer(folder)
        objective = task_objective(config, name)
        labels = objective.labels(config)
        task = task_for(settings.task or "", labels.kind)
        length = row_length(task, config, tokenizer, settings.seq_len)
        found.append((name, folder, objective, task, labels, tokenizer, length))
    shortest = min(length for *_, length in found)
    models = [
        _Model(name, folder, objective, reported(task, labels, tokenizer, shortest))
        for name, folder, objective, task, labels, tokenizer, _ in found
    ]
    truths = [[one.truths for one in model.reported.splits.values()] for model in models]
    if truths[-1] != truths[0]:
        raise UserError(
            f"Expected '{models[0].name}' and '{models[1].name}' to count classes alike, found "
            "another id2label in each config.json: compare a model with the one it was made from."
        )
    return models


def _answers(
    settings: ScoreConfig, model: _Model, device: "torch.device", console: "Console"
) -> "Answers":
    """What a model answers to every split.

    Raises UserError if it does not load, has no room, or its tokenizer is another model's.
    """
    import torch

    from sp3llm.evaluation.task_scores import load_model
    from sp3llm.runtime.progress import progress_bars
    from sp3llm.text.windows import check_token_ids

    batch = BATCH if settings.batch_size == "auto" else int(settings.batch_size)
    stock = load_model(model.folder, model.name, model.objective, device, settings.dtype)
    known = stock.get_input_embeddings().num_embeddings
    check_token_ids([model.reported.tokens], known, model.folder)
    try:
        with progress_bars(console) as progress:
            about = (model.name, model.objective, batch, progress)
            found = model.reported.answered_by(stock, *about)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"The GPU ran out of memory while '{model.name}' was scored: give a smaller "
            "--batch-size, or close what else uses it."
        ) from error
    del stock
    gc.collect()
    return found


def _write_answers(path: Path, asked: "Reported", answers: "Sequence[Answers]") -> None:
    """Every answer beside what is true, by split, the model's and then the dense one's."""
    content: dict[str, Any] = {
        name: {
            "true": list(questions.truths),
            **{who: list(a[name]) for who, a in zip(("small", "dense"), answers, strict=False)},
        }
        for name, questions in asked.splits.items()
    }
    path.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Versions of everything that a task's score depends on."""
    from importlib.metadata import version

    from sp3llm.runtime import machine

    names = ("datasets", "scikit-learn", "scipy")
    return {**machine.versions(), **{name: version(name) for name in names}}
