"""Compress a decoder model into a smaller one of the same stock architecture.

The story, top-down (SP3, arXiv 2308.16475, carried to LLMs with one basis for the whole stream):

1. find the model, its family and its tokenizer; refuse what cannot be done before any work;
2. plan: the widest hidden size within the budget;
3. stream the dense model over calibration text, layer by layer, and sum the second moments of the
   normalised residual stream; held-out text goes along for the perplexity before;
4. take the top principal components as the one global basis;
5. fold the norms, rotate, cut; then, layer by layer beside the dense model, refit what is left in
   closed form, and write it;
6. stream the result over the held-out text for the perplexity after.

`python -m sp3llm.compress [MODEL] --keep 0.75` is the same as `sp3llm compress`.
"""

import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sp3llm.config import CompressConfig
from sp3llm.errors import UserError

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.progress import Progress
    from torch import Tensor

    from sp3llm.checkpoint import Checkpoint
    from sp3llm.data import Windows
    from sp3llm.families import Family, Group
    from sp3llm.plan import Plan
    from sp3llm.rebuild import Projection
    from sp3llm.score import Excess
    from sp3llm.stream import Execution, Stream


@dataclass(frozen=True)
class Result:
    """What a run produced."""

    name: str
    out: Path
    architecture: str
    command: str
    plan: "Plan"
    eigenvalues: "Tensor"
    fits: list[dict[str, Any]]
    dense_bytes: int
    weight_bytes: int
    calibration: "Windows"
    evaluation: "Windows"
    dense_perplexity: float
    perplexity: float
    excess: "Excess"
    seconds: float
    peak_memory: int


def compress(settings: CompressConfig, console: "Console", command: str | None = None) -> Result:
    """Run the whole pipeline; `settings.out` holds the compressed model when it returns.

    Raises UserError for anything the user can mend; nothing is then left under `settings.out`.
    """
    from sp3llm import checkpoint as disk
    from sp3llm import families, report, score
    from sp3llm.plan import plan_width, resized_config
    from sp3llm.rebuild import Refitter, held_back_from, plain_groups, refitted_groups
    from sp3llm.stream import execution

    started = time.monotonic()
    folder, name, note = disk.resolve_model(settings.model)
    if note:
        console.print(note)
    family = families.family_of(disk.read_config(folder))
    dense = disk.open_checkpoint(folder)
    disk.check_tensors(dense, family)
    plan = plan_width(family, dense.config, settings.keep, settings.multiple_of)

    out = settings.out or Path(f"{Path(name).name.replace(' ', '-')}-keep{100 * settings.keep:g}")
    disk.check_output(out)
    held_from = held_back_from(settings.samples) if settings.refit else settings.samples
    dense_dtype = dense.dtype()
    dtype = _dtype(settings.dtype, dense_dtype)
    weight_bytes = plan.parameters * dtype.itemsize
    disk.check_disk(out, weight_bytes)
    on = execution(settings.device, dtype)
    calibration, evaluation = _windows(settings, dense, family)
    before, after = plan.dense_shape.hidden_size, plan.shape.hidden_size
    console.print(
        f"{name}: {plan.dense_parameters:,} parameters, hidden_size {before} -> "
        f"{plan.parameters:,} ({100 * plan.keep_params:.2f} %), hidden_size {after}"
    )

    with disk.output_folder(out) as partial, report.progress_bars(console) as progress:
        moment_DD, dense_losses = measure_dense(
            dense, family, calibration.tokens, evaluation.tokens, settings.moments, on, progress
        )
        eigenvalues, projection = choose_basis(dense, family, moment_DD, plan.shape.hidden_size)
        small_config = resized_config(family, dense.config, plan.shape)
        small_config = _with_dtype(small_config, dtype, dense_dtype)
        fits: list[dict[str, Any]] = []
        groups = _tracked(
            progress,
            "refit layer by layer" if settings.refit else "fold, rotate, cut",
            families.groups(family, dense.config),
        )
        if settings.refit:
            refitter = Refitter(
                dense, family, plan.shape, projection, dtype, on, settings.choose, held_from, fits
            )
            compressed = refitted_groups(refitter, calibration.tokens, groups)
        else:
            compressed = plain_groups(dense, family, projection, dtype, on, groups)
        small = write_model(family, small_config, compressed, dtype, partial)
        losses = measure_losses(small, family, evaluation.tokens, on, progress)
        companions = disk.copy_companions(folder, partial)
        result = Result(
            name=name,
            out=out,
            architecture=family.architecture,
            command=command or _command(settings),
            plan=plan,
            eigenvalues=eigenvalues,
            fits=fits,
            dense_bytes=plan.dense_parameters * dense_dtype.itemsize,
            weight_bytes=weight_bytes,
            calibration=calibration,
            evaluation=evaluation,
            dense_perplexity=score.perplexity(dense_losses),
            perplexity=score.perplexity(losses),
            excess=score.excess_log_perplexity(losses, dense_losses),
            seconds=time.monotonic() - started,
            peak_memory=report.peak_memory(),
        )
        record = _record(result, settings, on, dtype, companions)
        disk.write_json(partial / disk.RECORD, record)
        base_model = (
            settings.model if settings.model and not Path(settings.model).exists() else name
        )
        card = report.model_card(result, base_model)
        (partial / "README.md").write_text(card, encoding="utf-8")
        disk.write_json(partial / "config.json", small_config)

    console.print(report.closing_table(result))
    console.print(
        f"Written to {out} (stock {family.architecture}, record in {disk.RECORD}). Next:\n"
        f"  AutoModelForCausalLM.from_pretrained({str(out)!r})   in transformers\n"
        f"  vllm serve {out}",
        highlight=False,
    )
    return result


