"""From messages in the usual API's form to the turns of V4's chat format: checked, merged and put in order.

Tool results have no turn of their own: they and the user's messages beside them are one user turn, its parts joined
by a blank line, results in the order of the calls they answer. A conversation that the format cannot say without
losing something is a UserError that names the message.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dsv4.errors import UserError, nearest, shown
from dsv4.text.dsml import Call, check_call_name, parse_arguments
from dsv4.text.prompt import TASKS

_INSTRUCTIONS = {"content", "tools", "response_format", "task"}
# role -> what its messages may hold
KEYS = {
    "system": _INSTRUCTIONS,
    "developer": _INSTRUCTIONS,
    "user": {"content", "task"},
    "latest_reminder": {"content", "task"},
    "assistant": {"content", "reasoning_content", "tool_calls", "task", "wo_eos"},
    "tool": {"content", "tool_call_id"},
}
UNUSED = {"role", "name", "id", "mask"}  # known, and not said to the model


@dataclass(frozen=True)
class Part:
    """What one message gives to a user turn: its text, or the result of a call."""

    text: str
    is_result: bool = False
    call_id: str | None = None


@dataclass(frozen=True)
class Turn:
    """One turn. `parts` of a user turn are several where messages were merged, else one."""

    role: str
    parts: tuple[Part, ...]
    number: int  # of its first message, counted from 1, for error messages
    task: str | None = None
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    tools: tuple[Any, ...] = ()  # the schemas of functions
    response_format: Any = None
    ends: bool = True  # an assistant's turn that is to be continued does not

    @property
    def text(self) -> str:
        return "\n\n".join(f"<tool_result>{p.text}</tool_result>" if p.is_result else p.text for p in self.parts)

    @property
    def is_prompt(self) -> bool:
        """Whether the assistant answers it."""
        return self.role in ("user", "developer")


def turns_of(messages: Sequence[Mapping[str, Any]], first: int = 1) -> list[Turn]:
    """Turns of a conversation; UserError for one that is malformed. first: the number of the first message."""
    check_list(messages)
    turns: list[Turn] = []
    open_calls = _OpenCalls()
    for number, message in enumerate(messages, first):
        turn = _turn(number, message)
        if turn.role == "assistant":
            open_calls = _OpenCalls(turn)
        elif turn.parts[0].is_result:
            open_calls.answer(turn)
            turn = replace(turn, role="user")
        before = turns[-1] if turns else None
        if before and before.task and turn.role not in ("assistant", "latest_reminder"):
            raise UserError(
                f"message {number} (role {message['role']!r}) follows a message with the task {before.task!r}, which "
                "would be lost; let the assistant's answer follow that message, or leave its task out"
            )
        if before and before.role == turn.role == "user":
            turns[-1] = replace(before, parts=before.parts + turn.parts, task=turn.task)
        else:
            turns.append(turn)
    return _sorted(turns)


def check_list(messages: Any) -> None:
    """UserError for messages that are not a list with something in it."""
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise UserError(f"messages are {shown(messages)}; give a list of at least one message")


@dataclass
class _OpenCalls:
    """The calls that the latest assistant's turn made and no result has answered yet."""

    turn: Turn | None = None
    answered: list[str | None] = field(default_factory=list)

    def answer(self, turn: Turn) -> None:
        calls = self.turn.calls if self.turn else ()
        call_id = turn.parts[0].call_id
        where = f"message {turn.number} (role 'tool')"
        if len(self.answered) >= len(calls):
            raise UserError(
                f"{where} is the result of no call: the assistant's message before it makes "
                f"{len(calls) or 'no'} tool_calls; let each result follow the call it answers"
            )
        ids = [call.id for call in calls if call.id is not None]
        if ids and call_id not in ids:
            raise UserError(f"{where} answers {call_id!r}, which is none of the calls {ids}; correct its tool_call_id")
        if ids and call_id in self.answered:
            raise UserError(f"{where} answers the call {call_id!r} a second time; give each call one result")
        self.answered.append(call_id)


def _sorted(turns: Iterable[Turn]) -> list[Turn]:
    """Results in the order of their calls, in the places that results have among the parts of their turn."""
    order: dict[str | None, int] = {}
    result = []
    for turn in turns:
        if turn.calls:
            order = {call.id: i for i, call in enumerate(turn.calls) if call.id is not None}
        elif order and turn.role == "user":
            answers = iter(sorted((p for p in turn.parts if p.is_result), key=lambda p: order.get(p.call_id, 0)))
            turn = replace(turn, parts=tuple(next(answers) if p.is_result else p for p in turn.parts))
        result.append(turn)
    return result


