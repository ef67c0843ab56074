"""textpruner on a fine-tuned encoder, by itself: reads a model and rows, writes its folder.

    python eval/benchmarks/encoder_peers_prune.py prune METHOD MODEL ROWS KEEP OUT
    python eval/benchmarks/encoder_peers_prune.py answer FOLDER ROWS OUT

encoder_peers.py runs this in processes of their own with the transformers that textpruner asks for;
it knows torch and transformers, not sp3llm. ROWS is a file of torch: `calibration` and `held_out`,
token ids, masks and labels by their names. `prune` leaves the folder that textpruner writes, in
OUT.json seconds and memory, and in OUT.answers.pt the logits of the model that was pruned before it
was saved; `answer` says by OUT.answers.pt what a folder's stock class answers, loaded anew.

Heads and FFN neurons go, by the gradients of the task's loss, step by step as its documentation
recommends: of every layer the same share. Nothing is tuned afterwards.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from own_peak import peak_memory
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

ROWS = 32
"""Of a batch."""
STEPS = 8
"""Between which importance is measured anew: where the table in textpruner's documentation levels
off."""
UNEVEN = {"textpruner": False, "textpruner-uneven": True}
"""By method, whether layers may keep different numbers of heads."""


def batches(rows: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Rows as a stock model is called with them, as many at once as fit, padded no longer than
    needed.
    """
    parts = []
    for at in range(0, len(rows["input_ids"]), ROWS):
        part = {name: tensor[at : at + ROWS] for name, tensor in rows.items()}
        longest = int(part["attention_mask"].sum(1).max())
        parts.append({n: t if n == "labels" else t[:, :longest] for n, t in part.items()})
    return parts


def logits_of(model: Any, rows: dict[str, Tensor]) -> Tensor:
    """What a model answers, `(rows, classes)`, float32."""
    asked = {name: tensor for name, tensor in rows.items() if name != "labels"}
    with torch.no_grad():
        return torch.cat([model.eval()(**batch).logits for batch in batches(asked)])


def sizes_for(config: Any, keep: float) -> dict[str, int]:
    """Heads and neurons a layer that come to that part of the layers' matrices, both by the same
    share as nearly as whole heads allow.
    """
    width, neurons = config.hidden_size, config.intermediate_size
    heads = max(1, round(keep * config.num_attention_heads))
    of_a_head = 4 * width * (width // config.num_attention_heads)
    budget = keep * (4 * width**2 + 2 * width * neurons)
    return {
        "target_num_of_heads": heads,
        "target_ffn_size": int((budget - heads * of_a_head) / (2 * width)),
    }


def prune(options: argparse.Namespace) -> None:
    from textpruner import GeneralConfig, TransformerPruner, TransformerPruningConfig

    rows = torch.load(options.rows)
    started = time.perf_counter()
    model = AutoModelForSequenceClassification.from_pretrained(options.model).eval()
    asked = TransformerPruningConfig(
        **sizes_for(model.config, options.keep),
        pruning_method="iterative",
        n_iters=STEPS,
        head_even_masking=not UNEVEN[options.method],
    )
    aside = options.out.with_name(f"{options.out.name}.work")
    pruner = TransformerPruner(model, asked, GeneralConfig("cpu", str(aside)))
    written = Path(pruner.prune(batches(rows["calibration"])))
    AutoTokenizer.from_pretrained(options.model).save_pretrained(written)
    seconds = time.perf_counter() - started
    torch.save(logits_of(model, rows["held_out"]), f"{options.out}.answers.pt")
    written.rename(options.out)
    shutil.rmtree(aside)
    said = {
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "heads": pruner.head_mask.sum(1).int().tolist(),
        "intermediate_size": int(pruner.ffn_mask[0].sum()),
    }
    Path(f"{options.out}.json").write_text(json.dumps(said) + "\n")


def answer(options: argparse.Namespace) -> None:
    model, said = AutoModelForSequenceClassification.from_pretrained(
        options.folder, output_loading_info=True
    )
    if said["missing_keys"] or said["unexpected_keys"] or said["mismatched_keys"]:
        raise SystemExit(f"does not load whole: {said}")
    rows = torch.load(options.rows)
    torch.save(logits_of(model, rows["held_out"]), f"{options.out}.answers.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    pruning = commands.add_parser("prune", help="prune a model and leave its folder")
    pruning.set_defaults(run=prune)
    pruning.add_argument("method", choices=UNEVEN)
    pruning.add_argument("model", type=Path)
    pruning.add_argument("rows", type=Path)
    pruning.add_argument("keep", type=float)
    pruning.add_argument("out", type=Path)
    answering = commands.add_parser("answer", help="what a folder's model answers")
    answering.set_defaults(run=answer)
    answering.add_argument("folder", type=Path)
    answering.add_argument("rows", type=Path)
    answering.add_argument("out", type=Path)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
