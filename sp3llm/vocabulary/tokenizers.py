"""The vocabulary of a model folder's tokenizer, and which of its tokens must stay with others."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sp3llm.errors import UserError
from sp3llm.runtime.json_files import read_object
from sp3llm.text.tokenizer import has_backend, load_tokenizer
from sp3llm.vocabulary.ids import named_ids
from sp3llm.vocabulary.kept import ROW_MULTIPLE, Kept, kept_of
from sp3llm.vocabulary.merging import Ranks, passed_through
from sp3llm.vocabulary.pieces import read_pieces

if TYPE_CHECKING:
    from torch import Tensor

_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's tokens, and what must be known of how it comes by them."""

    folder: Path
    """The model folder."""
    ids: Mapping[str, int]
    """By token: its id. Added tokens included."""
    tokens: Mapping[int, str]
    """By id: its token."""
    added: Mapping[str, Mapping[str, Any]]
    """By token: how an added one is matched (`normalized`, `lstrip`, ...)."""
    ranks: Ranks
    """Of byte-pair encoding: its merges. Empty otherwise."""
    required: frozenset[int]
    """Ids that stay in any case."""
    _needs: dict[int, frozenset[int]] = field(default_factory=dict, repr=False, compare=False)
    """What `needs` has found so far."""

    def needs(self, token_id: int) -> frozenset[int]:
        """A token's id, and those of all that merges pass through on the way to it."""
        if token_id not in self._needs:
            passed = passed_through(self.tokens[token_id], self.ranks) if self.ranks else ()
            found = (self.ids[part] for part in passed if part in self.ids)
            self._needs[token_id] = frozenset((token_id, *found))
        return self._needs[token_id]


def read_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary of the tokenizer that transformers loads from a model folder.

    Raises UserError if there is none, or it is one whose files cannot be rewritten for fewer
    tokens; the sentence says why.
    """
    _check_files(folder)
    tokenizer = load_tokenizer(folder)
    if not has_backend(tokenizer):
        raise refused(
            folder, f"{type(tokenizer).__name__}, which the tokenizers library does not run"
        )
    parsed = json.loads(tokenizer.backend_tokenizer.to_str())
    model = parsed["model"]
    _check_model(folder, model)
    ids = tokenizer.get_vocab()
    added = added_tokens(parsed)
    named: set[int] = set()
    for name in _CONFIGS:
        if (folder / name).is_file():
            named |= named_ids(read_object(folder / name, "the model"))
    tokens = {token_id: token for token, token_id in ids.items()}
    staying = {*_basic_tokens(parsed), *added, *tokenizer.all_special_tokens}
    return Vocabulary(
        folder=folder,
        ids=ids,
        tokens=tokens,
        added=added,
        ranks=_ranks(model),
        required=frozenset(
            {ids[token] for token in staying if token in ids} | (named & tokens.keys())
        ),
    )


def added_tokens(parsed: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The added tokens of a `tokenizer.json`: by token, how it is matched."""
    return {
        entry["content"]: {key: entry[key] for key in entry if key not in ("id", "content")}
        for entry in parsed["added_tokens"]
    }


def closed(vocabulary: Vocabulary, wanted: Iterable[int]) -> set[int]:
    """The ids wanted, those that stay in any case, and all that merges need to reach them."""
    return {
        need for token_id in {*wanted, *vocabulary.required} for need in vocabulary.needs(token_id)
    }


def most_wanted(
    vocabulary: Vocabulary,
    uses_V: "Tensor",
    size: int | None,
    multiple: int = ROW_MULTIPLE,
) -> Kept:
    """The tokens that a text uses most, and all that must stay with them.

    `uses_V` says how often a text uses each row of the dense table, as a count or a share. `size`
    is how many tokens are kept at most, None for every one that the text uses. They are taken by
    their use, of equal ones the lower id first; one that needs more others than there is room for
    is passed by. The table's rows are a multiple of `multiple`, or as many as the dense one has.

    Raises UserError if `size` is less than what must stay, or the tokenizer has tokens beyond the
    dense table.
    """
    rows = len(uses_V)
    beyond = max(vocabulary.tokens)
    if beyond >= rows:
        raise UserError(
            f"Expected a row for every token of the tokenizer in '{vocabulary.folder}', found "
            f"{vocabulary.tokens[beyond]!r} with the id {beyond} and vocab_size {rows}: take the "
            "token out of the tokenizer, or resize the model's embeddings."
        )
    kept = closed(vocabulary, ())
    if size is not None and size < len(kept):
        raise UserError(
            f"Expected a vocabulary of at least {len(kept)} tokens, which are the special and "
            "added ones and those that any text needs of the tokenizer in "
            f"'{vocabulary.folder}', found {size}: ask for more."
        )
    room = rows if size is None else size
    for token_id in _by_use(uses_V):
        if len(kept) == room:
            break
        if token_id in vocabulary.tokens:
            needs = vocabulary.needs(token_id) - kept
            if len(kept) + len(needs) <= room:
                kept |= needs
    return kept_of(kept, rows, multiple)


