"""The first stage of a compression, before anything is measured: the tokens that stay."""

from typing import TYPE_CHECKING

from sp3llm.errors import UserError
from sp3llm.options import CompressConfig

if TYPE_CHECKING:
    from rich.console import Console

    from sp3llm.models.checkpoint import Checkpoint
    from sp3llm.models.families import Family
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
