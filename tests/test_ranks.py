"""Several processes make what one makes: moments, plan, weights; and fail together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sp3llm.checkpoint import RECORD
from sp3llm.execution import Ranks

from .conftest import save_model, tiny_model

REPOSITORY = Path(__file__).parent.parent


def launched(processes: int, *arguments: object) -> subprocess.CompletedProcess:
    """`sp3llm compress` under accelerate's own launcher, over gloo."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1"]
    command += ["--num_processes", str(processes), "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--main_process_port", "0"]
    if processes > 1:
        command += ["--multi_gpu"] if False else []
    command += ["-m", "sp3llm.compress", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=REPOSITORY, timeout=300
    )
