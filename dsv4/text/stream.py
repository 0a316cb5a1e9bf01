"""Decoding token by token: only completed characters come out, and together they are the whole decoding.

A character may be split over several tokens (one emoji is four bytes). Byte-level vocabularies feed an
incremental UTF-8 decoder, which is exact. Others decode a token differently at the start of a text than
inside it, so a short window of earlier tokens is decoded along and the known part is cut off.
"""

import codecs

from dsv4.text.tokenizer import UNKNOWN, Tokenizer

BROKEN = UNKNOWN.decode()


class StreamDecoder:
    """push(id) after each token, flush() after the last; special tokens are skipped, as in decode."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._window: list[int] = []  # ids whose text is out already, then ids whose text is not
        self._told = 0  # how many ids of the window are out already

    def push(self, token_id: int) -> str:
        """The text that this token completes, "" when a character is still open."""
        if self._tokenizer.exact_bytes:
            table = self._tokenizer.token_table
            return self._utf8.decode(table[token_id] if 0 <= token_id < len(table) else UNKNOWN)
        self._window.append(token_id)
        text = self._fresh()
        if not text or text.endswith(BROKEN):
            return ""
        self._window, self._told = self._window[self._told :], len(self._window) - self._told
        return text

    def flush(self) -> str:
        """What is left, an open character as U+FFFD; the decoder is as new afterwards."""
        text = self._utf8.decode(b"", final=True) if self._tokenizer.exact_bytes else self._fresh()
        self._utf8.reset()
        self._window, self._told = [], 0
        return text

    def _fresh(self) -> str:
        """Text of the ids that are not out yet, decoded behind those that are."""
        known = self._tokenizer.decode(self._window[: self._told])
        return self._tokenizer.decode(self._window)[len(known) :]
