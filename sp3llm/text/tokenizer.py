"""The tokenizer of a model folder."""

from pathlib import Path
from typing import Any

from sp3llm.errors import UserError, reason


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model folder.

    Raises UserError if there is none that loads.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises many kinds
        raise UserError(
            f"Expected a tokenizer in '{folder}', found none that loads "
            f"({type(error).__name__}: {reason(error)}): put the model's tokenizer files there."
        ) from error


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its BOS before a text by itself."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, special tokens left out."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
