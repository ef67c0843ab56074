"""Which tools load compressed models, and do they say what transformers says?

python eval/interop/interop.py [--only LOADER ...] [--models NAME ...]
python eval/interop/interop.py --only vllm --timed    adds tokens a second
python eval/interop/interop.py --folder dense=DIR --folder 75=DIR --windows 2 --name smollm2

They write eval/results/interop/interop.*, or NAME's. Every tool gets a virtual environment of its
own from the package registries, in .interop/, where the models and everything converted stay too.
The first run takes a while: llama.cpp is compiled. Rows of tools and models that are not asked for
stay as they are. Folders are taken as they are, in place of the models that are made from what the
repository carries; the first is the dense model that the others were made from.
"""

import argparse
import json
import os
import platform
import shlex
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from interop_environments import CACHE, REQUIREMENTS, environment, llama_cpp_source, versions
from interop_models import MODELS, ROOT, command_of, compressed, dense_of
from interop_tables import table
from outcomes import outcomes_of

from sp3llm.models.families import count_parameters, family_of
from sp3llm.models.shapes import Shape
from sp3llm.models.source import read_config

RESULTS = ROOT / "eval" / "results" / "interop"

TOKENS = 256
# Texts that servers continue greedily, by so many tokens.
PROMPTS = [
    "import os\nimport sys\n\n\ndef main(",
    "The quick brown fox",
    "class Node:\n    def __init__(self",
    "It was the best of times, it was",
]
NEW_TOKENS = 32


def reference(model: Path, path: Path, windows: int) -> float:
    """Logits of transformers in float32 on windows of held-out text, into a file, and its answers,
    into one beside it; the perplexity.
    """
    import numpy as np
    import torch
    from interop_loaders import perplexity
    from transformers import AutoModelForCausalLM

    from sp3llm.text.tokenizer import load_tokenizer
    from sp3llm.text.windows import evaluation_windows

    answers = path.with_suffix(".json")
    if answers.is_file() and answers.stat().st_mtime > (model / "config.json").stat().st_mtime:
        with np.load(path) as stored:
            return perplexity(stored["logits"], stored["tokens"])
    tokenizer = load_tokenizer(model)
    tokens = evaluation_windows("stdlib", tokenizer, windows, TOKENS).tokens
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        output = loaded(input_ids=tokens, labels=tokens)
    np.savez(path, tokens=tokens.numpy(), logits=output.logits.numpy())
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    said = [_greedy(loaded, row) for row in ids]
    found = {"prompts": PROMPTS, "ids": ids, "tokens": [new for new, _ in said]}
    answers.write_text(json.dumps({**found, "log_probabilities": [logs for _, logs in said]}))
    return output.loss.exp().item()


def _greedy(model: Any, ids: list[int]) -> tuple[list[int], list[float]]:
    """The likeliest next tokens, ends of text among them, and their log-probabilities."""
    import torch

    row, logs = list(ids), []
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            rates = model(input_ids=torch.tensor([row])).logits[0, -1].log_softmax(-1)
        row.append(int(rates.argmax()))
        logs.append(float(rates.max()))
    return row[len(ids) :], logs


