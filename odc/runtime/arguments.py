"""Command lines: mistakes as one sentence, number types with limits, help in 80 columns."""

import argparse
import contextlib
import os

import odc
from odc.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse with help in 80 columns, defaults shown, `--version`, and UserError for mistakes."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False, formatter_class=(
            lambda prog: _Formatter(prog, max_help_position=30, width=80)))
        self.add_argument("--version", action="version", version=f"odc {odc.__version__}")

    def error(self, message):
        message = message.removeprefix("argument ")
        raise UserError(message[:1].upper() + message[1:].rstrip(".") + " (see --help).")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        shown = action.default is not None and not isinstance(action.default, bool)
        return super()._get_help_string(action) if shown else action.help


def path(text):
    """An argparse type: a path, absolute and without ~. The words shapes and random stay words."""
    if not text:  # a variable of a script that is not set; it would mean the current folder
        raise argparse.ArgumentTypeError("an empty text is no path")
    return text if text in ("shapes", "random") else os.path.abspath(os.path.expanduser(text))


def whole(minimum, maximum=2**31 - 1):
    """An argparse type: an int from minimum to maximum."""
    return number(minimum, maximum, kind=int)


def number(minimum, maximum=1e9, above=False, kind=float):
    """An argparse type: a finite number from minimum to maximum; above excludes the minimum."""
    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if minimum <= value <= maximum and (value > minimum or not above):
                return value
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what} {'above' if above else 'from'} "
                                         f"{minimum:g} to {maximum:,.10g}")
    return parse


def check_output(option, file, start, taken=()):
    """Raise UserError for an output file that cannot be written, or is not ours to overwrite.

    start: bytes with which this output begins. A file that is there must be empty or begin alike,
    and must not be one of those that are taken.
    """
    problem = None
    if os.path.realpath(file) in map(os.path.realpath, taken):
        problem = "it is read, or written by a run or another argument"
    elif not os.access(os.path.dirname(os.path.abspath(file)), os.W_OK):  # a link is replaced
        problem = "its folder is missing or not writable"
    elif os.path.isfile(file):
        with open(file, "rb") as there:
            if there.read(len(start)) not in (b"", start):
                problem = "this file is not a result of this program, and would be overwritten"
    elif os.path.exists(file):
        problem = "it is no file"
    if problem:
        raise UserError(f"{option} {file}: {problem}; choose another name.")
