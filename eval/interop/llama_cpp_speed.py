"""How fast llama.cpp runs compressed models, and how large they are in its formats.

    python eval/interop/llama_cpp_speed.py --model dense=DIR --model 75=DIR --name serving/smollm2

The first model is what the others are compared with. Each is converted to bf16 and to q8_0, and run
by xllamacpp, in an environment of its own in .interop/; its wheel is built for any x86-64 processor
and does not use all that this one has. All get as many random tokens, models in turn, on all cores.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from interop_environments import CACHE, environment, llama_cpp_source

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from common import RESULTS, as_json, command, hardware, surroundings, table, with_own_names, write

from sp3llm.models.families import count_parameters, family_of
from sp3llm.models.source import read_config

_XLLAMACPP = "xllamacpp==2026.10.11549"
_ENGINE = Path(__file__).with_name("llama_cpp_engine.py")
_WORK = CACHE / "speed"
_PROMPTS, _PROMPT_TOKENS, _TURNS = 5, 256, 3
_FORMATS = ("bf16", "q8_0")
_KINDS = ("prefill", "decoding")
# A vocabulary that was cut has other ids, by which the converter knows pre-tokenizers: it looks at
# the dense model's (docs/deploy.md).
_CONVERT = """
import sys
source, dense = sys.argv[1:3]
del sys.argv[1:3]
sys.path[:0] = [source, source + "/gguf-py"]
import convert_hf_to_gguf
from conversion.base import TextModel
from transformers import AutoTokenizer

tokenizer, recognised = AutoTokenizer.from_pretrained(dense), TextModel.get_vocab_base_pre
TextModel.get_vocab_base_pre = lambda self, _: recognised(self, tokenizer)
convert_hf_to_gguf.main()
"""


def converted(model: Path, name: str, outtype: str, dense: Path) -> Path:
    """A GGUF of a model, made anew."""
    file = _WORK / f"{name}-{outtype}.gguf"
    source = llama_cpp_source([sys.executable, "-m", "pip"]) / "vendor" / "llama.cpp"
    words = [str(source), str(dense), str(model), "--outtype", outtype, "--outfile", str(file)]
    subprocess.run([sys.executable, "-c", _CONVERT, *words], check=True, capture_output=True)
    return file


def prompts_for(models: dict[str, Path]) -> Path:
    """Random token ids that all of the models have."""
    rows = min(read_config(path)["vocab_size"] for path in models.values())
    draw = random.Random(0)
    prompts = [[draw.randrange(300, rows) for _ in range(_PROMPT_TOKENS)] for _ in range(_PROMPTS)]
    path = _WORK / "prompts.json"
    path.write_text(json.dumps(prompts))
    return path


def measured(models: dict[str, Path]) -> list[dict[str, Any]]:
    """A row a format and model: bytes and speeds of all turns."""
    dense, python = next(iter(models.values())), environment("xllamacpp", [_XLLAMACPP])
    _WORK.mkdir(parents=True, exist_ok=True)
    rows, prompts = [], prompts_for(models)
    for outtype in _FORMATS:
        files = {name: converted(path, name, outtype, dense) for name, path in models.items()}
        found = {name: {kind: [] for kind in _KINDS} for name in files}
        for _ in range(_TURNS):
            for name, file in files.items():
                words = [str(python), str(_ENGINE), str(file), str(prompts)]
                ran = subprocess.run(words, check=True, capture_output=True, text=True)
                speeds = json.loads(ran.stdout.strip().splitlines()[-1])
                for kind in _KINDS:
                    found[name][kind] += speeds[kind]
                print(outtype, name, speeds, flush=True)
        for name, file in files.items():
            size = file.stat().st_size
            rows.append({"format": outtype, "model": name, "bytes": size, **found[name]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", required=True, help="NAME=FOLDER")
    parser.add_argument("--name", required=True, help="of the files under eval/results")
    options = parser.parse_args()
    models = {name: Path(path) for name, _, path in (one.partition("=") for one in options.model)}
    rows = measured(models)
    configs = {name: read_config(path) for name, path in models.items()}
    counts = {name: count_parameters(family_of(c), c) for name, c in configs.items()}
    first, cells = next(iter(models)), []
    for row in rows:
        base = next(r for r in rows if (r["format"], r["model"]) == (row["format"], first))
        cell = [row["format"], row["model"], f"{counts[row['model']]:,}"]
        cell.append(f"{row['bytes'] / 1e6:.1f} ({row['bytes'] / base['bytes']:.2f})")
        for kind in _KINDS:
            own, dense = statistics.median(row[kind]), statistics.median(base[kind])
            cell.append(f"{own:.0f} ({own / dense:.2f})")
        cells.append(cell)
    words = with_own_names(sys.argv[1:], options.name)
    record = {"command": command(__file__, words), "parameters": counts, "rows": rows}
    record |= surroundings("cpu")
    head = ["format", "model", "parameters", "MB (over dense)"]
    head += ["prefill, tokens a second (over dense)", "decoding, tokens a second (over dense)"]
    text = f"""# {Path(options.name).name}

    {record["command"]}

Prompts of {_PROMPT_TOKENS} tokens, one at a time, medians over {_TURNS} turns of {_PROMPTS - 1}
prompts, models in turn; xllamacpp's wheel for any x86-64. Machine: {hardware(record["machine"])}.

{table(head, cells)}
"""
    write(RESULTS / options.name, json=as_json(record), md=text)


if __name__ == "__main__":
    main()
