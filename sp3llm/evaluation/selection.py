"""What `sp3llm score --tasks` may name: presets, which are files, beside the tasks of lm-eval."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sp3llm.errors import UserError, reason


@dataclass(frozen=True)
class TokenPerplexity:
    """Perplexity a token over windows that do not overlap."""

    text: str
    """A text set, as `--calib` names it."""
    seq_len: int
    """Tokens a window."""

    def __str__(self) -> str:
        return f"{self.text}, {self.seq_len} tokens"


@dataclass(frozen=True)
class Mean:
    """A mean over tasks, as papers report it."""

    preset: str
    """The preset that asks for it."""
    tasks: tuple[str, ...]
    """What it is taken over."""
    metrics: tuple[str, ...]
    """Of each task, the first of these that it has."""


@dataclass(frozen=True)
class Selection:
    """What `--tasks` asks for, once presets and patterns are resolved."""

    tasks: tuple[str, ...]
    """lm-eval's names of tasks and groups."""
    perplexities: tuple[TokenPerplexity, ...]
    """Token perplexities."""
    means: tuple[Mean, ...]
    """Means over tasks."""


def shipped(name: str) -> Path:
    """`presets` or `tasks`: inside the installed package, or in `eval/` of a clone."""
    package = Path(__file__).parents[1]
    installed = package / name
    return installed if installed.is_dir() else package.parent / "eval" / name


def presets() -> dict[str, Path]:
    """The presets that come with sp3llm."""
    return {path.stem: path for path in sorted(shipped("presets").glob("*.yaml"))}


def read_preset(path: Path) -> dict[str, Any] | None:
    """The preset in a YAML file; None where the file holds something else, such as a task.

    Raises UserError if it cannot be read, or is a preset that has other keys or values.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"Cannot read '{path}' ({reason(error)}): name a preset or a task file that exists."
        ) from error
    try:
        preset = yaml.safe_load(text)
    except yaml.YAMLError:  # a task file, with tags that lm-eval alone knows
        return None
    known = {"tasks", "mean_of", "token_perplexity"}
    if not isinstance(preset, dict) or not known & set(preset):
        return None
    counted = preset.get("token_perplexity") or {"text": "", "seq_lens": []}
    if not (
        set(preset) <= known
        and isinstance(counted, dict)
        and set(counted) == {"text", "seq_lens"}
        and all(isinstance(n, int) and n > 1 for n in counted["seq_lens"])
    ):
        raise UserError(
            f"Expected the preset '{path}' to hold tasks, mean_of, and token_perplexity with text "
            f"and seq_lens, found {', '.join(map(str, preset))}: compare it with "
            f"{shipped('presets') / 'wikitext-token.yaml'}."
        )
    return preset
