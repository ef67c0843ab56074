"""What goes along with the weights: tokenizer, chat templates, generation config."""

import shutil
from pathlib import Path

from sp3llm.runtime.folders import RECORD

# Not weights of the model: training state, and formats of other tools.
_NOT_CARRIED = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".index.json", ".md", ".h5")
_CARRIED = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_NEVER_CARRIED = ("config.json", RECORD, "trainer_state.json", "training_args.json")


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, chat templates and generation config as they are; return their names."""
    copied = []
    for path in sorted(source.iterdir()):
        carried = path.suffix in _CARRIED and not path.name.endswith(_NOT_CARRIED)
        if path.is_file() and carried and path.name not in _NEVER_CARRIED:
            shutil.copyfile(path, target / path.name)
            copied.append(path.name)
    for folder in ("chat_templates", "additional_chat_templates"):
        if (source / folder).is_dir():
            shutil.copytree(source / folder, target / folder, dirs_exist_ok=True)
            copied.append(folder)
    return copied
