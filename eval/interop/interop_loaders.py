"""Load a model folder with another tool and compare what it says with transformers.

Run by eval/interop/interop.py inside the tool's own virtual environment, where sp3llm is not
installed:

    python interop_loaders.py LOADER MODEL REFERENCE.npz WORK

REFERENCE holds `tokens` (windows, tokens) and float32 `logits` (windows, tokens, vocabulary);
REFERENCE.json beside it what transformers answers to prompts. What was found is printed as one line
of JSON: a list of `{format, loads, ...}`, one a format.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from outcomes import print_outcomes

Found = dict[str, Any]

_GROUP = 32  # the smallest group of weights with a scale of their own that torchao has in int4


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def perplexity(logits: np.ndarray, tokens: np.ndarray) -> float:
    return perplexity_of(np.take_along_axis(log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1))


def perplexity_of(log_probabilities: np.ndarray) -> float:
    return float(np.exp(-log_probabilities.mean()))


def compare(logits: np.ndarray, reference: np.ndarray, tokens: np.ndarray) -> Found:
    """Logits (or log-probabilities) against those of transformers."""
    logits = np.asarray(logits, np.float32)[..., : reference.shape[-1]]
    ours, theirs = log_softmax(reference), log_softmax(logits)
    return {
        "perplexity": perplexity(logits, tokens),
        "mean_kl": float((np.exp(ours) * (ours - theirs)).sum(-1).mean()),
        "largest_log_probability_difference": float(
            np.abs(ours - theirs)[ours > np.log(1e-4)].max()
        ),
        "same_first_choice": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
    }


def llama_cpp(model: Path, tokens: np.ndarray, work: Path) -> Iterator[tuple[str, Callable]]:
    """GGUF by llama.cpp's own converter, and one K-quant by its quantizer."""
    source, dense = os.environ["LLAMA_CPP"], os.environ["INTEROP_DENSE"]
    converter = Path(__file__).with_name("convert_to_gguf.py")

    def converted(kind: str) -> Path:
        path = work / f"{kind}.gguf"
        words = [sys.executable, str(converter), source, dense, str(model), "--outtype", kind]
        run = subprocess.run(
            [*words, "--outfile", str(path)], capture_output=True, text=True, check=False
        )
        if run.returncode:
            raise RuntimeError(run.stderr.strip().splitlines()[-1])
        return path

    def quantized(kind: str) -> Path:
        import llama_cpp

        whole, path = converted("f16"), work / f"{kind}.gguf"
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
        if llama_cpp.llama_model_quantize(str(whole).encode(), str(path).encode(), options):
            raise RuntimeError("llama_model_quantize failed")
        return path

    def run(path: Path) -> tuple[np.ndarray, str]:
        sys.path.insert(1, f"{source}/gguf-py")
        import gguf
        import llama_cpp

        kinds = Counter(
            tensor.tensor_type.name
            for tensor in gguf.GGUFReader(path).tensors
            if len(tensor.shape) == 2
        )
        rows = []
        for window in tokens:
            loaded = llama_cpp.Llama(
                str(path), n_ctx=len(window), n_batch=len(window), logits_all=True, verbose=False
            )
            loaded.eval(window.tolist())
            rows.append(np.array(loaded.scores[: len(window)]))
        return np.stack(rows), "matrices: " + ", ".join(
            f"{count} {kind}" for kind, count in kinds.most_common()
        )

    for kind in ("f16", "q8_0"):
        yield f"GGUF {kind}", lambda kind=kind: run(converted(kind))
    yield "GGUF Q4_K_M", lambda: run(quantized("q4_k_m"))


def ctranslate2(model: Path, tokens: np.ndarray, work: Path) -> Iterator[tuple[str, Callable]]:
    def run(kind: str) -> tuple[np.ndarray, str]:
        import ctranslate2

        path = work / kind
        converter = ctranslate2.converters.TransformersConverter(str(model))
        converter.convert(str(path), quantization=kind, force=True)
        generator = ctranslate2.Generator(str(path), compute_type=kind)
        found = generator.forward_batch(tokens.tolist(), return_log_probs=True)
        return np.array(found), ""

    for kind in ("float32", "int8"):
        yield kind, lambda kind=kind: run(kind)


def onnx(model: Path, tokens: np.ndarray, work: Path) -> Iterator[tuple[str, Callable]]:
    def run(use_cache: bool) -> tuple[np.ndarray, str]:
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        loaded = ORTModelForCausalLM.from_pretrained(
            model, export=True, dtype=torch.float32, use_cache=use_cache, use_io_binding=False
        )
        ids = torch.tensor(tokens)
        return loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.numpy(), ""

    yield "float32", lambda: run(True)
    yield "float32, no KV cache", lambda: run(False)


def openvino(model: Path, tokens: np.ndarray, work: Path) -> Iterator[tuple[str, Callable]]:
    def run(in_8bit: bool) -> tuple[np.ndarray, str]:
        import torch
        from optimum.intel import OVModelForCausalLM

        loaded = OVModelForCausalLM.from_pretrained(
            model, export=True, load_in_8bit=in_8bit, device="cpu",
            ov_config={"INFERENCE_PRECISION_HINT": "f32"},
        )  # fmt: skip
        ids = torch.tensor(tokens)
        return loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.numpy(), ""

    yield "float32", lambda: run(False)
    yield "int8 weights", lambda: run(True)


