"""Packages of other pruners: each in a folder of its own, with nothing that it requires."""

import subprocess
import sys
from pathlib import Path

# Exact, so that a table can be had again. What is listed beside a peer is all that the part that
# prunes needs: without --no-deps a registry's torch for GPUs would come along.
PACKAGES = {
    "torch-pruning": ["torch-pruning==1.6.1"],
    "modelopt": [
        *("nvidia-modelopt==0.47.0", "ninja", "nvidia-ml-py", "omegaconf", "pulp<4", "pydantic"),
        *("antlr4-python3-runtime==4.9.3", "pydantic-core", "annotated-types"),
        *("typing-inspection", "scipy", "regex", "torchprofile"),
    ],
    # transformers 5 has no heads that are pruned one by one, which textpruner asks for.
    "textpruner": [
        *("textpruner==1.1.post2", "transformers==4.57.6", "huggingface_hub==0.36.2"),
        *("tokenizers==0.22.2", "sentencepiece==0.2.1", "protobuf"),
    ],
}


def packages(method: str, work: Path) -> list[str]:
    """Folders of the packages that a method needs, under `work`, installed if they are not there;
    none for one that needs what is there.
    """
    for name, wanted in PACKAGES.items():
        if method.startswith(name):
            folder = work.resolve() / "packages" / name
            if not folder.is_dir():
                pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
                there = ["--no-deps", "--target", str(folder)]
                subprocess.run([*pip, "install", *there, *wanted], check=True)
            return [str(folder)]
    return []
