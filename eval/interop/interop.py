"""Which tools load compressed models, and do they say what transformers says?

python eval/interop/interop.py [--only LOADER ...]   writes eval/results/interop/*

Every tool gets a virtual environment of its own from the package registries, in .interop/, where
the models and everything converted stay too. The first run takes a while: llama.cpp is compiled.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tarfile
import venv
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sp3llm.models.families import count_parameters, family_of
from sp3llm.models.shapes import Shape
from sp3llm.models.source import bundled_model, read_config

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".interop"
RESULTS = ROOT / "eval" / "results" / "interop"

# Exact, so that the table can be had again. Their own requirements choose transformers.
REQUIREMENTS = {
    "llama.cpp": ["transformers==5.24.0", "sentencepiece", "protobuf"],
    "ctranslate2": ["ctranslate2==4.8.5", "transformers==5.24.0", "sentencepiece"],
    "onnx": ["optimum-onnx[onnxruntime]==0.1.0", "sentencepiece"],
    "openvino": ["optimum-intel[openvino]==2.2.0", "sentencepiece"],
    "peft": ["peft==0.21.2", "transformers==5.24.0"],
    "bitsandbytes": ["bitsandbytes==0.50.2", "transformers==5.24.0", "accelerate"],
}
LLAMA_CPP = "llama-cpp-python==0.3.36"  # its source package carries llama.cpp with the converter
SHOWN = ("llama_cpp_python", "ctranslate2", "optimum-onnx", "onnxruntime", "optimum-intel",
         "openvino", "peft", "bitsandbytes", "transformers", "torch")  # fmt: skip
QUICK = ["--samples", "16", "--seq-len", "256"]
# None: the bundled model itself, so that what a tool refuses in any model is not blamed on ours.
MODELS = {
    "llama, dense": None,
    "llama, 75 %": ["--keep", "0.75"],
    "llama, 75 %, in 64s": [
        *("--keep", "0.75", "--hidden-size", "192", "--intermediate-size", "640", *QUICK)
    ],
    "llama, 75 %, square": ["--keep", "0.75", "--square"],
    "llama, 45 %, square": ["--keep", "0.5", "--square", *QUICK],
    "opt, 75 %": [
        str(ROOT / "eval" / "models" / "opt-4m"),
        "--keep",
        "0.75",
        "--calib",
        "stdlib",
        *QUICK,
    ],
}
WINDOWS, TOKENS = 8, 256
# Mean KL divergence, nats a token, below which two implementations say the same.
SAME = 1e-4


def environment(name: str, torch: str) -> Path:
    """The Python of a loader's virtual environment, made if it is not there."""
    folder = CACHE / name
    python = folder / "bin" / "python"
    wanted = json.dumps([torch, REQUIREMENTS[name]])
    stamp = folder / "installed.json"
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"{name}: installing {', '.join(REQUIREMENTS[name])}", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", torch, *REQUIREMENTS[name]], check=True)
    if name == "openvino":  # it comes along, belongs to another build of torch, and reads no text
        subprocess.run([*pip, "uninstall", "--yes", "torchvision"], check=True)
    if name == "llama.cpp":
        subprocess.run([*pip, "install", str(llama_cpp_source(pip))], check=True,
                       env={**os.environ, "CMAKE_ARGS": "-DLLAVA_BUILD=OFF"})  # fmt: skip
    stamp.write_text(wanted)
    return python


