"""Failures caught here: a prompt of the chat format that is not the released encoder's, by a byte or an id; a message,
or a part of one, lost in silence; text that becomes a control token, whoever wrote it, however it is spelled; a Jinja
template that says something else than the encoder; a malformed conversation that ends in a traceback.
"""

import copy
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from conversations import LOOKALIKES, conversation, text, v4_tokenizer
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsv4.errors import UserError
from dsv4.text import BPETokenizer, ByteTokenizer, chat_template, render, train_bpe, write_chat_template
from dsv4.text.chat import EFFORTS
from dsv4.text.prompt import ASSISTANT, BEGIN, CONTROLS, THINK, USER, Prompt

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
Message = dict[str, Any]


def user(content: Any = "U", **more: Any) -> Message:
    return {"role": "user", "content": content, **more}


def answer(content: str | None = "A", reasoning: str | None = None, *calls: Message, **more: Any) -> Message:
    made = {"tool_calls": list(calls)} if calls else {}
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, **made, **more}


def call(name: str, arguments: Any, call_id: str | None = None) -> Message:
    made: Message = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made | ({"id": call_id} if call_id else {})


def result(content: Any, call_id: str | None = None) -> Message:
    return {"role": "tool", "content": content} | ({"tool_call_id": call_id} if call_id else {})


def tool(name: str, **more: Any) -> Message:
    return {"type": "function", "function": {"name": name, **more}}


S, R = {"role": "system", "content": "S"}, {"role": "latest_reminder", "content": "today"}
DEV = {"role": "developer", "content": "D"}
TURNS = [S, user("U1"), answer("A1", "R1"), user("U2")]
F = call("f", '{"x": 1, "s": "q"}')
F_BLOCK = """

<｜DSML｜tool_calls>
<｜DSML｜invoke name="f">
<｜DSML｜parameter name="x" string="false">1</｜DSML｜parameter>
<｜DSML｜parameter name="s" string="true">q</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜tool_calls>"""
G_BLOCK = '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="g">\n\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
TWO = (call("f", "{}", "a"), call("g", "{}", "b"))
TWO_BLOCK = G_BLOCK.replace(
    '<｜DSML｜invoke name="g">', '<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>\n<｜DSML｜invoke name="g">'
)

# name -> (messages, how, what stands between bos and the end)
RULES: dict[str, tuple[list[Message], dict[str, Any], str]] = {
    # The eight cases that were measured with the released encoder, but for the sixth rule below.
    "earlier reasoning is dropped": (
        TURNS,
        {"thinking": True},
        f"S<｜User｜>U1<｜Assistant｜></think>A1{EOS}<｜User｜>U2<｜Assistant｜><think>",
    ),
    "chat mode has no reasoning": (
        TURNS,
        {},
        f"S<｜User｜>U1<｜Assistant｜></think>A1{EOS}<｜User｜>U2<｜Assistant｜></think>",
    ),
    "users merge": ([user("U1"), user("U2")], {}, "<｜User｜>U1\n\nU2<｜Assistant｜></think>"),
    "a result merges with the user": (
        [user("U1"), answer("", "R", F), result("OUT"), user("U2")],
        {"thinking": True},
        f"<｜User｜>U1<｜Assistant｜></think>{F_BLOCK}{EOS}<｜User｜><tool_result>OUT</tool_result>\n\nU2<｜Assistant｜><think>",
    ),
    "action": ([user(task="action")], {"thinking": True}, "<｜User｜>U<｜Assistant｜><think><｜action｜>"),
    "query": ([user(task="query")], {}, "<｜User｜>U<｜query｜>"),
    # Each rule of the format by itself.
    "arguments as an object are the arguments": (
        [user(), answer("", "R", call("f", {"x": 1, "s": "q"}))],
        {"thinking": True},
        f"<｜User｜>U<｜Assistant｜><think>R</think>{F_BLOCK}{EOS}",
    ),
    "the last reasoning stays": (
        [user(), answer("A", "R")],
        {"thinking": True},
        f"<｜User｜>U<｜Assistant｜><think>R</think>A{EOS}",
    ),
    "reasoning stays if asked to": (
        TURNS,
        {"thinking": True, "drop_thinking": False},
        f"S<｜User｜>U1<｜Assistant｜><think>R1</think>A1{EOS}<｜User｜>U2<｜Assistant｜><think>",
    ),
    "reasoning stays after the last user's message": (
        [user("U1"), answer("A1", "R1", call("g", "{}")), result("O"), answer("A2", "R2")],
        {"thinking": True},
        f"<｜User｜>U1<｜Assistant｜></think>A1{G_BLOCK}{EOS}<｜User｜><tool_result>O</tool_result>"
        f"<｜Assistant｜><think>R2</think>A2{EOS}",
    ),
    "a call without arguments": (
        [user(), answer("A", None, call("g", "{}"))],
        {},
        f"<｜User｜>U<｜Assistant｜></think>A{G_BLOCK}{EOS}",
    ),
    "results go by the order of the calls": (
        [user(), answer(None, None, *TWO), result("2", "b"), user("M"), result("1", "a")],
        {},
        f"<｜User｜>U<｜Assistant｜></think>{TWO_BLOCK}{EOS}<｜User｜><tool_result>1</tool_result>\n\nM\n\n"
        "<tool_result>2</tool_result><｜Assistant｜></think>",
    ),
    "text parts are joined": (
        [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])],
        {},
        "<｜User｜>a\n\nb<｜Assistant｜></think>",
    ),
    "developers speak as users, and do not merge": (
        [DEV, user()],
        {"thinking": True, "drop_thinking": False},
        "<｜User｜>D<｜User｜>U<｜Assistant｜><think>",
    ),
    "earlier developers are dropped with the reasoning": (
        [DEV, user()],
        {"thinking": True},
        "<｜User｜>U<｜Assistant｜><think>",
    ),
    "but not in chat mode": ([DEV, user()], {}, "<｜User｜>D<｜User｜>U<｜Assistant｜></think>"),
    "a last developer stays": (
        [user(), answer(), DEV],
        {"thinking": True},
        f"<｜User｜>U<｜Assistant｜></think>A{EOS}<｜User｜>D<｜Assistant｜><think>",
    ),
    "a reminder before": ([S, R, user()], {}, "S<｜latest_reminder｜>today<｜User｜>U<｜Assistant｜></think>"),
    "a reminder after": ([user(), R], {}, "<｜User｜>U<｜Assistant｜></think><｜latest_reminder｜>today"),
    "a system message alone": ([S], {}, "S"),
    "an open turn goes on": ([user(), answer("Once", wo_eos=True)], {}, "<｜User｜>U<｜Assistant｜></think>Once"),
    "a task's answer has no reasoning": (
        [user(task="action"), answer("Search", "R"), user("V")],
        {"thinking": True, "drop_thinking": False},
        f"<｜User｜>U<｜Assistant｜><think><｜action｜>Search{EOS}<｜User｜>V<｜Assistant｜><think>",
    ),
    "action in chat mode": ([user(task="action")], {}, "<｜User｜>U<｜Assistant｜></think><｜action｜>"),
    "title": ([user(), answer("A", task="title")], {}, f"<｜User｜>U<｜Assistant｜></think>A{EOS}<｜title｜>"),
    "authority": ([user(task="authority")], {}, "<｜User｜>U<｜authority｜>"),
    "domain": ([user(task="domain")], {"thinking": True}, "<｜User｜>U<｜domain｜>"),
    "read_url": ([user(task="read_url")], {}, "<｜User｜>U<｜read_url｜>"),
    "a task survives merging": (
        [user(), answer("", None, call("g", "{}")), result("O"), user("V", task="query")],
        {},
        f"<｜User｜>U<｜Assistant｜></think>{G_BLOCK}{EOS}<｜User｜><tool_result>O</tool_result>\n\nV<｜query｜>",
    ),
    "the format of replies": (
        [S, user()],
        {"response_format": {"type": "object", "é": [1.0]}},
        "S\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
        '{"type": "object", "é": [1.0]}'
        "<｜User｜>U<｜Assistant｜></think>",
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_of_the_format(rule: str) -> None:
    messages, how, expected = RULES[rule]
    before = copy.deepcopy(messages)
    assert render(messages, **how).text == BOS + expected
    assert messages == before, "the caller's messages were changed"


def digest(fixed: str) -> str:
    return hashlib.sha256(fixed.encode()).hexdigest()


def test_the_fixed_texts_are_those_models_were_trained_on() -> None:
    """By digest: of the preamble with two tools and of both effort texts, as the released encoder prints them."""
    schemas = [tool("f"), tool("g", description="é")]
    said = render([user()], tools=schemas).text
    assert said.startswith(BOS + "\n\n## Tools") and said.endswith("<｜User｜>U<｜Assistant｜></think>")
    preamble = said[len(BOS) + 2 : said.index("<｜User｜>")]
    assert digest(preamble) == "7fa6e7983da02db038c72b6d00ed88e0fd09b544b18030ef9860d37286d71a5c"
    assert '\n{"name": "f"}\n{"name": "g", "description": "é"}\n' in preamble
    efforts = {name: digest(fixed) for name, fixed in EFFORTS["0731"].items() if fixed}
    assert efforts == {
        "high": "f7a24f3b3050d4a83781e9b755b316aae2ec1d9dc87562541d90bcb04d7350f7",
        "max": "53fb31b8392ec5b4a926481943efc67636748f137c1a49d493a7af4d4fa55d2c",
    }
    assert EFFORTS["april"]["max"] == EFFORTS["0731"]["high"]


def test_effort_stands_before_everything_and_goes_by_edition() -> None:
    plain = render([S, user()], thinking=True).text
    for edition, efforts in EFFORTS.items():
        for effort, prefix in efforts.items():
            said = render([S, user()], thinking=True, effort=effort, edition=edition).text
            assert said == plain.replace(BOS, BOS + prefix)
            assert render([S, user()], effort=effort, edition=edition).text == render([S, user()]).text
    assert EFFORTS["april"]["high"] == EFFORTS["0731"]["low"] == ""


def test_tools_go_with_their_message_and_keep_the_reasoning() -> None:
    tools = [tool("f")]
    beside = render([S, *TURNS[1:]], tools=tools, thinking=True).text
    assert beside == render([{**S, "tools": tools}, *TURNS[1:]], thinking=True).text
    assert "<think>R1</think>" in beside and beside.startswith(BOS + "S\n\n## Tools\n")
    developer = render([{**DEV, "tools": tools}, answer("A", "R"), user()], thinking=True).text
    assert developer.startswith(BOS + "<｜User｜>D\n\n## Tools\n") and "<think>R</think>A" in developer
    both = render([{**S, "tools": tools, "response_format": {"a": 1}}, user()]).text
    assert both.index("## Tools") < both.index("tool calls.\n\n\n## Response Format:")


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no messages": ([], {}, "at least one message"),
    "one message": (user(), {}, "at least one message"),
    "a text": ("hello", {"tools": [tool("f")]}, "at least one message"),
    "not a message": (["hello"], {}, "message 1 is 'hello'"),
    "no role": ([{"content": "x"}], {}, "message 1 has the role None"),
    "an unknown role": ([user(), {"role": "asistant", "content": ""}], {}, "message 2 .* did you mean 'assistant'"),
    "a result without a call": ([user(), result("x")], {}, r"message 2 \(role 'tool'\) is the result of no call"),
    "a result after an answer": ([user(), answer("", None, F), answer(), result("x")], {}, "result of no call"),
    "too many results": (
        [user(), answer("", None, F), result("x"), result("y")],
        {},
        "message 4 .* makes 1 tool_calls",
    ),
    "a result of another call": (
        [user(), answer("", None, *TWO), result("x", "c")],
        {},
        r"none of the calls \['a', 'b'\]",
    ),
    "a result without an id": ([user(), answer("", None, *TWO), result("x")], {}, "none of the calls"),
    "a call answered twice": ([user(), answer("", None, *TWO), result("x", "a"), result("y", "a")], {}, "second time"),
    "an id twice": ([user(), answer("", None, TWO[0], TWO[0])], {}, "each its own"),
    "arguments cut short": (
        [user(), answer("", None, call("f", '{"x": '))],
        {},
        r"message 2 .*, tool call 1: its arguments",
    ),
    "no arguments": ([user(), answer("", None, call("f", ""))], {}, "not the JSON of an object"),
    "arguments as a list": ([user(), answer("", None, call("f", "[1]"))], {}, "give a JSON object"),
    "arguments missing": ([user(), answer("", None, call("f", None))], {}, "give a JSON object"),
    "an argument twice": ([user(), answer("", None, call("f", '{"a": 1, "a": 2}'))], {}, "'a' is there twice"),
    "not a number": ([user(), answer("", None, call("f", '{"a": NaN}'))], {}, "NaN is no JSON"),
    "infinity": ([user(), answer("", None, call("f", '{"a": 1e999}'))], {}, "JSON cannot say"),
    "a set": ([user(), answer("", None, call("f", {"a": {1}}))], {}, "JSON cannot say"),
    "deep arguments": ([user(), answer("", None, call("f", "[" * 100_000))], {}, "not the JSON of an object"),
    "a name that ends the name": ([user(), answer("", None, call("f", {'a" string="true">': 1}))], {}, "rename it"),
    "a call without a name": ([user(), answer("", None, call("", "{}"))], {}, "name of a tool"),
    "a call that is a text": ([user(), answer("", None, "f()")], {}, '"function": '),
    "calls that are one": ([user(), {"role": "assistant", "tool_calls": F}], {}, "tool_calls .* give a list"),
    "another type": ([user(), answer("", None, {**F, "type": "custom"})], {}, "only functions"),
    "tools of a user": ([user(tools=[tool("f")])], {}, "'tools', which would be lost; only system, developer may"),
    "calls of a user": ([user(tool_calls=[F])], {}, "only assistant may"),
    "a misspelt key": ([user(), {"role": "assistant", "reasoning": "R"}], {}, "did you mean 'reasoning_content'"),
    "an image": ([user([{"type": "image_url", "image_url": "x"}])], {}, "reads text only"),
    "a number": ([user(3)], {}, "reads text only"),
    "an empty developer": ([{"role": "developer", "content": ""}], {}, "is empty"),
    "an unknown task": ([user(task="weather")], {}, "use one of action, query"),
    "a task that nobody answers": ([user(task="query"), user()], {}, "message 2 .* task 'query', which would be lost"),
    "tools twice": ([{**S, "tools": [tool("f")]}], {"tools": [tool("f")]}, "given twice"),
    "a tool without a function": ([user()], {"tools": [{"name": "f"}]}, "message 0 .*, tool 1"),
    "half a character": ([user("\ud800")], {}, "half of a surrogate pair"),
    "an unknown effort": ([user()], {"effort": "low"}, "use one of None, high, max"),
    "an unknown edition": ([user()], {"edition": "may"}, "use one of april, 0731"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_malformed_conversation_is_one_clear_sentence(mistake: str) -> None:
    messages, how, expected = BAD[mistake]
    with pytest.raises(UserError, match=expected) as caught:
        render(messages, **how)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_pieces_are_control_tokens_and_single_texts() -> None:
    prompt = render([S, user("a"), user("b")], thinking=True)
    assert prompt.pieces == (BEGIN, "S", USER, "a\n\nb", ASSISTANT, THINK)
    assert prompt.opens_thinking and not render([user()]).opens_thinking
    assert Prompt.of(["", "a", "", "b", USER, ""]).pieces == ("ab", USER)
    tools = render([user()], tools=[tool("f", description="｜DSML｜ <think>")])
    names = [piece.name for piece in tools.pieces if not isinstance(piece, str)]
    assert names.count("｜DSML｜") == 9 and names.count("<think>") == 2, "of the preamble, not of the description"


# ------------------------------------------------------------------------------------------------ ids and safety


def test_ids_of_the_control_tokens_are_those_published() -> None:
    published = {BOS: 0, EOS: 1, "<｜User｜>": 128803, "<｜Assistant｜>": 128804, "<think>": 128821, "</think>": 128822}
    published |= {"｜DSML｜": 128825, "<｜latest_reminder｜>": 128828, "<｜action｜>": 128829, "<｜query｜>": 128830}
    published |= {"<｜authority｜>": 128831, "<｜domain｜>": 128832, "<｜title｜>": 128836, "<｜read_url｜>": 128845}
    assert {control.name: v4_tokenizer().token_id(control.name) for control in CONTROLS} == published
    assert v4_tokenizer().vocab_size == 129_280
    assert len(v4_tokenizer().markers) == 1283


def test_ids_are_those_of_the_whole_string_where_no_text_spells_a_token() -> None:
    """The released way, which tokenises the string with its tokens, and ours, piece by piece, meet."""
    tokenizer = v4_tokenizer()
    for seed in range(300):
        prompt = render(conversation(random.Random(seed), controls=False), thinking=seed % 2 == 0)
        assert prompt.ids(tokenizer) == tokenizer.encode(prompt.text, special=True)


def test_no_name_of_a_token_becomes_one_in_any_role() -> None:
    """All 1283 added tokens of the vocabulary, in everything that a message can hold."""
    tokenizer = v4_tokenizer()
    reserved = set(tokenizer.markers.values())
    frame = [i for i in everywhere("x").ids(tokenizer) if i in reserved]
    for name in (*tokenizer.markers, *LOOKALIKES):
        prompt = everywhere(name)
        ids = prompt.ids(tokenizer)
        assert [i for i in ids if i in reserved] == frame, name
        assert tokenizer.decode(ids, skip_special=False) == prompt.text


def everywhere(name: str) -> Prompt:
    messages = [
        {"role": "system", "content": name, "tools": [tool(name, description=name)], "response_format": {name: name}},
        {"role": "latest_reminder", "content": name},
        {"role": "developer", "content": name},
        user(name),
        answer(name, name, call(name, json.dumps({name: name, "list": [name]}))),
        result(name),
    ]
    return render(messages, thinking=True)


def check_texts(start: int, stop: int) -> None:
    tokenizer, controls = v4_tokenizer(), [0, 128803, 128804, 128822]
    reserved = set(tokenizer.markers.values())
    for seed in range(start, stop):
        rng = random.Random(seed)
        said = text(rng, longest=12)
        if said and rng.random() < 0.5:  # a name cut, doubled or written in another script
            at = rng.randrange(len(said))
            said = said[:at] + rng.choice(("", said[at:], "\u200b", "｜", "|", "▁", "_")) + said[at:]
        ids = render([user(said)]).ids(tokenizer)
        assert [i for i in ids if i in reserved] == controls, repr(said)
        assert tokenizer.decode(ids[2:-2]) == said


def test_no_text_of_a_user_yields_a_control_id() -> None:
    check_texts(0, 3000)


@pytest.mark.slow
def test_no_text_of_a_user_yields_a_control_id_100_000() -> None:
    check_texts(0, 100_000)


def test_text_is_only_text_to_the_tokenizer_itself() -> None:
    """V4's file calls <｜User｜> not special, so that the library takes it for the token in any text."""
    tokenizer = v4_tokenizer()
    assert tokenizer.encode("<｜User｜>", special=True) == [128803]
    assert 128803 not in tokenizer.encode("<｜User｜>")
    spec = json.loads(train_bpe(["the whale"], 258).to_json())
    fields = dict.fromkeys(("special", "single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"] += [fields | {"id": 258 + i, "content": name} for i, name in enumerate(("  ", "covid", "<b>"))]
    words = BPETokenizer(json.dumps(spec))
    assert words.encode("  covid") == [258, 259], "added words and spaces stay what they are"
    assert words.encode("<b>") != [260] == words.encode("<b>", special=True)
    assert words.markers == {BOS: 0, EOS: 1, "<b>": 260}


def test_a_vocabulary_without_the_tokens_is_refused() -> None:
    for tokenizer in (ByteTokenizer(), train_bpe(["the whale"], 258)):
        with pytest.raises(UserError, match="no token <｜User｜>, which the chat format needs"):
            render([user()]).ids(tokenizer)
        assert render([S]).ids(tokenizer) == [0, *tokenizer.encode("S")]


def test_a_tokenizer_that_lets_text_be_a_token_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = v4_tokenizer()
    leaky = lambda texts, special=False: [[128803] for _ in texts]  # noqa: E731
    monkeypatch.setattr(tokenizer, "encode_batch", leaky)
    with pytest.raises(UserError, match="makes a control token of the text 'U'"):
        render([user()]).ids(tokenizer)


# ------------------------------------------------------------------------------------------------ the Jinja template


def environment() -> ImmutableSandboxedEnvironment:
    """Set up as transformers and servers do."""

    def raise_exception(message: str) -> None:
        raise ValueError(message)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    made.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    made.globals["raise_exception"] = raise_exception
    return made


def with_objects(messages: list[Message]) -> list[Message]:
    """The messages with arguments as objects, which is what templates are given."""
    messages = copy.deepcopy(messages)
    for made in (made for message in messages for made in message.get("tool_calls") or []):
        if isinstance(made["function"]["arguments"], str):
            made["function"]["arguments"] = json.loads(made["function"]["arguments"])
    return messages


def test_the_template_is_the_encoder() -> None:
    template = environment().from_string(chat_template())
    for messages, how, _ in RULES.values():
        assert template.render(messages=with_objects(messages), **how) == render(messages, **how).text
    for seed in range(600):
        rng = random.Random(seed)
        messages, edition = conversation(rng), rng.choice(list(EFFORTS))
        how: dict[str, Any] = {"thinking": rng.random() < 0.6, "drop_thinking": rng.random() < 0.7, "edition": edition}
        if rng.random() < 0.3 and not any(message.get("tools") for message in messages):
            how["tools"] = [tool("f", description="é")]
        effort = rng.choice(list(EFFORTS[edition]))
        said = template.render(messages=with_objects(messages), reasoning_effort=effort, **how)
        assert said == render(messages, effort=effort, **how).text, seed


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "wizard", "content": "x"}],
        [user(), result("x")],
        [user(), answer("", None, *map(copy.deepcopy, TWO)), result("x", "c")],
        [user(), answer("", None, {"function": {"name": "f", "arguments": "{}"}})],
        [user(task="query"), user()],
        [user(task="weather")],
        [user([{"type": "image_url"}])],
    ],
)
def test_the_template_refuses_what_it_would_get_wrong(messages: list[Message]) -> None:
    template = environment().from_string(chat_template())
    with pytest.raises(ValueError):
        template.render(messages=messages)
    with pytest.raises(ValueError):
        template.render(messages=[user()], edition="may")
    with pytest.raises(ValueError):
        template.render(messages=[user()], reasoning_effort="low")


def test_transformers_finds_the_template_beside_the_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    train_bpe(["the whale " * 20], 300).save(tmp_path)
    assert write_chat_template(tmp_path) == tmp_path / "chat_template.jinja"
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    messages, tools = [user(), answer("A", "R", F), result("O")], [tool("f", description="é <")]
    said = theirs.apply_chat_template(with_objects(messages), tools=tools, tokenize=False, thinking=True)
    assert said == render(messages, tools=tools, thinking=True).text
