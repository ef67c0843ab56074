"""Held-out text continued by the dense and the compressed model, side by side."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sp3llm.errors import UserError, reason
from sp3llm.record import add_to_record

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from torch import Tensor

_TEXTS = 4
_PROMPT_TOKENS = 32
_NEW_TOKENS = 48
# Weights take this much memory when a model is loaded and run on a few short texts.
_MEMORY_MARGIN = 1.3


def dense_folder(record: dict[str, Any], named: str | None = None) -> Path | None:
    """What `find_dense` finds, or None."""
    try:
        return find_dense(record, named)
    except UserError:
        return None


def find_dense(record: dict[str, Any], named: str | None = None) -> Path:
    """The folder of the dense model: the one named, or where the record says it was.

    A model of the hub that nobody named is looked for in the hub cache only.

    Raises UserError if it is not there, or is not the model that was compressed.
    """
    from sp3llm import families, source
    from sp3llm.plan import Shape

    recorded = record["settings"]["model"]
    if named is not None or recorded is None or Path(recorded).is_dir():
        folder, _, _ = source.resolve_model(named or recorded)
    else:
        folder = _cached(record["base_model"], recorded)
    config = source.read_config(folder)
    family = families.family_of(config)
    wanted, found = Shape(**record["plan"]["dense_shape"]), Shape.of(family, config)
    count = families.count_parameters(family, config)
    if (found, count) != (wanted, record["plan"]["dense_parameters"]):
        raise UserError(
            f"Expected the dense model that this one was made from "
            f"({record['plan']['dense_parameters']:,} parameters) in '{folder}', found another "
            f"({count:,}): name the right one with --dense."
        )
    return folder


def _cached(base_model: str | None, recorded: str) -> Path:
    from huggingface_hub import snapshot_download

    if base_model:
        try:
            folder = Path(snapshot_download(base_model, local_files_only=True))
        except (OSError, ValueError):  # not in the cache, or no hub id
            folder = None
        if folder and any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir()):
            return folder
    raise UserError(
        f"The dense model '{recorded}' is not at hand: name its folder, or its hub id to download "
        "it, with --dense."
    )


def held_out_tokens(record: dict[str, Any], folder: Path) -> "Tensor":
    """The evaluation windows of a run once more, `(windows, tokens)`.

    Raises UserError if the text cannot be read, or is not what it was.
    """
    from sp3llm import data

    settings = record["settings"]
    tokenizer = data.load_tokenizer(folder)
    calibration = data.calibration_windows(
        settings["calib"], tokenizer, settings["samples"], settings["seq_len"], settings["seed"]
    )
    evaluation = data.evaluation_windows(
        settings["eval_text"],
        tokenizer,
        settings["eval_samples"],
        settings["seq_len"],
        calibration.documents,
    )
    if evaluation.sha256 != record["evaluation"]["sha256"]:
        raise UserError(
            f"The held-out text '{settings['eval_text']}' is not what it was when the model was "
            "compressed (its files changed, or for stdlib the Python): run the same command "
            "where it is the same."
        )
    return evaluation.tokens


def with_samples(
    folder: Path,
    record: dict[str, Any],
    console: "Console",
    device: str,
    named: str | None = None,
    dense: Path | None = None,
    tokens: "Tensor | None" = None,
) -> tuple[dict[str, Any], str | None]:
    """The record with samples, made where it has none or a dense model is `named`, and otherwise
    the reason why it has none.

    Raises UserError if the dense model that was named will not do.
    """
    if "samples" in record and named is None:
        return record, None
    try:
        dense = dense or find_dense(record, named)
        tokens = held_out_tokens(record, folder) if tokens is None else tokens
        samples = continuations(folder, record, dense, tokens, device, console)
    except UserError as error:
        if named is not None:
            raise
        return record, str(error)
    return add_to_record(folder, samples=samples), None


def continuations(
    folder: Path,
    record: dict[str, Any],
    dense: Path,
    tokens: "Tensor",
    device: str,
    console: "Console",
) -> dict[str, Any]:
    """Continue held-out text with both models, greedily: the entry `samples` of the record.

    `tokens` are evaluation windows, `(windows, tokens)`, of which a few are taken, spread evenly.

    Raises UserError if memory does not hold the models, or one does not run.
    """
    import torch

    from sp3llm.data import load_tokenizer
    from sp3llm.execution import execution

    on = execution(device, torch.float32).device
    _check_memory(max(record["dense_weight_bytes"], record["weight_bytes"]), on)
    rows = torch.linspace(0, len(tokens) - 1, min(_TEXTS, len(tokens))).long()
    prompt = min(_PROMPT_TOKENS, tokens.shape[1] // 2)
    new = min(_NEW_TOKENS, tokens.shape[1] - prompt)
    texts = tokens[rows]
    tokenizer = load_tokenizer(folder)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    with console.status("samples of the dense model"):
        dense_ids = _continued(dense, texts[:, :prompt], new, pad, on)
    with console.status("samples of the compressed model"):
        small_ids = _continued(folder, texts[:, :prompt], new, pad, on)

    def text(ids: "Tensor") -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    samples = [
        {
            "prompt": text(row[:prompt]),
            "text": text(row[prompt : prompt + new]),
            "dense": text(by_dense),
            "small": text(by_small),
        }
        for row, by_dense, by_small in zip(texts, dense_ids, small_ids, strict=True)
    ]
    return {"new_tokens": new, "texts": samples}


def _continued(folder: Path, prompts: "Tensor", new: int, pad: int, on: "torch.device") -> "Tensor":
    """What a model adds to prompts `(texts, tokens)`: `(texts, new)` at most."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with _quiet(), torch.no_grad():
            # Not moved there: a quantized model does not let itself be.
            place = {"dtype": "auto", "device_map": {"": on}}
            model = AutoModelForCausalLM.from_pretrained(folder, **place).eval()
            ids = model.generate(
                prompts.to(on),
                attention_mask=torch.ones_like(prompts, device=on),
                do_sample=False,
                max_new_tokens=new,
                pad_token_id=pad,
            )
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _too_large(f"memory ran out on {on}") from error
    except Exception as error:  # transformers raises many kinds
        raise UserError(
            f"The model in '{folder}' does not continue text ({type(error).__name__}: "
            f"{reason(error)}): try it in transformers alone."
        ) from error
    return ids[:, prompts.shape[1] :].cpu()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars, over at once, its remarks on settings that are not used, and
    bitsandbytes' at every call on how it casts.
    """
    from logging import ERROR, getLogger

    from transformers.utils import logging

    getLogger("bitsandbytes").setLevel(ERROR)
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _check_memory(weight_bytes: int, on: "torch.device") -> None:
    import psutil
    import torch

    from sp3llm.report import human_bytes

    needed = _MEMORY_MARGIN * weight_bytes
    free = psutil.virtual_memory().available
    if on.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(on)[0]
    if free < needed:
        raise _too_large(f"{human_bytes(needed)} are needed on {on}, {human_bytes(free)} are free")


def _too_large(why: str) -> UserError:
    return UserError(
        f"The dense model does not fit into memory ({why}): run sp3llm report with another "
        "--device, or where there is more."
    )
