"""Quantize the bundled Llama, dense and compressed, and write down what it costs.

    python eval/benchmarks/bench_quantize.py --work bench-work --run 75-int8 75-nf4 75-turned-int8
    python eval/benchmarks/bench_quantize.py --work bench-work --list

Every contestant is the real pipeline: `sp3llm compress`, once for each shape and turn, and
`sp3llm quantize`. One that was killed continues where it was; one that is finished is not run
again. `quantize.json`, `.md` and `.png` in `eval/results/quantization` are written anew from
all that are finished.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from common import (
    RESULTS,
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

from sp3llm.compression.story import compress
from sp3llm.maths.paired import excess_log_perplexity
from sp3llm.options import CompressConfig, QuantizeConfig
from sp3llm.quantization.story import quantize
from sp3llm.runtime.machine import machine

# In 64s, so that nf4 runs on a CPU and both formats see the same models.
IN_64S = {
    "75": {"hidden_size": 192, "intermediate_size": 640},
    "62.5": {"hidden_size": 192, "intermediate_size": 448},
    "50": {"hidden_size": 128, "intermediate_size": 640},
}
TURNED = "-turned"
# Searched freely: as many bytes in int8 as the dense model in nf4, all of them or the linear
# layers' alone.
AS_NF4 = {"as-nf4": {"keep": 0.705}, "linear-as-nf4": {"keep": 0.57}}
CONTESTANTS = {
    **{
        f"{name}{turned}-{bits}": (f"{name}{turned}", bits)
        for name in IN_64S
        for turned in ("", TURNED)
        for bits in ("int8", "nf4")
    },
    **{
        f"{name}{turned}-int8": (f"{name}{turned}", "int8")
        for name in AS_NF4
        for turned in ("", TURNED)
    },
}


def start_of(name: str, work: Path, seed: int) -> Path:
    """The compressed model that is quantized, made once."""
    out = work / f"start-{name}"
    if finished(out):
        return out
    shape = name.removesuffix(TURNED)
    changes = AS_NF4.get(shape) or {"keep": float(shape) / 100, **IN_64S[shape]}
    turn = "hadamard" if name.endswith(TURNED) else "none"
    config = CompressConfig(
        samples=64, seq_len=512, out=out, seed=seed, device="cpu", report=False, turn=turn,
        **changes,
    )  # fmt: skip
    compress(config, Console())
    return out


def run(name: str, work: Path, seed: int) -> None:
    """Quantize one contestant, unless that is done."""
    if finished(work / name):
        return
    start, bits = CONTESTANTS[name]
    folder = str(start_of(start, work, seed))
    quantize(QuantizeConfig(folder, bits, out=work / name, device="cpu"), Console())


def kept_of(name: str, work: Path) -> dict:
    """What is kept of a finished contestant: no paths of this machine."""
    record = record_of(work / name)
    entry = record["quantization"]
    del entry["command"], entry["settings"]
    kept = ("plan", "calibration", "evaluation", "dtype")
    return {"name": name, "turn": record["settings"]["turn"], **{k: record[k] for k in kept},
            **entry}  # fmt: skip


def losses(record: dict, model: str) -> torch.Tensor:
    return torch.tensor(record["models"][model]["window_losses"], dtype=torch.float64)[:, None]


def megabytes(model: dict) -> list[str]:
    return [f"{model[key] / 1e6:.2f}" for key in ("weight_bytes", "linear_bytes")]


def dense_rows(records: list[dict]) -> list[list[str]]:
    found = {"dense": (records[0], "dense")}
    found |= {f"dense {r['bits']}": (r, "dense_quantized") for r in records}
    rows = []
    for name, (record, key) in found.items():
        model = record["models"][key]
        excess = "" if key == "dense" else shown(model["excess_log_perplexity"])
        rows.append([name, "100.0 %", "256, 688", *megabytes(model), excess, excess])
    return rows


def costs(records: list[dict]) -> str:
    head = ["model", "kept", "width, FFN", "MB", "MB, linear layers", "excess log-perplexity",
            "of it by the bits"]  # fmt: skip
    rows = dense_rows(records)
    seen = set()
    for record in records:
        models, plan = record["models"], record["plan"]
        about = [f"{100 * plan['keep_params']:.1f} %",
                 "{hidden_size}, {intermediate_size}".format(**plan["shape"])]  # fmt: skip
        start = record["name"].rpartition("-")[0]
        excess = {key: shown(models[key]["excess_log_perplexity"]) for key in models}
        if start not in seen:
            rows.append([f"{start} bf16", *about, *megabytes(models["small"]), excess["small"], ""])
        seen.add(start)
        rows.append([
            f"{start} {record['bits']}", *about, *megabytes(models["small_quantized"]),
            excess["small_quantized"], shown(record["cost"]["small"]),
        ])  # fmt: skip
    return table(head, rows)


def turns(records: list[dict]) -> str:
    """What the turn changes: turned less unturned, on the same windows."""
    named = {record["name"]: record for record in records}
    rows = []
    for name, record in named.items():
        start, bits = CONTESTANTS[name]
        turned = named.get(f"{start}{TURNED}-{bits}")
        if start.endswith(TURNED) or turned is None:
            continue
        full, few = (
            excess_log_perplexity(losses(turned, key), losses(record, key))
            for key in ("small", "small_quantized")
        )
        added = excess_log_perplexity(
            losses(turned, "small_quantized") - losses(turned, "small"),
            losses(record, "small_quantized") - losses(record, "small"),
        )
        cost = [shown(one["cost"]["small"]) for one in (record, turned)]
        rows.append([name, *cost, *(shown(found.describe()) for found in (added, full, few))])
    head = ["model", "cost of the bits", "turned", "difference", "turned less unturned, bf16",
            "turned less unturned, quantized"]  # fmt: skip
    return table(head, rows)


def versus(records: list[dict]) -> str:
    """Every compressed model in int8 beside the dense one in nf4."""
    nf4 = next((record for record in records if record["bits"] == "nf4"), None)
    if nf4 is None:
        return "(dense nf4 is not measured yet)"
    dense = nf4["models"]["dense_quantized"]
    rows = []
    for record in records:
        if record["bits"] == "int8" and record["turn"] == "none":
            small = record["models"]["small_quantized"]
            more = excess_log_perplexity(
                losses(record, "small_quantized"), losses(nf4, "dense_quantized")
            )
            sizes = [f"{small[key] / dense[key]:.3f}" for key in ("weight_bytes", "linear_bytes")]
            rows.append([record["name"], *sizes, shown(more.describe())])
    head = ["model", "bytes over dense nf4's", "linear layers' alone",
            "loss over dense nf4's, nats a token"]  # fmt: skip
    return table(head, rows)


def draw(records: list[dict], path: Path) -> None:
    picture, axes = figure()
    for bits, marker in (("int8", "s"), ("nf4", "^")):
        mine = [r for r in records if r["bits"] == bits]
        for turn, fill in (("none", "full"), ("hadamard", "none")):
            points = [r["models"]["small_quantized"] for r in mine if r["turn"] == turn]
            axes.plot(
                [p["weight_bytes"] / 1e6 for p in points],
                [p["excess_log_perplexity"]["mean"] for p in points],
                marker, fillstyle=fill, markersize=5, color="C0" if bits == "int8" else "C1",
                label=f"compressed {bits}" + (", turned" if turn != "none" else ""),
            )  # fmt: skip
        if mine:
            dense = mine[0]["models"]["dense_quantized"]
            at = dense["weight_bytes"] / 1e6, dense["excess_log_perplexity"]["mean"]
            axes.plot(*at, "*", color="C0" if bits == "int8" else "C1", markersize=9)
            axes.annotate(f"dense {bits}", at, fontsize=7, xytext=(4, 6),
                          textcoords="offset points")  # fmt: skip
    whole = {r["name"].rpartition("-")[0]: r["models"]["small"] for r in records
             if r["turn"] == "none"}  # fmt: skip
    axes.plot(
        [p["weight_bytes"] / 1e6 for p in whole.values()],
        [p["excess_log_perplexity"]["mean"] for p in whole.values()],
        "o", color="C2", markersize=5, label="compressed bf16",
    )  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(
        xlabel="MB on disk",
        ylabel="excess log-perplexity (nats a token)",
        title="The bundled Llama, compressed and quantized",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=7)
    picture.savefig(path, dpi=120)


def publish(records: list[dict], seed: int) -> None:
    lines = ",\n".join(map(json.dumps, records))  # one a contestant: window losses are many
    first = records[0]
    evaluated, calibrated = first["evaluation"], first["calibration"]
    names = [record["name"] for record in records]
    versions, found_on = first["versions"], hardware(machine("cpu"))
    text = f"""# quantize

    {command(__file__, ["--work", "WORK", "--run", *names])}

