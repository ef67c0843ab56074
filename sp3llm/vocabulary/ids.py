"""Token ids in the configs of a model."""

from collections.abc import Iterator, Mapping
from typing import Any

from sp3llm.vocabulary.kept import Kept

# Lists of token ids, and of lists of them, under names that do not end in `_token_id`.
_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")
# Lists of pairs of something and a token id, and of a sequence of them and a bias.
_FORCED, _BIASED = "forced_decoder_ids", "sequence_bias"


def named_ids(config: Mapping[str, Any]) -> set[int]:
    """Every token id that `config.json`, `generation_config.json` or a tokenizer's config names.

    Those that a model's class assumes where its `config.json` names none are among them.
    """
    stated = _with_default_ids(config).items()
    return {found for key, value in stated for found in _ids_of(key, value) if found >= 0}


def restricted_ids(config: Mapping[str, Any], kept: Kept) -> dict[str, Any]:
    """A config with the ids that its tokens have among the kept ones, and their number of rows.

    What `named_ids` finds in it is kept where it is a token at all. An id of none (of a row that
    pads the dense table) becomes null, or leaves the list that it stands in; negative ones, which
    say that there is none, stay. What a model's class assumes where its `config.json` names no id
    is named, as it moves like the others.
    """
    stated = _with_default_ids(config)
    restricted = {key: _mapped(key, value, kept) for key, value in stated.items()}
    if "vocab_size" in config or "model_type" in config:
        restricted["vocab_size"] = kept.rows
    return restricted


def _with_default_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the ids of its model's class that it does not name. Others have no defaults."""
    if "model_type" not in config:
        return dict(config)
    from transformers import CONFIG_MAPPING

    defaults = CONFIG_MAPPING[config["model_type"]]().to_dict()
    assumed = {key: value for key, value in defaults.items() if _is_id(key) and value is not None}
    return {**assumed, **config}


def _is_id(key: str) -> bool:
    return key.endswith(("_token_id", "_token_ids")) or key in _LISTS


def _ids_of(key: str, value: Any) -> Iterator[int]:
    if key == _FORCED and isinstance(value, list):
        yield from _leaves([pair[1] for pair in value])
    elif key == _BIASED and isinstance(value, list):
        yield from _leaves([pair[0] for pair in value])
    elif _is_id(key):
        yield from _leaves(value)


def _leaves(value: Any) -> Iterator[int]:
    """The whole numbers in nested lists."""
    if isinstance(value, list):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def _mapped(key: str, value: Any, kept: Kept) -> Any:
    if key == _FORCED and isinstance(value, list):
        return [[place, _new(token, kept)] for place, token in value]
    if key == _BIASED and isinstance(value, list):
        return [[_new(sequence, kept), bias] for sequence, bias in value]
    return _new(value, kept) if _is_id(key) else value


def _new(value: Any, kept: Kept) -> Any:
    """An id, or nested lists of them, by their new names."""
    if isinstance(value, list):
        mapped = (_new(part, kept) for part in value)
        return [part for part in mapped if part is not None]
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return kept.new_id(value)
    return value
