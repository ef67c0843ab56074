"""The tokenizer of a model folder."""

import json
from pathlib import Path
from typing import Any

from sp3llm.errors import UserError, reason
from sp3llm.runtime.git_lfs import is_pointer, pointer_found


def has_backend(tokenizer: Any) -> bool:
    """Whether the tokenizers library runs it, which then tells how it comes by its tokens."""
    return hasattr(tokenizer, "backend_tokenizer")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model folder.

    Raises UserError if there is none that loads.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        if _has_own_code(folder):
            raise UserError(
                f"Expected a tokenizer of transformers' own classes in '{folder}', found one with "
                "code of its own (auto_map in tokenizer_config.json), which is not run: save it "
                "as a PreTrainedTokenizerFast with a tokenizer.json."
            ) from error
        for pointer in filter(is_pointer, sorted(folder.glob("tokenizer*"))):
            raise pointer_found(pointer) from error
        raise UserError(
            f"Expected a tokenizer in '{folder}', found none that loads "
            f"({type(error).__name__}: {reason(error)}): put the model's tokenizer files there."
        ) from error
    # Releases of transformers make one of special tokens alone where there are no files.
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.added_tokens_decoder):
        raise UserError(
            f"Expected a tokenizer in '{folder}', found none with a vocabulary: put the model's "
            "tokenizer files there."
        )
    return tokenizer


def load_row_tokenizer(folder: Path) -> Any:
    """The tokenizer in an encoder's folder, for rows of a task: it tells both texts of a pair apart
    by types where the model knows some, whatever its class has of them.

    Raises UserError if there is none that loads.
    """
    from transformers import AutoConfig

    tokenizer = load_tokenizer(folder)
    if getattr(AutoConfig.from_pretrained(folder), "type_vocab_size", 0) < 2:
        names = tokenizer.model_input_names
        tokenizer.model_input_names = [name for name in names if name != "token_type_ids"]
    return tokenizer


def keep_tokenizer_class(dense: Path, folder: Path) -> None:
    """Have `folder`, which holds a copy of the `dense` model's tokenizer, load it as that model's.

    transformers goes by `model_type` too where it chooses a tokenizer's class, so that a model
    written as another family's could get another. What the dense model's is loaded as is stated.

    Raises UserError if the dense model's tokenizer does not load, OSError if `folder` cannot be
    written.
    """
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    name = type(load_tokenizer(dense)).__name__
    # Fast or not is no difference: releases before 5 have both, and state either.
    if str(config.get("tokenizer_class")).removesuffix("Fast") != name.removesuffix("Fast"):
        text = json.dumps({**config, "tokenizer_class": name}, indent=2, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")


def _has_own_code(folder: Path) -> bool:
    """Whether a folder's tokenizer names Python code that is not of transformers."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        return "AutoTokenizer" in (config.get("auto_map") or {})
    except (OSError, ValueError, AttributeError):
        return False


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its BOS before a text by itself."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, special tokens left out."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