def llama_cpp_source(pip: list[str] | None = None) -> Path:
    """The source package of llama-cpp-python, unpacked; with `pip`, fetched if need be."""
    folder = CACHE / "sources"
    if pip and not list(folder.glob("llama_cpp_python-*.tar.gz")):
        subprocess.run(
            [*pip, "download", "--no-deps", "--no-binary", "llama-cpp-python", "-d", str(folder),
             LLAMA_CPP],
            check=True,
        )  # fmt: skip
    (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
    unpacked = folder / archive.name.removesuffix(".tar.gz")
    if not unpacked.is_dir():
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
    return unpacked


def compressed(name: str) -> Path:
    """A compressed model, made if it is not there."""
    if MODELS[name] is None:
        return bundled_model()
    folder = CACHE / "models" / name.replace(", ", "-").replace(" %", "").replace(" ", "-")
    if not (folder / "sp3llm.json").is_file():
        print(f"{name}: compressing", flush=True)
        words = [sys.executable, "-m", "sp3llm.compress", *MODELS[name], "--no-report"]
        subprocess.run([*words, "--out", str(folder)], check=True)
    return folder


def reference(model: Path, path: Path) -> float:
    """Logits of transformers in float32 on held-out text, into a file; the perplexity."""
    import numpy as np
    import torch
    from interop_loaders import perplexity
    from transformers import AutoModelForCausalLM

    from sp3llm.text.tokenizer import load_tokenizer
    from sp3llm.text.windows import evaluation_windows

    if path.is_file() and path.stat().st_mtime > (model / "config.json").stat().st_mtime:
        with np.load(path) as stored:
            return perplexity(stored["logits"], stored["tokens"])
    tokens = evaluation_windows("stdlib", load_tokenizer(model), WINDOWS, TOKENS).tokens
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        output = loaded(input_ids=tokens, labels=tokens)
    np.savez(path, tokens=tokens.numpy(), logits=output.logits.numpy())
    return output.loss.exp().item()


def versions(python: Path) -> dict[str, str]:
    """Versions in a virtual environment of what matters there."""
    words = [str(python), "-m", "pip", "--disable-pip-version-check", "list", "--format=json"]
    listed = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
    found = {entry["name"].lower(): entry["version"] for entry in listed}
    return {name: found[name] for name in SHOWN if name in found}


def measure(loader: str, python: Path, name: str, model: Path, stored: Path) -> list[dict]:
    """What one loader makes of one model, one row a format."""
    if loader == "llama.cpp" and name.startswith("opt"):
        kinds = ("GGUF f16", "GGUF q8_0", "GGUF Q4_K_M")
        return [{"format": k, "loads": False, "note": "llama.cpp has no OPT"} for k in kinds]
    work = CACHE / "work" / f"{loader}-{model.name}"
    work.mkdir(parents=True, exist_ok=True)
    script = Path(__file__).with_name("interop_loaders.py")
    source = llama_cpp_source() / "vendor" / "llama.cpp" if loader == "llama.cpp" else ""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "LLAMA_CPP": str(source)}
    run = subprocess.run(
        [str(python), str(script), loader, str(model), str(stored), str(work)],
        capture_output=True, text=True, env=variables, timeout=1800, check=False,
    )  # fmt: skip
    (work / "log.txt").write_text(run.stderr)
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no word"])[-1]
        return [{"format": "", "loads": False, "note": f"exit code {run.returncode}: {last}"}]
    rows = json.loads(run.stdout.strip().splitlines()[-1])
    for row in rows:  # no paths of this machine in results
        for path in (work, model, CACHE, ROOT):
            row["note"] = row["note"].replace(str(path), path.name)
    return rows


def matrix(record: dict[str, Any]) -> str:
    """One line a tool and format, one column a model."""
    models = list(record["models"])
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in record["rows"]:
        what = "**no**"
        if row["loads"]:
            what = "same" if row["mean_kl"] < SAME else f"KL {row['mean_kl']:.1g}"
        cells.setdefault((row["loader"], row["format"]), {})[row["model"]] = what
    lines = [f"| tool | format | {' | '.join(models)} |", f"|---|---|{'---|' * len(models)}"]
    lines += [
        f"| {loader} | {kind} | {' | '.join(found.get(name, '') for name in models)} |"
        for (loader, kind), found in cells.items()
    ]
    return "\n".join(lines)


