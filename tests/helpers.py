"""What several files of tests do: whole runs on tiny models, cuts in float64, fresh processes."""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sp3llm.compression.building import refitted_groups
from sp3llm.compression.projecting import plain_groups
from sp3llm.compression.projection import Projection
from sp3llm.compression.refitter import Refitter
from sp3llm.compression.story import compress
from sp3llm.models.checkpoint import Checkpoint
from sp3llm.models.families import FAMILIES, Family, is_square
from sp3llm.models.shapes import Shape, resized_config
from sp3llm.options import CompressConfig
from sp3llm.runtime.devices import Execution
from tests.conftest import (
    disk_tensors,
    family_of_model,
    random_orthogonal,
    save_model,
    tiny_model,
    written_model,
)

QUIET = Console(quiet=True)
CPU = torch.device("cpu")
EXECUTION = Execution(CPU, torch.float64)
BOS, EOS = 1, 2
# What writes into the stream, in any family.
WRITERS = {writer for family in FAMILIES.values() for writer in family.writers}
WRITERS |= {"project_in", "mlp.shared_expert.down_proj"}

# The beginning of a program for a fresh process, which cannot import sp3llm.
WITHOUT_SP3LLM = """
import sys

class Blocker:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "sp3llm":
            raise ImportError("sp3llm is blocked")

sys.meta_path.insert(0, Blocker())
try:
    import sp3llm
except ImportError:
    pass
else:
    sys.exit("sp3llm could be imported")
"""
LOAD_ELSEWHERE = (
    WITHOUT_SP3LLM
    + """
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    problems = {k: v for k, v in info.items() if v}
    assert not problems, (folder, problems)
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    # A random model may well begin with the end of the text, where generate would stop.
    generated = model.generate(
        ids, min_new_tokens=5, max_new_tokens=5, do_sample=False, pad_token_id=2
    )
    assert generated.shape == (1, 29)
    save_file({"logits": logits, "generated": generated}, folder + "/elsewhere.safetensors")
"""
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Seeded draws in float64."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tolerance(exact: bool) -> float:
    """Hugging Face's norms round to float32 in the middle of the model."""
    return 1e-12 if exact else 2e-6


def weights(folder: Path) -> dict[str, Tensor]:
    """Those of a model in one file."""
    return load_file(folder / "model.safetensors")


def byte_tokenizer(bos: bool = True, eos: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, with a BOS added before a text or not."""
    vocab = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocab)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>" if eos else None,
        unk_token="<unk>",
    )


def confine_stream(model, kept: int) -> None:
    """Make embeddings and writers write into `kept` dimensions only, along no coordinate axis."""
    width = model.config.hidden_size
    frame = random_orthogonal(width, seed=5)[:, :kept]
    if family_of_model(model).centred:  # one dimension goes to the mean, which nothing reads
        frame[:, 0] = 1
    frame = torch.linalg.qr(frame)[0]
    projector = frame @ frame.T
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("embed_tokens.weight", "embed_positions.weight", "embed_in.weight")):
                if parameter.shape[1] == width:  # else the projection into the stream confines it
                    parameter.copy_(parameter @ projector)
            elif any(f".{writer}." in name for writer in WRITERS) or name.endswith(
                "experts.down_proj"  # (E, D, F)
            ):
                parameter.copy_(projector @ parameter)


def shape_of_width(family, config, kept):
    """The dense shape at another width; heads go with it where the class demands that."""
    shape = Shape.of(family, config)
    if is_square(family, config):
        shape = shape.with_groups(shape.num_key_value_heads * kept // shape.hidden_size)
    return shape.with_width(kept) if shape.tie_word_embeddings else shape.with_width(kept).untied()


def cut_model(
    checkpoint: Checkpoint,
    family: Family,
    shape: Shape,
    projection: Projection,
    tokens: Tensor,
    folder: Path,
    refit: bool,
    layers: tuple[int, ...] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of that shape in float64, cut or refitted, written and read back."""
    if refit:
        refitter = Refitter(
            *(checkpoint, family, shape, projection, torch.float64, EXECUTION, "obs", 3, 4, []),
            layers=layers,
        )
        built = refitted_groups(refitter, tokens)
    else:
        cut = (checkpoint, family, projection, torch.float64, EXECUTION)
        built = plain_groups(*cut, layers=layers)
    config = resized_config(family, checkpoint.config, shape, layers)
    small = written_model(family, config, built, torch.float64, folder)
    return config, disk_tensors(small, family)


def compress_tiny(variant, folder, **settings):
    """A tiny model through the whole pipeline, with the bundled model's vocabulary."""
    variant, _, mask = variant.partition(" ")
    model = tiny_model(variant, torch.float32, vocab_size=4096)
    save_model(model, folder / "dense", tokenizer=True)
    if mask:
        settings = {"mask": mask, "mask_steps": 4, "mask_batch": 2, **settings}
    options = {"samples": 4, "seq_len": 32, "eval_samples": 4, "keep": 0.7, "calib": "stdlib"}
    options["report"] = False  # a second each
    options |= settings
    config = CompressConfig(model=str(folder / "dense"), out=folder / "small", **options)
    return compress(config, QUIET)
