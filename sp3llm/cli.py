"""The `sp3llm` command. Nothing heavy is imported before the arguments are understood."""

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sp3llm import __version__
from sp3llm.config import (
    ALLOCATIONS,
    BASES,
    BITS,
    CHOICES,
    COUNTS,
    DTYPES,
    MASKS,
    MOMENTS,
    PRECISIONS,
    STREAMS,
    TEACHER_DTYPES,
    TIES,
    TRACKERS,
    TURNS,
    BenchConfig,
    CompressConfig,
    QuantizeConfig,
    RecoverConfig,
    ScoreConfig,
)
from sp3llm.errors import UserError

_EPILOG = """examples:
  sp3llm compress                                    the bundled model, at 75 % of its parameters
  sp3llm compress meta-llama/Llama-2-7b --keep 0.8   a hub model, calibrated on WikiText-2
  sp3llm compress ./my-llama --calib my.jsonl --eval-text held-out.jsonl --out ./my-llama-small
"""


_SCORE_EPILOG = """examples:
  sp3llm score ./small --against ./dense --tasks zero-shot
  sp3llm score ./small --against ./dense --tasks papers,wikitext-token,gsm8k --batch-size 16
  sp3llm score ./small --against ./dense --tasks stdlib    needs no network
  accelerate launch -m sp3llm score ./small --tasks mmlu --num-fewshot 5
"""


_RECOVER_EPILOG = """examples:
  sp3llm recover small --teacher dense --steps 300           all weights
  sp3llm recover small --teacher dense --lora 16 --teacher-dtype nf4 --gradient-checkpointing
  accelerate launch -m sp3llm.recover small --teacher dense  several GPUs, or FSDP

A killed run continues from its last checkpoint when the same command is given again.
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage text, and exits with code 2."""

    def error(self, message: str) -> None:
        self.exit(2, f"sp3llm: {message}; see {self.prog} --help.\n")


