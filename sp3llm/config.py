"""What a run is asked to do, checked where it enters."""

import math
import shlex
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sp3llm.errors import UserError

MOMENTS = ("normalised", "raw")
BASES = ("pca", "readers", "gradient")
ALLOCATIONS = ("search", "width")
COUNTS = ("params", "bytes", "flops", "kv-cache")
CHOICES = ("obs", "energy")
MASKS = ("closed-form", "learned")
TURNS = ("none", "hadamard")
BITS = ("int8", "nf4")
TIES = ("auto", "keep", "untie")
STREAMS = ("auto", "gpu", "host", "disk")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
TEACHER_DTYPES = ("auto", "float32", "bfloat16", "int8", "nf4")
PRECISIONS = ("auto", "float32", "bfloat16")
TRACKERS = ("tensorboard", "wandb")


# Where things are computed and put, not what.
_NOT_OF_RESULT = (
    *("out", "streams", "max_memory", "batch_tokens", "fresh"),
    *("recover_steps", "score", "quantize", "report"),
)


@dataclass(frozen=True)
class CompressConfig:
    """Settings of `sp3llm compress`."""

    model: str | None = None
    """Hub id or folder; None: the small trained model that comes with the package."""
    keep: float = 0.75
    """Fraction of the dense checkpoint's parameters (tied weights once); never exceeded."""
    of: str = "params"
    """What `keep` counts: `params`, `bytes`, `flops` or `kv-cache`."""
    out: Path | None = None
    """Where the compressed model goes; None: `./<model>-keep<percent>`."""
    calib: str | None = None
    """Calibration sets; None: `stdlib` for the bundled model, `wikitext2` for any other."""
    samples: int = 128
    """Calibration windows."""
    seq_len: int | None = None
    """Tokens a window; None: 2048, or the model's positions if fewer."""
    eval_text: str | None = None
    """Held-out text; None: the evaluation split of the calibration set, or `stdlib`."""
    eval_samples: int = 128
    """Evaluation windows at most."""
    moments: str = "normalised"
    """Which second moments the basis comes from: of the normalised stream, or of the raw one."""
    refit: bool = True
    """Refit what is left in closed form, layer by layer (a second pass over the calibration)."""
    choose: str = "obs"
    """How neurons and KV groups are chosen: by the loss of the refit, or by their own energy."""
    mask: str = "closed-form"
    """Who decides what is kept: trial refits and the moments, or gates that are `learned` against
    the dense model."""
    mask_steps: int = 300
    """Steps of the learned mask."""
    mask_batch: int = 16
    """Windows a step of the learned mask, over all processes."""
    basis: str = "gradient"
    """What the basis keeps: what is large (`pca`), what the weights read (`readers`), or what the
    loss would miss (`gradient`)."""
    turn: str = "none"
    """How the kept basis is turned: `none`, or `hadamard`, which spreads the energy over the
    channels; only where no tie fixes the rotation."""
    allocate: str | None = None
    """`search`: the mix of width, FFN and KV groups that loses least; `width`: all on the hidden
    size. None: `search` with the refit or a learned mask, `width` without."""
    hidden_size: int | None = None
    """Fixes the hidden size."""
    intermediate_size: int | None = None
    """Fixes the FFN width."""
    num_key_value_heads: int | None = None
    """Fixes the number of KV groups."""
    head_dim: int | None = None
    """Fixes what every head of an OPT is projected to."""
    word_embed_proj_dim: int | None = None
    """Fixes the embedding width of a tied OPT."""
    tie: str = "auto"
    """What becomes of tied embeddings: `keep` them tied, `untie` them (the budget holds either
    way), or `auto`, whichever loses less."""
    square: bool = False
    """Keeps the hidden size at heads times head size, for tools that derive one from the other:
    whole heads go in step with the width."""
    tensor_parallel: int = 1
    """Keeps heads and widths divisible by this many devices."""
    multiple_of: int | None = None
    """What the new hidden size must be a multiple of; None: chosen from width and heads."""
    device: str = "auto"
    """Where to compute: `auto`, `cpu`, `cuda`, `cuda:1`, ..."""
    dtype: str = "auto"
    """Dtype of the weights written; `auto`: as in the checkpoint."""
    report: bool = True
    """Write report.html, with samples of both models."""
    seed: int = 0
    """Chooses the calibration windows; everything else is deterministic."""
    streams: str = "auto"
    """Where residual streams lie: on the GPU, the host, the disk, or the first with room."""
    max_memory: str | None = None
    """What may be taken, as accelerate writes it: `0=10GiB,cpu=30GiB`, or JSON."""
    batch_tokens: int | None = None
    """Tokens that go through a layer at once; None: by the memory there is."""
    fresh: bool = False
    """Start over where a killed run could be continued."""
    recover_steps: int = 0
    """Steps of recovery tuning afterwards, with the defaults of `RecoverConfig`."""
    score: str | None = None
    """lm-eval tasks or presets that the result and the dense model are scored on at the end."""
    quantize: str | None = None
    """`int8` or `nf4`: write the result in bitsandbytes' format too, beside the other."""

    def of_result(self) -> dict[str, Any]:
        """The settings that the result depends on, by option."""
        return {
            f"--{name.replace('_', '-')}": value if value is None else str(value)
            for name, value in asdict(self).items()
            if name not in _NOT_OF_RESULT
        }

    def __post_init__(self) -> None:
        if not (math.isfinite(self.keep) and 0 < self.keep < 1):
            raise UserError(
                f"Expected --keep between 0 and 1 (exclusive), found {self.keep:g}: give the "
                "fraction of parameters to keep, such as 0.75."
            )
        for name in (
            *("samples", "eval_samples", "seq_len", "multiple_of", "tensor_parallel"),
            *("batch_tokens", "mask_steps", "mask_batch"),
        ):
            value = getattr(self, name)
            least = 2 if name in ("seq_len", "mask_steps") else 1  # its shape is fixed after one
            if value is not None and value < least:
                raise UserError(
                    f"Expected --{name.replace('_', '-')} of at least {least}, found {value}: "
                    "give a larger number."
                )
        for name, choices in (
            ("of", COUNTS),
            ("moments", MOMENTS),
            ("basis", BASES),
            ("choose", CHOICES),
            ("mask", MASKS),
            ("turn", TURNS),
            ("tie", TIES),
            ("streams", STREAMS),
            ("dtype", DTYPES),
        ):
            if getattr(self, name) not in choices:
                raise UserError(
                    f"Expected --{name} to be one of {', '.join(choices)}, found "
                    f"'{getattr(self, name)}': choose one of them."
                )
        if self.quantize is not None:
            _check_bits("quantize", self.quantize)
        if self.recover_steps < 0:
            raise UserError(
                f"Expected --recover-steps of at least 0, found {self.recover_steps}: give a "
                "larger number, or leave it out."
            )
        if self.recover_steps:
            _check_recovery_device(self.device)
        if self.allocate not in (None, *ALLOCATIONS):
            raise UserError(
                f"Expected --allocate to be one of {', '.join(ALLOCATIONS)}, found "
                f"'{self.allocate}': choose one of them."
            )
        if self.moments == "raw" and self.basis != "pca":
            raise UserError(
                f"Expected --basis pca with --moments raw, found '{self.basis}', which weighs "
                "errors in the normalised stream: add --basis pca, or leave --moments raw out."
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

    @property
    def allocation(self) -> str:
        """`allocate`, resolved."""
        chosen = self.refit or self.mask == "learned"
        return self.allocate or ("search" if chosen else "width")


@dataclass(frozen=True)
class QuantizeConfig:
    """Settings of `sp3llm quantize`."""

    model: str
    """The compressed model: a folder or a hub id."""
    to: str
    """`int8` or `nf4`, as bitsandbytes has them."""
    dense: str | None = None
    """The dense model, a folder or a hub id, quantized alike to compare with; None: the one that
    the compressed model's record names."""
    out: Path | None = None
    """Where the quantized model goes; None: beside the compressed one, as `<model>-int8`."""
    device: str = "auto"
    """Where to compute: `auto`, `cpu`, `cuda`, `cuda:1`, ..."""

    def __post_init__(self) -> None:
        _check_bits("to", self.to)


@dataclass(frozen=True)
class ScoreConfig:
    """Settings of `sp3llm score`. What is None is left to lm-eval."""

    model: str
    """Hub id or folder."""
    tasks: str
    """Presets, lm-eval tasks, groups and patterns, and YAML files of either kind, by commas."""
    against: str | None = None
    """Hub id or folder of the dense model to compare with."""
    include_path: Path | None = None
    """Folder with further task files of lm-eval's."""
    num_fewshot: int | None = None
    """Examples before each question."""
    limit: float | None = None
    """Questions of each task at most, or the fraction of them if below 1."""
    batch_size: str = "auto"
    """Sequences at once; `auto`: as many as fit on a GPU, 8 on a CPU."""
    apply_chat_template: bool | str = False
    """Ask in the tokenizer's chat template, or in the one of this name."""
    device: str = "auto"
    """Where to compute: `auto`, `cpu`, `cuda`, `cuda:1`, ..."""
    dtype: str = "auto"
    """Dtype of weights and arithmetic; `auto`: as in the checkpoint."""
    output: Path | None = None
    """Where results and samples go; None: `./<model>-score`."""
    seed: int | None = None
    """Seeds all that lm-eval draws; None: its own defaults."""
    confirm_run_unsafe_code: bool = False
    """Run tasks that execute code a model wrote."""

    def __post_init__(self) -> None:
        if self.limit is not None and not (math.isfinite(self.limit) and self.limit > 0):
            raise UserError(
                f"Expected --limit above 0, found {self.limit:g}: give a number of questions, or a "
                "fraction of them below 1."
            )
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UserError(
                f"Expected --num-fewshot of at least 0, found {self.num_fewshot}: give 0 or more."
            )
        if self.batch_size != "auto" and not (
            self.batch_size.isdecimal() and int(self.batch_size) > 0
        ):
            raise UserError(
                f"Expected --batch-size to be auto or a number of at least 1, found "
                f"'{self.batch_size}': give one of them."
            )
        _check_dtype(self.dtype)


@dataclass(frozen=True)
class BenchConfig:
    """Settings of `sp3llm bench`."""

    model: str
    """Hub id or folder of the compressed model."""
    against: str
    """Hub id or folder of the dense model."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Sequences at once."""
    prompt_lengths: tuple[int, ...] = (128, 512)
    """Tokens of each prompt."""
    new_tokens: int = 32
    """Tokens generated after each prompt."""
    repeats: int = 9
    """Measurements of each figure, after one that warms up."""
    compile: bool = False
    """Run both models through `torch.compile`, with a static cache."""
    device: str = "auto"
    """Where to compute: `auto`, `cpu`, `cuda`, `cuda:1`, ..."""
    dtype: str = "auto"
    """Dtype of weights and arithmetic; `auto`: as in the checkpoints."""
    output: Path | None = None
    """JSON file for the figures, with a table as .md beside it; None: only printed."""
    seed: int = 0
    """Chooses the prompts' tokens."""

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "prompt_lengths", "new_tokens", "repeats"):
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            # The first new token comes with the prompt; the rate of the others needs one.
            least = 2 if name == "new_tokens" else 1
            if not values or min(values) < least:
                raise UserError(
                    f"Expected --{name.replace('_', '-')} of at least {least}, found "
                    f"{', '.join(map(str, values)) or 'none'}: give a larger number."
                )
        if self.output is not None and self.output.suffix != ".json":
            raise UserError(
                f"Expected --output to name a .json file, found '{self.output}': the table goes "
                "beside it as .md."
            )
        _check_dtype(self.dtype)


