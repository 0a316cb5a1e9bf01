"""What a prompt of the chat format is made of: control tokens by name, and plain text between them.

Text becomes ids apart from the control tokens, with no token but those of ordinary text allowed, so nothing that
somebody wrote can become a control token, however it is spelled.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dsv4.errors import UserError
from dsv4.text.tokenizer import BOS, EOS, Tokenizer


@dataclass(frozen=True, slots=True)
class Control:
    """A token of the format itself, by the name that the vocabulary gives it."""

    name: str


Piece = Control | str

BEGIN, END = Control(BOS), Control(EOS)
USER, ASSISTANT = Control("<｜User｜>"), Control("<｜Assistant｜>")
REMINDER = Control("<｜latest_reminder｜>")
THINK, THINK_END = Control("<think>"), Control("</think>")
DSML = Control("｜DSML｜")
TASKS = {name: Control(f"<｜{name}｜>") for name in ("action", "query", "authority", "domain", "title", "read_url")}

CONTROLS = (BEGIN, END, USER, ASSISTANT, REMINDER, THINK, THINK_END, DSML, *TASKS.values())
# Fill in the middle, no part of a prompt: begin, hole and end stand before the prefix, the suffix and the middle.
FIM_BEGIN, FIM_HOLE, FIM_END = FIM = tuple(Control(f"<｜fim▁{part}｜>") for part in ("begin", "hole", "end"))


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation. Two texts never stand side by side in `pieces`: what is joined is tokenised as one."""

    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> "Prompt":
        """Neighbouring texts become one, empty ones none."""
        return cls(tuple(_joined(pieces)))

    @property
    def text(self) -> str:
        """The prompt as one string, control tokens by name. Here, and only here, a text may look like one."""
        return "".join(piece.name if isinstance(piece, Control) else piece for piece in self.pieces)

    @property
    def opens_thinking(self) -> bool:
        """Whether what the model writes next is reasoning: what `ChatParser` wants to know."""
        return bool(self.pieces) and self.pieces[-1] == THINK

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """Ids of the whole prompt; no id of a control token but those of `pieces`.

        UserError for a tokenizer that has not all the control tokens of the prompt, or that lets text become one.
        """
        texts = iter(tokenizer.encode_batch([piece for piece in self.pieces if isinstance(piece, str)]))
        reserved = set(tokenizer.markers.values())
        ids: list[int] = []
        for piece in self.pieces:
            if isinstance(piece, Control):
                ids.append(control_id(tokenizer, piece))
                continue
            found = next(texts)
            if not reserved.isdisjoint(found):
                raise UserError(
                    f"this tokenizer makes a control token of the text {piece[:40]!r}, which would let any text "
                    "command the model; take the model's own tokenizer.json"
                )
            ids += found
        return ids


def control_id(tokenizer: Tokenizer, control: Control) -> int:
    """Id of a control token; UserError for a vocabulary without it."""
    found = tokenizer.token_id(control.name)
    if found is None:
        raise UserError(
            f"this tokenizer has no token {control.name}, which the chat format needs; "
            "take the tokenizer.json of DeepSeek-V4, or give the model plain text"
        )
    return found


def _joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    text: list[str] = []
    for piece in pieces:
        if isinstance(piece, str):
            text.append(piece)
            continue
        if any(text):
            yield "".join(text)
        text.clear()
        yield piece
    if any(text):
        yield "".join(text)
