"""Messages -> the prompt that V4 was taught: its chat format, of both releases.

The rules are those of the released encoder, byte for byte. Where it would drop in silence what it was given, there
is a UserError instead (turns.py), with two exceptions in which more is said than it says: a user message's task
survives merging with the tool results before it, and arguments given as an object are the arguments.
What the model writes is read by parse.py; a Jinja template for programs that want one is template.jinja.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsv4.errors import UserError, shown
from dsv4.files import make_folder, write_text
from dsv4.text.dsml import BLANK_LINE, calls_pieces, response_format_pieces, tools_pieces
from dsv4.text.prompt import ASSISTANT, BEGIN, END, REMINDER, TASKS, THINK, THINK_END, USER, Piece, Prompt
from dsv4.text.turns import Turn, check_list, turns_of

# Interface data of the released encoder, as everything that a model was trained on.
ABSOLUTE_MAXIMUM = """Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, \
rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, \
and rejected hypothesis to ensure absolutely no assumption is left unchecked.

"""
BEYOND_MAXIMUM = """Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.
You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the \
problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying cause \
rather than any surface symptom.
Do not stop reasoning until you have independently verified the solution from multiple angles and are certain that \
no assumption remains unchecked and no error remains undiscovered.

"""

# edition -> effort -> what stands before everything. V4 of April 2026; its update of 31 July and what followed it.
EFFORTS = {
    "april": {None: "", "high": "", "max": ABSOLUTE_MAXIMUM},
    "0731": {None: "", "low": "", "high": ABSOLUTE_MAXIMUM, "max": BEYOND_MAXIMUM},
}


def render(
    messages: Sequence[Mapping[str, Any]],
    *,
    thinking: bool = False,
    drop_thinking: bool = True,
    effort: str | None = None,
    edition: str = "april",
    tools: Sequence[Mapping[str, Any]] | None = None,
    response_format: Any = None,
) -> Prompt:
    """The prompt of a conversation, up to where the model goes on.

    messages: objects with `role` and `content` (a text, or the usual list of text parts):
      system, developer       may have `tools` (as in the usual API) and a `response_format`, printed as given
      user                    neighbours are one turn, joined by a blank line
      assistant               also `reasoning_content` and `tool_calls`, whose arguments are the JSON of an object or
                              the object itself; `wo_eos` leaves the turn open, to be continued
      tool                    the result of a call, found by its `tool_call_id` where calls have ids
      latest_reminder         date, place and the like
    Any but a tool's result may have a `task` (a quick instruction): action, query, authority, domain, title, read_url.
    tools, response_format: put on the system message, which is added where there is none.
    thinking: the model reasons first. drop_thinking: reasoning before the last user or developer message is left
    out, and so are developer messages before it; never where there are tools. effort: as in EFFORTS, by edition;
    without thinking it says nothing.

    UserError for whatever this format cannot say. Source: the encoder released with the weights.
    """
    pieces = marked(messages, thinking, drop_thinking, effort, edition, tools, response_format)
    return Prompt.of(piece for piece, _ in pieces)


def marked(
    messages: Sequence[Mapping[str, Any]],
    thinking: bool = False,
    drop_thinking: bool = True,
    effort: str | None = None,
    edition: str = "april",
    tools: Sequence[Mapping[str, Any]] | None = None,
    response_format: Any = None,
) -> list[tuple[Piece, bool]]:
    """The pieces of `render`, each with whether the model is to have written it: what it learns to write.

    That is everything of an assistant's turn: its reasoning and the </think> after it, its text and calls, and the
    end of sentence. <｜Assistant｜> and the token after it are the prompt's. A turn whose reasoning is left out here is
    not to be learned: it answers <think>, and stands here behind </think>.
    """
    efforts = EFFORTS.get(edition)
    if efforts is None:
        raise UserError(f"there is no edition {shown(edition)} of the chat format; use one of {', '.join(EFFORTS)}")
    if effort not in efforts:
        known = ", ".join(str(name) for name in efforts)
        raise UserError(f"edition {edition!r} has no effort {shown(effort)}; use one of {known}")
    first = 1
    if tools or response_format:
        messages, first = _with_instructions(messages, tools, response_format)
    turns = turns_of(messages, first)
    drop = thinking and drop_thinking and not any(turn.tools for turn in turns)
    if drop:
        turns = _without_reasoning(turns)
    prefix = efforts[effort] if thinking else ""
    pieces = [(BEGIN, False), (prefix, False), *_conversation(turns, thinking, drop)]
    for piece, _ in pieces:
        if isinstance(piece, str) and not _is_unicode(piece):
            raise UserError("a message holds half of a surrogate pair, which is no character; remove it")
    return pieces


def chat_template() -> str:
    """The Jinja template for programs that want one: `render` over the variables messages, tools, thinking,
    drop_thinking, reasoning_effort, edition and response_format. Arguments of calls must be objects, as Jinja
    reads no JSON; it checks less, and what comes of it is one string, in which text can spell control tokens.
    """
    return Path(__file__).with_name("template.jinja").read_text(encoding="utf-8")


def write_chat_template(folder: str | Path) -> Path:
    """Writes folder/chat_template.jinja, where transformers and servers look for it, and returns its path."""
    path = Path(folder) / "chat_template.jinja"
    make_folder(path.parent)
    write_text(path, chat_template())
    return path


def _with_instructions(messages: Any, tools: Any, response_format: Any) -> tuple[list[Any], int]:
    """Messages whose first is a system message with these, and its number: 0 where it was added."""
    check_list(messages)
    added = not isinstance(messages[0], Mapping) or messages[0].get("role") != "system"
    system = {"role": "system", "content": ""} if added else dict(messages[0])
    for key, value in (("tools", tools), ("response_format", response_format)):
        if value and system.get(key):
            raise UserError(f"{key} are given twice, by the system message and beside the messages; give one")
        if value:
            system[key] = value
    return [system, *messages[0 if added else 1 :]], 0 if added else 1


def _without_reasoning(turns: list[Turn]) -> list[Turn]:
    last = _last_prompt(turns)
    kept = [turn for i, turn in enumerate(turns) if turn.role != "developer" or i >= last]
    last = _last_prompt(kept)
    return [replace(turn, reasoning="") if i < last else turn for i, turn in enumerate(kept)]


def _last_prompt(turns: list[Turn]) -> int:
    """Index of the last user or developer turn, -1 for none."""
    return max((i for i, turn in enumerate(turns) if turn.is_prompt), default=-1)


def _conversation(turns: list[Turn], thinking: bool, drop: bool) -> Iterator[tuple[Piece, bool]]:
    last = _last_prompt(turns)
    for i, turn in enumerate(turns):
        answers_task = i > 0 and turns[i - 1].task is not None  # which is answered without thinking
        reasons = thinking and not answers_task and (i > last or not drop)
        learned = turn.role == "assistant" and (i > last or not drop)
        yield from ((piece, learned) for piece in _turn(turn, reasons))
        if i + 1 == len(turns) or turns[i + 1].role in ("assistant", "latest_reminder"):
            yield from ((piece, False) for piece in _opening(turn, thinking and (i >= last or not drop), thinking))


def _turn(turn: Turn, reasons: bool) -> Iterator[Piece]:
    if turn.is_prompt:
        yield USER
    elif turn.role == "latest_reminder":
        yield REMINDER
    elif turn.role == "assistant" and reasons:
        yield turn.reasoning
        yield THINK_END
    yield turn.text
    if turn.tools:
        yield BLANK_LINE
        yield from tools_pieces(turn.tools)
    if turn.response_format:
        yield BLANK_LINE
        yield from response_format_pieces(turn.response_format)
    if turn.calls:
        yield from calls_pieces(turn.calls)
    if turn.role == "assistant" and turn.ends:
        yield END


def _opening(turn: Turn, thinks: bool, thinking: bool) -> Iterator[Piece]:
    """What follows a turn that is last or is answered: a task's token, or the beginning of the assistant's turn."""
    if turn.task == "action":
        yield from (ASSISTANT, THINK if thinking else THINK_END, TASKS["action"])
    elif turn.task:
        yield TASKS[turn.task]
    elif turn.is_prompt:
        yield from (ASSISTANT, THINK if thinks else THINK_END)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
