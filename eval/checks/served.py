"""Which stock classes servers load once their width is cut, and whether their greedy tokens stay.

python eval/checks/served.py WORK --vllm PYTHON --llama-cpp SOURCE --xllamacpp PYTHON

Makes a tiny random model of every class under WORK, cuts it with `sp3llm compress`, and continues
four prompts with transformers, with vLLM (`--vllm`: the Python of an environment that has it) and
with llama.cpp (`--llama-cpp`: its source with the converter, `--xllamacpp`: the Python of an
environment with that package). What was made, cut or run before under WORK is kept. The prompts are
token ids, and every GGUF gets the bundled tokenizer's vocabulary, so that the table is about sizes.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

COMMON = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
# Heads of 32 in all, which vLLM's kernels for CPUs take.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 32, "tie_word_embeddings": True},
    "granite": {
        "residual_multiplier": 0.5,
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.17,
        "logits_scaling": 2.0,
    },
    # Every fourth layer has no positions, which llama.cpp does not ask the config about.
    "smollm3": {"num_hidden_layers": 4, "tie_word_embeddings": True},
    "phi3": {},
    "stablelm": {"use_qkv_bias": True, "num_key_value_heads": 8},
    "gpt_neox": {},
    "opt": {"ffn_dim": 512, "tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 256},
    # As published; llama.cpp does not ask the config about it.
    "qwen3_moe": {**EXPERTS, "head_dim": 32, "norm_topk_prob": True},
}
# Widths that eight heads of a size with a kernel do not make, but where the class itself is square:
# there heads go. vLLM's kernels for experts on CPUs take multiples of 32 only.
_SQUARE = {"hidden_size": 192, "num_key_value_heads": 6}
CUTS: dict[str, dict[str, int]] = {
    **{
        name: {"hidden_size": 224 if "num_experts_per_tok" in MODELS[name] else 200}
        for name in MODELS
    },
    "stablelm": _SQUARE,
    "gpt_neox": _SQUARE,
    "opt": _SQUARE,
}
NEW_TOKENS = 16
# As token ids of the bundled vocabulary.
PROMPTS = [
    [1, 1617, 740, 4024, 1999, 1051],
    [1, 837, 2405, 273],
    [1, 500],
    [1, *range(90, 150)],
]
# Between logarithms of probabilities. Implementations in float32 agree to 1e-5, but llama.cpp looks
# Gemma's GELU up in a table of float16.
SAME = 5e-3
_REASON = re.compile(r"\b\w*(?:Error|Exception): .*|error loading model: .*")


def make(work: Path, name: str) -> Path:
    """A random model of a class with the bundled tokenizer."""
    folder = work / "dense" / name
    if folder.is_dir():
        return folder
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from sp3llm.models.families import FAMILIES
    from sp3llm.models.source import bundled_model

    settings = COMMON | MODELS[name]
    if FAMILIES[name].keys.get("num_key_value_heads", "it has one") is None:
        del settings["num_key_value_heads"]  # vLLM would believe it
    config = CONFIG_MAPPING[name](**settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim >= 2 or parameter_name.endswith("bias"):
                parameter.normal_(0, 0.08)
    model.save_pretrained(folder)
    for file in bundled_model().glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def cut(work: Path, name: str) -> Path:
    """The same with fewer channels, as `sp3llm compress` writes it by default."""
    folder = work / "cut" / name
    if folder.is_dir():
        return folder
    import sp3llm

    options = {**CUTS[name], "allocate": "width", "tie": "keep"}
    options |= {"keep": 0.95, "samples": 8, "seq_len": 128, "eval_samples": 4, "calib": "stdlib"}
    sp3llm.compress(make(work, name), out=folder, report=False, **options)
    return folder


def by_transformers(folder: Path, prompts: list[list[int]]) -> tuple[list, list]:
    """Greedy tokens of every prompt, and the logarithms of their probabilities."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens, logs = [], []
    for prompt in prompts:
        run = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
        )
        new = run.sequences[0, len(prompt) :]
        rows = torch.cat(run.logits).log_softmax(-1)
        tokens.append(new.tolist())
        logs.append(rows[torch.arange(len(new)), new].tolist())
    return tokens, logs


def by_vllm(folder: Path, prompts: list[list[int]]) -> tuple[list, list]:
    """The same by vLLM."""
    from vllm import LLM, SamplingParams

    model = LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=256)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=1, ignore_eos=True)
    runs = [run.outputs[0] for run in model.generate(asked, sampling)]
    tokens = [list(run.token_ids) for run in runs]
    logs = [
        [step[token].logprob for token, step in zip(new, run.logprobs, strict=True)]
        for new, run in zip(tokens, runs, strict=True)
    ]
    return tokens, logs


