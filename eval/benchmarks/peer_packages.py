"""Packages of other pruners, each in a folder of its own, and scripts that run with them."""

import os
import subprocess
import sys
from collections.abc import Sequence
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


def run_apart(script: Path, words: Sequence[str], found: Sequence[str], log: Path) -> str | None:
    """Run a script in a process of its own with the folders `found` before all other packages;
    what it says goes to `log`. Returns the last line of its error, if it fails.
    """
    done = subprocess.run(
        [sys.executable, str(script), *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(found), "HF_HUB_OFFLINE": "1"},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    log.write_text(done.stderr)
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith(" ")]
    return (lines or [f"exit code {done.returncode}"])[-1] if done.returncode else None
