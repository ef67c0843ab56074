"""Which tokens text needs, as users name it: the sets that are read, and what was found in them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from sp3llm.errors import UserError
from sp3llm.text.rows import Render, chat_render
from sp3llm.text.sources import TextSource, read_documents, resolve_source, split_names
from sp3llm.text.split import content_hash
from sp3llm.text.tokenizer import load_tokenizer
from sp3llm.vocabulary.counting import token_counts

if TYPE_CHECKING:
    from torch import Tensor

# Of a hub set that is streamed, which may be a copy of the web, so many characters are read.
_STREAMED_CHARACTERS = 64_000_000


@dataclass(frozen=True)
class Wanted:
    """How often text uses every token of a vocabulary."""

    sources: tuple[str, ...]
    """Names of the sets that were read."""
    counts_V: "Tensor"
    """By row of the dense table, int64."""

    @property
    def tokens(self) -> int:
        """In the text."""
        return int(self.counts_V.sum())

    @property
    def used(self) -> int:
        """Different ones among them."""
        return int((self.counts_V > 0).sum())

    def covered(self, ids: tuple[int, ...]) -> float:
        """Share of the text's tokens that are among these."""
        import torch

        return self.counts_V[torch.tensor(ids)].sum().item() / self.tokens


def wanted_tokens(names: str, folder: Path, rows: int) -> Wanted:
    """Read the comma-separated sets `names` with the tokenizer of a model folder whose table has
    that many rows; of every set all but what is for evaluation.

    Raises UserError if a set is unknown, unreadable or empty.
    """
    tokenizer = load_tokenizer(folder)
    sources = [resolve_source(name) for name in split_names(names)]
    render = chat_render(tokenizer)
    documents = chain.from_iterable(_documents(source, render) for source in sources)
    wanted = Wanted(
        tuple(source.name for source in sources), token_counts(tokenizer, documents, rows)
    )
    if not wanted.tokens:
        raise UserError(
            f"Expected text in '{names}', which says which tokens stay, found none: name other "
            "text with --vocab-from."
        )
    return wanted


def without_documents(wanted: Wanted, folder: Path, documents: frozenset[str]) -> Wanted:
    """What all of the text but some documents uses, these given by the hashes of their content."""
    tokenizer = load_tokenizer(folder)
    render = chat_render(tokenizer)
    read = chain.from_iterable(_documents(resolve_source(name), render) for name in wanted.sources)
    held_back = (document for document in read if content_hash(document) in documents)
    counts_V = token_counts(tokenizer, held_back, len(wanted.counts_V))
    return replace(wanted, counts_V=wanted.counts_V - counts_V)


def _documents(source: TextSource, render: Render) -> Iterator[str]:
    """All documents of a set that may be learned from, or as many as are streamed."""
    parts = ("train", "calibration") if source.stdlib else ("train",)
    read = 0
    for document in chain.from_iterable(read_documents(source, part, 0, render) for part in parts):
        yield document
        read += len(document)
        if source.dataset and source.streaming and read >= _STREAMED_CHARACTERS:
            return
