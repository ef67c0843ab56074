"""Recover the bundled Llama at 62.5 % from several starts, and write down what came out.

    python eval/benchmarks/bench_recover.py --work bench-work --run refit-150 plain-150
    python eval/benchmarks/bench_recover.py --work bench-work --list

Every contestant is the real pipeline, sees the same windows in the same order, and is scored on
the same held-out tokens, which share no document with text that was calibrated on, trained on or
used to stop. A contestant that was killed continues where it was; one that is finished is not run
again. `recover.json`, `.md` and `.png` in `eval/results/recovery` are written anew from
all that are finished.
"""

import argparse
import gzip
import itertools
import json
import os
from pathlib import Path

import torch
from common import (
    RESULTS,
    as_json,
    command,
    contest,
    figure,
    finished,
    hardware,
    record_of,
    shown,
    table,
    write,
)
from rich.console import Console
from torch import Tensor

from sp3llm.compression.story import compress
from sp3llm.evaluation.perplexity import measure_losses
from sp3llm.maths.paired import excess_log_perplexity
from sp3llm.models.checkpoint import open_checkpoint
from sp3llm.models.families import family_of
from sp3llm.models.source import bundled_model, read_config
from sp3llm.options import CompressConfig, RecoverConfig
from sp3llm.recovery.story import recover
from sp3llm.runtime.devices import resolve_execution
from sp3llm.runtime.machine import machine
from sp3llm.text.sources import read_documents, resolve_source
from sp3llm.text.split import part_of
from sp3llm.text.tokenizer import load_tokenizer
from sp3llm.text.windows import cut_windows, pack

# A learned mask sees as many tokens a step as a step of recovery does.
_LEARNED = {"mask": "learned", "mask_batch": 8, "mask_steps": 75}
STARTS = {
    "refit": {},
    "width": {"allocate": "width"},
    "plain": {"refit": False, "basis": "pca"},
    "learned": _LEARNED,
    "refit50": {"keep": 0.5},
    "learned50": {"keep": 0.5, **_LEARNED},
}
ABOUT = {
    "refit": "default: shape searched, refitted",
    "width": "hidden size alone, refitted",
    "plain": "hidden size alone, principal components, cut and not refitted",
    "learned": "mask learned in 75 steps of 8 windows of 512 tokens, refitted",
    "refit50": "as refit, at 50 %",
    "learned50": "as learned, at 50 %",
}
CURVES = ("refit", "width", "plain")
OTHER_WINDOWS = 48
STEPS = (25, 75, 150, 600)
# Of all weights, over the hidden size: what this small model likes best, three times the default.
RATE = 0.2
# Name: start and settings that differ from the default.
CONTESTANTS = {
    **{f"{start}-{steps}": (start, {"steps": steps}) for start in CURVES for steps in STEPS},
    # A learned mask and its recovery against the closed form and a recovery of as many tokens.
    "learned-75": ("learned", {"steps": 75}),
    "learned50-75": ("learned50", {"steps": 75}),
    "refit50-75": ("refit50", {"steps": 75}),
    "refit50-150": ("refit50", {"steps": 150}),
    # What steps on this text do that is no recovery: with a tenth of the language-model loss, which
    # also learns the text's own manner; and with that loss alone, on the dense model, which has
    # nothing to recover.
    "lm-150": ("refit", {"steps": 150, "lm_weight": 0.1}),
    **{
        f"dense-lm-{steps}": (
            "dense",
            {"steps": steps, "kl_weight": 0.0, "lm_weight": 1.0, "lr": 3e-4},
        )
        for steps in (50, 150)
    },
    "lora-150": ("refit", {"steps": 150, "lora": 16}),
    # Beside refit-75.
    "bf16-teacher-75": ("refit", {"steps": 75, "teacher_dtype": "bfloat16"}),
    "nf4-teacher-75": ("refit", {"steps": 75, "teacher_dtype": "nf4"}),
    "int8-teacher-75": ("refit", {"steps": 75, "teacher_dtype": "int8"}),
    "hidden-75": ("refit", {"steps": 75, "hidden_weight": 0.5}),
    # Trained on the corpora of --also as well, their evaluation parts left out.
    "mix-150": ("refit", {"steps": 150, "train": None}),
}


def start_of(name: str, work: Path, seed: int) -> Path:
    """The compressed model that a contestant begins with, made once."""
    if name == "dense":
        return bundled_model()
    out = work / f"start-{name}"
    if not finished(out):
        settings = {"keep": 0.625, "samples": 64, "seq_len": 512, "out": out, "seed": seed}
        compress(CompressConfig(**{**settings, "device": "cpu", **STARTS[name]}), Console())
    return out