def measure_dense(
    dense: "Checkpoint",
    family: "Family",
    calibration_tokens: "Tensor",
    evaluation_tokens: "Tensor | None",
    moments: str,
    on: "Execution",
    progress: "Progress | None" = None,
) -> "tuple[Tensor, Tensor | None]":
    """One streaming pass of the dense model.

    Returns the sum over read sites of the mean second moment of the stream, `(D, D)`, float64
    (of the normalised stream, or of the raw one), and the token losses on the evaluation text.
    """
    import torch

    from sp3llm import families
    from sp3llm.moments import add_second_moment, normalise, widen
    from sp3llm.stream import empty_model, open_stream, probe_stream, run_layer, token_losses

    eps = families.setting(family, dense.config, "rms_norm_eps")
    width = families.axis_sizes(family, dense.config)[families.RESIDUAL]
    total_DD = torch.zeros(width, width, dtype=torch.float64, device=on.device)

    def probe(_: slice, x: "Tensor") -> None:
        seen = normalise(x, eps) if moments == "normalised" else widen(x)
        add_second_moment(total_DD, seen)

    model = empty_model(dense.config)
    embeddings, *layers, _head = families.groups(family, dense.config)
    table = dense.read(embeddings.parameters)
    calibration = open_stream(model, family, table, calibration_tokens, on)
    streams: list[tuple[Stream, Mapping[str, Any]]] = [
        (calibration, {site.norm: probe for site in family.sites})
    ]
    if evaluation_tokens is not None:
        streams.append((open_stream(model, family, table, evaluation_tokens, on), {}))
    for index, group in enumerate(_tracked(progress, "dense model, second moments", layers)):
        run_layer(model, family, index, dense.read(group.parameters), streams, on)
    probe_stream(calibration, probe, on)
    losses = None
    if evaluation_tokens is not None:
        tensors = head_tensors(dense, family)
        losses = token_losses(model, family, tensors, streams[1][0], evaluation_tokens, on)
    return total_DD / calibration_tokens.numel(), losses


def measure_losses(
    checkpoint: "Checkpoint",
    family: "Family",
    tokens: "Tensor",
    on: "Execution",
    progress: "Progress | None" = None,
) -> "Tensor":
    """Token losses of a checkpoint, streamed: `(windows, tokens - 1)`, float64, nats."""
    from sp3llm import families
    from sp3llm.stream import empty_model, open_stream, run_layer, token_losses

    model = empty_model(checkpoint.config)
    embeddings, *layers, _head = families.groups(family, checkpoint.config)
    stream = open_stream(model, family, checkpoint.read(embeddings.parameters), tokens, on)
    for index, group in enumerate(_tracked(progress, "compressed model, perplexity", layers)):
        run_layer(model, family, index, checkpoint.read(group.parameters), [(stream, {})], on)
    return token_losses(model, family, head_tensors(checkpoint, family), stream, tokens, on)


def head_tensors(checkpoint: "Checkpoint", family: "Family") -> "dict[str, Tensor]":
    """Final norm and head; a tied head's table under the head's own name."""
    from sp3llm import families

    *_, head = families.groups(family, checkpoint.config)
    tensors = checkpoint.read(head.parameters)
    if families.is_tied(family, checkpoint.config):
        table = checkpoint.read([family.embedding])[family.embedding]
        tensors[f"{family.head}.weight"] = table
    return tensors


def choose_basis(
    dense: "Checkpoint", family: "Family", moment_DD: "Tensor", hidden_size: int
) -> "tuple[Tensor, Projection]":
    """The top principal components of the stream; for tied models turned so that the tie holds.

    Returns all eigenvalues, falling, and the projection.
    """
    from sp3llm import families
    from sp3llm.moments import eigenbasis, tied_rotation
    from sp3llm.rebuild import Projection

    eigenvalues_D, vectors_DD = eigenbasis(moment_DD)
    basis_DK, tied_scale_K = vectors_DD[:, :hidden_size], None
    if families.is_tied(family, dense.config):
        norm = f"{family.final_norm}.weight"
        norm_weight_D = dense.read([norm])[norm].to(basis_DK)
        basis_DK, tied_scale_K = tied_rotation(basis_DK, norm_weight_D)
    return eigenvalues_D, Projection(basis_DK, tied_scale_K)


