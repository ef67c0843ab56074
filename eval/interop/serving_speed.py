"""How fast servers run compressed models, and how large they are in a server's formats.

    python eval/interop/serving_speed.py --engine llama.cpp --model dense=DIR --model 75=DIR \
        --name serving/smollm2-llama-cpp
    python eval/interop/serving_speed.py --engine vllm --model dense=DIR --model 75=DIR \
        --name serving/smollm2-vllm

The first model is what the others are compared with. Each engine has an environment of its own in
.interop/. All models get as many random tokens, in turn, on all cores. For llama.cpp they are
converted to bf16 and to q8_0; xllamacpp's wheel is built for any x86-64 processor and does not use
all that this one has. vLLM runs them in bfloat16, compiled.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interop_environments import CACHE, REQUIREMENTS, environment, llama_cpp_source
from vllm_variables import variables

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from common import RESULTS, as_json, command, hardware, surroundings, table, with_own_names, write

from sp3llm.models.families import count_parameters, family_of
from sp3llm.models.source import read_config

_WORK = CACHE / "speed"
_PROMPTS, _PROMPT_TOKENS = 5, 256


def converted(model: Path, name: str, outtype: str, dense: Path) -> Path:
    """A GGUF of a model, made anew."""
    file = _WORK / f"{name}-{outtype}.gguf"
    source = llama_cpp_source([sys.executable, "-m", "pip"]) / "vendor" / "llama.cpp"
    script = Path(__file__).with_name("convert_to_gguf.py")
    words = [str(source), str(dense), str(model), "--outtype", outtype, "--outfile", str(file)]
    subprocess.run([sys.executable, str(script), *words], check=True, capture_output=True)
    return file


def as_it_is(model: Path, name: str, outtype: str, dense: Path) -> Path:
    """The folder itself."""
    return model


@dataclass(frozen=True)
class Engine:
    """What runs models, and in which formats."""

    script: str
    """Run by the engine's own interpreter, with a file or folder of weights and the prompts."""
    requirements: tuple[str, ...]
    formats: tuple[str, ...]
    file: Callable[[Path, str, str, Path], Path]
    """What the script is given for a model, its name, a format and the dense model."""
    about: str
    turns: int
    """How often each model is started and measured."""
    variables: dict[str, str]
    """Of the environment that the script runs in."""


def engine_named(name: str, torch: str) -> Engine:
    """`llama.cpp` or `vllm`."""
    if name == "llama.cpp":
        about = "xllamacpp's wheel for any x86-64"
        wanted, formats = ("xllamacpp==2026.10.11549",), ("bf16", "q8_0")
        return Engine("llama_cpp_engine.py", wanted, formats, converted, about, 3, {})
    (wheel,) = REQUIREMENTS["vllm"]
    about, release = f"{wheel}, compiled", wheel.partition("==")[2]
    own = variables(_WORK, release)
    return Engine("vllm_engine.py", (torch, wheel), ("bf16",), as_it_is, about, 2, own)


def prompts_for(models: dict[str, Path]) -> Path:
    """Random token ids that all of the models have."""
    rows = min(read_config(path)["vocab_size"] for path in models.values())
    draw = random.Random(0)
    prompts = [[draw.randrange(300, rows) for _ in range(_PROMPT_TOKENS)] for _ in range(_PROMPTS)]
    path = _WORK / "prompts.json"
    path.write_text(json.dumps(prompts))
    return path


def measured(engine: Engine, python: Path, models: dict[str, Path]) -> list[dict[str, Any]]:
    """A row a format and model: bytes and speeds of all turns."""
    dense, script = next(iter(models.values())), Path(__file__).with_name(engine.script)
    rows, prompts = [], prompts_for(models)
    around = {**os.environ, **engine.variables}
    for outtype in engine.formats:
        files = {name: engine.file(path, name, outtype, dense) for name, path in models.items()}
        found: dict[str, dict[str, list[float]]] = {name: {} for name in files}
        for _ in range(engine.turns):
            for name, file in files.items():
                words = [str(python), str(script), str(file), str(prompts)]
                ran = subprocess.run(words, check=True, capture_output=True, text=True, env=around)
                # Engines say other things, too.
                lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
                speeds = json.loads(lines[-1])
                for kind, rates in speeds.items():
                    found[name].setdefault(kind, []).extend(rates)
                print(outtype, name, speeds, flush=True)
        for name, file in files.items():
            row = {"format": outtype, "model": name, "bytes": weight_bytes(file)}
            rows.append({**row, "speeds": found[name]})
    return rows


def weight_bytes(path: Path) -> int:
    """Of a file of weights, or of those in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=("llama.cpp", "vllm"), required=True)
    parser.add_argument("--model", action="append", required=True, help="NAME=FOLDER")
    parser.add_argument("--name", required=True, help="of the files under eval/results")
    parser.add_argument("--torch", default="torch==2.13.0", help="what vLLM runs beside")
    options = parser.parse_args()
    models = {name: Path(path) for name, _, path in (one.partition("=") for one in options.model)}
    _WORK.mkdir(parents=True, exist_ok=True)
    engine = engine_named(options.engine, options.torch)
    place = "xllamacpp" if options.engine == "llama.cpp" else options.engine
    rows = measured(engine, environment(place, list(engine.requirements)), models)
    configs = {name: read_config(path) for name, path in models.items()}
    counts = {name: count_parameters(family_of(c), c) for name, c in configs.items()}
    first, cells, kinds = next(iter(models)), [], list(rows[0]["speeds"])
    for row in rows:
        base = next(r for r in rows if (r["format"], r["model"]) == (row["format"], first))
        cell = [row["format"], row["model"], f"{counts[row['model']]:,}"]
        cell.append(f"{row['bytes'] / 1e6:.1f} ({row['bytes'] / base['bytes']:.2f})")
        for kind in kinds:
            own, dense = (statistics.median(one["speeds"][kind]) for one in (row, base))
            cell.append(f"{own:.0f} ({own / dense:.2f})")
        cells.append(cell)
    words = with_own_names(sys.argv[1:], options.name)
    record = {"command": command(__file__, words), "parameters": counts, "rows": rows}
    record |= surroundings("cpu")
    head = ["format", "model", "parameters", "MB (over dense)"]
    head += [f"{kind}, tokens a second (over dense)" for kind in kinds]
    text = f"""# {Path(options.name).name}

    {record["command"]}

Prompts of {_PROMPT_TOKENS} tokens, one at a time if nothing else is said, medians over
{engine.turns} turns of {_PROMPTS - 1} prompts, models in turn; {engine.about}.
Machine: {hardware(record["machine"])}.

{table(head, cells)}
"""
    write(RESULTS / options.name, json=as_json(record), md=text)


if __name__ == "__main__":
    main()