def measure(
    loader: str, python: Path, model: Path, dense: Path, stored: Path, timed: bool
) -> list[dict]:
    """What one loader makes of one model, made from a dense one, one row a format."""
    if loader == "llama.cpp" and read_config(model)["model_type"] == "opt":
        kinds = ("GGUF f16", "GGUF q8_0", "GGUF Q4_K_M")
        return [{"format": k, "loads": False, "note": "llama.cpp has no OPT"} for k in kinds]
    work = CACHE / "work" / f"{loader}-{stored.stem}"
    work.mkdir(parents=True, exist_ok=True)
    script = Path(__file__).with_name("interop_loaders.py")
    source = llama_cpp_source() / "vendor" / "llama.cpp" if loader == "llama.cpp" else ""
    variables = {"LLAMA_CPP": str(source), "INTEROP_DENSE": str(dense)}
    variables |= {"INTEROP_TIMED": "1"} if timed else {}
    words = [str(python), str(script), loader, str(model), str(stored), str(work)]
    return outcomes_of(words, work, (work, model, CACHE, ROOT), variables, timeout=1800)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=REQUIREMENTS, default=list(REQUIREMENTS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--folder", action="append", metavar="NAME=DIR", help="in place of models")
    parser.add_argument("--windows", type=int, default=8, help="of held-out text")
    parser.add_argument("--name", default="interop", help="of the files in eval/results/interop")
    parser.add_argument("--timed", action="store_true", help="speeds too, on a quiet machine")
    parser.add_argument("--torch", default="torch==2.13.0", help="what pip is asked for")
    options = parser.parse_args()
    if options.folder and options.name == "interop":
        parser.error("--folder writes to files of its own: give their --name")
    given = {name: Path(path) for name, _, path in (f.partition("=") for f in options.folder or ())}
    for loader in options.only:
        python = environment(loader, [options.torch, *REQUIREMENTS[loader]])
        installed = versions(python)
        for name in given or options.models:
            folder = given[name] if given else compressed(name, CACHE)
            dense = next(iter(given.values())) if given else dense_of(name, CACHE)
            stored, described = about(folder.resolve(), options.windows)
            model = {"command": None if given else command_of(name), **described}
            print(f"{loader}: {name}", flush=True)
            found = measure(loader, python, folder, dense, stored, options.timed)
            for row in found:
                print("   ", json.dumps(row), flush=True)
            rows = [{"loader": loader, "model": name, **row} for row in found]
            save(options, loader, installed, name, rows, model)


@cache
def about(folder: Path, windows: int) -> tuple[Path, dict[str, Any]]:
    """Where the reference of a model's folder is stored, made if need be, and what the model is."""
    stored = CACHE / "work" / f"{folder.parent.name}-{folder.name}-{windows}.npz"
    stored.parent.mkdir(exist_ok=True)
    config = read_config(folder)
    family = family_of(config)
    return (
        stored,
        {
            "architecture": config["architectures"][0],
            "parameters": count_parameters(family, config),
            **asdict(Shape.of(family, config)),
            "perplexity": reference(folder, stored, windows),
        },
    )


def save(
    options: argparse.Namespace,
    loader: str,
    found: dict[str, str],
    name: str,
    rows: list[dict[str, Any]],
    model: dict[str, Any],
) -> None:
    """Put what one loader makes of one model into the results, in place of what was there."""
    path = RESULTS / f"{options.name}.json"
    earlier = {"versions": {}, "models": {}, "rows": []}
    if path.is_file():
        earlier = json.loads(path.read_text())
    for row in rows:
        row["expected_perplexity"] = model["perplexity"]
    others = [row for row in earlier["rows"] if (row["loader"], row["model"]) != (loader, name)]
    models = {**earlier["models"], name: model}
    known = [] if options.folder else MODELS
    places = {key: place for place, key in enumerate([*REQUIREMENTS, *known, *models])}
    named = [f"{one.partition('=')[0]}=DIR" for one in options.folder or ()]
    words = [f"--folder {shlex.quote(one)}" for one in named]
    words += [f"--windows {options.windows} --name {options.name}"] if words else []
    record = {
        "command": " ".join(["python eval/interop/interop.py", *words]),
        "tokens": f"{options.windows} windows of {TOKENS} tokens of held-out stdlib text",
        "answers": f"{NEW_TOKENS} greedy tokens after each of {len(PROMPTS)} texts",
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "carried": not options.folder,
        "models": dict(sorted(models.items(), key=lambda entry: places[entry[0]])),
        "versions": dict(sorted({**earlier["versions"], loader: found}.items())),
        "rows": sorted(
            [*others, *rows], key=lambda row: (places[row["loader"]], places[row["model"]])
        ),
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
    path.with_suffix(".md").write_text(table(record))


if __name__ == "__main__":
    main()
