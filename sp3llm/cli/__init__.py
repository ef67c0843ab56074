"""The `sp3llm` command. Nothing heavy is imported before the arguments are understood.

Every command has a file here with its `SETTINGS` (a dataclass of `sp3llm.options`), what `--help`
says of it (`SUMMARY`, `DESCRIPTION`, `EPILOG`), and `run`.
"""

import argparse
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

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
    top = _Parser(prog=prog, description="Compress Hugging Face models into smaller stock ones.")
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
    it. Of several processes the first one on each host speaks; another one does where it fails by
    itself.
    """
    _check_system(os.name)
    _check_working_folder()
    _print_what_the_terminal_can()
    arguments = [*(prefix or []), *(sys.argv[1:] if argv is None else argv)]
    rank = _from_launcher("RANK", 0)
    speaks = _from_launcher("LOCAL_RANK", rank) == 0
    processes = _from_launcher("WORLD_SIZE", 1)
    try:
        _run(arguments, speaks, rank)
    finally:
        if processes > 1:  # others may be waiting for this process
            from sp3llm.runtime.presence import leave

            leave()


def _from_launcher(name: str, default: int) -> int:
    """A number that a launcher sets in the environment; exits with 2 where it is none."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        _refuse(
            f"Expected a number in the environment's {name}, which launchers of several processes "
            f"set, found '{value}': unset it."
        )
    return int(value)


def _refuse(message: str) -> NoReturn:
    """Exit with one sentence, before it is known whether this process speaks."""
    print(f"sp3llm: {message}", file=sys.stderr)
    sys.exit(2)


def _run(arguments: list[str], speaks: bool, rank: int) -> None:
    """Understand the arguments and do what they say, as process `rank` of those of a launcher."""
    try:
        given = vars(parser().parse_args(arguments))
        module = _module_of(given.pop("command"))
        settings = settings_from(module.SETTINGS, given)
    except UserError as error:
        if speaks:
            print(f"sp3llm: {error}", file=sys.stderr)
        sys.exit(2)
    if threading.current_thread() is threading.main_thread():  # no other may
        for number in _ENDING:
            if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
                signal.signal(number, _terminate)
    try:
        module.run(settings)
    except UserError as error:
        if speaks or not error.of_all:
            by = error.found_by or (f"process {rank}" if rank else "")
            print(f"sp3llm{f' ({by})' if by else ''}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        ended = stop.number if isinstance(stop, _Terminated) else None
        goes_on = module in (compress, recover)
        after = "the same command continues where it was" if goes_on else "start anew"
        if speaks:
            word = "terminated" if ended else "interrupted"
            print(f"sp3llm: {word}; {after}.", file=sys.stderr)
        sys.exit(128 + (ended or signal.SIGINT))


# What ends a run like Ctrl-C: schedulers and shutdowns send the first, a terminal that is closed
# the second.
_ENDING = (signal.SIGTERM, signal.SIGHUP) if os.name == "posix" else ()


class _Terminated(KeyboardInterrupt):
    """One of `_ENDING`: the end of the run, like Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def _terminate(number: int, _: object) -> None:
    raise _Terminated(number)


def _check_system(name: str) -> None:
    """Exit with one sentence where file locks and the like are not POSIX's."""
    if name != "posix":
        _refuse(
            f"expected Linux, macOS or another POSIX system, found '{name}': on Windows run it in "
            "WSL."
        )


def _check_working_folder() -> None:
    """Exit with one sentence where the shell stands in a folder that was removed: no path can be
    told from there.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        _refuse(
            "expected a folder to work in, found that the current one was removed: change to "
            "another."
        )


def _print_what_the_terminal_can() -> None:
    """Let characters that an output cannot encode, such as ± in ASCII, come out as others, and let
    what an output takes no more (a pipe whose reader has gone, a full disk under a log) be lost:
    neither is a reason to lose hours of work.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
            if "write" in vars(stream):  # of an earlier command in this process
                continue
            stream.write = _going_on(stream, stream.write)
            stream.flush = _going_on(stream, stream.flush)


def _going_on(stream: io.TextIOWrapper, act: Callable[..., Any]) -> Callable[..., Any]:
    """`act` of a stream, which is let go to nowhere from when it first fails."""

    def attempt(*arguments: Any) -> Any:
        try:
            return act(*arguments)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            if stream is sys.stdout:
                print(f"sp3llm: going on without output ({error.strerror}).", file=sys.stderr)
            return None

    return attempt


def _module_of(command: str) -> ModuleType:
    (module,) = (module for module in _COMMANDS if module.SETTINGS.command == command)
    return module
