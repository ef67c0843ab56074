"""lm-eval on a model and on the one it came from.

Everything lm-eval measures is measured by its own API, so that stock `lm_eval` gives the same
figures. Added are two things it does not know: the standard error of a *paired* difference, from
the samples of both models, and perplexity a token as papers on pruning count it.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sp3llm.errors import UserError, reason
from sp3llm.evaluation.comparison import (
    Comparison,
    Items,
    Scored,
    compare,
    not_compared,
    table,
)
from sp3llm.evaluation.files import output_for, write_comparison
from sp3llm.evaluation.selection import (
    Mean,
    Selection,
    TokenPerplexity,
    presets,
    read_preset,
    shipped,
)
from sp3llm.options import CompressConfig, ScoreConfig, command_line

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from torch import Tensor

    from sp3llm.text.windows import Windows


_INSTALL = "pip install 'lm-eval>=0.4.13'"
# Sequences at once on a CPU, where lm-eval cannot find out how many fit.
_CPU_BATCH = "8"


# --------------------------------------------------------------------------- what to score on


def select(words: str, include_path: Path | None = None) -> Selection:
    """Resolve `--tasks`: presets, lm-eval's names and patterns, and files of either, by commas.

    Raises UserError if lm-eval is missing, or if a name is unknown: the nearest ones are named.
    """
    check_installed()
    if include_path is not None and not include_path.is_dir():
        raise UserError(
            f"Expected --include-path to be a folder of task files, found '{include_path}': name "
            "one that exists."
        )
    asked: list[str] = []
    perplexities: list[TokenPerplexity] = []
    means: list[Mean] = []
    for word in filter(None, map(str.strip, words.split(","))):
        path = presets().get(word, Path(word))
        preset = read_preset(path) if path.suffix in (".yaml", ".yml") else None
        if preset is None:
            asked.append(word)
            continue
        tasks = tuple(preset.get("tasks") or ())
        asked += tasks
        if preset.get("mean_of"):
            means.append(Mean(path.stem, tasks, tuple(preset["mean_of"])))
        counted = preset.get("token_perplexity") or {"seq_lens": ()}
        perplexities += [TokenPerplexity(counted["text"], n) for n in counted["seq_lens"]]
    if not asked and not perplexities:
        raise UserError(
            f"Expected tasks of lm-eval or presets ({', '.join(presets())}), found '{words}': name "
            "at least one."
        )
    tasks = _known_tasks(list(dict.fromkeys(asked)), include_path)
    return Selection(tasks, tuple(dict.fromkeys(perplexities)), tuple(means))


def check_installed() -> None:
    """Raises UserError if lm-eval is missing or too old."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"Scoring on tasks needs the package lm-eval, which is not installed: {_INSTALL}."
        ) from error
    if not hasattr(TaskManager, "load"):
        raise UserError(
            f"Scoring on tasks needs lm-eval 0.4.13 or later, found an older one: {_INSTALL}."
        )


def _task_manager(
    tasks: Iterable[str], include_path: Path | None, metadata: dict[str, Any] | None = None
) -> Any:
    """lm-eval's index of task files, which takes it seconds; of ours alone where they will do."""
    from lm_eval.tasks import TaskManager

    ours = str(shipped("tasks"))
    if include_path is None:
        small = TaskManager(include_path=ours, include_defaults=False, metadata=metadata)
        if all(task in small.all_tasks or _is_task_file(task) for task in tasks):
            return small
    paths = [ours, *([str(include_path)] if include_path else [])]
    return TaskManager(include_path=paths, metadata=metadata)


def _is_task_file(word: str) -> bool:
    """Whether this is a file of one task; a group's may name any other task."""
    path = Path(word)
    if path.suffix not in (".yaml", ".yml"):
        return False
    lines = path.read_text(encoding="utf-8").splitlines()
    return not any(line.startswith("group:") for line in lines)


