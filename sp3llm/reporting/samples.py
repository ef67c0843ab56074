"""Held-out text continued by the dense and the compressed model, side by side."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sp3llm.errors import UserError, reason
from sp3llm.reporting.origins import find_dense, held_out_text
from sp3llm.reporting.record import Record, Sample, Samples, add_to_record

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from torch import Tensor

    from sp3llm.vocabulary.same_text import HeldOut


_TEXTS = 4
_PROMPT_TOKENS = 32
_NEW_TOKENS = 48
# Weights take this much memory when a model is loaded and run on a few short texts.
_MEMORY_MARGIN = 1.3


def with_samples(
    folder: Path,
    record: Record,
    console: "Console",
    device: str,
    named: str | None = None,
    dense: Path | None = None,
    held_out: "HeldOut | None" = None,
) -> tuple[Record, str | None]:
    """The record with samples, made where it has none or a dense model is `named`, and otherwise
    the reason why it has none.

    Raises UserError if the dense model that was named will not do.
    """
    if record.samples is not None and named is None:
        return record, None
    if record.answers is not None:
        return record, "an encoder continues no text."
    try:
        dense = dense or find_dense(record, named)
        held_out = held_out or held_out_text(record, folder, dense)
        samples = continuations(folder, record, dense, held_out, device, console)
    except UserError as error:
        if named is not None:
            raise
        return record, str(error)
    return add_to_record(folder, samples=samples), None


def continuations(
    folder: Path,
    record: Record,
    dense: Path,
    held_out: "HeldOut",
    device: str,
    console: "Console",
) -> Samples:
    """Continue held-out text with both models, greedily: a few of its windows, spread evenly.

    Raises UserError if memory does not hold the models, or one does not run.
    """
    import torch

    from sp3llm.models.objectives.catalogue import objective_of
    from sp3llm.runtime.devices import resolve_execution
    from sp3llm.text.tokenizer import load_tokenizer

    execution, tokens = resolve_execution(device, torch.float32).device, held_out.tokens
    _check_memory(max(record.dense_weight_bytes, record.weight_bytes), execution)
    rows = torch.linspace(0, len(tokens) - 1, min(_TEXTS, len(tokens))).long()
    prompt = min(_PROMPT_TOKENS, tokens.shape[1] // 2)
    new = min(_NEW_TOKENS, tokens.shape[1] - prompt)
    texts = tokens[rows]
    tokenizer = load_tokenizer(folder)
    whole, prompts = tokenizer, [texts[:, :prompt]]
    if held_out.same is not None:
        whole = load_tokenizer(dense)
        # Models with other tokens begin from the same words.
        words = [whole.decode(row[:prompt], skip_special_tokens=True) for row in texts]
        prompts = [tokenizer(text, return_tensors="pt")["input_ids"] for text in words]
    stock_class = objective_of(record.architecture).stock_class()
    with console.status("samples of the dense model"):
        dense_ids = _continued(stock_class, dense, [texts[:, :prompt]], new, whole, execution)
    with console.status("samples of the compressed model"):
        small_ids = _continued(stock_class, folder, prompts, new, tokenizer, execution)

    def text(ids: "Tensor", of: Any = whole) -> str:
        return of.decode(ids, skip_special_tokens=True)

    samples = [
        Sample(
            prompt=text(row[:prompt]),
            text=text(row[prompt : prompt + new]),
            dense=text(by_dense),
            small=text(by_small, tokenizer),
        )
        for row, by_dense, by_small in zip(texts, dense_ids, small_ids, strict=True)
    ]
    return Samples(new, tuple(samples))


def _continued(
    stock_class: Any,
    folder: Path,
    prompts: "list[Tensor]",
    new: int,
    tokenizer: Any,
    execution: "torch.device",
) -> "list[Tensor]":
    """What a model adds to prompts, each `(texts, tokens)`: for every text `new` tokens at most."""
    import torch

    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    try:
        with _quiet(), torch.no_grad():
            # Not moved there: a quantized model does not let itself be.
            place = {"dtype": "auto", "device_map": {"": execution}}
            model = stock_class.from_pretrained(folder, **place).eval()
            ids = [
                model.generate(
                    prompt.to(execution),
                    attention_mask=torch.ones_like(prompt, device=execution),
                    do_sample=False,
                    max_new_tokens=new,
                    pad_token_id=pad,
                )[:, prompt.shape[1] :]
                for prompt in prompts
            ]
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _too_large(f"memory ran out on {execution}") from error
    except Exception as error:  # transformers raises many kinds
        raise UserError(
            f"The model in '{folder}' does not continue text ({type(error).__name__}: "
            f"{reason(error)}): try it in transformers alone."
        ) from error
    return [row for some in ids for row in some.cpu()]


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


def _check_memory(weight_bytes: int, execution: "torch.device") -> None:
    import torch

    from sp3llm.reporting.formatting import human_bytes
    from sp3llm.runtime.memory import host_memory

    needed = _MEMORY_MARGIN * weight_bytes
    free = host_memory({})
    if execution.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(execution)[0]
    if free < needed:
        raise _too_large(
            f"{human_bytes(needed)} are needed on {execution}, {human_bytes(free)} are free"
        )


def _too_large(why: str) -> UserError:
    return UserError(
        f"The dense model does not fit into memory ({why}): run sp3llm report with another "
        "--device, or where there is more."
    )