def run(name: str, work: Path, train: str, also: list[Path], seed: int) -> None:
    """Recover one contestant, unless that is done."""
    start, changes = CONTESTANTS[name]
    out = work / name
    if finished(out):
        return
    if "train" in changes:
        changes = {"train": ",".join([train, *(str(seen_part(path, work)) for path in also)])}
        changes = {**CONTESTANTS[name][1], **changes}
    begun = start_of(start, work, seed)
    if "lora" not in changes:
        changes = {"lr": RATE / read_config(begun)["hidden_size"], **changes}
    settings = {
        "model": str(begun),
        "teacher": str(bundled_model()),
        "out": out,
        "train": train,
        "batch": 16,
        "seq_len": 256,
        "seed": seed,
        "device": "cpu",
    }
    recover(RecoverConfig(**{**settings, **changes}), Console())


def seen_part(path: Path, work: Path) -> Path:
    """A corpus without its evaluation part."""
    found = work / f"{path.name.removesuffix('.gz').removesuffix('.jsonl')}.train.jsonl.gz"
    if not found.is_file():
        documents = read_documents(resolve_source(str(path)), "train")
        with gzip.open(found, "wt", encoding="utf-8") as file:
            for document in documents:
                if part_of(document) != "evaluation":
                    file.write(json.dumps({"text": document}) + "\n")
    return found


def other_text(path: Path) -> Tensor:
    """Windows of the evaluation part of a corpus that no contestant is trained on."""
    tokenizer = load_tokenizer(bundled_model())
    source = resolve_source(str(path))
    documents = (d for d in read_documents(source, "train") if part_of(d) == "evaluation")
    runs = pack(documents, tokenizer, source.join)
    windows = cut_windows(runs, 512, tokenizer.bos_token_id)
    return torch.tensor(list(itertools.islice(windows, OTHER_WINDOWS)))


def score_elsewhere(name: str, work: Path, paths: list[Path], seed: int) -> None:
    """Excess on other held-out text, before and after, kept beside the finished contestant."""
    start = start_of(CONTESTANTS[name][0], work, seed)
    kept = work / f"{name}.elsewhere.json"
    found = json.loads(kept.read_text()) if kept.is_file() else {}
    for path in paths:
        if path.name in found:
            continue
        tokens = other_text(path)
        losses = {}
        for key, folder in (("dense", bundled_model()), ("before", start), ("after", work / name)):
            checkpoint = open_checkpoint(folder)
            family = family_of(checkpoint.config)
            execution = resolve_execution("cpu", torch.float32)
            losses[key] = measure_losses(checkpoint, family, tokens, execution)
        found[path.name] = {
            key: excess_log_perplexity(losses[key], losses["dense"]).describe()
            for key in ("before", "after")
        }
    kept.write_text(json.dumps(found))


def kept_of(name: str, work: Path) -> dict:
    """What is kept of a finished contestant: no paths of this machine."""
    record = record_of(work / name)
    entry = record["recoveries"][-1]
    del entry["command"]
    for key in ("model", "teacher", "out", "train", "stop_text", "eval_text"):
        words = str(entry["settings"][key]).split(",")
        entry["settings"][key] = ",".join(Path(word).name for word in words)
    for text in ("training", "stopping", "evaluation"):
        entry[text]["sources"] = [Path(word).name for word in entry[text]["sources"]]
    elsewhere = work / f"{name}.elsewhere.json"
    return {
        "name": name,
        "start": CONTESTANTS[name][0],
        "plan": record.get("plan"),
        "elsewhere": json.loads(elsewhere.read_text()) if elsewhere.is_file() else {},
        **entry,
    }


def moved(found: dict | None) -> str:
    if found is None:
        return ""
    return f"{found['before']['mean']:.4f} to {shown(found['after'])}"


def gains(records: list[dict]) -> str:
    others = sorted({text for record in records for text in record["elsewhere"]})
    head = [
        "contestant",
        "steps (best)",
        "parameters trained",
        "before",
        "after",
        *others,
        "seconds",
    ]
    rows = [
        [
            record["name"],
            f"{record['steps']} ({record['best_step']})",
            f"{record['trained_parameters']:,}",
            shown(record["excess_log_perplexity_before"]),
            shown(record["excess_log_perplexity"]),
            *(moved(record["elsewhere"].get(text)) for text in others),
            f"{record['training_seconds']:.0f}",
        ]
        for record in records
    ]
    return table(head, rows)


