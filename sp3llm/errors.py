"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Bad input. The message is one sentence: what was expected, what was found, what to do.

    The command line prints it without a traceback and exits with code 2; a program that calls
    sp3llm as a library catches it like any other exception.
    """
