"""Tokenizers for processes that tokenise: here, so that a process need not import a whole test file for them."""

import os
import signal
from collections.abc import Sequence

from dsv4.errors import UserError
from dsv4.text import ByteTokenizer


class Killer(ByteTokenizer):
    """Ends the process that tokenises."""

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        os.kill(os.getpid(), signal.SIGKILL)
        return []


class Refuser(ByteTokenizer):
    """Cannot use any text."""

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        raise UserError(f"cannot use {texts[0]}")