def draw(records: list[dict], path: Path) -> None:
    picture, axes = figure()
    for start, marker in zip(CURVES, "os^", strict=True):
        mine = [r for r in records if r["name"] == f"{start}-{r['settings']['steps']}"]
        if not mine:
            continue
        points = [(0, mine[0]["excess_log_perplexity_before"])]
        points += [(r["settings"]["steps"], r["excess_log_perplexity"]) for r in mine]
        x, y = zip(*sorted(points, key=lambda point: point[0]), strict=True)
        errors = [value["paired_standard_error"] for value in y]
        means = [value["mean"] for value in y]
        axes.errorbar(x, means, errors, marker=marker, markersize=4, label=ABOUT[start])
    for record in records:
        at_keep = "50-" not in record["name"]
        if at_keep and not record["name"].startswith(tuple(f"{start}-" for start in CURVES)):
            found = record["excess_log_perplexity"]["mean"]
            axes.plot(record["settings"]["steps"], found, "x")
            axes.annotate(record["name"], (record["settings"]["steps"], found), fontsize=6)
    # Linear: a contestant can fall below the dense model here, and a log scale would hide it.
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=25)
    axes.set_xticks([0, *STEPS], [0, *STEPS])
    axes.set(
        xlabel="steps of 16 windows of 256 tokens, each point a run of its own",
        ylabel="excess log-perplexity (nats a token)",
        title="The bundled Llama at 62.5 %, recovered on text like that scored",
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=7)
    picture.savefig(path, dpi=120)


def publish(records: list[dict], seed: int) -> None:
    first = records[0]
    evaluated, trained = first["evaluation"], first["training"]
    others = sorted({text for record in records for text in record["elsewhere"]})
    words = ["--work", "WORK", "--train", first["settings"]["train"]]
    words += ["--also", *others] if others else []
    words += ["--run", *(record["name"] for record in records)]
    text = f"""# recover

    {command(__file__, words)}

The bundled Llama, dense perplexity {first["dense_perplexity"]:.3f}, compressed to 62.5 % of its
parameters unless named (calibrated on 64 windows of 512 tokens of stdlib) and recovered: steps of
{first["settings"]["batch"]} windows of {trained["seq_len"]} tokens of
{", ".join(trained["sources"])}, a schedule of its own for every run. Starts:
{"; ".join(f"{name}, {about}" for name, about in ABOUT.items())}. All weights are trained unless a
rank is named, the teacher is float32 unless named. Excess log-perplexity (nats a token over the
dense model, with its paired standard error over windows) on {evaluated["samples"]} windows of
{evaluated["seq_len"]} tokens of {", ".join(evaluated["sources"])} (evaluation part, sha256
{evaluated["sha256"][:12]}), the same for all; no setting was chosen by it but one: that the
language-model loss has no weight by default, after its effect had been seen on it. Stopping is
decided on {first["stopping"]["samples"]} windows of text kept apart from the training text. Seed
{seed}.
Machine: {hardware(machine("cpu"))}; torch {first["versions"]["torch"]}, transformers
{first["versions"]["transformers"]}. Seconds were taken while other work ran beside, on
{os.environ.get("OMP_NUM_THREADS", "all")} thread(s) here.

**Read this with it.** The teacher was trained on a mixture, the contestants on
{", ".join(trained["sources"])} alone (but for `mix-150`), from the teacher's answers alone (but for
`lm-150`, a tenth of whose loss is the text's own: on text like it such a contestant can fall below
the dense model, which is no recovery; see eval/NOTES.md). The columns of other text, which nobody
but `mix-150` was tuned on, show what carries over. A learned mask's {_LEARNED["mask_steps"]} steps
see as many tokens as {_LEARNED["mask_steps"]} steps of recovery: compare `learned-75` with
`refit-150`, and `learned50-75` with `refit50-150`.

{gains(records)}
"""
    path = RESULTS / "recovery" / "recover"
    write(path, json=as_json(records), md=text)
    draw(records, Path(f"{path}.png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", default="stdlib", help="as for sp3llm recover")
    parser.add_argument(
        "--also", nargs="*", type=Path, default=[], metavar="FILE",
        help="corpora whose evaluation part is scored too; but for mix-150, not trained on",
    )  # fmt: skip
    options = contest(parser, CONTESTANTS)
    for name in options.run:
        run(name, options.work, options.train, options.also, options.seed)
        score_elsewhere(name, options.work, options.also, options.seed)
        done = [name for name in CONTESTANTS if finished(options.work / name)]
        records = [kept_of(name, options.work) for name in done]
        publish(records, options.seed)
        print(gains(records).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
