"""What `sp3llm plan` finds out: the shapes within a budget, what they cost, what a run will need.

From `config.json` alone, and the tokenizer where text says which tokens stay: no weights are read.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sp3llm.models import families
from sp3llm.models.families import Family
from sp3llm.models.formats import formats_of
from sp3llm.models.shapes import Cost, Shape
from sp3llm.models.source import read_config, resolve_config, resolve_tokenizer
from sp3llm.options import PlanConfig
from sp3llm.planning.candidates import candidates
from sp3llm.planning.encoders import check_encoder
from sp3llm.planning.fewer_rows import rows_alone
from sp3llm.planning.limits import Limits, cost_within, limits_of
from sp3llm.planning.needs import Needs, Workload, needs_of
from sp3llm.planning.recovery_needs import RecoveryNeeds, recovery_needs_of
from sp3llm.planning.windows import window_length

if TYPE_CHECKING:
    from sp3llm.vocabulary.choosing import ChosenVocabulary

# Bytes of a weight by the dtype that a config states, where it is not two.
_ITEMSIZES = {"float64": 8, "float32": 4}


@dataclass(frozen=True)
class Overview:
    """The plan of a model before one of its shapes is chosen."""

    model: str
    """Name to show."""
    notes: tuple[str, ...]
    """Lines to print where another repository was taken than the one named, or another class."""
    family: Family
    config: Mapping[str, Any]
    """`config.json` of the dense model."""
    vocabulary: "ChosenVocabulary | None"
    """The tokens that stay; None: all."""
    limits: Limits
    shapes: list[Shape]
    """Within the budget, the one that spends all of it on the hidden size first."""
    costs: list[Cost]
    """Of each of the shapes."""
    seq_len: int
    """Tokens a calibration window."""
    needs: Needs
    """Of a compression to the first shape."""
    recovery_needs: RecoveryNeeds | None
    """Of a recovery after it, where one was asked about."""

    def describe(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        config, export_as = self.config, self.limits.export_as
        shapes = [
            {
                **asdict(shape),
                **asdict(cost),
                "bytes_by_format": formats_of(self.family, config, shape, export_as),
            }
            for shape, cost in zip(self.shapes, self.costs, strict=True)
        ]
        plain = {
            "model": self.model,
            "limits": asdict(self.limits),
            "shapes": shapes,
            "needs": asdict(self.needs),
        }
        if self.vocabulary is not None:
            kept = self.vocabulary.kept
            plain["vocabulary"] = {"tokens": len(kept.old_ids), "rows": kept.rows}
        if self.recovery_needs is not None:
            plain["recovery_needs"] = asdict(self.recovery_needs)
        return plain


def overview_of(settings: PlanConfig) -> Overview:
    """Plan a model.

    Raises UserError if there is no such model, it cannot be compressed, or no shape fits.
    """
    if settings.vocab_from is None:
        config, name, note = resolve_config(settings.model)
    else:
        folder, name, note = resolve_tokenizer(settings.model)
        config = read_config(folder)
    family = families.family_of(config)
    left_out = families.left_out_line(family, config)
    pooler = None if left_out is None else _pooler_line(family, config)
    notes = tuple(filter(None, (note, left_out, pooler)))
    check_encoder(family, settings.compression, compresses=False)
    stated = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    itemsize = _ITEMSIZES.get(stated.removeprefix("torch."), 2)
    limits = limits_of(settings.compression, itemsize)
    vocabulary = None
    if settings.vocab_from is not None:
        vocabulary = _vocabulary(settings, folder, family, config, limits)
        limits = replace(limits, vocab_rows=vocabulary.kept.rows)
    shapes = candidates(family, config, limits)
    seq_len = window_length(family, config, settings.seq_len)
    samples = settings.compression.calibrated_with(family.task_head is not None)
    workload = Workload(samples, settings.eval_samples, seq_len, itemsize)
    needs = needs_of(family, config, shapes[0], workload, limits.export_as)
    recovery_needs = None
    if settings.recover:
        recovery_needs = recovery_needs_of(
            family, config, shapes[0], settings.recovery, seq_len, itemsize, limits.export_as
        )
    costs = [cost_within(family, config, limits, shape) for shape in shapes]
    return Overview(
        *(name, notes, family, config, vocabulary, limits, shapes, costs),
        *(seq_len, needs, recovery_needs),
    )


def _pooler_line(family: Family, config: Mapping[str, Any]) -> str | None:
    """A line to print where a pooler is counted and `config.json` names a class without one, whose
    checkpoints may hold none: those that transformers saves do not.
    """
    without = families.as_stored(family, ())
    if without is family:
        return None
    pooler = families.count_parameters(family, config) - families.count_parameters(without, config)
    return (
        f"A pooler of {pooler:,} parameters is counted, which {config['architectures'][0]} has no "
        "use for: a checkpoint without it has so many less, and none is made."
    )


def _vocabulary(
    settings: PlanConfig, folder: Path, family: Family, config: Mapping[str, Any], limits: Limits
) -> "ChosenVocabulary":
    """The tokens that stay of the tokenizer in a model folder."""
    from sp3llm.vocabulary.choosing import choose_vocabularies
    from sp3llm.vocabulary.wanted import wanted_tokens

    rows = families.axis_sizes(family, config)[families.VOCAB]
    wanted = wanted_tokens(settings.vocab_from, folder, rows)
    size, devices = settings.vocab_size, settings.tensor_parallel
    room = rows_alone(family, config, limits)
    return choose_vocabularies(folder, wanted, size, devices, most=1, room=room)[0]
