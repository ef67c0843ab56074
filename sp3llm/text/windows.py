"""Text for calibration and evaluation: documents in, fixed-length token windows out.

Three rules hold everywhere, training script included:

* **One split.** `part_of` sends a document to `train`, `calibration` or `evaluation` by a hash
  of its own content, so no list of files has to be kept and no run can leak into another.
* **Packed, never padded.** Documents are tokenized, joined and cut into windows of exactly
  `seq_len` tokens; each window begins with the tokenizer's BOS where the tokenizer adds one.
* **Same seed, same windows.** The order of documents depends on the seed and their content only.
"""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sp3llm.errors import UserError
from sp3llm.text.batches import Batch, token_ids
from sp3llm.text.rows import chat_render
from sp3llm.text.sources import TextSource, read_documents, read_hub, resolve_source, split_names
from sp3llm.text.split import content_hash, is_for_stopping
from sp3llm.text.tokenizer import adds_bos, encode

if TYPE_CHECKING:
    import torch

Encode = Callable[[Any, str], list[int]]
"""What makes token ids of a text, called with a tokenizer and the text."""

# Documents joined by text are tokenized in runs of about this many characters: together, as the
# tokens at a joint depend on both sides, but without holding a whole set.
_RUN_CHARS = 1 << 16
# Set in an id, while text is packed, where the token begins a word.
_BEGINS_WORD = 1 << 32


@dataclass(frozen=True)
class Windows:
    """Windows of token ids, and where they come from."""

    tokens: "torch.Tensor"
    """Token ids, `(samples, seq_len)`, int64."""
    sources: tuple[str, ...]
    """Names of the sets that they are drawn from."""
    documents: frozenset[str]
    """Content hashes of every document drawn."""
    begins_with_bos: bool
    """Each window begins with the tokenizer's BOS."""
    dropped_documents: int = 0
    """Documents left out since they were to be excluded, such as those of the other text."""
    begins_word: "torch.Tensor | None" = None
    """Which tokens begin a word, of those that the tokenizer cuts text into first, like `tokens`;
    None: it was not asked."""

    @property
    def sha256(self) -> str:
        """SHA-256 of the token ids and their shape, as 64 hex digits."""
        header = repr(tuple(self.tokens.shape)).encode()
        return hashlib.sha256(header + self.tokens.numpy().tobytes()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What `sp3llm.json` records of these windows."""
        return {
            "sources": list(self.sources),
            "samples": self.tokens.shape[0],
            "seq_len": self.tokens.shape[1],
            "begins_with_bos": self.begins_with_bos,
            "documents": len(self.documents),
            "dropped_documents": self.dropped_documents,
            "sha256": self.sha256,
        }


def pack(
    documents: Iterable[str], tokenizer: Any, join: str, encode: Encode = encode
) -> Iterator[list[int]]:
    """Yield lists of token ids, as `encode` has them, which, one after the other, are the packed
    text.

    With `join="eos"` every document is followed by the tokenizer's EOS (a blank line where there
    is none); otherwise documents are joined by that text before they are tokenized.
    """
    if join == "eos" and tokenizer.eos_token_id is not None:
        for document in documents:
            yield [*encode(tokenizer, document), tokenizer.eos_token_id]
        return
    separator = "\n\n" if join == "eos" else join
    run: list[str] = []
    length = 0
    for document in documents:
        run.append(document)
        length += len(document)
        if length >= _RUN_CHARS:
            yield encode(tokenizer, separator.join(run) + separator)
            run, length = [], 0
    if run:
        yield encode(tokenizer, separator.join(run) + separator)


def _encode_words(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, those that begin a word marked by `_BEGINS_WORD`."""
    found = tokenizer(text, add_special_tokens=False, verbose=False)
    words = [-1, *found.word_ids()]
    return [
        token if word is not None and word == before else token | _BEGINS_WORD
        for token, word, before in zip(found["input_ids"], words[1:], words, strict=False)
    ]


def cut_windows(
    runs: Iterable[list[int]], seq_len: int, bos_token_id: int | None
) -> Iterator[list[int]]:
    """Cut packed text into consecutive windows of exactly `seq_len` ids, each of which begins with
    the BOS if one is given.

    What is left at the end and does not fill a window is dropped.
    """
    head = [] if bos_token_id is None else [bos_token_id]
    body = seq_len - len(head)
    pending: list[int] = []
    for run in runs:
        pending.extend(run)
        whole = len(pending) - len(pending) % body
        for start in range(0, whole, body):
            yield head + pending[start : start + body]
        del pending[:whole]


