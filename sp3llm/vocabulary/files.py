"""A tokenizer's files, rewritten for the tokens that are kept."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from sp3llm.errors import UserError
from sp3llm.models.companions import text_files
from sp3llm.runtime.json_files import read_object
from sp3llm.vocabulary.ids import restricted_ids
from sp3llm.vocabulary.kept import Kept
from sp3llm.vocabulary.pieces import read_pieces, restricted_pieces
from sp3llm.vocabulary.tokenizers import Vocabulary, added_tokens, refused

# Whatever holds tokens with their ids; what is not rewritten of it is left out.
_VOCABULARIES = ("tokenizer*.json", "*.model*", "*.tiktoken", "tekken.json", "vocab*")
_SUFFICIENT = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model")


@dataclass(frozen=True)
class RestrictedFiles:
    """What becomes of the files beside the weights that depend on token ids."""

    contents: Mapping[str, bytes]
    """By name: what a file holds now."""
    left_out: Mapping[str, str]
    """By name: why a file does not come along, a line for the console."""


def restricted_files(vocabulary: Vocabulary, kept: Kept) -> RestrictedFiles:
    """Every file of a model folder that depends on token ids, for the tokens that are kept.

    Files that name no ids (chat templates, `special_tokens_map.json`) are in neither mapping: they
    are copied as they are. `config.json` is not looked at.

    Raises UserError if a file is damaged, or no file is left that holds the vocabulary.
    """
    folder = vocabulary.folder
    contents: dict[str, bytes] = {}
    left_out: dict[str, str] = {}
    for path in [*text_files(folder), folder / "generation_config.json"]:
        if path.parent != folder or not path.is_file():
            continue
        rewrite = _rewriter(path.name)
        if rewrite is None:
            continue
        found = rewrite(path, vocabulary, kept)
        if found is None:
            left_out[path.name] = (
                f"{path.name} is left out: it cannot be rewritten for fewer tokens, and other "
                "files say the same."
            )
        else:
            contents[path.name] = found
    if not any(fnmatch(name, pattern) for name in contents for pattern in _SUFFICIENT):
        raise refused(folder, f"ids in {', '.join(left_out) or 'no file'} that are not its tokens'")
    return RestrictedFiles(contents, left_out)


def check_restricted(tokenizer: Any, vocabulary: Vocabulary, kept: Kept) -> None:
    """Compare the tokenizer that transformers loads from rewritten files with what it is to be.

    Raises UserError if its tokens, their ids or the way in which added ones are matched differ.
    """
    expected = {vocabulary.tokens[old]: new for new, old in enumerate(kept.old_ids)}
    found = tokenizer.get_vocab()
    matched = added_tokens(json.loads(tokenizer.backend_tokenizer.to_str()))
    if found != expected or matched != vocabulary.added:
        token = next(
            (token for token in expected if found.get(token) != expected[token]),
            next(iter({**found, **matched}.keys() - expected.keys()), "an added one"),
        )
        raise UserError(
            f"Expected the tokenizer in '{vocabulary.folder}' to load for {len(expected)} of its "
            f"tokens as it was rewritten for them, found another place for {token!r}: keep the "
            "whole vocabulary."
        )


_Rewrite = Callable[[Path, Vocabulary, Kept], bytes | None]


def _rewriter(name: str) -> _Rewrite | None:
    """What rewrites a file of that name; None where it names no ids."""
    known: dict[str, _Rewrite] = {
        "tokenizer.json": _tokenizer,
        "tokenizer_config.json": _tokenizer_config,
        "generation_config.json": _generation_config,
        "added_tokens.json": _by_token,
        "vocab.json": _by_token,
        "vocab.txt": _by_line,
        "merges.txt": _merges,
    }
    if name in known:
        return known[name]
    if fnmatch(name, "*.model"):
        return _sentencepiece
    if any(fnmatch(name, pattern) for pattern in _VOCABULARIES):
        return lambda *_: None
    return None


def _tokenizer(path: Path, vocabulary: Vocabulary, kept: Kept) -> bytes:
    """`tokenizer.json`: the model, added tokens, and ids in what is put around or behind a text."""
    content = read_object(path, "the tokenizer")
    model = content["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = _new_ids(vocab, vocabulary, kept)
    else:  # of Unigram, in the order of ids, with their scores
        model["unk_id"] = None if model["unk_id"] is None else kept.new_id(model["unk_id"])
        model["vocab"] = [
            entry for entry in vocab if kept.new_id(vocabulary.ids.get(entry[0], -1)) is not None
        ]
    if "merges" in model:
        made = set(model["vocab"])
        model["merges"] = [merge for merge in model["merges"] if _is_made(merge, made)]
    for entry in content.get("added_tokens") or ():
        entry["id"] = _new_id(entry["content"], vocabulary, kept)
    padding = content.get("padding")
    if padding:
        padding["pad_id"] = _new_id(padding["pad_token"], vocabulary, kept)
    _renumber(content.get("post_processor"), vocabulary, kept)
    return _json(content)


def _renumber(processor: Any, vocabulary: Vocabulary, kept: Kept) -> None:
    """Give the tokens that a post-processor adds to a text their new ids, in place."""
    if not processor:
        return
    for part in processor.get("processors", ()):
        _renumber(part, vocabulary, kept)
    for entry in (processor.get("special_tokens") or {}).values():  # TemplateProcessing
        entry["ids"] = [_new_id(token, vocabulary, kept) for token in entry["tokens"]]
    for name in ("sep", "cls"):  # BertProcessing, RobertaProcessing
        if name in processor:
            token, _ = processor[name]
            processor[name] = [token, _new_id(token, vocabulary, kept)]


def _tokenizer_config(path: Path, vocabulary: Vocabulary, kept: Kept) -> bytes:
    content = restricted_ids(read_object(path, "the tokenizer"), kept)
    if content.get("added_tokens_decoder"):
        entries = content["added_tokens_decoder"].values()
        by_id = {_new_id(entry["content"], vocabulary, kept): entry for entry in entries}
        content["added_tokens_decoder"] = {str(new): by_id[new] for new in sorted(by_id)}
    return _json(content)


def _generation_config(path: Path, vocabulary: Vocabulary, kept: Kept) -> bytes:
    return _json(restricted_ids(read_object(path, "the model"), kept))


def _by_token(path: Path, vocabulary: Vocabulary, kept: Kept) -> bytes | None:
    """`vocab.json`, `added_tokens.json`: ids by token."""
    content = read_object(path, "the tokenizer")
    if any(vocabulary.ids.get(token) != token_id for token, token_id in content.items()):
        return None
    return _json(_new_ids(content, vocabulary, kept))


def _by_line(path: Path, vocabulary: Vocabulary, kept: Kept) -> bytes | None:
    """`vocab.txt`: the token of each id on a line."""
    tokens = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if any(vocabulary.ids.get(token) != token_id for token_id, token in enumerate(tokens)):
        return None
    return _lines(token for old, token in enumerate(tokens) if kept.new_id(old) is not None)


def _merges(path: Path, vocabulary: Vocabulary, kept: Kept) -> bytes:
    """`merges.txt`: a pair on a line, after a line with the version."""
    made = {vocabulary.tokens[old] for old in kept.old_ids}
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    return _lines(line for line in lines if line.startswith("#version") or _is_made(line, made))


def _sentencepiece(path: Path, vocabulary: Vocabulary, kept: Kept) -> bytes | None:
    pieces = read_pieces(path)
    return None if pieces is None else restricted_pieces(pieces, vocabulary.ids, kept)


def _is_made(merge: str | list[str], tokens: set[str]) -> bool:
    """Whether both parts of a merge are among the tokens, and what they make."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    return len(parts) == 2 and {*parts, "".join(parts)} <= tokens


def _new_id(token: str, vocabulary: Vocabulary, kept: Kept) -> int:
    """The new id of a token that stays in any case. Raises UserError if it is none at all."""
    new = kept.new_id(vocabulary.ids.get(token, -1))
    if new is None:
        raise refused(vocabulary.folder, f"files that name {token!r}, which is none of its tokens")
    return new


def _new_ids(ids: Mapping[str, int], vocabulary: Vocabulary, kept: Kept) -> dict[str, int]:
    """By token: its new id; without those that are not kept."""
    new = {token: kept.new_id(vocabulary.ids.get(token, -1)) for token in ids}
    remaining = {token: token_id for token, token_id in new.items() if token_id is not None}
    return dict(sorted(remaining.items(), key=lambda item: item[1]))


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _lines(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()