def by_llama_cpp(gguf: Path, prompts: list[list[int]]) -> tuple[list, list]:
    """The same by llama.cpp, of a GGUF."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
    params.cpuparams.n_threads = 2
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    tokens, logs = [], []
    for prompt in prompts:
        asked = {"prompt": prompt, "n_predict": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
        asked |= {"n_probs": 1, "return_tokens": True, "cache_prompt": False}
        request = Request(
            f"{server.listening_address}/completion",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urlopen(request, timeout=300) as answer:
            said = json.load(answer)
        tokens.append(said["tokens"])
        # Tokens that are parts of a character have one entry together, the last one's.
        entries = iter([*said["completion_probabilities"], None])
        entry = next(entries)
        logs.append([])
        for token in said["tokens"]:
            is_said = entry is not None and entry["id"] == token
            logs[-1].append(entry["logprob"] if is_said else None)
            entry = next(entries) if is_said else entry
    return tokens, logs


def convert(folder: Path, gguf: Path) -> None:
    """A GGUF in float32 by llama.cpp's own converter, whose source is first on the path."""
    import convert_hf_to_gguf
    from conversion import get_model_class
    from conversion.base import TextModel

    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    get_model_class(architecture).set_vocab = TextModel._set_vocab_sentencepiece
    # By a name with phi3 in it llama.cpp would look for tokens of Phi-3's vocabulary.
    sys.argv[1:] = [str(folder), "--outtype", "f32", "--outfile", str(gguf), "--model-name", "tiny"]
    convert_hf_to_gguf.main()


def run(python: str, what: str, folder: Path, name: Path, path: str = "") -> dict[str, Any]:
    """What a loader says of a folder: `tokens` and `logs`, or `error`; kept beside `name`."""
    out = name.with_name(f"{name.name}-{what}.json")
    if not out.is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        # In this process vLLM's errors are as they are raised.
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        words = [python, str(Path(__file__).resolve()), "--loader", what, str(folder), str(out)]
        log = out.with_suffix(".log")
        with log.open("w") as file:
            subprocess.run(words, stdout=file, stderr=file, check=False, env=environment)
        if not out.is_file():
            out.write_text(json.dumps({"error": error_of(log.read_text(errors="replace"))}))
    return json.loads(out.read_text())


def error_of(log: str) -> str:
    """The line of a log that says why there is no result: the first exception's own."""
    lines = [line for line in log.splitlines() if line.strip()]
    found = [match[0] for match in map(_REASON.search, lines) if match]
    return (found or lines[-1:] or ["no word"])[0].strip()


def verdict(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """Whether a loader's result is transformers' own, in a cell of the table."""
    if "error" in found:
        return f"**no**: {found['error']}"
    pairs = list(zip(found["tokens"], expected["tokens"], strict=True))
    same = sum(mine == theirs for mine, theirs in pairs)
    logs = zip(found["logs"], expected["logs"], pairs, strict=True)
    # After a first difference the texts are different, and so is everything said of them.
    apart = max(
        (
            abs(mine - theirs)
            for rows, other_rows, (tokens, others) in logs
            if tokens == others
            for mine, theirs in zip(rows, other_rows, strict=True)
            if mine is not None
        ),
        default=float("inf"),
    )
    word = "same" if same == len(pairs) and apart < SAME else "**other**"
    return f"{word} ({same} of {len(pairs)}, {apart:.0e})"


def row(options: argparse.Namespace, name: str) -> list[str]:
    """A class's row: its name, what it is written as, and what each loader makes of both models."""
    folders = {"dense": make(options.work, name), "cut": cut(options.work, name)}
    written = json.loads((folders["cut"] / "config.json").read_text())["architectures"][0]
    outs = {kind: options.work / "ran" / kind / name for kind in folders}
    own = {
        kind: run(sys.executable, "transformers", folder, outs[kind])
        for kind, folder in folders.items()
    }
    cells = [name, written]
    if options.vllm:
        cells += [
            verdict(run(options.vllm, "vllm", folder, outs[kind]), own[kind])
            for kind, folder in folders.items()
        ]
    if options.llama_cpp:
        cells += [
            verdict(run_llama_cpp(options, folder, outs[kind]), own[kind])
            for kind, folder in folders.items()
        ]
    return cells


def run_llama_cpp(options: argparse.Namespace, folder: Path, out: Path) -> dict[str, Any]:
    """What llama.cpp says of a folder that its converter takes."""
    source = f"{options.llama_cpp}{os.pathsep}{options.llama_cpp / 'gguf-py'}"
    converted = run(sys.executable, "gguf", folder, out, source)
    if "error" in converted:
        return {"error": f"converting: {converted['error']}"}
    return run(options.xllamacpp, "llama_cpp", Path(converted["gguf"]), out)


def load(what: str, folder: Path, out: Path) -> None:
    """What a process does in a loader's environment."""
    if what == "gguf":
        path = out.with_suffix(".gguf")
        convert(folder, path)
        out.write_text(json.dumps({"gguf": str(path)}))
        return
    loader = {"transformers": by_transformers, "vllm": by_vllm, "llama_cpp": by_llama_cpp}[what]
    tokens, logs = loader(folder, PROMPTS)
    out.write_text(json.dumps({"tokens": tokens, "logs": logs}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="folder to make everything in")
    parser.add_argument("names", nargs="*", help="classes, by model_type (default: all)")
    parser.add_argument("--vllm", help="Python of an environment with vLLM")
    parser.add_argument("--llama-cpp", type=Path, help="folder of llama.cpp's source")
    parser.add_argument("--xllamacpp", help="Python of an environment with xllamacpp")
    options = parser.parse_args()
    for name in options.names or MODELS:
        print("| " + " | ".join(row(options, name)) + " |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--loader"]:
        load(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
