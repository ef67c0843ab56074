"""How often a text uses each token of a vocabulary."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from sp3llm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# Documents are tokenized together in runs of about this many characters, which keeps all cores busy
# and holds no set whole.
_RUN_CHARS = 1 << 22


def token_counts(tokenizer: Any, documents: Iterable[str], size: int) -> "Tensor":
    """How often each of `size` tokens occurs in the documents, `(size,)`, int64.

    Special tokens that a tokenizer adds to a text are not counted.

    Raises UserError if a document holds a token id of `size` or more.
    """
    import torch

    counts_V = torch.zeros(size, dtype=torch.int64)
    for run in _runs(documents):
        ids = tokenizer(run, add_special_tokens=False, verbose=False)["input_ids"]
        found = torch.bincount(torch.tensor(list(chain.from_iterable(ids)), dtype=torch.int64))
        if len(found) > size:
            raise UserError(
                f"Expected token ids below the model's vocab_size {size}, found {len(found) - 1}: "
                "the tokenizer belongs to another model."
            )
        counts_V[: len(found)] += found
    return counts_V


def _runs(documents: Iterable[str]) -> Iterator[list[str]]:
    """Lists of documents of about `_RUN_CHARS` characters together."""
    run: list[str] = []
    length = 0
    for document in documents:
        run.append(document)
        length += len(document)
        if length >= _RUN_CHARS:
            yield run
            run, length = [], 0
    if run:
        yield run
