"""Run one model for `sp3llm bench`: load it, time prompt and generation, weigh its memory."""

import inspect
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sp3llm.errors import UserError, reason
from sp3llm.evaluation.speed_figures import Pass

if TYPE_CHECKING:
    from sp3llm.models.families import Family


@dataclass(frozen=True)
class Subject:
    """A model under measurement."""

    name: str
    """As the user knows it."""
    model: nn.Module
    config: Mapping[str, Any]
    """Its `config.json`."""
    family: "Family | None"
    """None where sp3llm does not know it, and cannot count its work."""
    disk_bytes: int
    """Bytes of the weight files."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters and buffers in memory, tied ones once."""
        tensors = {t.data_ptr(): t for t in (*self.model.parameters(), *self.model.buffers())}
        return sum(tensor.nbytes for tensor in tensors.values())

    @property
    def parameters(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights in memory."""
        return next(self.model.parameters()).dtype

    def describe(self) -> dict[str, int]:
        """Its sizes, for JSON."""
        return {
            "parameters": self.parameters,
            "disk_bytes": self.disk_bytes,
            "memory_bytes": self.weight_bytes,
        }


def load(model: str, dtype: str, device: torch.device) -> Subject:
    """Load a model as plain transformers does.

    Raises UserError if there is none that loads.
    """
    from transformers import AutoModelForCausalLM

    from sp3llm.models.families import family_of
    from sp3llm.models.source import read_config, resolve_model
    from sp3llm.models.stock import check_found

    folder, name, _ = resolve_model(model)
    config = read_config(folder)
    try:
        family = family_of(config)
    except UserError:  # speed can be measured all the same; the table says that nothing is promised
        family = None
    try:
        stock, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            output_loading_info=True,
        )
        check_found(name, info)
        stock = stock.to(device).eval()
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:  # transformers raises many kinds
        raise UserError(
            f"Cannot load the model '{name}' ({type(error).__name__}: {reason(error)}): check that "
            "plain transformers loads it."
        ) from error
    files = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    return Subject(name, stock, config, family, sum(file.stat().st_size for file in files))


@dataclass(frozen=True)
class Runner:
    """A model ready to run on one prompt. `runner_of` makes it."""

    subject: Subject
    prompt: Tensor
    """Token ids on the device, `(batch, tokens)`."""
    new_tokens: int
    """Tokens to generate after it, the first included."""
    forward: Callable[..., Any]
    """The model, or the compiled one."""
    cache_name: str
    """What its forward calls the KV cache, which transformers renames."""
    static_cache: Any = None
    """The KV cache of a compiled model, used anew in every pass; None: each pass makes its own."""


def runner_of(subject: Subject, prompt: Tensor, new_tokens: int, compiled: bool) -> Runner:
    """A model ready to run on a prompt, `(batch, tokens)`; if asked, one that its first passes
    compile.
    """
    from transformers import StaticCache

    names = inspect.signature(type(subject.model).forward).parameters
    cache_name = "cache" if "cache" in names else "past_key_values"
    plain = Runner(subject, prompt, new_tokens, subject.model, cache_name)
    if not compiled:
        return plain
    length = prompt.shape[1] + new_tokens
    cache = StaticCache(config=subject.model.config, max_cache_len=length)
    runner = replace(plain, static_cache=cache)
    # The cache takes its memory in a first pass that is not compiled: the graphs may then rely on
    # where it lies.
    run_pass(runner)
    # As transformers itself compiles for generation.
    mode = "reduce-overhead" if prompt.device.type == "cuda" else "default"
    return replace(runner, forward=torch.compile(subject.model, mode=mode, dynamic=False))


def next_tokens(runner: Runner, tokens: Tensor, cache: Any) -> Tensor:
    """The likeliest tokens after `tokens`, `(batch, tokens)`, and what `cache` holds: `(batch, 1)`.

    The cache holds `tokens` too afterwards.
    """
    if runner.static_cache is not None:
        torch.compiler.cudagraph_mark_step_begin()
    output = runner.forward(
        input_ids=tokens, use_cache=True, logits_to_keep=1, **{runner.cache_name: cache}
    )
    return output.logits[:, -1:].argmax(-1)


@torch.no_grad()
def run_pass(runner: Runner) -> Pass:
    """Prefill the prompt and generate greedily, without regard to any end of text; timed."""
    device = runner.prompt.device
    _synchronize(device)
    began = time.perf_counter()
    cache = _empty_cache(runner)
    token = runner.prompt

    def prefill() -> None:
        nonlocal token
        token = next_tokens(runner, runner.prompt, cache)

    def decode() -> None:
        nonlocal token
        for _ in range(runner.new_tokens - 1):
            token = next_tokens(runner, token, cache)

    prefill_seconds = timed(device, prefill)
    token.tolist()
    first_token = time.perf_counter() - began
    return Pass(prefill_seconds, first_token, timed(device, decode))


def _empty_cache(runner: Runner) -> Any:
    from transformers import DynamicCache

    if runner.static_cache is None:
        return DynamicCache(config=runner.subject.model.config)
    runner.static_cache.reset()
    return runner.static_cache


def peak_memory(runner: Runner) -> int | None:
    """Bytes of the weights and of the most that a pass holds beside them; None: unknown."""
    weights = runner.subject.weight_bytes
    device = runner.prompt.device
    if device.type != "cuda":
        # A static cache was allocated before, and is not seen in what a pass allocates.
        layers = () if runner.static_cache is None else runner.static_cache.layers
        cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        return weights + cache + _most_allocated(lambda: run_pass(runner))
    if runner.static_cache is not None:
        return None
    _synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run_pass(runner)
    _synchronize(device)
    return weights + torch.cuda.max_memory_allocated(device) - before


def timed(device: torch.device, work: Callable[[], Any]) -> float:
    """Seconds that `work` takes on the device, by its own clock where it has one."""
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record(torch.cuda.current_stream(device))
    work()
    end.record(torch.cuda.current_stream(device))
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1000


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _most_allocated(work: Callable[[], Any]) -> int:
    """The most bytes of tensors that `work` holds at once on a CPU, by the profiler's trace."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"
    )
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most
