"""Command lines: mistakes as one sentence, number types with limits, help in 80 columns."""

import argparse
import contextlib
import os

import odc
from odc.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse with help in 80 columns, defaults shown, `--version`, and UserError for mistakes."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=_Formatter, allow_abbrev=False,
                         add_help=False)

    def parse_args(self, arguments=None, namespace=None):
        group = self.add_argument_group("about")
        group.add_argument("-h", "--help", action="help", help="show this and exit")
        group.add_argument("--version", action="version", version=f"odc {odc.__version__}")
        return super().parse_args(arguments, namespace)

    def error(self, message):
        message = message.removeprefix("argument ")
        raise UserError(message[:1].upper() + message[1:].rstrip(".") + " (see --help).")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=30, width=80)

    def _get_help_string(self, action):
        # "(default: None)" and "(default: False)" tell a reader nothing.
        if action.default is None or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)


def path(text):
    """An argparse type: a path, absolute and without ~. The words shapes and random stay words."""
    return text if text in ("shapes", "random") else os.path.abspath(os.path.expanduser(text))


def whole(minimum, maximum=2**31 - 1):
    """An argparse type: an int from minimum to maximum."""
    return _type(int, lambda x: minimum <= x <= maximum,
                 f"a whole number from {minimum} to {maximum}")


def number(minimum, maximum=1e9, above=False):
    """An argparse type: a finite float from minimum to maximum; above excludes the minimum."""
    least = f"above {minimum:g}" if above else f"from {minimum:g}"
    return _type(float, lambda x: minimum <= x <= maximum and (x > minimum or not above),
                 f"a number {least} to {maximum:g}")


def _type(kind, is_allowed, what):
    def parse(text):
        with contextlib.suppress(ValueError):
            if is_allowed(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")

    return parse


def check_output(option, file, start, inputs=()):
    """Raise UserError for an output file that could not be written after the work, or that is not
    this program's to overwrite.

    start: bytes with which this output begins. A file that is there must be empty or begin alike,
    and must not be one of the inputs.
    """
    problem, real = None, os.path.realpath(file)
    if not os.access(os.path.dirname(real), os.W_OK):
        problem = "its folder is missing or not writable"
    elif os.path.exists(file) and not os.path.isfile(file):
        problem = "it is no file"
    elif os.path.exists(file):
        with open(file, "rb") as there:
            if there.read(len(start)) not in (b"", start):
                problem = "this file is not a result of this program, and would be overwritten"
    if real in map(os.path.realpath, inputs):
        problem = "it is read, or written by another argument"
    if problem:
        raise UserError(f"{option} {file}: {problem}; choose another name.")
