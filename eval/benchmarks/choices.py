"""What somebody who wants a smaller model can choose between, on the same windows and prompts.

    python eval/benchmarks/choices.py --dense DIR --model NAME=DIR ... --name real/choices

Plain transformers runs every model, in bfloat16, as it is and with its matrices in int8 or nf4 of
bitsandbytes (`--bits`); losses are paired window by window, on the held-out text of the first
`--model`, which sp3llm wrote. All models share a tokenizer.
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
from peers_prune import token_losses
from torch import Tensor

from sp3llm.maths.paired import excess_log_perplexity
from sp3llm.quantization.bits import bits_config, take_any_width
from sp3llm.reporting.formatting import human_bytes
from sp3llm.reporting.origins import held_out_tokens
from sp3llm.reporting.record import read_record
from sp3llm.text.tokenizer import load_tokenizer

PROMPTS = ("The city of Paris is", "The ship was built in 1905 and")
_NEW_TOKENS = 40


def loaded(folder: Path, bits: str) -> Any:
    """The stock model, with its matrices in that format."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if bits != "bf16":
        options["quantization_config"] = bits_config(bits, torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    if bits == "nf4":
        take_any_width(model)
    return model


def size_of(model: Any) -> tuple[int, int]:
    """Parameters, tied ones once and packed ones as what they stand for, and bytes."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    scales = [getattr(getattr(t, "quant_state", None), "absmax", None) for t in tensors]
    scales += [getattr(t, "SCB", None) for t in tensors]
    return model.num_parameters(), sum(t.nbytes for t in (*tensors, *scales) if t is not None)


@torch.no_grad()
def continuations(model: Any, tokenizer: Any) -> list[str]:
    """Greedy ones of the prompts."""
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        new = model.generate(ids, max_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=0)
        found.append(tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True))
    return found


def measured(name: str, folder: Path, bits: str, tokens: Tensor, tokenizer: Any) -> dict[str, Any]:
    """One choice."""
    model = loaded(folder, bits)
    parameters, size = size_of(model)
    losses = torch.cat([token_losses(model, window[None]) for window in tokens])
    samples = continuations(model, tokenizer)
    print(f"{name} in {bits}: {losses.mean():.4f}", flush=True)
    return {
        "model": name,
        "bits": bits,
        "parameters": parameters,
        "bytes": size,
        "losses": losses,
        "samples": samples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--bits", nargs="*", default=["bf16", "int8", "nf4"])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--name", required=True, help="of the files under eval/results")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.dense)
    small = {name: Path(folder) for name, folder in (m.split("=", 1) for m in options.model)}
    folders = {"dense": options.dense, **small}
    first = next(iter(small.values()))
    tokens = held_out_tokens(read_record(first), first)[: options.samples]
    rows = [
        measured(name, folder, bits, tokens, tokenizer)
        for name, folder in folders.items()
        for bits in options.bits
    ]
    dense = rows[0]["losses"]
    for row in rows:
        row["excess"] = excess_log_perplexity(row.pop("losses"), dense).describe()
    rows.sort(key=lambda row: row["bytes"], reverse=True)
    write_table(options, tokens.shape, rows)


def write_table(
    options: argparse.Namespace, windows: tuple[int, int], rows: list[dict[str, Any]]
) -> None:
    """The choices by their bytes, and what they write."""
    words = with_own_names(sys.argv[1:], options.name)
    found = {"command": command(__file__, words), "rows": rows, **surroundings("cpu")}
    head = ["model", "matrices in", "parameters", "bytes", "excess, nats a token"]
    cells = [
        [
            *(row["model"], row["bits"], f"{row['parameters']:,}", human_bytes(row["bytes"])),
            shown(row["excess"]),
        ]
        for row in rows
    ]
    samples = "\n\n".join(
        f"**{prompt}**\n\n"
        + "\n".join(
            f"- {row['model']}, {row['bits']}: {' '.join(row['samples'][place].split())}"
            for row in rows
            if row["bits"] == "bf16"
        )
        for place, prompt in enumerate(PROMPTS)
    )
    text = f"""# {Path(options.name).name}

    {found["command"]}

{windows[0]} held-out windows of {windows[1]} tokens, the same for all, by plain
transformers in bfloat16; differences from the dense model in bfloat16 are paired window by window.
Bytes are of what is in memory, scales of few bits among it. Machine: {hardware(found["machine"])};
torch {found["versions"]["torch"]}, transformers {found["versions"]["transformers"]}.

{table(head, cells)}

Greedy, {_NEW_TOKENS} tokens:

{samples}
"""
    write(RESULTS / options.name, json=as_json(found), md=text)


if __name__ == "__main__":
    main()
