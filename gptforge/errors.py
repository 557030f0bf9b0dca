"""Errors that are for people. The command line prints each as one line, without a traceback."""


class UserError(ValueError):
    """Something the user gave is wrong; the message says what, with the values, and what to do."""


class RunError(RuntimeError):
    """The run cannot go on, through no mistake in its flags: no disk, no memory, no finite loss."""


class Terminated(BaseException):
    """SIGTERM, or a closed terminal: a command ends as by Ctrl-C, and cleans up as well."""
