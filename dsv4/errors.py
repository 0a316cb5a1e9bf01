"""The exceptions that mean "the user can mend this", and what their sentences are made with."""

import difflib
from collections.abc import Iterable
from reprlib import Repr
from typing import Any


class UserError(ValueError):
    """Wrong use: its message is one sentence naming the value, the rule and the remedy.

    The command line prints the message alone and exits with `exit_code`; anything else is a failure of ours.
    """

    exit_code = 2


class FileError(UserError):
    """The machine said no to a file operation (disk full, read-only, deleted meanwhile): path, reason, remedy."""

    exit_code = 1


def nearest(given: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: "; did you mean 'x'?", or nothing when no known name is like it."""
    match = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def shown(value: Any) -> str:
    """A value of unknown size and depth for a message: its repr, cut."""
    short = Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    return short.repr(value)
