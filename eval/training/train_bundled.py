"""Train the small models that the project ships: tokenizer, weights, model card.

    python eval/training/train_bundled.py --corpus books.jsonl.gz peps.jsonl.gz --work /tmp/llama \
        --out sp3llm/bundled/llama-8m
    python eval/training/train_bundled.py --family opt --corpus books.jsonl.gz peps.jsonl.gz \
        --work /tmp/opt --out eval/models/opt-4m
    python eval/training/train_bundled.py --family llama-tied \
        --corpus books.jsonl.gz peps.jsonl.gz --work /tmp/tied --out eval/models/llama-tied-4m

The Llama goes into the package; the OPT and the smaller Llama, whose embeddings are tied, are for
tests and benchmarks only and take the first one's tokenizer as it is. The text is the running
Python's own documentation and the documents of `--corpus` (jsonl rows with a `text`), each divided
by `sp3llm.text.split.part_of`: only the `train` part is learned from, only the `evaluation` part is
scored. The run continues from the last checkpoint in `--work`; the order of windows depends on the
seed and the step alone, so a resumed run sees the same batches.
"""

import argparse
import gzip
import io
import json
import math
import os
import platform
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sp3llm.text.split import part_of
from sp3llm.text.stdlib import stdlib_documents
from sp3llm.text.windows import cut_windows, pack

