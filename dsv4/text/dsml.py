"""DSML, in which V4 writes tool calls: a block of invocations, each with its parameters as text or as JSON.

    <｜DSML｜tool_calls>
    <｜DSML｜invoke name="weather">
    <｜DSML｜parameter name="city" string="true">Bergen</｜DSML｜parameter>
    <｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜tool_calls>

A block stands behind a blank line. ｜DSML｜ is one control token, so a value may hold any text, this markup included.
The fixed texts are interface data of the released encoder, which models were trained on: not a letter may change.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from dsv4.errors import UserError, shown
from dsv4.text.prompt import CONTROLS, Piece

BLANK_LINE = "\n\n"

TOOLS = """## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, \
objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> \
BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""
TOOLS_END = """

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""
RESPONSE_FORMAT = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"

LONGEST_NAME = 4096  # characters; a longer one is no name to a parser that reads a stream
_PARAMETER_NAME_END = re.compile(r'" string="(?:true|false)">')  # a name that holds it would end there

_NAMES = {control.name: control for control in CONTROLS}
_MARKUP = re.compile(f"({'|'.join(map(re.escape, _NAMES))})")


@dataclass(frozen=True)
class Call:
    """A tool call: arguments by name, in the order given. `id` is the caller's, and no part of the format."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


def tools_pieces(schemas: Iterable[Any]) -> Iterator[Piece]:
    """How to call tools, and their schemas, one JSON object a line."""
    yield from _markup(TOOLS)
    yield "\n".join(to_json(schema, "the schema of a tool") for schema in schemas)
    yield TOOLS_END


def response_format_pieces(schema: Any) -> Iterator[Piece]:
    """The schema that replies must follow."""
    yield RESPONSE_FORMAT + to_json(schema, "response_format")


def calls_pieces(calls: Iterable[Call]) -> Iterator[Piece]:
    """A block of calls, the blank line before it included."""
    yield from _markup(BLANK_LINE + "<｜DSML｜tool_calls>\n")
    for call in calls:
        yield from _markup("<｜DSML｜invoke name=")
        yield f'"{call.name}">\n'
        for i, (name, value) in enumerate(call.arguments.items()):
            yield from _markup("\n<｜DSML｜parameter name=" if i else "<｜DSML｜parameter name=")
            is_text = isinstance(value, str)
            yield f'"{name}" string="{"true" if is_text else "false"}">'
            yield value if is_text else to_json(value, f"the argument {name!r}")
            yield from _markup("</｜DSML｜parameter>")
        yield from _markup("\n</｜DSML｜invoke>\n")
    yield from _markup("</｜DSML｜tool_calls>")


def parse_arguments(given: Any, where: str) -> dict[str, Any]:
    """Arguments of a call: a string with a JSON object, as the usual API has it, or that object itself.

    The released encoder takes an object, and a string that is no JSON object, for one parameter called `arguments`,
    which teaches the model that tools are called so. Here an object is the arguments, and anything else a UserError.
    """
    arguments = given
    if isinstance(given, str):
        try:
            arguments = json.loads(given, object_pairs_hook=_once, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{where}: its arguments {shown(given)} are not the JSON of an object ({error}); "
                "give an object, {} for no arguments"
            ) from None
    if not isinstance(arguments, dict):
        raise UserError(f"{where}: its arguments are {shown(given)}; give a JSON object, {{}} for no arguments")
    for name in arguments:
        if not isinstance(name, str) or len(name) > LONGEST_NAME or _PARAMETER_NAME_END.search(name):
            raise UserError(f"{where}: {shown(name)} cannot be an argument's name in DSML; rename it")
    return arguments


def check_call_name(name: Any, where: str) -> str:
    """The name of a tool; UserError for none, and for one too long."""
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME:
        raise UserError(f"{where}: {shown(name)} cannot be the name of a tool; give a plain word")
    return name


def is_json(text: str) -> bool:
    """Whether a parameter's text is one JSON value. Numbers stay text here: their size is nobody's business."""
    try:
        json.loads(text, object_pairs_hook=_once, parse_int=str, parse_float=str, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return False
    return True


def to_json(value: Any, what: str) -> str:
    """JSON as the released encoder prints it: ", " and ": " between, every character as it is."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{what} is {shown(value)}, which JSON cannot say ({error}); give plain values") from None


def _markup(text: str) -> Iterator[Piece]:
    """A fixed text of ours, in which the names of control tokens are these tokens."""
    for part in _MARKUP.split(text):
        yield _NAMES.get(part, part)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
