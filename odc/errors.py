"""The two exceptions that end a program without a traceback."""


class UserError(Exception):
    """A mistake that the person at the keyboard can mend.

    The message is one sentence that names the value or the path, and the remedy. Raise it on every
    process alike, or inside `distributed.raise_everywhere`, so that no process waits for another.
    """


class Interrupted(Exception):
    """A signal asked the program to stop. Every process raises it at the same point."""