def table(record: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "| tool | format | model | loads | perplexity (transformers) | mean KL | same first choice "
        "| note |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        if row["loads"]:
            same = "yes, the same" if row["mean_kl"] < SAME else "yes"
            expected = record["models"][row["model"]]["perplexity"]
            cells = [same, f"{row['perplexity']:.3f} ({expected:.3f})", f"{row['mean_kl']:.1e}",
                     f"{100 * row['same_first_choice']:.1f} %"]  # fmt: skip
        else:
            cells = ["**no**", "", "", ""]
        note = row["note"].replace("|", "/")
        lines.append(
            f"| {' | '.join([row['loader'], row['format'], row['model'], *cells, note])} |"
        )
    tools = "; ".join(
        f"{loader}: {', '.join(f'{k} {v}' for k, v in found.items())}"
        for loader, found in record["versions"].items()
    )
    models = "\n".join(
        f"- {name}: {'`' + entry['command'] + '`, ' if entry['command'] else ''}"
        f"{entry['parameters']:,} parameters, hidden_size {entry['hidden_size']}, "
        f"{entry['num_attention_heads']} heads of {entry['head_dim']}, FFN "
        f"{entry['intermediate_size']}"
        for name, entry in record["models"].items()
    )
    return f"""# Real loaders

`{record["command"]}`, {record["tokens"]}, {record["machine"]}. Perplexity, mean KL divergence
(nats a token) and the share of tokens with the same first choice are against the same folder in
transformers, float32. \"Same\": a mean KL below {SAME:g}.

{matrix(record)}

## In detail

{chr(10).join(lines)}

## Models and tools

Models, all of them made from what the repository carries (8 M Llama, 4 M OPT):

{models}

Tools: {tools}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=REQUIREMENTS, default=list(REQUIREMENTS))
    parser.add_argument("--torch", default="torch==2.13.0", help="what pip is asked for")
    options = parser.parse_args()
    models, stored = {}, {}
    for name, options_of in MODELS.items():
        folder = compressed(name)
        stored[name] = CACHE / "work" / f"{folder.name}.npz"
        stored[name].parent.mkdir(exist_ok=True)
        config = read_config(folder)
        family = family_of(config)
        shape = Shape.of(family, config)
        words = [Path(word).name if word.startswith("/") else word for word in options_of or ()]
        models[name] = {
            "command": " ".join(["sp3llm compress", *words]) if words else None,
            "parameters": count_parameters(family, config),
            **asdict(shape),
            "perplexity": reference(folder, stored[name]),
        }
    for loader in options.only:
        python = environment(loader, options.torch)
        rows = []
        for name in MODELS:
            print(f"{loader}: {name}", flush=True)
            found = measure(loader, python, name, compressed(name), stored[name])
            for row in found:
                print("   ", json.dumps(row), flush=True)
            rows += [{"loader": loader, "model": name, **row} for row in found]
        save(loader, versions(python), rows, models)


def save(
    loader: str, found: dict[str, str], rows: list[dict[str, Any]], models: dict[str, Any]
) -> None:
    """Put one loader's rows into the results, in place of those it had."""
    path = RESULTS / "interop.json"
    earlier = json.loads(path.read_text()) if path.is_file() else {"versions": {}, "rows": []}
    rows = [*(row for row in earlier["rows"] if row["loader"] != loader), *rows]
    order = list(REQUIREMENTS)
    record = {
        "command": "python eval/interop/interop.py",
        "tokens": f"{WINDOWS} windows of {TOKENS} tokens of held-out stdlib text",
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "models": models,
        "versions": dict(sorted({**earlier["versions"], loader: found}.items())),
        "rows": sorted(rows, key=lambda row: order.index(row["loader"])),
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
    path.with_suffix(".md").write_text(table(record))
    print(f"written: {loader} in {path}, {path.with_suffix('.md')}", flush=True)


if __name__ == "__main__":
    main()