VOCAB_SIZE = 4096
# Held-out tokens of each text that the card reports on.
SCORED_TOKENS = 96 * 1024
LLAMA = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
OPT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "word_embed_proj_dim": 256,
    "ffn_dim": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "dropout": 0.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # OPT's own default, 1, is BOS here, and the padding row of an embedding is never trained.
    "pad_token_id": None,
}
TIED = {
    **LLAMA,
    "num_hidden_layers": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
MODELS = {"llama": LLAMA, "opt": OPT, "llama-tied": TIED}
# What adds to the residual stream starts small, by the depth of the model.
WRITERS = ("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")
# The models that take the tokenizer trained for the first.
BORROWERS = ("opt", "llama-tied")
LENDER = Path(__file__).parents[2] / "sp3llm" / "bundled" / "llama-8m"
ABOUT = {
    "llama": """# sp3llm bundled Llama

A grouped-query `LlamaForCausalLM` with {parameters:,} parameters that sp3llm
compresses when no model is named, and that its tests and benchmarks use: hidden size
{c.hidden_size}, {c.num_hidden_layers} layers, {c.num_attention_heads} heads of {c.head_dim} on
{c.num_key_value_heads} key/value heads, FFN {c.intermediate_size}, {c.max_position_embeddings}
positions, a byte-fallback SentencePiece vocabulary of {c.vocab_size}, untied embeddings, bf16.
""",
    "opt": """# sp3llm OPT for tests and benchmarks

An `OPTForCausalLM` with {parameters:,} parameters, its tied embeddings counted once. It is not
part of the installed package. Hidden size {c.hidden_size}, {c.num_hidden_layers} layers,
{c.num_attention_heads} heads, FFN {c.ffn_dim} with {c.activation_function}, biases everywhere,
LayerNorm before each block, {c.max_position_embeddings} learned positions, bf16, the vocabulary of
{c.vocab_size} and the tokenizer of the bundled Llama. There is no padding token: the padding row
of an embedding is never trained.
""",
    "llama-tied": """# sp3llm tied Llama for benchmarks

A `LlamaForCausalLM` with {parameters:,} parameters whose head is its embedding table, counted
once. It is not part of the installed package. Hidden size {c.hidden_size}, {c.num_hidden_layers}
layers, {c.num_attention_heads} heads of {c.head_dim} on {c.num_key_value_heads} key/value heads,
FFN {c.intermediate_size}, {c.max_position_embeddings} positions, bf16, the vocabulary of
{c.vocab_size} and the tokenizer of the bundled Llama.
""",
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "legacy": False,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 1024,
}


def read_corpus(paths: list[Path], part: str) -> dict[str, list[str]]:
    """Documents of `part`, by corpus name; the standard library's first."""
    corpora = {"stdlib": [d for d in stdlib_documents() if part_of(d) == part]}
    for path in paths:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            texts = [json.loads(line)["text"] for line in file]
        corpora[path.name.split(".")[0]] = [t for t in texts if part_of(t) == part]
    return corpora


def train_tokenizer(corpora: dict[str, list[str]], folder: Path) -> None:
    """A byte-fallback SentencePiece BPE like Llama's, with its `tokenizers` twin beside it."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    lines = (
        line
        for documents in corpora.values()
        for document in documents
        for line in document.split("\n")
        if line.strip()
    )
    # Into memory: a file name given here would be written into the model.
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.9999,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        max_sentence_length=20000,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = json.dumps(TOKENIZER_CONFIG, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(config)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(config)
    (folder / "config.json").unlink()


def copy_tokenizer(source: Path, folder: Path, positions: int) -> None:
    """The tokenizer of another model, with this one's number of positions."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "tokenizer_config.json").read_text())
    config["model_max_length"] = positions
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("tokenizer.model", "tokenizer.json"):
        shutil.copyfile(source / name, folder / name)


def packed_windows(documents: list[str], tokenizer, seq_len: int, order_seed: int) -> np.ndarray:
    """Windows `(n, seq_len)`, uint16, BOS first, documents in a seeded order."""
    order = np.random.default_rng(order_seed).permutation(len(documents))
    runs = pack((documents[i] for i in order), tokenizer, "eos")
    return np.array(list(cut_windows(runs, seq_len, tokenizer.bos_token_id)), dtype=np.uint16)


def batch_of(windows: np.ndarray, step: int, batch: int, seed: int) -> torch.Tensor:
    """The batch of one step: a permutation an epoch, all of it a function of seed and step."""
    start = step * batch
    rows = []
    for position in range(start, start + batch):
        epoch, index = divmod(position, len(windows))
        order = np.random.default_rng([seed, epoch]).permutation(len(windows))
        rows.append(windows[order[index]])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@torch.no_grad()
def heldout_loss(forward, windows: np.ndarray, batch: int) -> float:
    total = 0.0
    used = len(windows) // batch * batch
    for start in range(0, used, batch):
        ids = torch.from_numpy(windows[start : start + batch].astype(np.int64))
        total += forward(ids).item()
    return total / (used // batch)


def train(args: argparse.Namespace) -> None:
    work = args.work
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    positions = MODELS[args.family]["max_position_embeddings"]
    tokenizer_folder = work / "tokenizer"
    if args.family in BORROWERS:
        copy_tokenizer(LENDER, tokenizer_folder, positions)
    elif not (tokenizer_folder / "tokenizer.json").exists():
        train_tokenizer(read_corpus(args.corpus, "train"), tokenizer_folder)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)

    cache = work / "windows.npz"
    if not cache.exists():
        train_documents = [d for ds in read_corpus(args.corpus, "train").values() for d in ds]
        arrays = {
            "short": packed_windows(train_documents, tokenizer, args.seq_len, args.seed),
            "long": packed_windows(train_documents, tokenizer, positions, args.seed + 1),
        }
        for name, documents in read_corpus(args.corpus, "evaluation").items():
            arrays[f"heldout {name}"] = packed_windows(documents, tokenizer, positions, 0)
        np.savez(cache, **arrays)
    arrays = dict(np.load(cache))
    heldout = {k: v for k, v in arrays.items() if k.startswith("heldout")}
    print({k: v.size for k, v in arrays.items()}, "tokens")

    # Eager attention: compiled, it is a third faster than the CPU's fused kernel at these shapes.
    config = AutoConfig.for_model(
        args.family.partition("-")[0], **MODELS[args.family], attn_implementation="eager"
    )
    model = AutoModelForCausalLM.from_config(config)
    residual_std = 0.02 / math.sqrt(2 * model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if name.endswith(WRITERS):
            torch.nn.init.normal_(parameter, std=residual_std)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    checkpoint = work / "checkpoint.pt"
    step, curve, seconds = 0, [], 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, curve, seconds = state["step"], state["curve"], state["seconds"]
        print(f"continuing at step {step}")

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.autocast):
            logits = model(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, VOCAB_SIZE).float(), ids[:, 1:].reshape(-1)
        )

    forward = torch.compile(loss_of, dynamic=False) if args.compile else loss_of
    few = {name: w[:32] for name, w in heldout.items()}
    long_from = round(args.steps * (1 - args.long_share))
    long_batch = args.batch * args.seq_len // positions
    clock = time.time()
    running: list[float] = []
    while step < args.steps:
        if step < long_from:
            ids = batch_of(arrays["short"], step, args.batch, args.seed)
        else:
            ids = batch_of(arrays["long"], step - long_from, long_batch, args.seed + 1)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)
        loss = forward(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running.append(loss.item())
        step += 1
        if step % 20 == 0:
            rate = 20 * ids.numel() / (time.time() - clock)
            seconds += time.time() - clock
            clock = time.time()
            print(f"{step}/{args.steps} loss {np.mean(running[-20:]):.4f} {rate:.0f} tokens/s")
        if step % 200 == 0 or step == args.steps:
            losses = {name: heldout_loss(loss_of, w, long_batch) for name, w in few.items()}
            curve.append(
                {
                    "step": step,
                    "tokens": step * ids.numel(),
                    "train": float(np.mean(running)),
                    **losses,
                }
            )
            print(json.dumps(curve[-1]), flush=True)
            running = []
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "curve": curve,
                "seconds": seconds,
            }
            torch.save(state, work / "checkpoint.part")
            os.replace(work / "checkpoint.part", checkpoint)
            clock = time.time()
    export(args, model, tokenizer_folder, curve, heldout, seconds)


