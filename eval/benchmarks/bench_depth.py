"""The baseline everybody knows: drop the blocks whose removal costs least, and refit nothing.

python eval/benchmarks/bench_depth.py --samples 32 --seq-len 512

Greedy: at each step the block whose absence raises the loss on calibration text least is dropped.
Scored on the same held-out text as eval/benchmarks/bench.py; needs a model that fits in memory.
"""

import argparse
import copy

import torch
from common import RESULTS, as_json, command, surroundings, write
from transformers import AutoModelForCausalLM

from sp3llm.maths.paired import excess_log_perplexity, perplexity
from sp3llm.models.source import resolve_model
from sp3llm.text.tokenizer import load_tokenizer
from sp3llm.text.windows import calibration_windows, evaluation_windows


@torch.no_grad()
def token_losses(model, tokens: torch.Tensor) -> torch.Tensor:
    losses = []
    for batch in tokens.split(4):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        losses.append(
            torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), batch[:, 1:], reduction="none"
            ).double()
        )
    return torch.cat(losses)


def without(model, dropped: list[int]):
    """The same model with some blocks taken out; parameters are shared."""
    smaller = copy.copy(model)
    smaller._modules = dict(model._modules)
    decoder = copy.copy(model.model)
    decoder._modules = dict(model.model._modules)
    kept = [layer for i, layer in enumerate(model.model.layers) if i not in dropped]
    decoder._modules["layers"] = torch.nn.ModuleList(kept)
    smaller._modules["model"] = decoder
    return smaller


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub id (default: the bundled Llama)")
    parser.add_argument("--calib", default="stdlib")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--eval-seq-len", type=int, default=1024)
    parser.add_argument("--eval-samples", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drop", type=int, default=6, help="blocks to drop at most")
    options = parser.parse_args()

    folder, name, _ = resolve_model(options.model)
    tokenizer = load_tokenizer(folder)
    calibration = calibration_windows(
        options.calib, tokenizer, options.samples, options.seq_len, options.seed
    )
    evaluation = evaluation_windows(
        options.calib, tokenizer, options.eval_samples, options.eval_seq_len, calibration.documents
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    dense_count = sum(p.numel() for p in model.parameters())
    dense_losses = token_losses(model, evaluation.tokens)
    records, dropped = [], []
    for _ in range(options.drop):
        left = [i for i in range(len(model.model.layers)) if i not in dropped]
        scores = {
            i: token_losses(without(model, [*dropped, i]), calibration.tokens).mean().item()
            for i in left
        }
        dropped.append(min(scores, key=scores.get))
        smaller = without(model, dropped)
        losses = token_losses(smaller, evaluation.tokens)
        count = sum(p.numel() for p in smaller.parameters())
        excess = excess_log_perplexity(losses, dense_losses)
        records.append(
            {
                "plan": {"keep_params": count / dense_count, "parameters": count},
                "dropped": list(dropped),
                "perplexity": perplexity(losses),
                "excess_log_perplexity": excess.describe(),
            }
        )
        print(f"{100 * count / dense_count:.2f} %, blocks {dropped} dropped: {excess.mean:.4f}")
    run = {
        "command": command(__file__),
        "model": name,
        "calibration": calibration.describe(),
        "evaluation": evaluation.describe(),
        **surroundings("cpu"),
        "runs": records,
    }
    write(RESULTS / "depth" / "depth", json=as_json(run))


if __name__ == "__main__":
    main()
