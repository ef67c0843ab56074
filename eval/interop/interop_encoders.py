"""Do other tools load compressed encoders, and do they say what transformers says?

    python eval/interop/interop_encoders.py [--only TOOL ...]
    python eval/interop/interop_encoders.py --classes sst2=FOLDER --classifier bert-sst2 \
        --pairs mrpc=FOLDER

A classifier goes through ONNX, a sentence encoder into sentence-transformers, dense ones beside
them. Both are made of all-MiniLM-L6-v2 (`eval/real_encoder.py`), the classifier by fine-tuning,
which takes long: `--classifier` names one that is there. Models and the tools' environments stay
in .interop/. Writes eval/results/interop/encoders.*; what is there of other tools stays.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from interop_environments import CACHE, REQUIREMENTS, environment, versions
from interop_models import ROOT
from outcomes import outcomes_of

sys.path.insert(0, str(ROOT / "eval" / "benchmarks"))
from common import (
    RESULTS,
    as_json,
    command,
    finished,
    hardware,
    record_of,
    surroundings,
    table,
    with_own_names,
    write,
)

NAME = "interop/encoders"
TOOLS = {
    "onnx": REQUIREMENTS["onnx"],
    "sentence-transformers": ["sentence-transformers==6.2.0", "transformers==5.24.0"],
}
# By tool: of the encoder's matrices, what is kept.
KEPT = {"onnx": 0.15, "sentence-transformers": 0.5}
_BATCH = 32
_SCRIPTS = ROOT / "eval"


def dense_encoder() -> Path:
    """all-MiniLM-L6-v2 as the hub has it, fetched if it is not there."""
    folder = CACHE / "dense" / "minilm"
    if not (folder / "1_Pooling" / "config.json").is_file():
        _python(_SCRIPTS / "real_encoder.py", "fetch", folder)
    return folder


def classifier(task: str) -> Path:
    """The same, fine-tuned on a task, made if it is not there."""
    folder = CACHE / "dense" / "minilm-classifier"
    if not (folder / "finetuning.json").is_file():
        words = ["--model", dense_encoder(), "--task", task, "--out", folder]
        _python(_SCRIPTS / "training" / "finetune_encoder.py", *words)
    return folder


def compressed(dense: Path, tool: str, task: str) -> Path:
    """What is compressed for a tool, made if it is not there."""
    folder = CACHE / "models" / f"encoder-{tool}"
    if not finished(folder):
        words = ["--keep", KEPT[tool], "--of", "encoder", "--task", task, "--no-report"]
        _python("-m", "sp3llm.compress", dense, *words, "--out", folder)
    return folder


def _python(*words: Any) -> None:
    subprocess.run([sys.executable, *map(str, words)], check=True)


def rows_of(task: str) -> list[tuple[tuple[str, ...], Any]]:
    """Texts and label of every validation row."""
    from sp3llm.text.task_rows import evaluation_rows
    from sp3llm.text.tasks import resolve_task

    (rows,) = evaluation_rows(resolve_task(task)).values()
    return [(row.texts, row.label) for row in rows]


def reference(tool: str, model: Path, texts: list[str], path: Path) -> np.ndarray:
    """What transformers makes of texts in float32, a row a text, and with the token ids into a
    file: logits; of a sentence encoder the mean over the tokens of the last hidden states, of
    length one.
    """
    import torch
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    kind = AutoModelForSequenceClassification if tool == "onnx" else AutoModel
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = kind.from_pretrained(model, dtype=torch.float32).eval()
    ids, answers = [], []
    for at in range(0, len(texts), _BATCH):
        read = tokenizer(texts[at : at + _BATCH], padding=True, return_tensors="pt")
        with torch.no_grad():
            output = loaded(**read)
        if tool == "onnx":
            answers.append(output.logits)
        else:
            mask = read["attention_mask"][..., None]
            mean = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
            answers.append(torch.nn.functional.normalize(mean, dim=-1))
        ids += read["input_ids"].tolist()
    longest = max(map(len, ids))
    padded = np.array([row + [0] * (longest - len(row)) for row in ids])
    found = torch.cat(answers).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, input_ids=padded, answers=found)
    path.with_suffix(".json").write_text(json.dumps(texts))
    return found


def measure(tool: str, python: Path, model: Path, stored: Path) -> list[dict[str, Any]]:
    """What a tool makes of a model, a row a format."""
    work = stored.with_suffix("")
    work.mkdir(exist_ok=True)
    script = Path(__file__).with_name("encoder_loaders.py")
    words = [str(python), str(script), tool, str(model), str(stored), str(work)]
    return outcomes_of(words, work, (work, model, CACHE, ROOT), {})


def kept_cosines(
    vectors: list[np.ndarray], pairs: list[tuple[int, int]], small: Path
) -> dict[str, Any]:
    """How near a small sentence encoder, the second, is to the dense one, the first: the cosine of
    both vectors of a text, the small one taken back to the dense width by the basis beside it, and
    the rank correlation of the pairs' cosines.
    """
    from scipy import stats

    from sp3llm.models.basis_file import read_basis

    lifted = vectors[1] @ read_basis(small).numpy().T
    lifted /= np.linalg.norm(lifted, axis=-1, keepdims=True)
    same = (lifted * vectors[0]).sum(-1)
    first, second = np.array(pairs).T
    of_pairs = [(one[first] * one[second]).sum(-1) for one in vectors]
    return {
        "texts": len(same),
        "mean_cosine": float(same.mean()),
        "least_cosine": float(same.min()),
        "pairs": len(pairs),
        "spearman_of_pairs": float(stats.spearmanr(*of_pairs).statistic),
    }


def contest(tool: str, options: argparse.Namespace) -> dict[str, Any]:
    """A tool on a dense model and on the compressed one."""
    python = environment(tool, [options.torch, *TOOLS[tool]])
    if tool == "onnx":
        task = options.classes
        dense = options.classifier or classifier(task)
    else:
        task = options.pairs
        dense = dense_encoder()
    rows = rows_of(task)
    texts = list(dict.fromkeys(text for row, _ in rows for text in row))
    small, vectors = compressed(dense, tool, task), []
    found: dict[str, Any] = {"run": command(__file__, with_own_names(sys.argv[1:]))}
    found |= {"versions": versions(python), "texts": len(texts), "rows": []}
    for name, model in (("dense", dense), (f"{100 * KEPT[tool]:g} %", small)):
        stored = CACHE / "work" / f"{tool}-{name.removesuffix(' %')}.npz"
        vectors.append(reference(tool, model, texts, stored))
        width = json.loads((model / "config.json").read_text())["hidden_size"]
        for row in measure(tool, python, model, stored):
            print(f"{tool}, {name}:", json.dumps(row), flush=True)
            found["rows"].append({"model": name, "width": width, **row})
    words = record_of(small)["command"].split()
    found["command"] = " ".join(with_own_names(words[: words.index("--out")]))
    found["task"] = with_own_names([task])[0]
    if tool == "sentence-transformers":
        numbers = {text: number for number, text in enumerate(texts)}
        pairs = [(numbers[first], numbers[second]) for (first, second), _ in rows]
        found["kept"] = kept_cosines(vectors, pairs, small)
    return found


def markdown(record: dict[str, Any]) -> str:
    """The results as Markdown."""
    cells, lines = [], []
    runs = "\n".join(dict.fromkeys(f"    {found['run']}" for found in record["tools"].values()))
    for tool, found in record["tools"].items():
        for row in found["rows"]:
            apart = f"{row['largest_difference']:.1e}" if row["loads"] else ""
            loads = "yes" if row["loads"] else "**no**"
            names = [tool, row["format"], row["model"], str(row["width"])]
            cells.append([*names, loads, apart, row["note"].replace("|", "/")])
        shown = ", ".join(f"{name} {release}" for name, release in found["versions"].items())
        lines.append(f"- {tool}: {found['texts']:,} texts, `{found['command']}`; {shown}")
    tools = "\n".join(lines)
    head = [
        "tool",
        "format",
        "model",
        "width",
        "loads",
        "largest difference from transformers",
        "note",
    ]
    kept = record["tools"].get("sentence-transformers", {}).get("kept")
    near = (
        f"""
