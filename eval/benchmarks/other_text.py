"""What compressed models lose on text of several kinds, whatever they were calibrated on.

    python eval/benchmarks/other_text.py --dense DIR --model NAME=DIR ... --text NAME=SET ... \
        --name real/smollm2-texts

Every text is read as held out, without any document that one of the models was calibrated on; all
models, which share a tokenizer, see the same windows, and differences from the dense model are
paired window by window. Beside the excess stands the divergence from what the dense model predicts.
Run it where the models were compressed: their records name the files they were calibrated on.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from common import (
    RESULTS,
    as_json,
    command,
    hardware,
    shown,
    surroundings,
    table,
    with_own_names,
    write,
)
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from sp3llm.maths.losses import divergence
from sp3llm.maths.paired import excess_log_perplexity
from sp3llm.reporting.record import read_record
from sp3llm.text.tokenizer import load_tokenizer
from sp3llm.text.windows import calibration_windows, evaluation_windows
from sp3llm.vocabulary.same_text import calibrated_documents

_ROWS = 4


def calibrated_on(folders: list[Path], tokenizer: Any) -> frozenset[str]:
    """Content hashes of all documents that the folders' records say were calibrated on."""
    draws = {
        tuple(settings[name] for name in ("calib", "samples", "seq_len", "seed"))
        for settings in (read_record(folder).settings for folder in folders)
    }
    pair = tokenizer, tokenizer
    found = (calibrated_documents(calibration_windows, names, pair, *how) for names, *how in draws)
    return frozenset().union(*found)


@torch.no_grad()
def measured(model: Any, dense: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of both models, `(windows, tokens - 1)`, and the divergence between them, by window,
    in nats.
    """
    losses: tuple[list[Tensor], list[Tensor]] = ([], [])
    apart = []
    for rows in tokens.split(_ROWS):
        logits = [one(input_ids=rows, use_cache=False).logits[:, :-1] for one in (model, dense)]
        for kept, found in zip(losses, logits, strict=True):
            wide = found.float().mT
            kept.append(cross_entropy(wide, rows[:, 1:], reduction="none").double())
        apart += [divergence(small, whole, 1.0) for small, whole in zip(*logits, strict=True)]
    return torch.cat(losses[0]), torch.cat(losses[1]), torch.stack(apart)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=SET")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--name", required=True, help="of the files under eval/results")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.dense)
    models = {name: Path(folder) for name, folder in (m.split("=", 1) for m in options.model)}
    texts = dict(text.split("=", 1) for text in options.text)
    drawn = calibrated_on(list(models.values()), tokenizer)
    windows = {
        name: evaluation_windows(text, tokenizer, options.samples, options.seq_len, drawn)
        for name, text in texts.items()
    }
    dense = AutoModelForCausalLM.from_pretrained(options.dense, dtype=torch.bfloat16).eval()
    rows = []
    for name, folder in models.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        for text, held_out in windows.items():
            small, whole, apart = measured(model, dense, held_out.tokens)
            excess = excess_log_perplexity(small, whole).describe()
            kept = read_record(folder).plan.keep_params
            found = {"model": name, "kept": kept, "text": text, "sha256": held_out.sha256}
            rows.append({**found, "excess": excess, "divergence": apart.mean().item()})
            print(rows[-1], flush=True)
    write_table(options, list(texts), rows)


def write_table(options: argparse.Namespace, texts: list[str], rows: list[dict[str, Any]]) -> None:
    """A line a model, with excess and divergence by text."""
    words = with_own_names(sys.argv[1:], options.name)
    found = {"command": command(__file__, words), "rows": rows, **surroundings("cpu")}
    by_model: dict[str, list[str]] = {}
    for row in rows:
        cells = by_model.setdefault(row["model"], [f"{100 * row['kept']:.2f} %"])
        cells.append(f"{shown(row['excess'])}, {row['divergence']:.4f}")
    text = f"""# {Path(options.name).name}

    {found["command"]}

Excess over the dense model with its paired standard error, and divergence from it, nats a token; at
most {options.samples} windows of {options.seq_len} tokens of each text, none calibrated on, in
bfloat16. Machine: {hardware(found["machine"])}; torch {found["versions"]["torch"]}.

{table(["model", "kept", *texts], [[name, *cells] for name, cells in by_model.items()])}
"""
    write(RESULTS / options.name, json=as_json(found), md=text)


if __name__ == "__main__":
    main()