def peft(model: Path, tokens: np.ndarray, work: Path) -> Iterator[tuple[str, Callable]]:
    """Attach, train a step, merge, save, and load what was saved in transformers alone."""

    def run() -> tuple[np.ndarray, str]:
        import peft
        import torch
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        ids = torch.tensor(tokens)
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        tuned = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules="all-linear"))
        with torch.no_grad():
            attached = tuned(input_ids=ids).logits
        optimizer = torch.optim.SGD((p for p in tuned.parameters() if p.requires_grad), lr=0.1)
        before = tuned(input_ids=ids, labels=ids).loss
        before.backward()
        optimizer.step()
        tuned.eval()
        with torch.no_grad():
            output = tuned(input_ids=ids, labels=ids)
            merged = tuned.merge_and_unload()
            merged.save_pretrained(work / "merged")
            stock = AutoModelForCausalLM.from_pretrained(work / "merged", dtype=torch.float32)
            again = stock(input_ids=ids).logits
        if not output.loss < before:
            raise RuntimeError(f"the loss did not fall: {before:.4f} to {output.loss:.4f}")
        off = (again - output.logits).abs().max().item()
        if off > 1e-3:
            raise RuntimeError(f"merged and reloaded logits differ by {off:.2g}")
        note = f"loss {before:.4f} to {output.loss:.4f} in a step; merged, reloaded: {off:.1g} off"
        return attached.numpy(), note

    yield "LoRA attached", run


def bitsandbytes(model: Path, tokens: np.ndarray, work: Path) -> Iterator[tuple[str, Callable]]:
    def run(**options: Any) -> tuple[np.ndarray, str]:
        import torch
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        loaded = AutoModelForCausalLM.from_pretrained(
            model, quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32,
            device_map="cpu",
        )  # fmt: skip
        kinds = Counter(type(part).__name__ for part in loaded.modules())
        count = kinds["Linear8bitLt"] + kinds["Linear4bit"]
        if not count:
            raise RuntimeError("no layer was quantized")
        with torch.no_grad():
            logits = loaded(input_ids=torch.tensor(tokens)).logits.float().numpy()
        return logits, f"{count} layers quantized"

    yield "int8", lambda: run(load_in_8bit=True)
    yield "nf4", lambda: run(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def torchao(model: Path, tokens: np.ndarray, work: Path) -> Iterator[tuple[str, Callable]]:
    """`quantize_`, the head left out as transformers' TorchAoConfig does, whose errors hide what
    is wrong.
    """

    def run(name: str, **settings: Any) -> tuple[np.ndarray, str]:
        import torch
        from torchao import quantization
        from torchao.prototype.quantization import int4
        from transformers import AutoModelForCausalLM

        if name == "IntxWeightOnlyConfig":
            settings = {"weight_dtype": torch.int4, "granularity": quantization.PerGroup(_GROUP)}
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        layers = {
            part
            for name, part in loaded.named_modules()
            if isinstance(part, torch.nn.Linear) and name != "lm_head"
        }
        made_by = int4 if name.startswith("Prototype") else quantization
        quantization.quantize_(
            loaded, getattr(made_by, name)(**settings), lambda part, _: part in layers
        )
        count = sum(type(part.weight) is not torch.nn.Parameter for part in layers)
        if not count:
            raise RuntimeError("no layer was quantized")
        with torch.no_grad():
            logits = loaded(input_ids=torch.tensor(tokens)).logits.float().numpy()
        return logits, f"{count} of {len(layers)} layers quantized"

    yield "int8 weights", lambda: run("Int8WeightOnlyConfig")
    yield "int8 weights and activations", lambda: run("Int8DynamicActivationInt8WeightConfig")
    yield "int4 weights", lambda: run("Int4WeightOnlyConfig", group_size=_GROUP)
    yield "int4 weights, for CPUs", lambda: run("PrototypeInt4WeightOnlyConfig", group_size=_GROUP)
    yield "int4 weights, in bytes", lambda: run("IntxWeightOnlyConfig")


LOADERS = {
    "llama.cpp": llama_cpp,
    "ctranslate2": ctranslate2,
    "onnx": onnx,
    "openvino": openvino,
    "peft": peft,
    "bitsandbytes": bitsandbytes,
    "torchao": torchao,
}


def runs(
    name: str, model: Path, reference: Path, work: Path
) -> Iterator[tuple[str, Callable[[], tuple[Found, str]]]]:
    """What there is to run of a tool, by format: each says what it found, and a note."""
    with np.load(reference) as stored:
        tokens, logits = stored["tokens"], stored["logits"]
    if name not in LOADERS:
        from interop_servers import SERVERS

        answers = json.loads(reference.with_suffix(".json").read_text())
        yield from SERVERS[name](model, tokens, logits, answers, work)
        return

    def compared(run: Callable[[], tuple[np.ndarray, str]]) -> tuple[Found, str]:
        theirs, note = run()
        return compare(theirs, logits, tokens), note

    for kind, run in LOADERS[name](model, tokens, work):
        yield kind, partial(compared, run)


def main() -> None:
    name, model, reference, work = sys.argv[1:]
    print_outcomes(runs(name, Path(model), Path(reference), Path(work)))


if __name__ == "__main__":
    main()