def _by_use(uses_V: "Tensor") -> list[int]:
    """Ids that occur, the most frequent first, of equal ones the lower first."""
    order = uses_V.argsort(descending=True, stable=True)
    return order[: int((uses_V > 0).sum())].tolist()


def _ranks(model: Mapping[str, Any]) -> Ranks:
    return {tuple(pair): rank for rank, pair in enumerate(model.get("merges", ()))}


def _basic_tokens(parsed: Mapping[str, Any]) -> Iterator[str]:
    """What any text needs of a tokenizer's model: its characters, or the bytes they fall back on.

    Of Unigram also the least likely token: by its score the unknown one's is reckoned.
    """
    model = parsed["model"]
    vocab = model["vocab"]
    tokens = [token for token, _ in vocab] if model["type"] == "Unigram" else list(vocab)
    if model["type"] == "Unigram":
        yield min(vocab, key=lambda entry: entry[1])[0]
        if model["unk_id"] is not None:
            yield tokens[model["unk_id"]]
    elif model["unk_token"] is not None:
        yield model["unk_token"]
    if _falls_back_on_bytes(parsed, tokens):
        yield from _BYTES
        # A decoder tells what stands for a space by its character, before it makes text of bytes.
        yield from _characters_named(parsed["decoder"])
        return
    # Marked where it continues a word.
    prefix = model["continuing_subword_prefix"] if model["type"] == "WordPiece" else None
    forms = {token: list(_characters(token, prefix)) for token in tokens}
    yield from (token for token, characters in forms.items() if characters == [token])
    if not parsed["model"].get("merges"):
        # Elsewhere merges start from characters, so that none of these is ever reached.
        known = set(tokens)
        yield from (
            token for token, characters in forms.items() if not known.issuperset(characters)
        )


def _characters(token: str, prefix: str | None) -> Iterator[str]:
    """The tokens of single characters that a token is made of."""
    if prefix is None:
        yield from token
        return
    continues = token.startswith(prefix) and token != prefix
    for place, character in enumerate(token[len(prefix) :] if continues else token):
        yield f"{prefix}{character}" if continues or place else character


def _falls_back_on_bytes(parsed: Mapping[str, Any], tokens: Iterable[str]) -> bool:
    """Whether a character without a token becomes its bytes, and bytes a character again."""
    decoder = parsed["decoder"] or {}
    steps = [decoder, *decoder.get("decoders", ())]
    return (
        bool(parsed["model"].get("byte_fallback"))
        and any(step.get("type") == "ByteFallback" for step in steps)
        and set(tokens).issuperset(_BYTES)
    )


def _characters_named(settings: Any) -> Iterator[str]:
    """The characters of every text in nested settings."""
    if isinstance(settings, str):
        yield from settings
    elif isinstance(settings, list | dict):
        for part in settings.values() if isinstance(settings, dict) else settings:
            yield from _characters_named(part)


def _check_model(folder: Path, model: Mapping[str, Any]) -> None:
    """Raise UserError if a tokenizer's model is not of the kinds that are understood here."""
    if model["type"] not in ("BPE", "Unigram", "WordPiece"):
        raise refused(folder, f"the model {model['type']}, whose words have no smaller parts")
    if model["type"] != "BPE":
        return
    if model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        raise refused(folder, "BPE that marks the parts of words")
    if model["dropout"]:
        raise refused(folder, "BPE with dropout, which encodes a text differently each time")


def _check_files(folder: Path) -> None:
    """Raise UserError if a folder's vocabulary lies in formats alone that are not rewritten."""
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
        return
    models = sorted(folder.glob("*.model"))
    others = [*models, *folder.glob("*.tiktoken"), *folder.glob("tekken.json")]
    if others and not any(read_pieces(path) for path in models):
        raise refused(folder, f"{', '.join(path.name for path in others)} alone")


def refused(folder: Path, found: str) -> UserError:
    """The refusal of a folder whose tokenizer is something else than what is rewritten here."""
    return UserError(
        "Expected a tokenizer that can be rewritten for fewer tokens (tokenizer.json, vocab.json "
        "with merges.txt, vocab.txt or a sentencepiece model, of byte-pair encoding, Unigram or "
        f"WordPiece) in '{folder}', found {found}: keep the whole vocabulary."
    )