def write_model(
    family: "Family",
    small_config: Mapping[str, Any],
    compressed: "Iterator[tuple[Group, dict[str, Tensor]]]",
    dtype: "torch.dtype",
    folder: Path,
) -> "Checkpoint":
    """Write groups as they come, a shard at a time; returns the checkpoint written.

    `config.json` is not written yet: the folder does not load until the caller says it is whole.
    """
    from sp3llm import checkpoint as disk
    from sp3llm.families import count_parameters

    layout = disk.shard_layout(family, small_config, dtype)
    files: dict[str, Path] = {}
    for number, shard in enumerate(layout):
        tensors: dict[str, Tensor] = {}
        for _ in shard:
            _, group = next(compressed)
            tensors |= {name: tensor.cpu() for name, tensor in group.items()}
        path = disk.write_shard(folder, number, len(layout), tensors)
        files |= dict.fromkeys(tensors, path)
    assert next(compressed, None) is None
    parameters = count_parameters(family, small_config)
    disk.write_index(folder, layout, parameters * dtype.itemsize, parameters)
    return disk.Checkpoint(folder, small_config, files)


def _tracked(progress: "Progress | None", description: str, items: list[Any]) -> Any:
    return items if progress is None else progress.track(items, description=description)


def _dtype(asked: str, dense: "torch.dtype") -> "torch.dtype":
    import torch

    return dense if asked == "auto" else getattr(torch, asked)


def _with_dtype(
    config: Mapping[str, Any], dtype: "torch.dtype", dense: "torch.dtype"
) -> dict[str, Any]:
    """State the dtype under the key the config already uses, where it changes or is missing."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    if keys and dtype == dense:
        return dict(config)
    return {**config, **dict.fromkeys(keys or ["torch_dtype"], str(dtype).removeprefix("torch."))}


def _windows(
    settings: CompressConfig, dense: "Checkpoint", family: "Family"
) -> "tuple[Windows, Windows]":
    """Calibration and evaluation windows of the length the model can take."""
    from sp3llm import data, families

    positions = families.setting(family, dense.config, "max_position_embeddings")
    seq_len = settings.seq_len or min(2048, positions)
    if seq_len > positions:
        raise UserError(
            f"Expected --seq-len of at most {positions}, the model's positions, found {seq_len}: "
            "give a smaller one."
        )
    tokenizer = data.load_tokenizer(dense.folder)
    calib = settings.calib or ("stdlib" if settings.model is None else "wikitext2")
    calibration = data.calibration_windows(
        calib, tokenizer, settings.samples, seq_len, settings.seed
    )
    evaluation = data.evaluation_windows(
        settings.eval_text or data.default_evaluation(calib),
        tokenizer,
        settings.eval_samples,
        seq_len,
        calibration.documents,
    )
    vocab_size = families.axis_sizes(family, dense.config)[families.VOCAB]
    largest = max(calibration.tokens.max().item(), evaluation.tokens.max().item())
    if largest >= vocab_size:
        raise UserError(
            f"Expected token ids below the model's vocab_size {vocab_size}, found {largest}: the "
            f"tokenizer in '{dense.folder}' belongs to another model."
        )
    return calibration, evaluation


def _record(
    result: Result,
    settings: CompressConfig,
    on: "Execution",
    dtype: "torch.dtype",
    companions: list[str],
) -> dict[str, Any]:
    """`sp3llm.json`: everything needed to know, and repeat, what was done."""
    from sp3llm import report

    plain = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(settings).items()}
    return {
        "model": result.name,
        "command": result.command,
        "settings": plain,
        "plan": result.plan.describe(),
        "calibration": result.calibration.describe(),
        "evaluation": result.evaluation.describe(),
        "dense_perplexity": result.dense_perplexity,
        "perplexity": result.perplexity,
        "excess_log_perplexity": result.excess.describe(),
        "eigenvalues": result.eigenvalues.tolist(),
        "fits": result.fits,
        "dtype": str(dtype).removeprefix("torch."),
        "compute_dtype": str(on.dtype).removeprefix("torch."),
        "weight_bytes": result.weight_bytes,
        "files_copied": companions,
        "seconds": round(result.seconds, 2),
        "peak_memory_bytes": result.peak_memory,
        "versions": report.versions(),
        "machine": report.machine(str(on.device)),
    }


def _command(settings: CompressConfig) -> str:
    """The command line that gives these settings."""
    defaults = asdict(CompressConfig())
    words = ["sp3llm", "compress", *([settings.model] if settings.model else [])]
    for key, value in asdict(settings).items():
        if key != "model" and (key == "keep" or value != defaults[key]):
            words += [f"--{key.replace('_', '-')}", str(value)]
    return shlex.join(words)


if __name__ == "__main__":
    from sp3llm.cli import main

    main(prefix=["compress"])