def _known_tasks(asked: list[str], include_path: Path | None) -> tuple[str, ...]:
    """lm-eval's names for what was asked for, patterns resolved, each once."""
    if not asked:
        return ()
    manager = _task_manager(asked, include_path)
    known: list[str] = []
    for word in asked:
        is_file = Path(word).suffix in (".yaml", ".yml")
        matching = [word] if is_file else manager.match_tasks([word])
        if not matching:
            near = get_close_matches(word, [*presets(), *manager.all_tasks], n=3, cutoff=0.6)
            meant = f"did you mean {' or '.join(near)}?" if near else "no name is like it."
            raise UserError(
                f"Unknown task or preset '{word}': {meant} The presets are "
                f"{', '.join(presets())}; lm_eval ls tasks lists all tasks."
            )
        known += matching
    return tuple(dict.fromkeys(known))


def load_tasks(
    selection: Selection, include_path: Path | None, metadata: dict[str, Any] | None = None
) -> dict[str, Any]:
    """lm-eval's `tasks` and `groups` by name, with their data, which is downloaded if need be.

    Raises UserError if that fails.
    """
    if not selection.tasks:
        return {"tasks": {}, "groups": {}}
    manager = _task_manager(selection.tasks, include_path, metadata)
    try:
        return dict(manager.load(list(selection.tasks)))
    except Exception as error:  # datasets and the hub raise many kinds
        raise UserError(
            f"Cannot load the tasks {', '.join(selection.tasks)} ({type(error).__name__}: "
            f"{reason(error)}): check the network and the task files, or use --tasks stdlib, which "
            "needs no download."
        ) from error


# --------------------------------------------------------------------------- scoring one model


@dataclass(frozen=True)
class _Model:
    """A model to score."""

    name: str
    """To show."""
    pretrained: str
    """For transformers: a folder, or a hub id."""

    @staticmethod
    def of(model: str) -> "_Model":
        from sp3llm.models.source import read_config, resolve_model

        folder, name, _ = resolve_model(model)
        read_config(folder)  # says so where the folder is no model
        return _Model(name, model if Path(model).is_dir() else name)

    def unloadable(self, error: Exception) -> UserError:
        """What to tell the user where transformers raised this."""
        return UserError(
            f"Cannot load the model '{self.name}' ({type(error).__name__}: {reason(error)}): "
            "check that plain transformers loads it."
        )

    def positions(self) -> int | None:
        """The longest text it takes, tokens; None: its config names no limit."""
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.pretrained)
        except Exception as error:  # transformers raises many kinds
            raise self.unloadable(error) from error
        return next(
            (
                getattr(config, key)
                for key in ("max_position_embeddings", "n_positions", "seq_length")
                if getattr(config, key, None)
            ),
            None,
        )


@dataclass(frozen=True)
class _Scoring:
    """What is the same for both models."""

    settings: ScoreConfig
    selection: Selection
    device: "torch.device"
    output: Path
    console: "Console"

    @property
    def batch_size(self) -> str:
        """Sequences at once, or `auto`, which lm-eval finds out on a GPU alone."""
        is_auto = self.settings.batch_size == "auto" and self.device.type == "cpu"
        return _CPU_BATCH if is_auto else self.settings.batch_size

    def model_args(self, model: _Model) -> dict[str, str]:
        """How lm-eval is told what to load."""
        return {"pretrained": model.pretrained, "dtype": self.settings.dtype}


def _score_one(scoring: _Scoring, model: _Model, loaded: Mapping[str, Any]) -> Scored | None:
    """Score one model on `loaded` tasks and write lm-eval's files; None on every process but the
    first.
    """
    lm = _load(scoring, model)
    windows, losses = _token_losses(lm, scoring.selection.perplexities, scoring.console)
    if scoring.selection.tasks:
        scored = _evaluate(scoring, model, lm, loaded)
    else:
        scored = Scored({}, {}, {}, {}, {}, {}, {}, {}) if lm.rank == 0 else None
    return None if scored is None else replace(scored, windows=windows, losses=losses)