def export(args, model, tokenizer_folder: Path, curve: list[dict], heldout, seconds) -> None:
    """Write the bf16 model, its tokenizer, its card with the curve, into `--out`."""
    args.out.mkdir(parents=True, exist_ok=True)
    model = model.to(torch.bfloat16)
    model.generation_config.bos_token_id, model.generation_config.eos_token_id = 1, 2
    model.save_pretrained(args.out)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, args.out / file.name)
    model = model.float()

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, labels=ids).loss

    windows = SCORED_TOKENS // model.config.max_position_embeddings
    few = {name: w[:windows] for name, w in heldout.items()}
    scores = {name: (heldout_loss(loss_of, w, 4), w.size) for name, w in few.items()}
    print(json.dumps({name: loss for name, (loss, _) in scores.items()}))
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    torch.manual_seed(0)
    samples = []
    for prompt in ("It was a cold evening, and the old man", "Return a new list containing"):
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=70, do_sample=True, top_k=40, temperature=0.8)
        samples.append(tokenizer.decode(out[0], skip_special_tokens=True))
    plot(curve, args.out / "curve.png")
    (args.out / "README.md").write_text(card(args, model, curve, scores, samples, seconds))


def plot(curve: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    tokens = [row["tokens"] / 1e6 for row in curve]
    for key in (k for k in curve[0] if k not in ("step", "tokens")):
        axes.plot(tokens, [row[key] for row in curve], label=key.replace("_", " "))
    axes.set(xlabel="tokens seen (millions)", ylabel="loss (nats a token)", ylim=(None, 6))
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110)


def card(args, model, curve, scores, samples, seconds) -> str:
    tokens = curve[-1]["tokens"]
    rows = "\n".join(
        f"| {name} | {size:,} | {loss:.4f} | {math.exp(loss):.2f} |"
        for name, (loss, size) in scores.items()
    )
    quarter = max(1, len(curve) // 4)
    points = "\n".join(
        "| " + " | ".join([f"{r['tokens']:,}"] + [f"{r[k]:.3f}" for k in list(r)[2:]]) + " |"
        for r in curve[quarter - 1 :: quarter]
    )
    names = list(curve[0])[2:]
    quoted = "\n\n".join("> " + s.replace("\n", "\n> ") for s in samples)
    about = ABOUT[args.family].format(parameters=model.num_parameters(), c=model.config)
    positions = model.config.max_position_embeddings
    family = "" if args.family == "llama" else f"--family {args.family} "
    autocast = "" if args.autocast else " --no-autocast"
    arithmetic = "bf16 autocast" if args.autocast else "float32"
    threads = torch.get_num_threads()
    machine = f"{platform.machine()}, torch {torch.__version__}"
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: en
---

{about}
## Training

`python eval/training/train_bundled.py {family}--corpus books.jsonl.gz peps.jsonl.gz
--steps {args.steps} --batch {args.batch} --seq-len {args.seq_len}
--long-share {args.long_share} --lr {args.lr} --seed {args.seed}{autocast}`

{tokens:,} tokens seen, the last {args.long_share:.0%} of them in windows of {positions} (linear
warm-up over {args.warmup} steps, then cosine to zero; AdamW, betas 0.9 and 0.95, weight decay
0.1, clipping at 1.0, {arithmetic}) in {seconds / 60:.0f} minutes on {threads} CPU thread(s)
({machine}). Text: Python {platform.python_version()}'s own
documentation (pydoc topics and docstrings, PSF-2.0), fourteen public-domain English books, and
the Python Enhancement Proposals (public domain / CC0); only the `train` part of each, as
`sp3llm.text.split.part_of` divides them.

![Loss against tokens](curve.png)

| tokens | {" | ".join(n.replace("_", " ") for n in names)} |
|{"---|" * (len(names) + 1)}
{points}

## Held-out text

The `evaluation` part of the same sources (its first windows), {positions} tokens a window, float32
arithmetic on the shipped bf16 weights. The curve scores the same long windows from the start, so
it stays high until the last {args.long_share:.0%} of the training, which is on long windows too.

| text | tokens | loss | perplexity |
|---|---|---|---|
{rows}

## Samples

Seed 0, top-k 40, temperature 0.8:

{quoted}

It knows nothing and is for testing compression only.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--family", choices=tuple(MODELS), default="llama")
    parser.add_argument("--corpus", type=Path, nargs="*", default=[], help="jsonl.gz files")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and caches")
    parser.add_argument("--out", type=Path, required=True, help="where the model goes")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32, help="windows a step")
    parser.add_argument("--seq-len", type=int, default=256, help="length of the windows")
    parser.add_argument(
        "--long-share", type=float, default=0.25, help="last steps, on windows of all positions"
    )
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    # Only a CPU with bf16 arithmetic gains by it.
    parser.add_argument("--autocast", action=argparse.BooleanOptionalAction, default=True)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
