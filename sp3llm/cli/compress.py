"""`sp3llm compress`."""

import os

from sp3llm.options import CompressConfig

SETTINGS = CompressConfig
SUMMARY = "compress a model"
DESCRIPTION = """\
Compress a Hugging Face model, a decoder or an encoder, into a smaller one of
the same stock architecture."""
EPILOG = """examples:
  sp3llm compress                                    the bundled model, at 75 % of its parameters
  sp3llm compress meta-llama/Llama-2-7b --keep 0.8   a hub model, calibrated on WikiText-2
  sp3llm compress ./my-llama --calib my.jsonl --eval-text held-out.jsonl --out ./my-llama-small
"""


def run(settings: CompressConfig) -> None:
    """Compresses; the first of several processes shows how it goes."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from rich.console import Console

    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    with console.status("importing torch and transformers"):
        import transformers

        from sp3llm.compression.story import compress

    transformers.utils.logging.set_verbosity_error()
    compress(settings, console)