The bundled Llama, dense perplexity {first["models"]["dense"]["perplexity"]:.3f}, compressed
(calibrated on {calibrated["samples"]} windows of {calibrated["seq_len"]} tokens of
{", ".join(calibrated["sources"])}, calibration part, sha256 {calibrated["sha256"][:12]}; default
basis and refit) and quantized by bitsandbytes. Models named by a percentage have widths in 64s, so
that nf4 runs on a CPU; `as-nf4` and `linear-as-nf4` are shapes that the search chose within the
bytes of the dense model in nf4. `turned` is `--turn hadamard`. Excess log-perplexity (nats a token
over the dense model in bf16, with its paired standard error over windows) on {evaluated["samples"]}
windows of {evaluated["seq_len"]} tokens of {", ".join(evaluated["sources"])} (evaluation part,
sha256 {evaluated["sha256"][:12]}). Seed {seed}. Everything that is not quantized is stored in
bf16 and computed in float32. Bytes are those of the files of weights; the linear layers' hold
their scales. The dense model's FFN of 688 is not in 64s: its nf4 weights are dequantized block by
block, as a GPU does. Machine: {found_on}; torch {versions["torch"]}, transformers
{versions["transformers"]}, bitsandbytes {versions["bitsandbytes"]},
{os.environ.get("OMP_NUM_THREADS", "all")} thread(s).

**Read this with it.** Embeddings and head, which bitsandbytes leaves in 16 bits, are 27 % of this
model's parameters and 56 % of its bytes in nf4; of a 7B Llama they are 4 % and 13 %. Cutting the
width cuts them too, which flatters pruning by the bytes of everything; the linear layers alone are
what a large model would see.

{costs(records)}

## Does the turn help?

Negative differences are its gain; the cost of the bits is quantized less bf16, each model by
itself.

{turns(records)}

## Compressed in int8, or dense in nf4?

{versus(records)}
"""
    path = RESULTS / "quantization" / "quantize"
    write(path, json=f"[\n{lines}\n]\n", md=text)
    draw(records, Path(f"{path}.png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options = contest(parser, CONTESTANTS)
    for name in options.run:
        run(name, options.work, options.seed)
        done = [name for name in CONTESTANTS if finished(options.work / name)]
        publish([kept_of(name, options.work) for name in done], options.seed)
        print(name, "finished", flush=True)


if __name__ == "__main__":
    main()
