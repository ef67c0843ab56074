"""What sentence-transformers keeps beside an encoder: how its stream is pooled into one vector."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sp3llm.errors import UserError
from sp3llm.runtime.json_files import read_object

_MODULES = "modules.json"
_SETTINGS = ("sentence_bert_config.json", "config_sentence_transformers.json")
# What pools and scales a stream of any width; whatever else there is has weights of its own.
_WITHOUT_WEIGHTS = ("Transformer", "Pooling", "Normalize")
_WIDTHS = ("word_embedding_dimension", "embedding_dimension")


def check_modules(folder: Path) -> None:
    """Raise UserError if a sentence encoder has modules that do not go along."""
    for module in _modules(folder):
        kind = str(module.get("type")).rpartition(".")[2]
        if kind not in _WITHOUT_WEIGHTS:
            raise UserError(
                f"Expected a sentence encoder of {', '.join(_WITHOUT_WEIGHTS)} in {_MODULES}, "
                f"found {kind}, whose weights read the stream: take it out, or compress the "
                "encoder alone from a folder without that file."
            )


def copy_modules(source: Path, target: Path, width: int) -> list[str]:
    """Copy how a sentence encoder pools, for a stream `width` wide; the names copied."""
    modules = _modules(source)
    if not modules:
        return []
    copied = [name for name in (_MODULES, *_SETTINGS) if (source / name).is_file()]
    for name in copied:
        shutil.copyfile(source / name, target / name)
    for module in modules:
        place = str(module.get("path") or "")
        if place:
            (target / place).mkdir(parents=True, exist_ok=True)
            copied.append(place)
        config = source / place / "config.json"
        if place and config.is_file():
            settings = read_object(config, "the checkpoint")
            widths = {key: width for key in _WIDTHS if key in settings}
            text = json.dumps({**settings, **widths}, indent=2) + "\n"
            (target / place / "config.json").write_text(text, encoding="utf-8")
    return copied


def _modules(folder: Path) -> list[Mapping[str, Any]]:
    """The modules of a sentence encoder, in order; none where the folder is of another model.

    Raises UserError if they are no list of modules inside the folder.
    """
    path = folder / _MODULES
    if not path.is_file():
        return []
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        places = [(folder / str(module.get("path") or "")).resolve() for module in modules]
        inside = all(folder.resolve() in (place, *place.parents) for place in places)
    except (ValueError, AttributeError, TypeError):
        inside = False
    if not inside:
        raise UserError(
            f"Expected a list of modules in '{path}', found something else: get an undamaged copy "
            "of it."
        )
    return modules
