"""The models that other tools load, made from what the repository carries."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from sp3llm.models.source import bundled_model

ROOT = Path(__file__).parents[2]
QUICK = ["--samples", "16", "--seq-len", "256"]
# What of the bundled Llama becomes which class; the model_type is given in place of a folder.
DERIVED: dict[str, dict[str, Any]] = {
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": False},
}
# None: the bundled model itself, so that what a tool refuses in any model is not blamed on ours.
MODELS = {
    "llama, dense": None,
    "llama, 75 %": ["--keep", "0.75"],
    "llama, 75 %, in 64s": [
        *("--keep", "0.75", "--hidden-size", "192", "--intermediate-size", "640", *QUICK)
    ],
    "llama, 75 %, square": ["--keep", "0.75", "--square"],
    "llama, 45 %, square": ["--keep", "0.5", "--square", *QUICK],
    "llama, 75 %, 7 layers": ["--keep", "0.75", "--num-hidden-layers", "7", *QUICK],
    "llama, 75 %, 3072 tokens": [
        *("--keep", "0.75", "--vocab-from", "stdlib", "--vocab-size", "3072", *QUICK)
    ],
    "qwen2, 75 %": ["qwen2", "--keep", "0.75", "--calib", "stdlib", *QUICK],
    "qwen3, 75 %": ["qwen3", "--keep", "0.75", "--calib", "stdlib", *QUICK],
    "opt, 75 %": ["opt-4m", "--keep", "0.75", "--calib", "stdlib", *QUICK],
    "opt, 75 %, 3 heads": [
        *("opt-4m", "--keep", "0.75", "--calib", "stdlib", "--num-key-value-heads", "3", *QUICK)
    ],
}


def compressed(name: str, cache: Path) -> Path:
    """A model of `MODELS`, made under `cache` if it is not there."""
    options = MODELS[name]
    if options is None:
        return bundled_model()
    folder = cache / "models" / name.replace(", ", "-").replace(" %", "").replace(" ", "-")
    if not (folder / "sp3llm.json").is_file():
        print(f"{name}: compressing", flush=True)
        named = [] if options[0].startswith("-") else [str(dense_of(name, cache))]
        words = [*named, *options[len(named) :]]
        run = [sys.executable, "-m", "sp3llm.compress", *words, "--no-report"]
        subprocess.run([*run, "--out", str(folder)], check=True)
    return folder


def command_of(name: str) -> str | None:
    """The command that makes a model of `MODELS`."""
    words = MODELS[name]
    return None if words is None else " ".join(["sp3llm compress", *words])


def dense_of(name: str, cache: Path) -> Path:
    """The folder of the model that one of `MODELS` is made from."""
    first = (MODELS[name] or ["--"])[0]
    return bundled_model() if first.startswith("-") else _dense(first, cache)


def _dense(word: str, cache: Path) -> Path:
    """The folder of a model, by its word in `MODELS`."""
    return derived(word, cache) if word in DERIVED else ROOT / "eval" / "models" / word


def derived(model_type: str, cache: Path) -> Path:
    """The bundled Llama as another class, seeded values in what only that class has."""
    folder = cache / "dense" / model_type
    if (folder / "config.json").is_file():
        return folder
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    source = bundled_model()
    settings = json.loads((source / "config.json").read_text())
    settings |= {**DERIVED[model_type], "model_type": model_type}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings)).float()
    missing = model.load_state_dict(load_file(source / "model.safetensors"), strict=False)
    if missing.unexpected_keys:
        raise RuntimeError(f"{model_type} has no {', '.join(missing.unexpected_keys)}")
    torch.manual_seed(0)
    with torch.no_grad():
        for name in missing.missing_keys:
            parameter = model.get_parameter(name)
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            else:  # the norms of Qwen3's queries and keys
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    for file in source.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder
