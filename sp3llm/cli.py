"""The `sp3llm` command. Nothing heavy is imported before the arguments are understood."""

import argparse
import os
import sys
from pathlib import Path

from sp3llm import __version__
from sp3llm.config import (
    ALLOCATIONS,
    BASES,
    CHOICES,
    COUNTS,
    DTYPES,
    MOMENTS,
    CompressConfig,
)
from sp3llm.errors import UserError

_EPILOG = """examples:
  sp3llm compress                                    the bundled model, at 75 % of its parameters
  sp3llm compress meta-llama/Llama-2-7b --keep 0.8   a hub model, calibrated on WikiText-2
  sp3llm compress ./my-llama --calib my.jsonl --eval-text held-out.jsonl --out ./my-llama-small
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
    return top


def add_compress(add: argparse.ArgumentParser) -> None:
    """The options of `sp3llm compress`."""
    default = CompressConfig()
    add.add_argument("model", nargs="?", help="hub id or folder (default: the bundled Llama)")
    add.add_argument(
        "--keep",
        type=_number,
        default=default.keep,
        metavar="FRACTION",
        help="fraction of the dense model's parameters, tied weights once; never exceeded "
        f"(default: {default.keep})",
    )
    add.add_argument(
        "--of",
        default=default.of,
        help=f"what --keep counts: {', '.join(COUNTS)} (default: {default.of})",
    )
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
        "--samples",
        type=int,
        default=default.samples,
        metavar="N",
        help=f"calibration windows (default: {default.samples})",
    )
    add.add_argument(
        "--seq-len",
        type=int,
        metavar="N",
        help="tokens a window (default: 2048, or the model's positions if fewer)",
    )
    add.add_argument(
        "--eval-text",
        metavar="SETS",
        help="held-out text for the perplexity, named like --calib (default: the evaluation split "
        "of the calibration set, else stdlib)",
    )
    add.add_argument(
        "--eval-samples",
        type=int,
        default=default.eval_samples,
        metavar="N",
        help=f"evaluation windows at most (default: {default.eval_samples})",
    )
    add.add_argument(
        "--moments",
        default=default.moments,
        help=f"moments of which stream give the basis: {' or '.join(MOMENTS)} (default: "
        f"{default.moments}; raw is there to compare with)",
    )
    add.add_argument(
        "--refit",
        action=argparse.BooleanOptionalAction,
        default=default.refit,
        help="refit what is left in closed form, layer by layer (default: yes)",
    )
    add.add_argument(
        "--basis",
        default=default.basis,
        help=f"basis of the stream: {', '.join(BASES)} (default: {default.basis}: principal "
        "components; the others weigh what the readers or the loss would miss)",
    )
    add.add_argument(
        "--choose",
        default=default.choose,
        help=f"how FFN neurons and KV groups are chosen: {' or '.join(CHOICES)} (default: "
        f"{default.choose}, by the loss of the refit)",
    )
    add.add_argument(
        "--allocate",
        help=f"{' or '.join(ALLOCATIONS)}: find the mix of hidden size, FFN width and KV groups "
        "that loses least, or spend the budget on the hidden size (default: search; width with "
        "--no-refit)",
    )
    for option in ("hidden-size", "intermediate-size", "num-key-value-heads"):
        add.add_argument(f"--{option}", type=int, metavar="N", help=f"fix {option} by hand")
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
    add.add_argument(
        "--device", default=default.device, help="auto, cpu, cuda, ... (default: auto)"
    )
    add.add_argument(
        "--dtype",
        default=default.dtype,
        help=f"dtype of the weights written: {', '.join(DTYPES)} (default: as in the checkpoint)",
    )
    add.add_argument(
        "--seed",
        type=int,
        default=default.seed,
        metavar="N",
        help=f"chooses the calibration windows (default: {default.seed})",
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected a number such as 0.75, found '{text}'"
        ) from error


def main(argv: list[str] | None = None, prefix: list[str] | None = None) -> None:
    """Run the command line; exits with 2 and one sentence where the input is wrong."""
    arguments = [*(prefix or []), *(sys.argv[1:] if argv is None else argv)]
    options = vars(parser().parse_args(arguments))
    del options["command"]
    try:
        settings = CompressConfig(**options)
        _run_compress(settings)
    except UserError as error:
        print(f"sp3llm: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("sp3llm: interrupted; nothing was written.", file=sys.stderr)
        sys.exit(130)


def _run_compress(settings: CompressConfig) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from rich.console import Console

    console = Console()
    with console.status("importing torch and transformers"):
        import torch  # noqa: F401
        import transformers

        from sp3llm.compress import compress

    transformers.utils.logging.set_verbosity_error()
    compress(settings, console)
