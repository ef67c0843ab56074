"""The first stage of a compression, before anything is measured: the tokens that stay."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sp3llm.errors import UserError
from sp3llm.options import CompressConfig

if TYPE_CHECKING:
    from rich.console import Console

    from sp3llm.models.checkpoint import Checkpoint
    from sp3llm.models.families import Family
    from sp3llm.models.shapes import Shape
    from sp3llm.planning.limits import Limits
    from sp3llm.vocabulary.choosing import ChosenVocabulary
    from sp3llm.vocabulary.wanted import Wanted


def vocabularies_of(
    settings: CompressConfig,
    dense: "Checkpoint",
    family: "Family",
    limits: "Limits",
    evaluation: str,
    wanted: "Wanted | None",
    console: "Console",
) -> "list[ChosenVocabulary]":
    """The tokens that stay, and where a search may choose others, ever fewer of them; nothing where
    no text was named that says which.

    `evaluation` are the held-out sets, `wanted` is what another process has found in the text.

    Raises UserError if the text cannot be read, the held-out text is among it, the tokenizer cannot
    be rewritten, or more must stay than is asked for.
    """
    from sp3llm.models.families import VOCAB, axis_sizes
    from sp3llm.planning.fewer_rows import rows_alone
    from sp3llm.runtime.progress import print_line
    from sp3llm.vocabulary.choosing import MOST_VOCABULARIES, choose_vocabularies
    from sp3llm.vocabulary.wanted import wanted_tokens

    if settings.vocab_from is None:
        return []
    if wanted is None:
        _check_held_out(settings.vocab_from, evaluation)
        with console.status("tokens that the text uses"):
            rows = axis_sizes(family, dense.config)[VOCAB]
            wanted = wanted_tokens(settings.vocab_from, dense.folder, rows)
    predicts = settings.refit and settings.moments != "raw"
    most = MOST_VOCABULARIES if predicts and settings.allocation == "search" else 1
    size, devices = settings.vocab_size, settings.tensor_parallel
    room = rows_alone(family, dense.config, limits)
    chosen = choose_vocabularies(dense.folder, wanted, size, devices, most, room)
    for line in chosen[0].lines():
        print_line(console, line)
    return chosen


def shapes_with(
    vocabularies: "list[ChosenVocabulary]",
    family: "Family",
    config: "Mapping[str, Any]",
    limits: "Limits",
) -> "tuple[list[Shape], list[ChosenVocabulary]]":
    """The shapes to choose from, with every vocabulary, and these, the largest first, without those
    that are too much for any shape within the budget. `config` is the whole dense model's.

    Raises UserError as `planning.candidates.candidates` does.
    """
    from sp3llm.planning.candidates import candidates
    from sp3llm.planning.fewer_rows import with_fewer_rows

    rows = [vocabulary.kept.rows for vocabulary in vocabularies]
    for place in range(len(rows) - 1):
        try:
            of_rows = replace(limits, vocab_rows=rows[place])
            shapes = candidates(family, config, of_rows)
        except UserError:
            continue
        shapes += with_fewer_rows(family, config, of_rows, shapes, rows[place + 1 :])
        return shapes, vocabularies[place:]
    last = replace(limits, vocab_rows=rows[-1]) if rows else limits
    return candidates(family, config, last), vocabularies[-1:]


def _check_held_out(vocab_from: str, evaluation: str) -> None:
    """Raise UserError if a file is to say which tokens stay and to be scored on as well: a file is
    read whole for either.
    """
    from sp3llm.text.sources import local_files

    paths = {path.resolve() for path in local_files(vocab_from).values()}
    for name, path in local_files(evaluation).items():
        if path.resolve() in paths:
            raise UserError(
                f"Expected other held-out text than that of --vocab-from, found '{name}' in both: "
                "a vocabulary made from the text that it is scored on tells nothing, so name "
                "another file with --eval-text."
            )