def _turn(number: int, message: Mapping[str, Any]) -> Turn:
    if not isinstance(message, Mapping):
        raise UserError(f"message {number} is {shown(message)}; a message is an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in KEYS:
        known = ", ".join(KEYS)
        raise UserError(f"message {number} has the role {shown(role)}; use one of {known}{nearest(str(role), KEYS)}")
    where = f"message {number} (role {role!r})"
    for key, value in message.items():
        if key not in KEYS[role] | UNUSED and value not in (None, [], {}, "", False):
            owners = [r for r, keys in KEYS.items() if key in keys]
            remedy = f"only {', '.join(owners)} may" if owners else f"leave it out{nearest(str(key), KEYS[role])}"
            raise UserError(f"{where} has {key!r}, which would be lost; {remedy}")
    text = _text(message.get("content"), where)
    if role == "developer" and not text:
        raise UserError(f"{where} is empty; give it content, or leave it out")
    task = message.get("task")
    if task is not None and (not isinstance(task, str) or task not in TASKS):
        raise UserError(f"{where} has the task {shown(task)}; use one of {', '.join(TASKS)}")
    call_id = message.get("tool_call_id")
    if call_id is not None and not isinstance(call_id, str):
        raise UserError(f"{where} has the tool_call_id {shown(call_id)}; give the id of a call")
    reasoning = message.get("reasoning_content")
    if reasoning is not None and not isinstance(reasoning, str):
        raise UserError(f"{where} has the reasoning_content {shown(reasoning)}; give a text")
    return Turn(
        role=role,
        parts=(Part(text, role == "tool", call_id),),
        number=number,
        task=task,
        reasoning=reasoning or "",
        calls=_calls(message.get("tool_calls"), where),
        tools=_tools(message.get("tools"), where),
        response_format=message.get("response_format") or None,
        ends=not message.get("wo_eos"),
    )


def _text(content: Any, where: str) -> str:
    """Content as one text: a string, nothing, or the usual list of text parts, joined by blank lines."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, Sequence) else [content]
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise UserError(f"{where} has the content {shown(part)}, but this model reads text only; give a text")
    return "\n\n".join(part["text"] for part in parts)


def _calls(given: Any, where: str) -> tuple[Call, ...]:
    calls = []
    for i, call in enumerate(_listed(given, "tool_calls", where), 1):
        here = f"{where}, tool call {i}"
        function = _function(call, here, {"name", "arguments"}, {"id", "type", "index", "function"})
        call_id = call.get("id")
        if call_id is not None and not isinstance(call_id, str):
            raise UserError(f"{here} has the id {shown(call_id)}; give a text, or none")
        name = check_call_name(function.get("name"), here)
        calls.append(Call(name, parse_arguments(function.get("arguments"), here), call_id or None))
    ids = {call.id for call in calls if call.id}
    if ids and len(ids) < len(calls):
        raise UserError(f"{where} has tool_calls with the ids {[c.id for c in calls]}; give each its own, or none any")
    return tuple(calls)


def _tools(given: Any, where: str) -> tuple[Any, ...]:
    tools = []
    for i, tool in enumerate(_listed(given, "tools", where), 1):
        here = f"{where}, tool {i}"
        function = _function(tool, here, None, None)
        check_call_name(function.get("name"), here)
        tools.append(function)
    return tuple(tools)


def _listed(given: Any, key: str, where: str) -> Sequence[Any]:
    if given is None:
        return ()
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
        raise UserError(f"{where} has the {key} {shown(given)}; give a list")
    return given


def _function(given: Any, where: str, keys: set[str] | None, outer: set[str] | None) -> Mapping[str, Any]:
    """The function of a tool or of a call, which may hold `keys` only."""
    if not isinstance(given, Mapping) or not isinstance(function := given.get("function"), Mapping):
        raise UserError(f'{where} is {shown(given)}; give {{"type": "function", "function": {{...}}}}')
    if given.get("type", "function") != "function":
        raise UserError(f"{where} has the type {shown(given['type'])}; only functions can be called")
    for found, known in ((given, outer), (function, keys)):
        unknown = sorted(map(str, set(found) - known)) if known else []
        if unknown:
            raise UserError(f"{where} has {unknown[0]!r}, which would be lost; leave it out")
    return function
