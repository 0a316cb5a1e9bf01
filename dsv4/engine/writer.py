"""Tokens in, text out: whole characters only, nothing of a stop string, nothing that may yet become one."""

from collections.abc import Sequence

from dsv4.text import StreamDecoder, Tokenizer


class TextWriter:
    """The text of one request as it grows. What comes out does not depend on how tokens cut the text."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.decoder = StreamDecoder(tokenizer)
        self.stop = stop
        self.stopped = False  # a stop string was found: the text is complete
        self._held = ""  # the longest end of the text that a stop string begins with

    def push(self, token: int) -> str:
        """The text that this token lets out, often "" while a character or a possible stop string is open."""
        return self._let_out(self.decoder.push(token))

    def flush(self) -> str:
        """No more tokens: what was held back is text after all."""
        text = self._let_out(self.decoder.flush()) + self._held
        self._held = ""
        return text

    def _let_out(self, text: str) -> str:
        text = self._held + text
        # The first to be complete counts, as if the text had come character by character.
        found = min(((at + len(s), at) for s in self.stop if (at := text.find(s)) >= 0), default=None)
        if found:
            self.stopped, self._held = True, ""
            return text[: found[1]]
        safe = len(text) - max((_overlap(text, s) for s in self.stop), default=0)
        self._held = text[safe:]
        return text[:safe]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with (and is longer than)."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
