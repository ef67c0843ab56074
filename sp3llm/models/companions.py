"""What goes along with the weights: tokenizer, chat templates, generation config."""

import json
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

# What the stock classes read beside weights and config. Everything else in a folder is somebody
# else's: training state, scores, adapters, what other tools keep of weights in other formats.
_CARRIED = (
    *("tokenizer*.json", "tokenizer.model*", "*.model", "*.tiktoken", "tekken.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab*.json", "vocab*.txt", "merges.txt"),
    *("generation_config.json", "chat_template*", "*.jinja", "*processor_config.json"),
)
_TEMPLATE_FOLDERS = ("chat_templates", "additional_chat_templates")
_TOKENIZER_CONFIG = "tokenizer_config.json"
# What config.json says of files that are not carried along: code of its own, where a stock class
# serves, and another name of the weights' file, which are written under the usual one.
_OF_OTHER_FILES = ("auto_map", "transformers_weights")


def carried_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` without what it says of files that are not carried along: a result that names
    them does not load.
    """
    return {key: value for key, value in config.items() if key not in _OF_OTHER_FILES}


def copy_companions(
    source: Path, target: Path, instead: Mapping[str, bytes | None] | None = None
) -> list[str]:
    """Copy tokenizer, chat templates and generation config; return their names.

    Of a tokenizer's config the mention of code that is not carried along is left out. `instead`
    has, by name, what goes in place of a file's own content; None: the file does not go along.
    """
    copied = []
    for path in _carried_files(source):
        content = (instead or {}).get(path.name, b"")
        if content is None:
            continue
        if content:
            (target / path.name).write_bytes(content)
        else:
            shutil.copyfile(path, target / path.name)
        copied.append(path.name)
    if _TOKENIZER_CONFIG in copied:
        _without_code(target / _TOKENIZER_CONFIG)
    for folder in _TEMPLATE_FOLDERS:
        if (source / folder).is_dir():
            shutil.copytree(source / folder, target / folder, dirs_exist_ok=True)
            copied.append(folder)
    return copied


def _carried_files(folder: Path) -> list[Path]:
    """The files of a folder that go along with its weights."""
    files = (path for path in sorted(folder.iterdir()) if path.is_file())
    return [path for path in files if any(fnmatch(path.name, pattern) for pattern in _CARRIED)]


def text_files(folder: Path) -> list[Path]:
    """The files of a folder that decide which tokens a text becomes: tokenizer, chat templates."""
    templates = (path for name in _TEMPLATE_FOLDERS for path in sorted(folder.glob(f"{name}/*")))
    return [
        *(path for path in _carried_files(folder) if path.name != "generation_config.json"),
        *filter(Path.is_file, templates),
    ]


def _without_code(path: Path) -> None:
    """Take `auto_map` out of a tokenizer's config, whose stock class has served."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config, dict) and config.pop("auto_map", None) is not None:
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")
