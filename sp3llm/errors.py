"""The exceptions that a user is meant to read."""

import re


class UserError(Exception):
    """Bad input. The message is one sentence: what was expected, what was found, what to do.

    The command line prints it without a traceback and exits with code 2; a program that calls
    sp3llm as a library catches it like any other exception.
    """

    of_all = False
    """Every process of the run raises it, so that on each host one's word is enough."""
    found_by = ""
    """Which process of the run found it, where that is another than the one that raises it."""


class ResumableError(UserError):
    """A run that stopped through no fault of its input: the same command continues it."""


def of_all(error: UserError) -> UserError:
    """The error, as one that every process of the run raises."""
    error.of_all = True
    return error


def reason(error: Exception, limit: int = 200) -> str:
    """What another package's exception says, on one line and fit to stand inside a sentence."""
    text = re.sub(r"[.!?] (?=[A-Z])", "; ", " ".join(str(error).split()))
    return text[:limit].rstrip(" .;") or type(error).__name__
