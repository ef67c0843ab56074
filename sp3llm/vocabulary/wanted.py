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
    counts_SV: "Tensor"
    """By set, in the order of `sources`, and by row of the dense table; int64."""
    expected_V: "Tensor | None" = None
    """Of a set's next tokens, as the dense model expects them, in the mean over the sets: `(V,)`,
    float64; None: it was not asked."""

    @property
    def counts(self) -> "Tensor":
        """In all sets together, by row of the dense table: `(V,)`, int64."""
        return self.counts_SV.sum(0)

    @property
    def shares(self) -> "Tensor":
        """Of a set's tokens, in the mean over the sets, by row of the dense table: `(V,)`, float64.
        Every set counts alike, as in calibration text: beside a library of books, a file of the
        user's own would decide nothing. Where the model was asked what it expects, that is half of
        it: of the many tokens that text has once or never it alone knows which will be next.
        """
        counts_SV = self.counts_SV.double()
        shares_V = (counts_SV / counts_SV.sum(1, keepdim=True).clamp_min(1)).mean(0)
        return shares_V if self.expected_V is None else (shares_V + self.expected_V) / 2

    @property
    def tokens(self) -> int:
        """In the text."""
        return int(self.counts_SV.sum())

    @property
    def used(self) -> int:
        """Different ones among them."""
        return int((self.counts > 0).sum())

    def covered(self, ids: tuple[int, ...]) -> float:
        """Share of the text's tokens that are among these."""
        import torch

        return self.counts[torch.tensor(ids)].sum().item() / self.tokens


def wanted_tokens(names: str, folder: Path, rows: int) -> Wanted:
    """Read the comma-separated sets `names` with the tokenizer of a model folder whose table has
    that many rows; of every set all but what is for evaluation.

    Raises UserError if a set is unknown, unreadable or empty.
    """
    import torch

    tokenizer = load_tokenizer(folder)
    render = chat_render(tokenizer)
    sources = [resolve_source(name) for name in split_names(names)]
    counts = [token_counts(tokenizer, _documents(source, render), rows) for source in sources]
    for source, counts_V in zip(sources, counts, strict=True):
        if not counts_V.any():
            raise UserError(
                f"Expected text in '{source.name}', which says which tokens stay, found none: name "
                "other text with --vocab-from."
            )
    return Wanted(tuple(source.name for source in sources), torch.stack(counts))


def without_documents(wanted: Wanted, folder: Path, documents: frozenset[str]) -> Wanted:
    """What all of the text but some documents uses, these given by the hashes of their content."""
    import torch

    tokenizer = load_tokenizer(folder)
    render = chat_render(tokenizer)
    rows = wanted.counts_SV.shape[1]
    held_back = []
    for name in wanted.sources:
        read = _documents(resolve_source(name), render)
        some = (document for document in read if content_hash(document) in documents)
        held_back.append(token_counts(tokenizer, some, rows))
    return replace(wanted, counts_SV=wanted.counts_SV - torch.stack(held_back))


def _documents(source: TextSource, render: Render) -> Iterator[str]:
    """All documents of a set that may be learned from, or as many as are streamed."""
    parts = ("train", "calibration") if source.stdlib else ("train",)
    read = 0
    for document in chain.from_iterable(read_documents(source, part, 0, render) for part in parts):
        yield document
        read += len(document)
        if source.dataset and source.streaming and read >= _STREAMED_CHARACTERS:
            return