def calibration_windows(
    names: str, tokenizer: Any, samples: int, seq_len: int, seed: int
) -> Windows:
    """Exactly `samples` windows of `seq_len` tokens from the comma-separated sets `names`.

    Several sets give equal shares (the first ones one window more where it does not divide) and
    take turns, so that the first windows, which gradients and trials see, and the last, which
    choose ridges, are of all of them. Documents are taken in an order drawn from `seed`.

    Raises UserError if a set is unknown, unreadable, empty or too small.
    """
    recipe = _Recipe(tokenizer, seq_len, seed)
    parts = []
    for source, share in _shares(names, samples):
        part = _draw(
            read_documents(source, "calibration", seed, chat_render(tokenizer)),
            source,
            share,
            recipe,
        )
        if len(part.rows) < share:
            raise UserError(
                f"Calibration set '{source.name}' holds {len(part.rows)} windows of {seq_len} "
                f"tokens, {share} were asked for: lower --samples or --seq-len, or add a set to "
                "--calib."
            )
        parts.append(part)
    return _joined(parts, recipe, in_turns=True)


def evaluation_windows(
    names: str,
    tokenizer: Any,
    samples: int,
    seq_len: int,
    exclude: frozenset[str] = frozenset(),
    words: bool = False,
) -> Windows:
    """At most `samples` windows of held-out text, in a fixed order that no seed changes.

    Documents whose content hash is in `exclude` (the calibration documents) are dropped and
    counted. With `words`, which asks for a tokenizer of the tokenizers library, it is noted which
    tokens begin one.

    Raises UserError if not even one window is left.
    """
    recipe = _Recipe(tokenizer, seq_len, None, exclude, words)
    parts = [
        _draw(
            read_documents(source, "evaluation", render=chat_render(tokenizer)),
            source,
            share,
            recipe,
        )
        for source, share in _shares(names, samples)
    ]
    if not any(part.rows for part in parts):
        raise UserError(
            f"Evaluation text '{names}' does not fill one window of {seq_len} tokens after "
            f"{sum(part.dropped for part in parts)} documents that also occur in the calibration "
            "set were dropped: choose other text with --eval-text."
        )
    return _joined(parts, recipe)


def unbroken_windows(name: str, tokenizer: Any, seq_len: int) -> Windows:
    """All windows of a set's evaluation split, cut as papers on pruning cut them.

    GPTQ, SparseGPT and SliceGPT join the rows of the split by blank lines, empty rows too, tokenize
    that text (a `.txt` as it stands) at once (a BOS, where the tokenizer adds one, comes at its
    very beginning only) and cut it into windows that do not overlap. `evaluation_windows` differs:
    it drops duplicates, knows where documents end, and begins every window with the BOS.

    Raises UserError if the set is unknown, unreadable or shorter than one window.
    """
    source = resolve_source(name)
    if source.dataset and source.evaluation_split:
        rows = list(read_hub(replace(source, document_start=None), source.evaluation_split, 0))
    else:
        rows = list(read_documents(source, "evaluation", render=chat_render(tokenizer)))
    ids = tokenizer(("\n\n" if source.join else "").join(rows), verbose=False)["input_ids"]
    windows = list(cut_windows([ids], seq_len, None))
    if not windows:
        raise UserError(
            f"Evaluation text '{name}' holds {len(ids)} tokens, fewer than one window of "
            f"{seq_len}: choose other text or shorter windows."
        )
    import torch

    return Windows(
        tokens=torch.tensor(windows, dtype=torch.int64),
        sources=(source.name,),
        documents=frozenset(map(content_hash, rows)),
        begins_with_bos=False,
    )


def training_windows(
    names: str,
    tokenizer: Any,
    samples: int,
    seq_len: int,
    seed: int,
    exclude: frozenset[str],
    stopping: bool = False,
    words: bool = False,
    to_stop_by: bool = False,
) -> Windows:
    """At most `samples` windows to train on from the comma-separated sets `names`, or, with
    `stopping`, of what is kept apart from that to decide when to stop.

    Sets give equal shares, or all they have. Documents whose content hash is in `exclude` (those
    of the evaluation) are dropped and counted; the others come in an order drawn from `seed`.
    `words` is that of `evaluation_windows`; `to_stop_by` says that the sets were named for deciding
    when to stop.

    Raises UserError if a set is unknown or unreadable, or not one window is left.
    """
    recipe = _Recipe(tokenizer, seq_len, seed, exclude, words)
    parts = []
    for source, share in _shares(names, samples):
        training = read_documents(source, "train", seed, chat_render(tokenizer))
        documents = (text for text in training if is_for_stopping(text) == stopping)
        parts.append(_draw(documents, source, share, recipe))
    if not any(part.rows for part in parts):
        text, others = "the training text", "the evaluation"
        apart = " and a sixteenth kept apart to decide when to stop recovery"
        advice = "choose text of more documents"
        if to_stop_by:
            text, others = "the text of --stop-text", "the evaluation and the training text"
        elif stopping:
            text = "a sixteenth of the training text, kept to decide when to stop,"
            apart, advice = "", "name text for it with --stop-text"
        raise UserError(
            f"Expected at least one window of {seq_len} tokens in {text} "
            f"'{names}' after {sum(part.dropped for part in parts)} documents of {others} "
            f"were dropped{apart}, found none: {advice}, or lower --seq-len."
        )
    return _joined(parts, recipe)


