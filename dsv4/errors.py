"""The one exception that means "the user can mend this", and what its sentences are made with."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong use: its message is one sentence naming the value, the rule and the remedy.

    The command line prints the message alone and exits with code 2; anything else is a failure of ours.
    """


def nearest(given: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: "; did you mean 'x'?", or nothing when no known name is like it."""
    match = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