The small sentence encoder beside the dense one: the cosine of both vectors of a text, the small one
taken back to the dense width by `sp3llm.basis`, is {kept["mean_cosine"]:.4f} on average over
{kept["texts"]:,} texts and {kept["least_cosine"]:.4f} at the least. Spearman's correlation of their
cosines of {kept["pairs"]:,} pairs is {kept["spearman_of_pairs"]:.4f}.
"""
        if kept
        else ""
    )
    return f"""# Encoders in other tools

{runs}

Logits (onnx; "fused": `--optimize O2`), and vectors pooled over tokens and of length one
(sentence-transformers), against the same folder in transformers, float32, on validation texts,
which each tool reads with the tokenizer of its folder.
Machine: {hardware(record["machine"])}.

{table(head, cells)}
{near}
{tools}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--classes", default="sst2", help="task of the classifier")
    parser.add_argument("--pairs", default="mrpc", help="task of pairs, for the sentence encoder")
    parser.add_argument("--classifier", type=Path, help="fine-tuned on --classes")
    parser.add_argument("--torch", default="torch==2.13.0", help="what pip is asked for")
    options = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    earlier = json.loads(path.read_text())["tools"] if path.is_file() else {}
    for tool in options.only:
        earlier[tool] = contest(tool, options)
        record = {"tools": {name: earlier[name] for name in TOOLS if name in earlier}}
        record |= surroundings("cpu")
        write(RESULTS / NAME, json=as_json(record), md=markdown(record))


if __name__ == "__main__":
    main()
