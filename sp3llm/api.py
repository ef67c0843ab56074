"""sp3llm from a notebook or a script.

Keyword arguments are called as the options of the commands are, with underscores
(docs/options.md); results are typed, and nothing is printed unless `progress` is asked for. What a
user can mend is raised as `UserError`, in one sentence.
"""

from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from sp3llm.errors import UserError
from sp3llm.options import CompressConfig, PlanConfig, RecoverConfig

if TYPE_CHECKING:
    from rich.console import Console

    from sp3llm.compression.job import Result
    from sp3llm.planning.overview import Overview
    from sp3llm.recovery.result import Recovery


def plan(model: str | Path | None = None, **options: Any) -> "Overview":
    """The shapes of a model within a budget, from its `config.json` alone; imports no torch.

    `model` is a hub id or a folder; None is the bundled Llama. `options` are those of
    `sp3llm plan`: `keep=0.75`, `of="flops"`, `hidden_size=3072`, ...

    Raises UserError for an option that does not exist or has an impossible value, and where no
    shape fits.
    """
    from sp3llm.planning.overview import overview_of

    return overview_of(_settings(PlanConfig, model=model, **options))


def compress(
    model: str | Path | None = None, *, progress: bool = False, **options: Any
) -> "Result | None":
    """Compress a model; the folder `out` holds the result when this returns.

    `model` is a hub id or a folder; None is the bundled Llama. `options` are those of
    `sp3llm compress`: `keep=0.75`, `calib="my.jsonl"`, `out="small"`, `recover_steps=300`, ...
    With `progress` bars and tables are printed as the command prints them.

    Returns what was made and measured: `plan`, `perplexity`, `dense_perplexity`, `excess`, of an
    encoder `answers`, `out`, ...; None where a killed run had finished the compression and only its
    recovery was left.
    Raises UserError for anything that the user can mend; nothing is then left in `out`.
    """
    settings = _settings(CompressConfig, model=model, **options)
    from sp3llm.compression import story

    return story.compress(settings, _console(progress))


def recover(
    model: str | Path, teacher: str | Path | None = None, *, progress: bool = False, **options: Any
) -> "Recovery | None":
    """Tune a compressed model against the dense one; the folder `out` holds the result.

    `teacher` None is the model that the record of `model` names. `options` are those of
    `sp3llm recover`: `steps=300`, `lora=16`, `teacher_dtype="nf4"`, ...

    Returns what was trained and measured; None in every process of `accelerate launch` but the
    first. Raises UserError for anything that the user can mend.
    """
    settings = _settings(RecoverConfig, model=model, teacher=teacher, **options)
    from sp3llm.recovery import story

    return story.recover(settings, _console(progress))


def _settings(kind: type, **options: Any) -> Any:
    """The settings of a command; texts become paths where the option is one, and back.

    Raises UserError for an option that there is not.
    """
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind)]
    for name, value in options.items():
        if name not in names:
            near = get_close_matches(name, names, n=1)
            meant = f"did you mean {near[0]}?" if near else "docs/options.md lists all."
            raise UserError(f"Expected an option of sp3llm {kind.command}, found '{name}': {meant}")
        kinds = get_args(hints[name]) or (hints[name],)
        if isinstance(value, str) and Path in kinds and str not in kinds:
            options[name] = Path(value)
        elif isinstance(value, Path) and str in kinds and Path not in kinds:
            options[name] = str(value)
    return kind(**options)


def _console(progress: bool) -> "Console":
    import transformers
    from rich.console import Console

    transformers.utils.logging.set_verbosity_error()
    return Console(quiet=not progress)