def check_token_ids(batches: "Iterable[Batch]", vocab_size: int, tokenizer_folder: Path) -> None:
    """Raise UserError if windows, or rows of a task, hold token ids that a model with `vocab_size`
    of them lacks.
    """
    largest = max(token_ids(batch).max().item() for batch in batches)
    if largest >= vocab_size:
        raise UserError(
            f"Expected token ids below the model's vocab_size {vocab_size}, found {largest}: the "
            f"tokenizer in '{tokenizer_folder}' belongs to another model."
        )


@dataclass(frozen=True)
class _Recipe:
    """How documents become windows."""

    tokenizer: Any
    seq_len: int
    seed: int | None
    """Draws the order of the documents; None: the order they are read in."""
    exclude: frozenset[str] = frozenset()
    """Content hashes of documents to drop."""
    words: bool = False
    """Whether it is noted which tokens begin a word."""


@dataclass(frozen=True)
class _Drawn:
    """Windows of one set."""

    source: str
    """The set's name."""
    rows: list[list[int]]
    """Token ids, a list for each window."""
    documents: set[str]
    """Content hashes of the documents that were read to fill them."""
    dropped: int
    """Documents that the recipe excludes."""


def _shares(names: str, samples: int) -> list[tuple[TextSource, int]]:
    """The sets of a comma-separated list, each with how many of `samples` windows it is to give:
    equal shares, the first ones one window more where it does not divide.
    """
    sources = [resolve_source(name) for name in split_names(names)]
    share, left = divmod(samples, len(sources))
    return [(source, share + (index < left)) for index, source in enumerate(sources)]


def _draw(documents: Iterable[str], source: TextSource, samples: int, recipe: _Recipe) -> _Drawn:
    """At most `samples` windows of a set's documents; no more are read than fill them.

    A hub set that is streamed is shuffled as it comes, by `read_documents`.
    """
    drawn: set[str] = set()
    dropped: list[str] = []

    def allowed() -> Iterator[str]:
        for document in documents:
            digest = content_hash(document)
            if digest in recipe.exclude:
                dropped.append(digest)
            else:
                yield document

    def noted(ordered: Iterable[str]) -> Iterator[str]:
        for document in ordered:
            drawn.add(content_hash(document))
            yield document

    ordered: Iterable[str] = allowed()
    if recipe.seed is not None and not (source.dataset and source.streaming):
        ordered = sorted(ordered, key=content_hash)
        random.Random(recipe.seed).shuffle(ordered)
    bos = recipe.tokenizer.bos_token_id if adds_bos(recipe.tokenizer) else None
    encoder = _encode_words if recipe.words else encode
    runs = pack(noted(ordered), recipe.tokenizer, source.join, encoder)
    rows = list(islice(cut_windows(runs, recipe.seq_len, bos), samples))
    return _Drawn(source.name, rows, drawn, len(dropped))


def _joined(parts: list[_Drawn], recipe: _Recipe, in_turns: bool = False) -> Windows:
    """The windows of all sets, one set after the other, or a window of each in turn."""
    import torch

    rows = [row for part in parts for row in part.rows]
    if in_turns:
        rows = [row for turn in zip_longest(*(part.rows for part in parts)) for row in turn if row]
    tokens = torch.tensor(rows, dtype=torch.int64)
    return Windows(
        tokens=tokens % _BEGINS_WORD,
        sources=tuple(part.source for part in parts),
        documents=frozenset().union(*(part.documents for part in parts)),
        begins_with_bos=adds_bos(recipe.tokenizer),
        dropped_documents=sum(part.dropped for part in parts),
        begins_word=tokens >= _BEGINS_WORD if recipe.words else None,
    )