def parser(prog: str = "sp3llm") -> argparse.ArgumentParser:
    """The command line."""
    top = _Parser(prog=prog, description="Compress decoder models into smaller stock ones.")
    top.add_argument("--version", action="version", version=f"sp3llm {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_compress(
        commands.add_parser(
            "compress",
            help="compress a model",
            description="Compress a Hugging Face decoder model into a smaller one of the same "
            "stock architecture.",
            epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    add_plan(
        commands.add_parser(
            "plan",
            help="show the shapes within a budget, from config.json alone",
            description="Show the shapes within a budget, what they cost, and what a run will "
            "need, from config.json alone: no weights are read.",
        )
    )
    add_report(
        commands.add_parser(
            "report",
            help="write report.html and the model card of a compressed model, or push it",
            description="Write report.html and the model card, README.md, of a compressed model "
            "anew, with all that its record holds by now; --push-to-hub uploads the folder.",
        )
    )
    add_score(
        commands.add_parser(
            "score",
            help="score a model on lm-eval's tasks, and against the dense one",
            description="Score a model on tasks of lm-eval, and against the dense model with the "
            "standard error of the paired difference.",
            epilog=_SCORE_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    add_bench(
        commands.add_parser(
            "bench",
            help="measure speed and memory against the dense model",
            description="Measure prefill and decode speed, time to first token and memory of a "
            "compressed model and its dense one in turns, beside what their FLOPs and bytes "
            "promise.",
        )
    )
    add_recover(
        commands.add_parser(
            "recover",
            help="tune a compressed model against the dense one",
            description="Tune a compressed model by distillation from the dense one it came from; "
            "the result is a stock model again.",
            epilog=_RECOVER_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    add_quantize(
        commands.add_parser(
            "quantize",
            help="write a compressed model in int8 or nf4, beside the dense one in as many bits",
            description="Write a compressed model in few bits with bitsandbytes, beside the one in "
            "full precision, and measure the perplexity of both and of the dense model, in full "
            "precision and quantized alike.",
        )
    )
    return top


def add_compress(add: argparse.ArgumentParser) -> None:
    """The options of `sp3llm compress`."""
    default = CompressConfig()
    add_budget(add)
    add.add_argument(
        "--out", type=Path, metavar="DIR", help="output folder (default: ./<model>-keep<percent>)"
    )
    add.add_argument(
        "--calib",
        metavar="SETS",
        help="calibration text: stdlib, wikitext2, c4, ptb, alpaca, fineweb-edu, a .txt, .jsonl or "
        ".parquet file, or a hub dataset; several, comma-separated, give equal shares (default: "
        "stdlib for the bundled model, else wikitext2)",
    )
    add.add_argument(
        "--eval-text",
        metavar="SETS",
        help="held-out text for the perplexity, named like --calib (default: the evaluation split "
        "of the calibration set, else stdlib)",
    )
    add.add_argument(
        "--refit",
        action=argparse.BooleanOptionalAction,
        default=default.refit,
        help="refit what is left in closed form, layer by layer (default: yes)",
    )
    for option, choices, what in (
        ("moments", MOMENTS, "stream whose second moments are taken; raw is there to compare with"),
        ("basis", BASES, "what the basis of the stream keeps: what is large, what the weights "
         "read, or what the loss would miss"),
        ("choose", CHOICES, "how FFN neurons and KV groups are chosen: by the loss of the refit, "
         "or by their own energy"),
        ("mask", MASKS, "who decides what is kept: trial refits and moments, or gates that learn "
         "it against the dense model, which memory must hold whole"),
        ("turn", TURNS, "how the kept basis is turned, where no tie fixes it: hadamard spreads the "
         "energy over the channels, for quantizers"),
    ):  # fmt: skip
        value = getattr(default, option)
        add.add_argument(
            f"--{option}", default=value, help=f"{what}: {', '.join(choices)} (default: {value})"
        )
    for option, value, what in (
        ("mask-steps", default.mask_steps, "steps of the learned mask"),
        ("mask-batch", default.mask_batch, "windows a step of the learned mask"),
    ):
        add.add_argument(
            f"--{option}", type=int, default=value, metavar="N", help=f"{what} (default: {value})"
        )
    add.add_argument(
        "--device", default=default.device, help="auto, cpu, cuda, ... (default: auto)"
    )
    add.add_argument(
        "--dtype",
        default=default.dtype,
        help=f"dtype of the weights written: {', '.join(DTYPES)} (default: as in the checkpoint)",
    )
    add.add_argument(
        "--report",
        action=argparse.BooleanOptionalAction,
        default=default.report,
        help="write report.html into the output folder, with samples of both models (default: yes)",
    )
    add.add_argument(
        "--seed",
        type=int,
        default=default.seed,
        metavar="N",
        help=f"chooses the calibration windows (default: {default.seed})",
    )
    add.add_argument(
        "--streams",
        default=default.streams,
        help=f"where the streams of all windows lie: {', '.join(STREAMS)}; auto takes the first "
        "with room (default: auto)",
    )
    add.add_argument(
        "--max-memory",
        metavar="SIZES",
        help="what may be taken, such as 0=20GiB,cpu=60GiB; GPUs that are not named stay idle",
    )
    add.add_argument(
        "--batch-tokens",
        type=int,
        metavar="N",
        help="tokens that go through a layer at once (default: by the memory there is)",
    )
    add.add_argument(
        "--fresh",
        action="store_true",
        help="start over instead of continuing a run of the same command that was killed",
    )
    add.add_argument(
        "--recover-steps",
        type=int,
        default=default.recover_steps,
        metavar="N",
        help="tune the result for N steps against the dense model, on the calibration sets' "
        "training text, as `sp3llm recover` does (default: 0)",
    )
    add.add_argument(
        "--score",
        metavar="TASKS",
        help="at the end, score result and dense model on these tasks or presets, as sp3llm score "
        "does",
    )
    add.add_argument(
        "--quantize",
        metavar="BITS",
        help=f"write the result in {' or '.join(BITS)} too, into <out>-<bits>, as sp3llm quantize "
        "does",
    )


def add_quantize(add: argparse.ArgumentParser) -> None:
    """The options of `sp3llm quantize`."""
    add.add_argument("model", help="the compressed model: a folder or a hub id")
    add.add_argument(
        "--to", required=True, metavar="BITS", help=f"{' or '.join(BITS)}; on a CPU nf4 wants "
        "widths in multiples of 64",
    )  # fmt: skip
    add.add_argument(
        "--dense",
        metavar="MODEL",
        help="the dense model to quantize alike (default: the one that the record of MODEL names)",
    )
    add.add_argument(
        "--out", type=Path, metavar="DIR", help="output folder (default: <model>-<bits>, beside it)"
    )
    add.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")


def add_score(add: argparse.ArgumentParser) -> None:
    """The options of `sp3llm score`."""
    add.add_argument("model", help="hub id or folder")
    add.add_argument("--against", metavar="DENSE", help="hub id or folder of the dense model")
    add.add_argument(
        "--tasks",
        required=True,
        help="comma-separated: the presets zero-shot, papers, wikitext-token and stdlib, tasks, "
        "groups and patterns of lm-eval, or YAML files of a preset or a task",
    )
    add.add_argument(
        "--include-path", type=Path, metavar="DIR", help="folder with further lm-eval task files"
    )
    add.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples before each question (default: "
        "the task's own)",
    )  # fmt: skip
    add.add_argument(
        "--limit",
        type=_number,
        metavar="N",
        help="only the first N questions of each task, or that fraction of them if below 1; for "
        "trying out",
    )
    add.add_argument(
        "--batch-size",
        default="auto",
        metavar="N",
        help="sequences at once, or auto: as many as fit on a GPU, 8 on a CPU (default: auto)",
    )
    add.add_argument(
        "--apply-chat-template",
        nargs="?",
        const=True,
        default=False,
        metavar="NAME",
        help="ask in the tokenizer's chat template, or in the one of that name",
    )
    _add_where(add)
    add.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for results and samples (default: "
        "./<model>-score)",
    )  # fmt: skip
    add.add_argument(
        "--seed", type=int, metavar="N", help="seeds all that lm-eval draws (default: its own)"
    )
    add.add_argument(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="run tasks that execute code which the model writes",
    )


def add_bench(add: argparse.ArgumentParser) -> None:
    """The options of `sp3llm bench`."""
    add.add_argument("model", help="hub id or folder of the compressed model")
    add.add_argument(
        "--against", required=True, metavar="DENSE", help="hub id or folder of the dense model"
    )
    for option, default, what in (
        ("batch-sizes", BenchConfig.batch_sizes, "sequences at once"),
        ("prompt-lengths", BenchConfig.prompt_lengths, "tokens of each prompt"),
    ):
        add.add_argument(
            f"--{option}",
            type=int,
            nargs="+",
            default=list(default),
            metavar="N",
            help=f"{what} (default: {' '.join(map(str, default))})",
        )
    for option, default, what in (
        ("new-tokens", BenchConfig.new_tokens, "tokens generated after each prompt"),
        ("repeats", BenchConfig.repeats, "measurements of each figure, after a warm-up"),
        ("seed", BenchConfig.seed, "chooses the prompts' tokens"),
    ):
        add.add_argument(
            f"--{option}", type=int, default=default, metavar="N", help=f"{what} (default: "
            f"{default})",
        )  # fmt: skip
    add.add_argument(
        "--compile", action="store_true", help="run both through torch.compile, with a static cache"
    )
    _add_where(add)
    add.add_argument(
        "--output", type=Path, metavar="FILE", help=".json file for the figures; the table goes "
        "beside it as .md",
    )  # fmt: skip


def _add_where(add: argparse.ArgumentParser) -> None:
    add.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    add.add_argument(
        "--dtype",
        default="auto",
        help=f"dtype of weights and arithmetic: {', '.join(DTYPES)} (default: as in the "
        "checkpoint)",
    )


def add_recover(add: argparse.ArgumentParser) -> None:
    """The options of `sp3llm recover`."""
    default = RecoverConfig(model="")

    def option(name: str, what: str, **kwargs: Any) -> None:
        value = getattr(default, name.replace("-", "_"))
        stated = "" if value is None or value is False else f" (default: {value})"
        add.add_argument(f"--{name}", default=value, help=what + stated, **kwargs)

    whole = {"type": int, "metavar": "N"}
    number = {"type": _number, "metavar": "X"}
    sets = {"metavar": "SETS"}
    add.add_argument("model", help="the compressed model: a folder or a hub id")
    option("teacher", "the dense model (default: the one that the record of MODEL names)",
           metavar="MODEL")  # fmt: skip
    option("out", "output folder (default: ./<model>-recovered)", type=Path, metavar="DIR")
    option("train", "text to train on, named like compress's --calib (default: the sets that MODEL "
           "was calibrated on)", **sets)  # fmt: skip
    option("stop-text", "text to decide on when to stop (default: a sixteenth of the training "
           "text, kept apart)", **sets)  # fmt: skip
    option("eval-text", "held-out text for the perplexity (default: as for the compression)",
           **sets)  # fmt: skip
    option("eval-samples", "evaluation windows at most", **whole)
    option("steps", "optimizer steps", **whole)
    option("batch", "windows a step, over all processes", **whole)
    option("micro-batch", "windows that a process runs at once (default: 2048 tokens' worth)",
           **whole)  # fmt: skip
    option("seq-len", "tokens a window (default: 2048, or the model's positions if fewer)", **whole)
    option("lr", "peak learning rate (default: by the hidden size)", **number)
    option("warmup", "fraction of the steps over which it rises", **number)
    option("weight-decay", "AdamW's, on matrices", **number)
    option("clip", "largest norm of the gradient", **number)
    option("temperature", "temperature at which model and teacher are compared", **number)
    option("kl-weight", "weight of the divergence from the teacher", **number)
    option("lm-weight", "weight of the language-model loss", **number)
    option("hidden-weight", "weight of the error of the residual stream, seen through the basis "
           "that compress stores", **number)  # fmt: skip
    option("lora", "train adapters of this rank, merged in the end (default: all weights)",
           type=int, metavar="RANK")  # fmt: skip
    option("lora-alpha", "scale of the adapters (default: twice the rank)", **number)
    option("teacher-dtype", f"the teacher's weights: {', '.join(TEACHER_DTYPES)}; auto is as in "
           "its checkpoint, float32 on a CPU")  # fmt: skip
    option("teacher-memory", "GB of the device that the teacher may take; the rest is offloaded "
           "(default: no limit)", **number)  # fmt: skip
    option("teacher-logits", "compute the teacher's largest logits once into this folder, or use "
           "those in it", type=Path, metavar="DIR")  # fmt: skip
    option("top-k", "how many logits a token it holds", **whole)
    option("precision", f"arithmetic: {', '.join(PRECISIONS)}; auto is bfloat16 on a GPU")
    option("gradient-checkpointing", "compute activations again instead of keeping them",
           action="store_true")  # fmt: skip
    option("stop-windows", "windows that the held-out loss is taken on", **whole)
    option("check-every", "steps between held-out losses (default: a tenth of all)", **whole)
    option("patience", "checks without a better loss before training stops", **whole)
    option("checkpoint-every", "steps between checkpoints (default: a tenth of all)", **whole)
    option("track", f"follow the run in {' or '.join(TRACKERS)}")
    option("device", "auto, cuda or cpu")
    option("seed", "orders the training windows and starts the adapters", **whole)


def add_plan(add: argparse.ArgumentParser) -> None:
    """The options of `sp3llm plan`."""
    add_budget(add)
    add.add_argument("--json", action="store_true", help="print JSON for machines")
    add.add_argument(
        "--recover",
        action="store_true",
        help="estimate the device memory of `sp3llm recover` too; what follows is as there",
    )
    default = RecoverConfig(model="")
    add.add_argument("--lora", type=int, metavar="RANK", help="adapters (default: all weights)")
    add.add_argument(
        "--teacher-dtype", default=default.teacher_dtype, help=f"{', '.join(TEACHER_DTYPES)}"
    )
    add.add_argument("--teacher-memory", type=_number, metavar="GB", help="the rest is offloaded")
    for name, value in (("batch", default.batch), ("micro-batch", default.micro_batch)):
        add.add_argument(f"--{name}", type=int, default=value, metavar="N", help="windows")
    add.add_argument("--gradient-checkpointing", action="store_true", help="keep less")


def add_report(add: argparse.ArgumentParser) -> None:
    """The options of `sp3llm report`."""
    add.add_argument("folder", type=Path, metavar="DIR", help="what sp3llm compress wrote")
    add.add_argument(
        "--dense",
        metavar="MODEL",
        help="the dense model, to make samples anew with (default: the samples there are, or the "
        "model that the record names, if it is at hand)",
    )
    add.add_argument(
        "--device", default="auto", help="where samples are made: auto, cpu, cuda, ... "
        "(default: auto)",
    )  # fmt: skip
    add.add_argument(
        "--add",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="put what sp3llm score (comparison_<date>.json) or sp3llm bench (its --output) found "
        "into the record",
    )
    add.add_argument(
        "--push-to-hub",
        metavar="REPO_ID",
        help="upload the folder to this repository (owner/name) of the Hugging Face hub, which is "
        "made if it does not exist",
    )
    add.add_argument("--private", action="store_true", help="only into a private repository")


def add_budget(add: argparse.ArgumentParser) -> None:
    """What `compress` and `plan` share: the model, the budget, and what is fixed by hand."""
    default = CompressConfig()
    add.add_argument("model", nargs="?", help="hub id or folder (default: the bundled Llama)")
    add.add_argument(
        "--keep",
        type=_number,
        default=default.keep,
        metavar="FRACTION",
        help="fraction of the dense model to keep; never exceeded; tied weights count once "
        f"(default: {default.keep})",
    )
    add.add_argument(
        "--of",
        default=default.of,
        help=f"what --keep counts: {', '.join(COUNTS)} (default: {default.of})",
    )
    add.add_argument(
        "--allocate",
        help=f"{' or '.join(ALLOCATIONS)}: find the mix of hidden size, FFN width and KV groups "
        "that loses least, or spend the budget on the hidden size (default: search; width with "
        "--no-refit)",
    )
    add.add_argument(
        "--tie",
        default=default.tie,
        help=f"tied embeddings: {', '.join(TIES)}; auto takes whichever loses less at the budget "
        f"(default: {default.tie})",
    )
    for option in (
        "hidden-size",
        "intermediate-size",
        "num-key-value-heads",
        "head-dim",
        "word-embed-proj-dim",
    ):
        add.add_argument(f"--{option}", type=int, metavar="N", help=f"fix {option} by hand")
    add.add_argument(
        "--square",
        action="store_true",
        help="keep hidden_size = heads x head_dim, for tools that derive one from the other "
        "(CTranslate2): whole heads go in step with the width; OPT, GPT-NeoX and StableLM are "
        "square without it",
    )
    add.add_argument(
        "--tensor-parallel",
        type=int,
        default=default.tensor_parallel,
        metavar="N",
        help="keep heads and widths divisible by N devices (default: 1)",
    )
    add.add_argument(
        "--multiple-of",
        type=int,
        metavar="N",
        help="what the new hidden size must be a multiple of (default: 256, 64 or 8, by width and "
        "heads)",
    )
    for option, what in (
        ("samples", "calibration windows"),
        ("eval-samples", "evaluation windows at most"),
    ):
        value = getattr(default, option.replace("-", "_"))
        add.add_argument(
            f"--{option}", type=int, default=value, metavar="N", help=f"{what} (default: {value})"
        )
    add.add_argument(
        "--seq-len",
        type=int,
        metavar="N",
        help="tokens a window (default: 2048, or the model's positions if fewer)",
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected a number such as 0.75, found '{text}'"
        ) from error


def main(argv: list[str] | None = None, prefix: list[str] | None = None) -> None:
    """Run the command line; exits with 2 and one sentence where the input is wrong.

    Of several processes the first one speaks; another one does where it fails by itself.
    """
    arguments = [*(prefix or []), *(sys.argv[1:] if argv is None else argv)]
    options = vars(parser().parse_args(arguments))
    rank = int(os.environ.get("RANK", "0"))
    try:
        command = options.pop("command")
        as_json = options.pop("json", False)
        recovery = _planned_recovery(options) if command == "plan" else None
        if command == "bench":
            options |= {key: tuple(options[key]) for key in ("batch_sizes", "prompt_lengths")}
        kinds = {
            "score": ScoreConfig,
            "bench": BenchConfig,
            "recover": RecoverConfig,
            "quantize": QuantizeConfig,
            "report": dict,
        }
        settings = kinds.get(command, CompressConfig)(**options)
    except UserError as error:
        if rank == 0:
            print(f"sp3llm: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        if command == "plan":
            _run_plan(as_json, settings, recovery)
        elif command == "recover":
            _run_recover(settings)
        elif command == "score":
            _run_score(settings)
        elif command == "bench":
            _run_bench(settings)
        elif command == "quantize":
            _run_quantize(settings)
        elif command == "report":
            _run_report(**settings)
        else:
            _run_compress(settings)
    except UserError as error:
        if rank == 0 or not error.of_all:
            where = f" (process {rank})" if rank else ""
            print(f"sp3llm{where}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        goes_on = command in ("compress", "recover")
        after = "the same command continues where it was" if goes_on else "start anew"
        print(f"sp3llm: interrupted; {after}.", file=sys.stderr)
        sys.exit(130)


def _run_compress(settings: CompressConfig) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from rich.console import Console

    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    with console.status("importing torch and transformers"):
        import transformers

        from sp3llm.compression.story import compress

    transformers.utils.logging.set_verbosity_error()
    compress(settings, console)


def _run_report(
    folder: Path,
    dense: str | None,
    device: str,
    add: list[Path],
    push_to_hub: str | None,
    private: bool,
) -> None:
    from rich.console import Console

    from sp3llm.reporting.card import write_card
    from sp3llm.reporting.hub import check_login, push
    from sp3llm.reporting.origins import dense_folder
    from sp3llm.reporting.page import write_page
    from sp3llm.reporting.record import add_to_record, measured, read_record
    from sp3llm.reporting.samples import with_samples

    if private and push_to_hub is None:
        raise UserError(
            "Expected --push-to-hub with --private, found none: say where to, or leave it out."
        )
    console = Console()
    record = read_record(folder)
    if push_to_hub is not None:
        check_login()
    entries = {key: value for path in add for key, value in measured(path, folder).items()}
    if entries:
        record = add_to_record(folder, **entries)
    record, no_samples = with_samples(folder, record, console, device, dense)
    write_card(folder, record, dense_folder(record, dense))
    written = write_page(folder, record, no_samples)
    if no_samples:
        console.print(f"No samples: {no_samples}", markup=False, highlight=False)
    console.print(f"Written: {written}, {folder / 'README.md'}", markup=False, highlight=False)
    if push_to_hub is not None:
        url = push(folder, push_to_hub, private, console)
        console.print(f"Pushed to {url}", markup=False, highlight=False)


def _run_score(settings: ScoreConfig) -> None:
    from rich.console import Console

    from sp3llm.evaluation.harness import is_first_process, score

    score(settings, Console(quiet=not is_first_process()))


def _run_bench(settings: BenchConfig) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler tells when it starts
    from rich.console import Console

    console = Console()
    with console.status("importing torch and transformers"):
        import transformers

        from sp3llm.evaluation.speed import bench

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    bench(settings, console)


def _run_recover(settings: RecoverConfig) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from rich.console import Console

    # Of several processes one speaks.
    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    with console.status("importing torch and transformers"):
        import torch
        import transformers

        from sp3llm.recovery.story import recover

    transformers.utils.logging.set_verbosity_error()
    try:
        recover(settings, console)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "The GPU ran out of memory: use --gradient-checkpointing, a smaller --micro-batch or "
            "--seq-len, --lora, or --teacher-dtype nf4; the same command then begins anew."
        ) from error


def _run_quantize(settings: QuantizeConfig) -> None:
    from rich.console import Console

    console = Console()
    with console.status("importing torch and transformers"):
        import torch
        import transformers

        from sp3llm.quantization.story import quantize

    transformers.utils.logging.set_verbosity_error()
    try:
        quantize(settings, console)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "The GPU ran out of memory, which holds the quantized dense model whole: close what "
            "else uses it, or use --device cpu."
        ) from error


def _planned_recovery(options: dict[str, Any]) -> RecoverConfig | None:
    """Takes the settings of a recovery out of the options of `plan`; None where none is asked
    for.
    """
    asked = options.pop("recover")
    names = ("lora", "teacher_dtype", "teacher_memory", "batch", "micro_batch")
    found = {name: options.pop(name) for name in (*names, "gradient_checkpointing")}
    settings = RecoverConfig(model="", **found)
    if not asked and settings != RecoverConfig(model=""):
        raise UserError(
            "Expected --recover with the options of a recovery, found them alone: add it, or leave "
            "them out."
        )
    return settings if asked else None


def _run_plan(as_json: bool, settings: CompressConfig, recovery: RecoverConfig | None) -> None:
    import json

    from sp3llm.models import families
    from sp3llm.models.shapes import cost_of
    from sp3llm.models.source import resolve_config
    from sp3llm.planning.candidates import candidates
    from sp3llm.planning.limits import limits_of
    from sp3llm.planning.needs import needs_of
    from sp3llm.planning.recovery_needs import recovery_needs_of
    from sp3llm.reporting.plans import needs_line, plan_table
    from sp3llm.reporting.recovery import recovery_line

    config, name, note = resolve_config(settings.model)
    family = families.family_of(config)
    stated = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    itemsize = {"float64": 8, "float32": 4}.get(stated.removeprefix("torch."), 2)
    limits = limits_of(settings, itemsize)
    shapes = candidates(family, config, limits)
    seq_len = families.window_length(family, config, settings.seq_len)
    needs = needs_of(
        family, config, shapes[0], settings.samples, settings.eval_samples, seq_len, itemsize, 4
    )
    recovery_needs = None
    if recovery is not None:
        recovery_needs = recovery_needs_of(family, config, shapes[0], recovery, seq_len, itemsize)
    if as_json:
        rows = [
            {**asdict(shape), **asdict(cost_of(family, config, shape, limits.context, itemsize))}
            for shape in shapes
        ]
        plan = {"model": name, "limits": asdict(limits), "shapes": rows, "needs": asdict(needs)}
        if recovery_needs is not None:
            plan["recovery_needs"] = asdict(recovery_needs)
        print(json.dumps(plan, indent=2))
        return
    from rich.console import Console

    console = Console()
    if note:
        console.print(note, markup=False)
    console.print(plan_table(name, family, config, limits, shapes))
    console.print(needs_line(settings, seq_len, needs), highlight=False, markup=False)
    if recovery_needs is not None:
        line = recovery_line(recovery, seq_len, recovery_needs)
        console.print(line, highlight=False, markup=False)
