"""Where a model comes from: a folder, the hub, or the package itself. Imports no torch."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sp3llm.errors import UserError, reason
from sp3llm.runtime.json_files import read_object

BUNDLED = "bundled/llama-8m"
ADAPTER = "adapter_config.json"

# Repositories in Meta's own format, and the Hugging Face twin of each.
_HF_TWINS = {
    f"meta-llama/Llama-2-{size}{chat}": f"meta-llama/Llama-2-{size}{chat}-hf"
    for size in ("7b", "13b", "70b")
    for chat in ("", "-chat")
}
# Of subfolders (checkpoints of training, other precisions, adapters) only chat templates are read.
_WEIGHT_FOLDER_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.tiktoken")
# The same weights in another format, beside those that are read.
_NOT_FETCHED = ["consolidated*", *(f"*/{pattern}" for pattern in _WEIGHT_FOLDER_FILES)]
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.tiktoken"]


def bundled_model() -> Path:
    """The small trained model that comes with the package."""
    return Path(__file__).parents[1] / BUNDLED


def resolve_model(model: str | None) -> tuple[Path, str, str | None]:
    """Turn what the user named into a local folder.

    `model` is None (the bundled model), a folder, or a hub id, which is downloaded into the hub
    cache (safetensors where there are any, `.bin` shards otherwise).

    Returns the folder, the name to show, and a line to print if another repository was taken.
    Raises UserError if there is no such model or it is not in Hugging Face format.
    """
    if model is None:
        return bundled_model(), "the bundled Llama", None
    folder = Path(model)
    if os.path.isdir(model):
        return folder, folder.resolve().name, None
    if os.path.exists(model):
        raise UserError(
            f"Expected a model folder or a hub id, found the file '{model}': name the folder that "
            "holds config.json and the weights."
        )
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UserError(
            f"Expected a model folder or a hub id (owner/name), found '{model}', which is no "
            "folder here: check the path."
        )
    name, note = _hub_name(model)
    return _reached(name, _download), name, note


def _hub_name(model: str) -> tuple[str, str | None]:
    """The repository to take, and a line to print where it is not the one named."""
    if model not in _HF_TWINS:
        return model, None
    twin = _HF_TWINS[model]
    return twin, f"{model} is in Meta's own format; taking its Hugging Face twin {twin}."


def _unreachable(model: str, error: Exception) -> UserError:
    return UserError(
        f"Cannot get '{model}' from the hub ({type(error).__name__}: {reason(error)}): check "
        "the name, the network, and for gated models `hf auth login`, or name a local folder."
    )


def _taken(model: str | None, fetch: Callable[[str], Path]) -> tuple[Path, str, str | None]:
    """What `resolve_model` does, but that of a hub id no more comes than `fetch` gets of it, which
    returns the folder.
    """
    if model is None or os.path.exists(model) or model.count("/") != 1:
        return resolve_model(model)
    name, note = _hub_name(model)
    return _reached(name, fetch), name, note


def _reached(name: str, fetch: Callable[[str], Path]) -> Path:
    """What `fetch` gets of a repository of the hub.

    Raises UserError where it gets nothing.
    """
    try:
        return fetch(name)
    except Exception as error:  # the hub raises many kinds: gated, missing, offline, cut off
        raise _unreachable(name, error) from error


def _snapshot(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=_NOT_FETCHED))


def _download(name: str) -> Path:
    folder = _snapshot(name, _HUB_PATTERNS)
    has_weights = any(folder.glob("model*.safetensors"))
    if (folder / "config.json").exists() and not has_weights:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, allow_patterns=[*_HUB_PATTERNS, "*.bin"]))
    return folder


def _download_config(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, "config.json")).parent


def _download_tokenizer(name: str) -> Path:
    return _snapshot(name, [p for p in _HUB_PATTERNS if not p.endswith(".safetensors")])


def resolve_config(model: str | None) -> tuple[dict[str, Any], str, str | None]:
    """`config.json` of what the user named, without its weights.

    Returns the config, the name to show, and a line to print if another repository was taken.
    Raises UserError as `resolve_model` does.
    """
    folder, name, note = _taken(model, _download_config)
    return read_config(folder), name, note


def resolve_tokenizer(model: str | None) -> tuple[Path, str, str | None]:
    """A folder with config and tokenizer of what the user named, with its weights where they are
    here already.

    Returns what `resolve_model` does, and raises UserError as that does.
    """
    return _taken(model, _download_tokenizer)


def adapter_base(folder: Path) -> str:
    """What the adapter in a folder was trained on, to show."""
    try:
        settings = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        return f"'{settings['base_model_name_or_path']}'"
    except (OSError, ValueError, KeyError, TypeError):
        return "a model that it does not name"


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a model folder.

    Raises UserError where there is none, and says so where the folder is in Meta's own format.
    """
    path = folder / "config.json"
    if not path.is_file():
        if (folder / ADAPTER).is_file() or any(folder.glob("adapter_model.*")):
            raise UserError(
                f"'{folder}' holds an adapter for {adapter_base(folder)}, and no model: merge it "
                "first (`merge_and_unload` and `save_pretrained` of peft), and name the merged one."
            )
        if (folder / "params.json").exists() or any(folder.glob("consolidated.*")):
            raise UserError(
                f"'{folder}' is in Meta's own format (params.json, consolidated.*.pth): name the "
                "Hugging Face version of the model, usually called the same with -hf."
            )
        # Where training keeps its checkpoints, or a hub cache its revisions.
        below = [*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")]
        if below:
            raise UserError(
                f"Expected config.json in '{folder}', found it in '{min(below).parent}': name the "
                "folder that is meant."
            )
        raise UserError(
            f"Expected config.json in '{folder}', found none: name the folder of a Hugging Face "
            "model."
        )
    return read_object(path, "the checkpoint")
