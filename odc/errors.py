"""The two exceptions that end a program without a traceback."""


class UserError(Exception):
    """A mistake that a person can mend. The message names the value or the path, and the remedy.

    Raise it on every process alike, or inside `distributed.raise_everywhere`: else others wait.
    """


class Interrupted(Exception):
    """A signal asked the program to stop. Every process raises it at the same point."""
