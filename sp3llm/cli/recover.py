"""`sp3llm recover`."""

import os

from sp3llm.errors import UserError
from sp3llm.options import RecoverConfig

SETTINGS = RecoverConfig
SUMMARY = "tune a compressed model against the dense one"
DESCRIPTION = """\
Tune a compressed model by distillation from the dense one it came from; the
result is a stock model again."""
EPILOG = """examples:
  sp3llm recover small --teacher dense --steps 300           all weights
  sp3llm recover small --teacher dense --lora 16 --teacher-dtype nf4 --gradient-checkpointing
  accelerate launch -m sp3llm.recover small --teacher dense  several GPUs, or FSDP

A killed run continues from its last checkpoint when the same command is given again.
"""


def run(settings: RecoverConfig) -> None:
    """Tunes the model; the first of several processes shows how it goes."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from rich.console import Console

    # Of several processes one speaks.
    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    with console.status("importing torch and transformers"):
        import torch
        import transformers

        from sp3llm.recovery.story import recover

    transformers.utils.logging.set_verbosity_error()
    try:
        recover(settings, console)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "The GPU ran out of memory: use --gradient-checkpointing, a smaller --micro-batch or "
            "--seq-len, --lora, or --teacher-dtype nf4; the same command then begins anew."
        ) from error
