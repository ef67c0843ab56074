"""Run `sp3llm compress` over ratios and settings, and write down what came out.

python eval/benchmarks/bench.py --name basis --keep 0.75 0.625 0.5 \
    --vary moments=normalised,raw basis=pca

Every cell is the real pipeline. `NAME.json` holds, for each run, the command, seed, text hashes,
versions and machine; `NAME.md` the table. Both lie in `eval/results`, where those of that name lie
already, else in the folder that NAME begins with (`curve/mine`), else in one called NAME.
"""

import argparse
import itertools
import shlex
import tempfile
from dataclasses import replace
from pathlib import Path

from common import as_json, command, hardware, place, record_of, shown, table, write
from rich.console import Console

from sp3llm.compression.story import compress
from sp3llm.options import CompressConfig
from sp3llm.runtime.machine import machine

SHAPE = ("hidden_size", "intermediate_size", "num_key_value_heads")


def parse_vary(words: list[str]) -> dict[str, list]:
    """`moments=normalised,raw` to a list of values of the setting's type."""
    varied = {}
    for word in words:
        key, _, values = word.partition("=")
        varied[key] = [typed(key, value) for value in values.split(",")]
    return varied


def typed(key: str, value: str) -> bool | int | float | str:
    default = getattr(CompressConfig(), key)
    if isinstance(default, bool):
        return value in ("true", "yes", "1")
    if default is None:
        return int(value) if value.isdigit() else value
    return type(default)(value)


def run(settings: CompressConfig) -> dict:
    """One compression into a temporary folder; its record."""
    with tempfile.TemporaryDirectory() as folder:
        result = compress(replace(settings, out=Path(folder) / "small"), Console(quiet=True))
        record = record_of(result.out)
    del record["eigenvalues"], record["files_copied"], record["fits"], record["settings"]["out"]
    words = shlex.split(record["command"])
    at = words.index("--out")
    record["command"] = shlex.join([*words[:at], *words[at + 2 :]])
    return record


def sizes(shape: dict) -> str:
    """Width, FFN and KV groups, and what else an OPT's shape has."""
    text = ", ".join(str(shape[key]) for key in SHAPE)
    width = shape["word_embed_proj_dim"]
    if width is None:
        return text
    tied = "tied " if shape["tie_word_embeddings"] else ""
    return f"{text}; heads of {shape['head_dim']}, {tied}table of {width}"


def outcomes(records: list[dict], varied: list[str]) -> str:
    head = ["kept", *varied, "width, FFN, KV", "perplexity", "excess log-perplexity", "seconds"]
    rows = [
        [
            f"{100 * record['plan']['keep_params']:.2f} %",
            *(str(record["settings"][key]) for key in varied),
            sizes(record["plan"]["shape"]),
            f"{record['perplexity']:.3f}",
            shown(record["excess_log_perplexity"]),
            f"{record['seconds']:.0f}",
        ]
        for record in records
    ]
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--name", required=True, help="name of the files in eval/results, or FOLDER/NAME"
    )
    parser.add_argument("--model", help="as for sp3llm compress")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.625, 0.5])
    parser.add_argument("--vary", nargs="*", default=[], help="SETTING=VALUE,VALUE ...")
    parser.add_argument("--calib", help="as for sp3llm compress")
    parser.add_argument("--eval-text", help="as for sp3llm compress")
    parser.add_argument("--samples", type=int, default=CompressConfig().samples)
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    varied = parse_vary(options.vary)
    base = CompressConfig(
        model=options.model,
        calib=options.calib,
        eval_text=options.eval_text,
        samples=options.samples,
        seq_len=options.seq_len,
        seed=options.seed,
        report=False,
    )
    records = []
    for keep, *values in itertools.product(options.keep, *varied.values()):
        settings = replace(base, keep=keep, **dict(zip(varied, values, strict=True)))
        records.append(run(settings))
        print(outcomes(records[-1:], list(varied)).splitlines()[-1], flush=True)

    path = place(options.name)
    first = records[0]
    evaluated, calibrated = first["evaluation"], first["calibration"]
    text = f"""# {path.name}

    {command(__file__)}

Model: {first["model"]}; dense perplexity {first["dense_perplexity"]:.3f}. Excess log-perplexity
(nats a token over the dense model, with its paired standard error over windows) on
{evaluated["samples"]} windows of {evaluated["seq_len"]} tokens of {", ".join(evaluated["sources"])}
(evaluation part, sha256 {evaluated["sha256"][:12]}). Calibrated on {calibrated["samples"]} windows
of {calibrated["seq_len"]} tokens of {", ".join(calibrated["sources"])} (calibration part, sha256
{calibrated["sha256"][:12]}), seed {options.seed}. Machine: {hardware(machine("cpu"))}; torch
{first["versions"]["torch"]}, transformers {first["versions"]["transformers"]}.

{outcomes(records, list(varied))}
"""
    write(path, json=as_json(records), md=text)


if __name__ == "__main__":
    main()