def _load(scoring: _Scoring, model: _Model) -> Any:
    """The model as lm-eval's `HFLM`.

    Raises UserError if it does not load whole, or has no chat template where one is asked for.
    """
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    from sp3llm.models.stock import check_found

    try:
        # Without its weights first: lm-eval does not ask for what was found of them.
        _, info = AutoModelForCausalLM.from_pretrained(
            model.pretrained, device_map="meta", output_loading_info=True
        )
        check_found(model.name, info)
        lm = HFLM(
            **scoring.model_args(model), device=str(scoring.device), batch_size=scoring.batch_size
        )
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:  # transformers raises many kinds
        raise model.unloadable(error) from error
    has_template = getattr(lm.tokenizer, "chat_template", None) is not None
    if scoring.settings.apply_chat_template and not has_template:
        raise UserError(
            f"Expected a chat template in the tokenizer of '{model.name}', found none: leave "
            "--apply-chat-template out."
        )
    _share_among_processes(lm)
    return lm


def _evaluate(
    scoring: _Scoring, model: _Model, lm: Any, loaded: Mapping[str, Any]
) -> Scored | None:
    """Run lm-eval on its tasks, and write its files; None on every process but the first."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    settings = scoring.settings
    tracker = EvaluationTracker(output_path=str(scoring.output))
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    limit = settings.limit
    results = simple_evaluate(
        model=lm,
        model_args=scoring.model_args(model),
        tasks=_roots(loaded),
        num_fewshot=settings.num_fewshot,
        batch_size=scoring.batch_size,
        device=str(scoring.device),
        limit=int(limit) if limit is not None and limit >= 1 else limit,
        evaluation_tracker=tracker,
        apply_chat_template=settings.apply_chat_template,
        confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
        **({} if settings.seed is None else dict.fromkeys(seeds, settings.seed)),
    )
    if results is None:
        return None
    # It was given a model rather than the name of a kind, and says so; lm_eval's files do not.
    results["config"]["model"] = tracker.general_config_tracker.model_source = "hf"
    samples = results.pop("samples")
    scored = _scored(results, samples)
    _save(tracker, results, samples, scoring.output)
    return replace(scored, hashes=results["task_hashes"])  # which saving adds


def _share_among_processes(lm: Any) -> None:
    """Divide the questions among all processes of `accelerate launch`.

    HFLM does so only where a process sees more than one GPU, and counts the processes of its own
    machine alone: on CPUs, and with one GPU a machine, every process would answer all questions.
    """
    accelerator = getattr(lm, "accelerator", None)
    if accelerator is not None:
        lm._rank, lm._world_size = accelerator.process_index, accelerator.num_processes


def _roots(loaded: Mapping[str, Any]) -> list[Any]:
    """What to hand back to lm-eval: groups and tasks that are in no other group."""
    inside = {child for group in loaded["groups"].values() for child in group.child_names}
    every = {**loaded["groups"], **loaded["tasks"]}
    return [item for name, item in every.items() if name not in inside]


def _scored(results: Mapping[str, Any], samples: Mapping[str, list[dict[str, Any]]]) -> Scored:
    """What lm-eval found: token perplexities and hashes come from elsewhere."""
    values, errors, counts = {}, {}, {}
    for name, figures in results["results"].items():
        counts[name] = figures.get("sample_len", 0)
        for key, value in figures.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            values[name, key] = float(value)
            error = figures.get(f"{metric}_stderr,{filtered}")
            if isinstance(error, int | float):
                errors[name, key] = float(error)
    items: dict[tuple[str, str], Items] = {}
    for name, rows in samples.items():
        for row in rows:
            for metric in row["metrics"]:
                by_document = items.setdefault((name, f"{metric},{row['filter']}"), {})
                by_document[row["doc_id"]] = row[metric]
    return Scored(
        values,
        errors,
        counts,
        higher_is_better=results["higher_is_better"],
        items=items,
        windows={},
        losses={},
        hashes={},
    )


def _save(tracker: Any, results: Any, samples: Mapping[str, Any], output: Path) -> None:
    """lm-eval's own files, in its own layout; it only logs what goes wrong, so look."""
    tracker.save_results_aggregated(results=results, samples=samples)
    for name in results["configs"]:
        tracker.save_results_samples(task_name=name, samples=samples[name])
    folder = output / tracker.general_config_tracker.model_name_sanitized
    written = [f"results_{tracker.date_id}.json"]
    written += [f"samples_{name}_{tracker.date_id}.jsonl" for name in results["configs"]]
    missing = [name for name in written if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"lm-eval could not write {', '.join(missing)} to '{folder}': check that there is room."
        )


