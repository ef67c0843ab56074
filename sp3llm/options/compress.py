"""Settings of `sp3llm compress`."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from sp3llm.errors import UserError
from sp3llm.options.checks import check_bits, check_fields, check_out, check_recovery_device
from sp3llm.options.choices import (
    ALLOCATIONS,
    BASES,
    BITS,
    COUNTS,
    DTYPES,
    EXPORTS,
    KV_HEADS,
    MASKS,
    MOMENTS,
    PRECISIONS,
    STREAMS,
    TIES,
    TURNS,
    UNIT_SELECTIONS,
)
from sp3llm.options.field import MOST_SEED, flag, option

# Settings that change where the weights are computed and put and what is done with them afterwards,
# but not what they are: a killed run may be continued with others.
_NOT_OF_RESULT = {
    "out",
    "streams",
    "max_memory",
    "batch_tokens",
    "fresh",
    "recover_steps",
    "score",
    "quantize",
    "report",
}

# Calibration windows of text, and rows of a task, where nothing else is said.
_WINDOWS, _ROWS = 128, 2048


@dataclass(frozen=True)
class CompressConfig:
    """Settings of `sp3llm compress`."""

    command: ClassVar[str] = "compress"

    model: str | None = option(
        "hub id or folder", default=None, shown="the bundled Llama", positional=True
    )
    keep: float = option(
        "fraction of the dense model to keep; never exceeded; tied weights count once",
        default=0.75,
        metavar="FRACTION",
        recorded="always",
    )
    of: str = option(
        "what --keep is a fraction of; encoder: an encoder's matrices, embeddings and head not "
        "counted, as papers on BERT have it",
        default="params",
        choices=COUNTS,
    )
    task: str | None = option(
        "of an encoder: the task whose training rows are calibrated on and whose validation rows "
        "are reported on, named like score's --task",
        default=None,
    )
    out: Path | None = option(
        "output folder", default=None, shown="./<model>-keep<percent>", metavar="DIR"
    )
    calib: str | None = option(
        "calibration text: stdlib, wikitext2, c4, ptb, alpaca, fineweb-edu, a .txt, .jsonl or "
        ".parquet file, or a hub dataset; several, comma-separated, give equal shares",
        default=None,
        shown="stdlib for the bundled model, else wikitext2",
        metavar="SETS",
    )
    samples: int | None = option(
        "calibration windows, or rows of a task at most",
        default=None,
        shown="128, of a task 2048",
        least=1,
    )
    seq_len: int | None = option(
        "tokens a window, or a row of a task at most",
        default=None,
        shown="2048, of a task 128 and of answers in a text 384, or the model's positions if fewer",
        least=2,
    )
    eval_text: str | None = option(
        "held-out text for the perplexity, named like --calib",
        default=None,
        shown="the evaluation split of the calibration set, else stdlib",
        metavar="SETS",
    )
    eval_samples: int = option(
        "evaluation windows at most; of a task all validation rows count", default=128, least=1
    )
    moments: str = option(
        "stream whose second moments are taken; raw is there to compare with",
        default="normalised",
        choices=MOMENTS,
    )
    refit: bool = option(
        "refit what is left in closed form, layer by layer, in a second pass over the calibration "
        "text",
        default=True,
    )
    unit_selection: str = option(
        "how the FFN neurons and KV groups that stay are chosen: by the loss of the refit, or by "
        "their own energy",
        default="obs",
        choices=UNIT_SELECTIONS,
    )
    mask: str = option(
        "who decides what is kept: trial refits and moments, or gates that learn it against the "
        "dense model, which memory must hold whole",
        default="closed-form",
        choices=MASKS,
    )
    mask_steps: int = option("steps of the learned mask", default=300, least=2)
    mask_batch: int = option(
        "windows a step of the learned mask, over all processes", default=16, least=1
    )
    basis: str = option(
        "what the basis of the stream keeps: what is large, what the weights read, or what the "
        "loss would miss",
        default="gradient",
        choices=BASES,
    )
    turn: str = option(
        "how the kept basis is turned, where no tie fixes it: hadamard spreads the energy over the "
        "channels, for quantizers",
        default="none",
        choices=TURNS,
    )
    vocab_from: str | None = option(
        "text like what the model will be used for, named like --calib; all of it but an "
        "evaluation split is read, and says which tokens stay of vocabulary and tokenizer",
        default=None,
        metavar="SETS",
    )
    vocab_size: int | None = option(
        "tokens that are kept of the vocabulary, those that --vocab-from uses most and that the "
        "model expects there",
        default=None,
        shown="by the search, or all that the text uses",
        least=1,
    )
    allocate: str | None = option(
        "how the budget is spent: on the mix of hidden size, FFN width, KV groups and layers "
        "(and tokens, with --vocab-from) that loses least, or on the hidden size alone",
        default=None,
        shown="search; width with --no-refit, unless the mask is learned",
        choices=ALLOCATIONS,
    )
    hidden_size: int | None = option("fix the hidden size", default=None)
    intermediate_size: int | None = option("fix the FFN width", default=None)
    num_key_value_heads: int | None = option("fix the number of key-value heads", default=None)
    kv_heads: str = option(
        "what becomes of key-value heads that go: drop them with their query heads, or merge them "
        "into others, which keeps all query heads; try both (eval/NOTES.md)",
        default="drop",
        choices=KV_HEADS,
    )
    num_hidden_layers: int | None = option(
        "fix the number of layers; those go whose addition to the stream the loss misses least",
        default=None,
    )
    head_dim: int | None = option(
        "fix the head size that an OPT or an encoder is projected to", default=None
    )
    word_embed_proj_dim: int | None = option("fix the embedding width of a tied OPT", default=None)
    tie: str = option(
        "what becomes of tied embeddings; the budget holds either way, and auto takes whichever "
        "loses less",
        default="auto",
        choices=TIES,
    )
    square: bool = option(
        "keep hidden_size = heads x head_dim, for tools that derive one from the other "
        "(CTranslate2): whole heads go in step with the width; OPT, GPT-NeoX and StableLM are "
        "square without it",
        default=False,
    )
    tensor_parallel: int = option(
        "keep heads and widths divisible by N devices", default=1, least=1
    )
    multiple_of: int | None = option(
        "what the new hidden size must be a multiple of",
        default=None,
        shown="256, 64, 32 or 8, by width and heads",
        least=1,
    )
    device: str = option("where to compute: auto, cpu, cuda, cuda:1, ...", default="auto")
    dtype: str = option(
        "dtype of the weights written",
        default="auto",
        shown="as in the checkpoint",
        choices=DTYPES,
    )
    compute_dtype: str = option(
        "dtype of the arithmetic; auto is that of the weights on a GPU and, for bfloat16 weights, "
        "on a CPU with units for it; else float32",
        default="auto",
        choices=PRECISIONS,
    )
    export_as: str = option(
        "stock class of the result: as the original's, as a Llama where that computes exactly the "
        "same, or, auto, as a Llama only where vLLM and llama.cpp could not load the original's "
        "class at the new width (Qwen2)",
        default="auto",
        choices=EXPORTS,
    )
    report: bool = option(
        "write report.html into the output folder, with samples of both models", default=True
    )
    seed: int = option(
        "chooses the calibration windows; everything else is deterministic",
        default=0,
        least=0,
        most=MOST_SEED,
    )
    streams: str = option(
        "where the streams of all windows lie; auto takes the first of the others with room",
        default="auto",
        choices=STREAMS,
    )
    max_memory: str | None = option(
        "what may be taken, as accelerate writes it, such as 0=20GiB,cpu=60GiB, or JSON; of "
        "several GPUs the first one named is used",
        default=None,
        metavar="SIZES",
    )
    batch_tokens: int | None = option(
        "tokens that go through a layer at once",
        default=None,
        shown="by the memory there is",
        least=1,
    )
    fresh: bool = option(
        "start over instead of continuing a run of the same command that was killed",
        default=False,
        recorded="never",
    )
    recover_steps: int = option(
        "tune the result for N steps against the dense model, on the calibration sets' training "
        "text, as sp3llm recover does by default",
        default=0,
    )
    score: str | None = option(
        "at the end, score result and dense model on these tasks or presets, as sp3llm score does",
        default=None,
        metavar="TASKS",
    )
    quantize: str | None = option(
        "write the result in few bits too, into <out>-<bits>, as sp3llm quantize does",
        default=None,
        choices=BITS,
    )

    def of_result(self) -> dict[str, Any]:
        """The settings that the compressed weights depend on, as text, by option: what must be the
        same for a killed run to be continued.
        """
        return {
            flag(name): value if value is None else str(value)
            for name, value in asdict(self).items()
            if name not in _NOT_OF_RESULT
        }

    def __post_init__(self) -> None:
        if not (math.isfinite(self.keep) and 0 < self.keep < 1):
            raise UserError(
                f"Expected --keep between 0 and 1 (exclusive), found {self.keep:g}: give the "
                "fraction of parameters to keep, such as 0.75."
            )
        if self.quantize is not None:
            check_bits("quantize", self.quantize)
        check_fields(self)
        check_out(self.out)
        self._check_task()
        if self.vocab_size is not None and self.vocab_from is None:
            raise UserError(
                f"Expected --vocab-from with --vocab-size, found {self.vocab_size} alone: name "
                "text like what the model will be used for, which says which tokens stay."
            )
        if self.vocab_from is not None and self.mask == "learned":
            raise UserError(
                "Expected --mask closed-form with --vocab-from, found learned, whose gates are "
                "learned on the dense model with all of its vocabulary: leave one of them out."
            )
        if self.recover_steps < 0:
            raise UserError(
                f"Expected --recover-steps of at least 0, found {self.recover_steps}: give a "
                "larger number, or leave it out."
            )
        if self.recover_steps:
            check_recovery_device(self.device)
        if self.moments == "raw" and self.basis != "pca":
            raise UserError(
                f"Expected --basis pca with --moments raw, found '{self.basis}', which weighs "
                "errors in the normalised stream: add --basis pca, or leave --moments raw out."
            )
        if self.kv_heads == "merge" and (self.mask == "learned" or not self.refit):
            what = "--mask learned" if self.mask == "learned" else "--no-refit"
            raise UserError(
                "Expected a refit with --kv-heads merge, which sees what the heads give, found "
                f"{what}: leave one of them out."
            )
        if self.mask == "learned" and self.num_hidden_layers is not None:
            raise UserError(
                "Expected no --num-hidden-layers with --mask learned, whose gates are on every "
                f"layer, found {self.num_hidden_layers}: leave one of them out."
            )
        if not (self.refit or self.mask == "learned") and (
            self.allocate == "search"
            or self.intermediate_size
            or self.num_key_value_heads
            or self.square
        ):
            raise UserError(
                "Cutting FFN or KV groups needs the refit, which chooses what survives, found "
                "--no-refit: leave it out, or use --allocate width and --hidden-size only."
            )

    def _check_task(self) -> None:
        """Raises UserError where what is asked for is not there for a task, or for nothing else."""
        if self.task is None:
            return
        for name, value in (
            *(("calib", self.calib), ("eval_text", self.eval_text)),
            *(("vocab_from", self.vocab_from), ("score", self.score), ("quantize", self.quantize)),
        ):
            if value is not None:
                raise UserError(
                    f"Expected no {flag(name)} with --task, whose rows are calibrated on and "
                    f"reported on, found {value}: leave one of them out."
                )
        if self.turn != "none":
            raise UserError(
                f"Expected --turn none with --task, found {self.turn}: an encoder's norms fix how "
                "its basis is turned, so leave it out."
            )

    @property
    def calibrated(self) -> int:
        """`samples`, resolved."""
        return self.calibrated_with(self.task is not None)

    def calibrated_with(self, rows: bool) -> int:
        """`samples`, resolved for windows of text, or for rows of a task."""
        return self.samples or (_ROWS if rows else _WINDOWS)

    @property
    def allocation(self) -> str:
        """`allocate`, resolved."""
        chosen = self.refit or self.mask == "learned"
        return self.allocate or ("search" if chosen else "width")
