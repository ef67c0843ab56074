"""Load an encoder's folder with another tool and compare what it says with transformers.

Run by eval/interop/interop_encoders.py inside the tool's own virtual environment, where sp3llm is
not installed:

    python encoder_loaders.py TOOL MODEL REFERENCE.npz WORK

REFERENCE holds what transformers makes of the texts in REFERENCE.json: token ids `input_ids`,
padded at the end with zeros, and `answers`, a row a text: logits, or pooled vectors of length one.
What was found is printed as one line of JSON: a list of `{format, loads, note, ...}`, one a format.
"""

import json
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from outcomes import print_outcomes

# Texts at once.
_BATCH = 32


def compare(answers: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Answers, a row a text, against those of transformers."""
    if answers.shape != reference.shape:
        raise RuntimeError(f"answers of shape {answers.shape}, expected {reference.shape}")
    return {"largest_difference": float(np.abs(answers - reference).max())}


def onnx(
    *options: str, model: Path, texts: list[str], stored: Any, work: Path
) -> tuple[np.ndarray, str]:
    """The graph that optimum's command exports with these options, run by onnxruntime on what the
    exported folder's own tokenizer reads.
    """
    import onnxruntime
    from transformers import AutoTokenizer

    out = work / "-".join(["exported", *options[1:]])
    words = [str(Path(sys.executable).with_name("optimum-cli")), "export", "onnx"]
    words += ["--model", str(model), "--task", "text-classification", *options]
    run = subprocess.run([*words, str(out)], capture_output=True, text=True, check=False)
    if run.returncode:
        print(run.stderr, file=sys.stderr)
        raise RuntimeError((run.stderr.strip().splitlines() or ["no word"])[-1])
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    tokenizer = AutoTokenizer.from_pretrained(out)
    rows = []
    for at in range(0, len(texts), _BATCH):
        read = tokenizer(texts[at : at + _BATCH], padding=True, return_tensors="np")
        _check_ids(read["input_ids"], stored["input_ids"][at : at + _BATCH])
        rows.append(session.run(["logits"], {name: read[name] for name in names})[0])
    return np.concatenate(rows), _nodes(out / "model.onnx")


def _check_ids(ids: np.ndarray, expected: np.ndarray) -> None:
    """Raise RuntimeError if the exported tokenizer reads other ids."""
    expected = expected[:, : ids.shape[1]]
    if not np.array_equal(ids, expected):
        raise RuntimeError(f"{(ids != expected).any(1).sum()} of {len(ids)} texts have other ids")


def _nodes(path: Path) -> str:
    """What operators of onnxruntime's own, fused ones, are in a graph."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    fused = Counter(node.op_type for node in graph.node if node.domain == "com.microsoft")
    names = ", ".join(f"{count} {name}" for name, count in sorted(fused.items()))
    return f"{len(graph.node)} nodes" + (f", of them {names}" if names else "")


def sentence_transformers(
    model: Path, texts: list[str], stored: Any, work: Path
) -> tuple[np.ndarray, str]:
    """`SentenceTransformer(folder)`, with the modules that lie beside the weights."""
    from sentence_transformers import SentenceTransformer

    loaded = SentenceTransformer(str(model), device="cpu")
    vectors = loaded.encode(texts, batch_size=_BATCH, show_progress_bar=False)
    return vectors, " > ".join(type(part).__name__ for part in loaded)


# By tool and format.
TOOLS = {
    "onnx": {"float32": onnx, "float32, fused": partial(onnx, "--optimize", "O2")},
    "sentence-transformers": {"float32": sentence_transformers},
}


def main() -> None:
    name, model, reference, work = sys.argv[1:]
    texts = json.loads(Path(reference).with_suffix(".json").read_text())
    with np.load(reference) as opened:
        stored = dict(opened)

    def answered(run: Any) -> tuple[dict[str, Any], str]:
        answers, note = run(model=Path(model), texts=texts, stored=stored, work=Path(work))
        return compare(answers, stored["answers"]), note

    print_outcomes((kind, partial(answered, run)) for kind, run in TOOLS[name].items())


if __name__ == "__main__":
    main()
