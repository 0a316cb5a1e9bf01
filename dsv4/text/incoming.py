"""What a model writes, piece by piece, as a string in which every control token is one character.

That character is half of a surrogate pair, which no text can hold, so a token and a text that spells it never meet.
From ids this is exact. From text, which is what other servers hand on, spellings are all there is to go by.
"""

import re
from collections.abc import Iterable

from dsv4.text.prompt import CONTROLS, DSML, END, THINK_END
from dsv4.text.stream import StreamDecoder
from dsv4.text.tokenizer import Tokenizer

_CHARACTERS = {control: chr(0xDC00 + i) for i, control in enumerate(CONTROLS)}
_OF_NAME = {control.name: character for control, character in _CHARACTERS.items()}
_NAME_OF = {ord(character): control.name for control, character in _CHARACTERS.items()}
ANY = re.compile(f"[{''.join(_CHARACTERS.values())}]")
MARK, STOP, THOUGHT = _CHARACTERS[DSML], _CHARACTERS[END], _CHARACTERS[THINK_END]

_SPELLED = re.compile("|".join(map(re.escape, _OF_NAME)))
_HALVES = re.compile("[\ud800-\udfff]")
# What a text may end in before a name of a token is complete: names, and the two tags that one is a part of.
_PREFIXES = {
    spelling[:n]
    for spelling in (*_OF_NAME, f"<{DSML.name}", f"</{DSML.name}")
    for n in range(1, len(spelling))
    if spelling[:n] not in _OF_NAME
}
_LONGEST = max(map(len, _PREFIXES))


def spelled(text: str) -> str:
    """The text with its control tokens by name."""
    return text.translate(_NAME_OF)


class SpelledText:
    """Text in which control tokens are spelled, cut anywhere: what may become one is kept back."""

    def __init__(self) -> None:
        self._kept = ""

    def push(self, text: str) -> str:
        text = _SPELLED.sub(
            lambda found: _OF_NAME[found[0]], self._kept + _HALVES.sub("\N{REPLACEMENT CHARACTER}", text)
        )
        longest = range(min(_LONGEST, len(text)), 0, -1)
        self._kept = next((text[-n:] for n in longest if text[-n:] in _PREFIXES), "")
        return text[: len(text) - len(self._kept)]

    def flush(self) -> tuple[str, str]:
        """What was kept back: as text, or as the half of a control token that it must be taken for."""
        kept, self._kept = self._kept, ""
        return ("", kept) if len(kept) > 1 else (kept, "")


class TokenText:
    """Ids of a vocabulary: a control token is its id, whatever texts spell."""

    def __init__(self, tokenizer: Tokenizer):
        known = ((tokenizer.token_id(control.name), character) for control, character in _CHARACTERS.items())
        self._controls = {i: character for i, character in known if i is not None}
        self._decoder = StreamDecoder(tokenizer)

    def push(self, ids: Iterable[int]) -> str:
        out = []
        for i in ids:
            if i in self._controls:
                out += [self._decoder.flush(), self._controls[i]]
            else:
                out.append(self._decoder.push(i))
        return "".join(out)

    def flush(self) -> tuple[str, str]:
        """The character that was still open, if any."""
        return self._decoder.flush(), ""