def _token_losses(
    lm: Any, perplexities: Sequence[TokenPerplexity], console: "Console"
) -> "tuple[dict[TokenPerplexity, Windows], dict[TokenPerplexity, Tensor]]":
    """Windows, and the token losses on them, the same on every process."""
    import torch

    from sp3llm.models.objectives.causal_lm import window_losses
    from sp3llm.runtime.progress import progress_bars
    from sp3llm.text.windows import unbroken_windows

    windows = {p: unbroken_windows(p.text, lm.tokenizer, p.seq_len) for p in perplexities}
    losses = {}
    with progress_bars(console) as progress:
        for asked, drawn in windows.items():
            share = drawn.tokens[lm.rank :: lm.world_size]
            rows = [
                window_losses(lm.model, window, lm.device)
                for window in progress.track(share, description=f"{asked.text}, {asked.seq_len}")
            ]
            mine = torch.stack(rows) if rows else torch.empty(0, asked.seq_len - 1).double()
            together = torch.empty(len(drawn.tokens), asked.seq_len - 1, dtype=torch.float64)
            for rank, part in enumerate(_gathered(mine, lm.world_size)):
                together[rank :: lm.world_size] = part
            losses[asked] = together
    return windows, losses


def _gathered(value: "Tensor", processes: int) -> "list[Tensor]":
    if processes == 1:
        return [value]
    import torch

    parts: list[Tensor] = [value] * processes
    torch.distributed.all_gather_object(parts, value)
    return parts


# --------------------------------------------------------------------------- the command


def is_first_process() -> bool:
    """Whether this process prints and writes, under `accelerate launch`."""
    return os.environ.get("RANK", "0") == "0"


def score(settings: ScoreConfig, console: "Console") -> Comparison | None:
    """Score a model, and the one it is compared with; results, samples and the table are written.

    Under `accelerate launch` the processes share the questions, and all but the first return None.

    Raises UserError for anything the user can mend.
    """
    import logging

    import torch

    from sp3llm.runtime.devices import resolve_execution
    from sp3llm.runtime.progress import print_line

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with console.status("reading lm-eval's tasks"):
        selection = select(settings.tasks or "", settings.include_path)
    if "LMEVAL_LOG_LEVEL" not in os.environ:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
    device = resolve_execution(settings.device, torch.float32).device
    models = [_Model.of(m) for m in (settings.model, settings.against) if m is not None]
    selection, notes = _within_positions(selection, models)
    for note in notes:
        print_line(console, note)
    output = output_for(settings, models[0].name)
    scoring = _Scoring(settings, selection, device, output, console)
    scored, loaded = _score_all(scoring, models)
    if scored[0] is None:
        return None
    small, dense = scored[0], scored[1] if len(scored) > 1 else None
    rows = compare(loaded, selection, small, dense)
    notes += [] if dense is None else not_compared(small, dense)
    against = models[1].name if len(models) > 1 else None
    hashes = small.hashes | {str(text): drawn.sha256 for text, drawn in small.windows.items()}
    comparison = Comparison(models[0].name, against, rows, notes, hashes)
    written = write_comparison(comparison, settings, output, str(device), versions())
    console.print(table(comparison))
    further = "" if dense else " Add --against DENSE to learn what was lost."
    print_line(
        console,
        f"Written to {output}: {written} and .md, and lm-eval's own results and samples.{further}",
    )
    return comparison