def command_line(settings: ScoreConfig | BenchConfig | QuantizeConfig) -> str:
    """The command line that gives these settings."""
    commands = {ScoreConfig: "score", BenchConfig: "bench", QuantizeConfig: "quantize"}
    words = ["sp3llm", commands[type(settings)], settings.model]
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name == "model" or (field.default is not MISSING and value == field.default):
            continue
        words.append(f"--{field.name.replace('_', '-')}")
        if value is not True:
            words += map(str, value if isinstance(value, tuple) else (value,))
    return shlex.join(words)


def _check_bits(option: str, bits: str) -> None:
    if bits not in BITS:
        raise UserError(
            f"Expected --{option} to be {' or '.join(BITS)}, found '{bits}': choose one of them."
        )


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise UserError(
            f"Expected --dtype to be one of {', '.join(DTYPES)}, found '{dtype}': choose one of "
            "them."
        )


@dataclass(frozen=True)
class RecoverConfig:
    """Settings of `sp3llm recover`."""

    model: str
    """The compressed model: a folder or a hub id."""
    teacher: str | None = None
    """The dense model: a folder or a hub id; None: the one that the compressed model's record
    names."""
    out: Path | None = None
    """Where the recovered model goes; None: `./<model>-recovered`."""
    train: str | None = None
    """Sets of text to train on; None: those that the model was calibrated on."""
    stop_text: str | None = None
    """Text that stopping is decided on; None: a sixteenth of the training documents, which is not
    trained on."""
    eval_text: str | None = None
    """Held-out text for the perplexity; None: as for the compression."""
    eval_samples: int = 128
    """Evaluation windows at most."""
    steps: int = 300
    """Optimizer steps."""
    batch: int = 16
    """Windows a step, over all processes."""
    micro_batch: int | None = None
    """Windows that a process runs at once; None: as many as hold 2048 tokens, one at least."""
    seq_len: int | None = None
    """Tokens a window; None: 2048, or the model's positions if fewer."""
    lr: float | None = None
    """Peak learning rate; None: by the hidden size, see `recover.default_lr`."""
    warmup: float = 0.05
    """Fraction of the steps over which the learning rate rises; it then falls as a cosine to 0."""
    weight_decay: float = 0.0
    """AdamW's, on matrices."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    temperature: float = 1.0
    """Temperature at which teacher and model are compared."""
    kl_weight: float = 1.0
    """Weight of the divergence from the teacher."""
    lm_weight: float = 0.0
    """Weight of the language-model loss, which also learns the text's own manner."""
    hidden_weight: float = 0.0
    """Weight of the error of the residual stream, through the basis that `compress` stores."""
    lora: int | None = None
    """Rank of the adapters; None: all weights are trained."""
    lora_alpha: float | None = None
    """Scale of the adapters; None: twice the rank."""
    teacher_dtype: str = "auto"
    """`auto`: as in its checkpoint, on a CPU float32; `float32`, `bfloat16`, or `int8` and `nf4` as
    bitsandbytes has them."""
    teacher_memory: float | None = None
    """GB of the device that the teacher may take; the rest waits on the host, then on disk."""
    teacher_logits: Path | None = None
    """Where the teacher's largest logits are kept, computed once; None: it runs beside."""
    top_k: int = 64
    """How many logits a token `teacher_logits` keeps."""
    precision: str = "auto"
    """Arithmetic: `float32`, `bfloat16` by autocast; `auto`: bfloat16 on a GPU."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    stop_windows: int = 32
    """Windows that the held-out loss is taken on."""
    check_every: int | None = None
    """Steps between held-out losses; None: a tenth of the steps."""
    patience: int = 5
    """Checks without a better loss after which training stops; the best weights are kept."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; None: a tenth of the steps."""
    track: str | None = None
    """`tensorboard` or `wandb`."""
    device: str = "auto"
    """`auto`: what accelerate finds; `cpu`."""
    seed: int = 0
    """Orders the training windows and starts the adapters."""

    def __post_init__(self) -> None:
        whole = ("eval_samples", "steps", "batch", "micro_batch", "lora", "top_k", "stop_windows")
        for name in (*whole, "check_every", "patience", "checkpoint_every", "seq_len"):
            value = getattr(self, name)
            least = 2 if name == "seq_len" else 1
            if value is not None and value < least:
                raise UserError(
                    f"Expected {_option(name)} of at least {least}, found {value}: give a larger "
                    "number."
                )
        for name in ("lr", "clip", "temperature", "lora_alpha", "teacher_memory"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(
                    f"Expected {_option(name)} above 0, found {value:g}: give a positive number."
                )
        for name in ("weight_decay", "kl_weight", "lm_weight", "hidden_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(
                    f"Expected {_option(name)} of at least 0, found {value:g}: give 0 or more."
                )
        if not 0 <= self.warmup < 1:
            raise UserError(
                f"Expected --warmup between 0 and 1, the fraction of steps, found {self.warmup:g}: "
                "give a fraction such as 0.05."
            )
        if self.kl_weight == self.lm_weight == self.hidden_weight == 0:
            raise UserError(
                "Expected something to learn from, found --kl-weight, --lm-weight and "
                "--hidden-weight all 0: raise one of them."
            )
        if self.lora_alpha is not None and self.lora is None:
            raise UserError(
                "Expected --lora with --lora-alpha, which scales adapters, found none: add --lora "
                "16, or leave it out."
            )
        for name, choices in (
            ("teacher_dtype", TEACHER_DTYPES),
            ("precision", PRECISIONS),
            ("track", (None, *TRACKERS)),
        ):
            if getattr(self, name) not in choices:
                known = ", ".join(choice for choice in choices if choice)
                raise UserError(
                    f"Expected {_option(name)} to be one of {known}, found "
                    f"'{getattr(self, name)}': choose one of them."
                )
        if self.teacher_logits is not None and self.hidden_weight:
            raise UserError(
                "Expected the teacher itself for --hidden-weight, found --teacher-logits, which "
                "holds no hidden states: leave one out."
            )
        _check_recovery_device(self.device)

    @property
    def checked_every(self) -> int:
        """`check_every`, resolved."""
        return self.check_every or max(1, self.steps // 10)

    @property
    def saved_every(self) -> int:
        """`checkpoint_every`, resolved."""
        return self.checkpoint_every or max(1, self.steps // 10)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_recovery_device(device: str) -> None:
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"Expected --device auto, cuda or cpu for recovery, found '{device}': choose GPUs with "
            "CUDA_VISIBLE_DEVICES or accelerate launch."
        )
