"""The `sp3llm` command. Nothing heavy is imported before the arguments are understood.

Every command has a file here with its `SETTINGS` (a dataclass of `sp3llm.options`), what `--help`
says of it (`SUMMARY`, `DESCRIPTION`, `EPILOG`), and `run`.
"""

import argparse
import os
import sys
from types import ModuleType

from sp3llm import __version__
from sp3llm.cli import bench, compress, plan, quantize, recover, report, score
from sp3llm.errors import UserError
from sp3llm.options.derive import add_options, settings_from

_COMMANDS = (compress, plan, report, score, bench, recover, quantize)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage text, and exits with code 2."""

    def error(self, message: str) -> None:
        self.exit(2, f"sp3llm: {message}; see {self.prog} --help.\n")


def parser(prog: str = "sp3llm") -> argparse.ArgumentParser:
    """The command line. It finds `command`, and of its options those that are given."""
    top = _Parser(prog=prog, description="Compress decoder models into smaller stock ones.")
    top.add_argument("--version", action="version", version=f"sp3llm {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in _COMMANDS:
        add = commands.add_parser(
            module.SETTINGS.command,
            help=module.SUMMARY,
            description=module.DESCRIPTION,
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_options(add, module.SETTINGS)
    return top


def main(argv: list[str] | None = None, prefix: list[str] | None = None) -> None:
    """Run the command line; exits with 2 and one sentence where the input is wrong.

    `argv` is what was typed, without the program's name (None: `sys.argv`); `prefix` goes before
    it. Of several processes the first one speaks; another one does where it fails by itself.
    """
    arguments = [*(prefix or []), *(sys.argv[1:] if argv is None else argv)]
    given = vars(parser().parse_args(arguments))
    module = _module_of(given.pop("command"))
    rank = int(os.environ.get("RANK", "0"))
    try:
        settings = settings_from(module.SETTINGS, given)
    except UserError as error:
        if rank == 0:
            print(f"sp3llm: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        module.run(settings)
    except UserError as error:
        if rank == 0 or not error.of_all:
            where = f" (process {rank})" if rank else ""
            print(f"sp3llm{where}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        goes_on = module in (compress, recover)
        after = "the same command continues where it was" if goes_on else "start anew"
        print(f"sp3llm: interrupted; {after}.", file=sys.stderr)
        sys.exit(130)


def _module_of(command: str) -> ModuleType:
    (module,) = (module for module in _COMMANDS if module.SETTINGS.command == command)
    return module