def _score_all(
    scoring: _Scoring, models: Sequence[_Model]
) -> tuple[list[Scored | None], dict[str, Any]]:
    """What each model scored, one after the other, and the tasks as they were loaded last."""
    import gc

    import torch

    from sp3llm.runtime.progress import print_line

    scored, loaded = [], {}
    for model in models:
        # Tasks are loaded for each model by itself: some look at its name, and they keep answers.
        loaded = load_tasks(
            scoring.selection, scoring.settings.include_path, scoring.model_args(model)
        )
        _check_safe(loaded, scoring.settings)
        print_line(scoring.console, f"Scoring {model.name}")
        try:
            scored.append(_score_one(scoring, model, loaded))
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"The GPU ran out of memory while '{model.name}' was scored: give a smaller "
                "--batch-size, or close what else uses it."
            ) from error
        gc.collect()
        if scoring.device.type == "cuda":
            torch.cuda.empty_cache()
    return scored, loaded


def _within_positions(
    selection: Selection, models: Sequence[_Model]
) -> tuple[Selection, list[str]]:
    """Leave out the windows that a model has no positions for, and say so."""
    if not selection.perplexities:
        return selection, []
    limits = {model.name: model.positions() or math.inf for model in models}
    kept, notes = [], []
    for asked in selection.perplexities:
        short = {name: most for name, most in limits.items() if most < asked.seq_len}
        if not short:
            kept.append(asked)
            continue
        name, most = next(iter(short.items()))
        notes.append(
            f"No token perplexity on {asked} a window: '{name}' has {most} positions, and longer "
            "windows would measure what it was never trained for."
        )
    if not kept and not selection.tasks:
        raise UserError(
            f"Expected a model of at least {min(p.seq_len for p in selection.perplexities)} "
            f"positions for these windows, found {min(limits.values())}: use a preset with "
            "shorter ones."
        )
    return replace(selection, perplexities=tuple(kept)), notes


def _check_safe(loaded: Mapping[str, Any], settings: ScoreConfig) -> None:
    unsafe = [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe and not settings.confirm_run_unsafe_code:
        raise UserError(
            f"The task {unsafe[0]} runs code that the model wrote: add --confirm-run-unsafe-code "
            "if this machine may be harmed, or leave the task out."
        )


def versions() -> dict[str, str]:
    """Versions of everything that a score depends on."""
    from importlib.metadata import version

    from sp3llm.runtime.machine import versions

    return {**versions(), "lm-eval": version("lm-eval"), "datasets": version("datasets")}


# --------------------------------------------------------------------------- after compressing


def check_scoring(settings: CompressConfig) -> None:
    """Everything about `--score` that can be refused before a compression begins: lm-eval itself,
    the names, windows too long for the model, data that cannot be had.
    """
    from sp3llm.text.sources import read_documents, resolve_source

    selection = select(settings.score or "")
    selection, _ = _within_positions(selection, [_Model.of(_dense(settings))])
    load_tasks(selection, None)
    for text in {asked.text for asked in selection.perplexities}:
        next(read_documents(resolve_source(text), "evaluation"), None)


def _dense(settings: CompressConfig) -> str:
    from sp3llm.models.source import bundled_model

    return settings.model or str(bundled_model())


def score_compressed(settings: CompressConfig, out: Path, console: "Console") -> None:
    """Score what was written to `out` against the dense model, and add it to the record there.

    lm-eval's own files go to a folder beside `out`.

    Raises UserError if scoring fails; the model stays.
    """
    from sp3llm.reporting.record import Scores, add_to_record
    from sp3llm.reporting.typed_json import from_json

    scoring = ScoreConfig(
        model=str(out),
        against=_dense(settings),
        tasks=settings.score or "",
        device=settings.device,
        output=out.with_name(f"{out.name}-score"),
    )
    try:
        comparison = score(scoring, console)
    except UserError as error:
        raise UserError(f"The model was written to {out}, but not scored. {error}") from error
    if comparison is not None:
        scores = {"command": command_line(settings), **comparison.describe()}
        add_to_record(out, scores=from_json(Scores, scores))
