"""Failures caught here: a reply that is read as something else than was written, whole or cut anywhere; a tool call
lost, or leaked as text; half a tag shown; output that is malformed or cut short ending in a traceback or in silence, or
read as something else in other pieces; text taken for a control token; what xgrammar's deepseek_v4 would refuse.
"""

import itertools
import json
import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from conversations import Message, arguments, assistant, v4_tokenizer

from dsv4.errors import UserError
from dsv4.text import ByteTokenizer, ChatParser, Event, Tokenizer, read_reply, render
from dsv4.text.dsml import LONGEST_NAME
from dsv4.text.prompt import CONTROLS

D, EOS = "｜DSML｜", "<｜end▁of▁sentence｜>"
OPEN, CLOSE = f"\n\n<{D}tool_calls>\n", f"\n</{D}tool_calls>"
F = f'<{D}invoke name="f">\n<{D}parameter name="x" string="false">1</{D}parameter>\n</{D}invoke>'
G = f'<{D}invoke name="g">\n<{D}parameter name="s" string="true">a"\n<b</{D}parameter>\n</{D}invoke>'
USER = {"role": "user", "content": "U"}


def made(name: str, given: str) -> Message:
    return {"type": "function", "function": {"name": name, "arguments": given}}


FX, GS = made("f", '{"x": 1}'), made("g", '{"s": "a\\"\\n<b"}')


def said(content: str = "", reasoning: str = "", calls: Sequence[Message] = ()) -> Message:
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": list(calls)}


def written(message: Message, thinking: bool) -> Any:
    """The prompt's pieces that a message adds, as a model would write them."""
    before = render([USER], thinking=thinking)
    whole = render([USER, message], thinking=thinking, drop_thinking=False)
    assert whole.pieces[: len(before.pieces)] == before.pieces
    return type(whole)(whole.pieces[len(before.pieces) :])


def wanted(message: Message, thinking: bool) -> Message:
    calls = [made(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls") or []]
    reasoning = message.get("reasoning_content") or "" if thinking else ""
    return said(message.get("content") or "", reasoning, calls)


def feed(pieces: Sequence[Any], thinking: bool, tokenizer: Tokenizer | None = None) -> tuple[ChatParser, list[Event]]:
    parser = ChatParser(thinking=thinking, tokenizer=tokenizer)
    events = [event for piece in pieces for event in parser.feed(piece)]
    return parser, events + parser.finish()


def cut(whole: Any, rng: random.Random) -> list[Any]:
    """At random places, or everywhere."""
    if rng.random() < 0.3:
        return [whole[i : i + 1] for i in range(len(whole))]
    places = sorted(rng.randrange(len(whole) + 1) for _ in range(rng.randrange(8)))
    return [whole[a:b] for a, b in itertools.pairwise((0, *places, len(whole)))]


def joined(events: Sequence[Event]) -> list[tuple[str, int, str]]:
    """Events with neighbours of a kind as one, as how much comes at a time depends on the pieces."""
    kinds = itertools.groupby(
        events, key=lambda e: (e.kind, e.index, e.kind in ("reasoning", "content", "arguments") or id(e))
    )
    return [(key[0], key[1], "".join(event.text for event in group)) for key, group in kinds]


def same_however_cut(whole: Any, thinking: bool, rng: random.Random, tokenizer: Tokenizer | None = None) -> ChatParser:
    first, events = feed([whole], thinking, tokenizer)
    for _ in range(2):
        again, others = feed(cut(whole, rng), thinking, tokenizer)
        assert (again.message, again.warnings, again.ended) == (first.message, first.warnings, first.ended), whole
        assert joined(others) == joined(events), whole
    check_events(first.message, events)
    return first


def check_events(message: Message, events: Sequence[Event]) -> None:
    """What the events say is the message, to who follows them all and to who waits for whole calls."""
    for kind, key in (("reasoning", "reasoning_content"), ("content", "content")):
        assert "".join(event.text for event in events if event.kind == kind) == message[key]
    calls: dict[int, list[str]] = {}
    done = []
    for event in events:
        if event.kind == "call":
            assert event.index == len(calls)
            calls[event.index] = [event.text, ""]
        elif event.kind == "arguments":
            calls[event.index][1] += event.text
        elif event.kind == "withdrawn":
            assert event.index == len(calls) - 1 == len(done)
            del calls[event.index]
        elif event.kind == "done":
            assert calls[event.index][1] == event.text
            done.append(event.text)
    assert [made(*calls[i]) for i in range(len(calls))] == message["tool_calls"]
    assert done == [c["function"]["arguments"] for c in message["tool_calls"]]
    assert all(isinstance(json.loads(given), dict) for given in done)


# ------------------------------------------------------------------------------------------------ rules by hand

G_CUT = G[: G.index("<b")]  # within its value
BLOCK = OPEN + F + "\n" + G + CLOSE
# name -> (thinking, output, message, a part of each warning)
CASES: dict[str, tuple[bool, str, Message, list[str]]] = {
    "content": (False, f"A{EOS}", said("A"), []),
    "reasoning and content": (True, f"R</think>A{EOS}", said("A", "R"), []),
    "reasoning and calls": (True, f"R</think>{BLOCK}{EOS}", said("", "R", [FX, GS]), []),
    "content and calls": (False, f"A\n\n{BLOCK}{EOS}", said("A\n\n", "", [FX, GS]), []),
    "without the end token": (False, BLOCK, said("", "", [FX, GS]), []),
    "no arguments": (
        False,
        OPEN + F.split("<｜DSML｜parameter")[0] + f"\n</{D}invoke>" + CLOSE,
        said("", "", [made("f", "{}")]),
        [],
    ),
    "no blank line before": (False, "A" + BLOCK.strip(), said("A", "", [FX, GS]), []),
    "other space between": (
        False,
        f"A\n\n<{D}tool_calls>" + F.replace("\n", "\n\n ") + f" </{D}tool_calls>",
        said("A", "", [FX]),
        [],
    ),
    "two blocks": (False, OPEN + F + CLOSE + "B" + OPEN + G + CLOSE, said("B", "", [FX, GS]), []),
    "empty": (False, "", said(), []),
    # Cut short.
    "within the reasoning": (True, "R", said("", "R"), ["ended within the reasoning"]),
    "ended in the reasoning": (True, f"R{EOS}", said("", "R"), ["ended within the reasoning"]),
    "within half a name": (False, f"A\n\n<{D}tool_ca", said("A\n\n"), [f"half a tag, '<{D}tool_ca'"]),
    "within half a token": (False, "A\n\n<｜DS", said("A\n\n"), ["half a control token, '<｜DS'"]),
    "after the opening": (False, "A" + OPEN, said("A" + OPEN), ["cut short"]),
    "within a value": (False, OPEN + G_CUT, said(OPEN + G_CUT), ["'g' was malformed or cut short"]),
    "within a closing tag": (
        False,
        OPEN + G[:-3],
        said(OPEN + G.rpartition("</")[0]),
        ["'g' was", "half a tag, '</｜DSML｜invo'"],
    ),
    "after a call": (False, OPEN + F, said("", "", [FX]), ["a block of tool calls was malformed or cut short"]),
    "within the second": (False, OPEN + F + G_CUT, said(G_CUT, "", [FX]), ["'g' was malformed or cut short"]),
    "after half a closing tag": (
        False,
        OPEN + G.rpartition("/")[0],
        said(OPEN + G.rpartition("<")[0]),
        ["half a tag, '<'", "'g' was"],
    ),
    "half a tag of the reasoning": (True, "R</", said("", "R"), ["half a control token, '</'", "within the reasoning"]),
    # Malformed.
    "a bad value": (
        False,
        OPEN + F.replace(">1<", ">one<") + CLOSE,
        said(OPEN + F.replace(">1<", ">one<") + CLOSE),
        ["argument 'x'", "markup in the content"],
    ),
    "not a number": (
        False,
        OPEN + F.replace(">1<", ">NaN<"),
        said(OPEN + F.replace(">1<", ">NaN<")),
        ["argument 'x'", "markup"],
    ),
    "an empty block": (False, OPEN + CLOSE[1:], said(OPEN + CLOSE[1:]), ["a block without tool calls"]),
    "text in a block": (False, OPEN + "so" + CLOSE, said(OPEN + "so" + CLOSE), ["a block of tool calls", "markup"]),
    "a block after a bad one": (False, OPEN + "so" + BLOCK, said(OPEN + "so", "", [FX, GS]), ["a block of tool calls"]),
    "a stray tag": (False, f"A</{D}invoke>B", said(f"A</{D}invoke>B"), ["markup in the content"]),
    "a call in the reasoning": (True, f"R{BLOCK}", said("", "R" + BLOCK), ["markup in the reasoning", "ended within"]),
    "a second thought": (True, "R</think>A</think>B", said("A</think>B", "R"), ["</think> in the content"]),
    "a thought begun twice": (True, "<think>R</think>A", said("A", "<think>R"), ["<think> in the reasoning"]),
    "a turn of the user": (False, "A<｜User｜>B", said("A<｜User｜>B"), ["<｜User｜> in the content"]),
    "beyond the end": (False, f"A{EOS}more", said("A"), ["4 characters after the end"]),
}


@pytest.mark.parametrize("case", CASES)
def test_every_rule_of_reading(case: str) -> None:
    thinking, output, expected, warnings = CASES[case]
    for tokenizer in (None, v4_tokenizer()):
        if tokenizer and any("half a control token" in part for part in warnings):
            continue  # which ids cannot be: a token is there or it is not
        whole = tokenizer.encode(output, special=True) if tokenizer else output
        parser = same_however_cut(whole, thinking, random.Random(0), tokenizer)
        assert parser.message == expected
        assert len(parser.warnings) == len(warnings), parser.warnings
        assert all(part in warning for part, warning in zip(warnings, parser.warnings, strict=True)), parser.warnings
        assert parser.ended == (EOS in output)


def test_a_call_is_told_before_it_is_complete() -> None:
    """Name first, then the arguments as they are written, each piece as soon as it cannot be a tag."""
    parser = ChatParser(thinking=False)
    assert parser.feed("A" + OPEN) == [Event("content", "A")]
    assert parser.feed(f'<{D}invoke name="g">\n<{D}') == [Event("call", "g")]
    assert parser.feed('parameter name="s" string="true">one "two') == [
        Event("arguments", '{"s": '),
        Event("arguments", '"'),
        Event("arguments", 'one \\"two'),
    ]
    assert parser.feed("\n<") == [Event("arguments", "\\n")]
    assert parser.feed("b") == [Event("arguments", "<b")]
    assert parser.feed(f"</{D}parameter>\n</{D}invoke>") == [
        Event("arguments", '"'),
        Event("arguments", "}"),
        Event("done", '{"s": "one \\"two\\n<b"}'),
    ]
    assert parser.message["tool_calls"] == [made("g", '{"s": "one \\"two\\n<b"}')]


def test_a_call_that_fails_is_withdrawn() -> None:
    parser, events = feed([OPEN + G_CUT], thinking=False)
    assert [kind for kind, _ in itertools.groupby(event.kind for event in events)] == [
        "call",
        "arguments",
        "withdrawn",
        "content",
    ]
    assert parser.message == said(OPEN + G_CUT)


def test_from_ids_a_text_that_spells_a_token_is_text() -> None:
    tokenizer = v4_tokenizer()
    spelled = "".join(control.name for control in CONTROLS) + BLOCK
    message = said(
        spelled, spelled, [made("f", json.dumps({"s": spelled, D + "</think>": [spelled]}, ensure_ascii=False))]
    )
    ids = written(message, True).ids(tokenizer)
    assert same_however_cut(ids, True, random.Random(0), tokenizer).message == message


def test_misuse_is_said() -> None:
    with pytest.raises(UserError, match="fed lists of ids"):
        ChatParser(thinking=False, tokenizer=v4_tokenizer()).feed("text")
    parser = ChatParser(thinking=False)
    with pytest.raises(UserError, match="one without is fed text"):
        parser.feed([1])
    parser.finish()
    assert parser.finish() == []
    with pytest.raises(UserError, match="begin a new one"):
        parser.feed("more")
    assert read_reply("a\ud800b", thinking=False).message["content"] == "a\N{REPLACEMENT CHARACTER}b"
    assert read_reply([67, 1, 68], thinking=False, tokenizer=ByteTokenizer()).message["content"] == "A"


# ------------------------------------------------------------------------------------------------ properties


def test_what_is_rendered_is_read_back() -> None:
    tokenizer = v4_tokenizer()
    for seed in range(400):
        rng = random.Random(seed)
        thinking = rng.random() < 0.6
        message = assistant(rng, controls=False)
        parser = same_however_cut(written(message, thinking).text, thinking, rng)
        assert (parser.message, parser.warnings, parser.ended) == (wanted(message, thinking), [], True), seed
        message = assistant(rng, controls=True)  # from ids, with texts that spell control tokens
        parser = same_however_cut(written(message, thinking).ids(tokenizer), thinking, rng, tokenizer)
        assert (parser.message, parser.warnings, parser.ended) == (wanted(message, thinking), [], True), seed
        assert written(parser.message, thinking).text == written(message, thinking).text


PARTS = ("", "A", "A\n", "A\n\n", "<", "a <b> </c> 小柴胡 🐋", "\n\n<")
VALUES: tuple[Any, ...] = (
    "",
    "q",
    '"\n\\',
    "</",
    "\n\n",
    "<|DSML|tool_calls>",
    1,
    -0.5,
    None,
    True,
    [],
    {"a": [{"b": "</"}]},
)


def shapes() -> list[tuple[Message, bool]]:
    """Tool calls of every shape: what stands before them, how many, with how many arguments of which kinds."""
    some = [{}, *({"a": value} for value in VALUES)]
    some += [dict(zip("abc", VALUES[i:] + VALUES, strict=False)) for i in range(len(VALUES))]
    blocks = [[one] for one in some] + [[one, two] for one, two in itertools.pairwise(some)] + [some[:5]]
    calls = [[made("f", json.dumps(given, ensure_ascii=False)) for given in block] for block in blocks]
    return [
        (said(content, "R" if thinking else "", block), thinking)
        for thinking, content, block in itertools.product((False, True), PARTS, calls)
    ]


def test_tool_calls_of_every_shape_survive() -> None:
    """None lost and none leaked, from text and from ids, in pieces cut at random."""
    tokenizer, every = v4_tokenizer(), shapes()
    assert len({json.dumps(shape) for shape in every}) == len(every) >= 455
    lost = leaked = 0
    for i, (message, thinking) in enumerate(every):
        rng, output = random.Random(i), written(message, thinking)
        for whole, vocabulary in ((output.text, None), (output.ids(tokenizer), tokenizer)):
            parser, _ = feed(cut(whole, rng), thinking, vocabulary)
            lost += parser.message["tool_calls"] != message["tool_calls"]
            leaked += parser.message["content"] != message["content"] or bool(parser.warnings)
    assert (lost, leaked) == (0, 0)


HALF = re.compile(rf"</?{D}[^>]*\Z|</\Z|</?｜(?:D(?:S(?:ML?)?)?)?\Z|</?t(?:h(?:i(?:nk?)?)?)?\Z")


def test_a_stream_cut_short_anywhere_is_read_without_half_a_tag() -> None:
    tokenizer = v4_tokenizer()
    for seed in range(12):
        rng = random.Random(seed)
        thinking = rng.random() < 0.5
        kinds = ("q é", "two\nlines", "", 1.5, [True, {"a": None}], -3)
        given = [{key: rng.choice(kinds) for key in "abc"[: rng.randrange(4)]} for _ in range(2)]
        calls = [made("f", json.dumps(one, ensure_ascii=False)) for one in given]
        message = said("A", "R" if thinking else "", calls)
        output = written(message, thinking)
        for whole, vocabulary in ((output.text, None), (output.ids(tokenizer), tokenizer)):
            for end in range(0, len(whole), rng.randrange(1, 5)):
                parser = same_however_cut(whole[:end], thinking, rng, vocabulary)
                read = parser.message
                assert not HALF.search(read["content"]) and not HALF.search(read["reasoning_content"]), read
                assert read["tool_calls"] == message["tool_calls"][: len(read["tool_calls"])]
                assert read["reasoning_content"] in ("", "<", message["reasoning_content"], "R<")
                known = ("", "A", "A\n", "A\n\n", "A\n\n<", "A<")  # the last: of the end token's name
                assert read["content"] in known or parser.warnings


def test_any_mixture_of_tags_is_read_one_way() -> None:
    """Nothing is lost either: what is shown, what was called and what the warnings say is all that came."""
    tags = (
        "\n\n",
        OPEN,
        CLOSE,
        F,
        G,
        *re.split(r"(?<=>)|(?=<)", F + G),
        "<",
        "</",
        D,
        "x",
        "</think>",
        "<think>",
        "\n",
        ">",
    )
    tokenizer = v4_tokenizer()
    for seed in range(700):
        rng = random.Random(seed)
        output = "".join(rng.choice(tags) for _ in range(rng.randrange(16)))
        thinking = rng.random() < 0.3
        same_however_cut(output, thinking, rng)
        parser = same_however_cut(tokenizer.encode(output, special=True), thinking, rng, tokenizer)
        shown = parser.message["reasoning_content"] + parser.message["content"]
        if not parser.message["tool_calls"] and not any("left out" in warning for warning in parser.warnings):
            assert shown in (output, output.replace("</think>", "", 1)), parser.warnings


def test_long_and_hostile_output_takes_linear_time() -> None:
    """A name that never ends is given up. The rest takes a second or two, and hours if time went with the square."""
    endless = f'{OPEN}<{D}invoke name="' + "n" * (LONGEST_NAME + 100)
    parser, _ = feed(list(endless + "end"), thinking=False)
    assert parser.message["content"] == endless + "end"
    long = "n" * LONGEST_NAME
    message = said("", "", [made(long, json.dumps({long: 1}))])
    assert read_reply(written(message, False).text, thinking=False).message == message
    for hostile in (OPEN * 10_000, (OPEN + F.split("1")[0]) * 5000, f"<{D}" * 30_000 + ">", "\n" * 300_000, F * 1500):
        assert read_reply(hostile, thinking=False).message == said(hostile)


@pytest.mark.slow
def test_many_more_of_all_these() -> None:
    """What the tests above do, 20 times as often: about ten minutes."""
    tokenizer = v4_tokenizer()
    for seed in range(10_000, 24_000):
        rng = random.Random(seed)
        thinking = rng.random() < 0.6
        message = assistant(rng, controls=True)
        whole: Any = written(message, thinking).ids(tokenizer)
        assert same_however_cut(whole, thinking, rng, tokenizer).message == wanted(message, thinking), seed
        text = written(assistant(rng, controls=False), thinking).text
        text = text[: rng.randrange(len(text) + 1)]
        at = rng.randrange(len(text) + 1)
        same_however_cut(
            text[:at] + rng.choice((D, "<", OPEN, F, EOS, "")) + text[at + rng.randrange(9) :], thinking, rng
        )


# ------------------------------------------------------------------------------------------------ xgrammar


def schema_of(value: Any) -> dict[str, Any]:
    kinds = {
        str: "string",
        bool: "boolean",
        int: "integer",
        float: "number",
        type(None): "null",
        list: "array",
        dict: "object",
    }
    return {"type": kinds[type(value)]}


class Grammar:
    """xgrammar's structural tag deepseek_v4 for tools, over a vocabulary of bytes."""

    DRAWN = {256, *b' "<>/:,{}[]x1\n'}  # what is drawn where there is a choice

    def __init__(self, tools: list[dict[str, Any]], **how: Any):
        self.xgr = pytest.importorskip(
            "xgrammar", reason="xgrammar is optional: pip install --no-deps xgrammar apache-tvm-ffi"
        )
        vocabulary = [bytes([byte]) for byte in range(256)] + [b"<eos>"]
        info = self.xgr.TokenizerInfo(vocabulary, vocab_type=self.xgr.VocabType.RAW, stop_token_ids=[256])
        self.tag = self.xgr.get_model_structural_tag("deepseek_v4", tools=tools, **how)
        self.compiled = self.xgr.GrammarCompiler(info).compile_structural_tag(self.tag)

    def allows(self, output: str) -> bool:
        matcher = self.xgr.GrammarMatcher(self.compiled)
        return matcher.accept_string(output) and matcher.accept_token(256)

    def draw(self, rng: random.Random, longest: int = 3000) -> str | None:
        """A string that it allows, byte by byte; None where it does not come to an end."""
        matcher, mask = self.xgr.GrammarMatcher(self.compiled), self.xgr.allocate_token_bitmask(1, 257)
        out = bytearray()
        while len(out) < longest:
            matcher.fill_next_token_bitmask(mask)
            allowed = np.flatnonzero(np.unpackbits(mask.numpy().view(np.uint8), bitorder="little")).tolist()
            few = [i for i in allowed if i in self.DRAWN]
            picked = rng.choice(few or allowed)
            if picked < 256 and 256 not in allowed and ord("<") in allowed and rng.random() < 0.3:
                picked = ord("<")  # values come to an end
            matcher.accept_token(picked)
            if picked == 256:
                return out.decode(errors="replace")
            out.append(picked)
        return None


def tool_for(name: str, given: dict[str, Any]) -> dict[str, Any]:
    shape = {"type": "object", "properties": {k: schema_of(v) for k, v in given.items()}, "required": list(given)}
    return {"type": "function", "function": {"name": name, "parameters": shape}}


def test_xgrammar_opens_and_closes_calls_as_we_do() -> None:
    """Byte for byte, as its tag spells them."""
    grammar = Grammar([tool_for("f", {"x": 1})], tool_choice="required", reasoning="disabled")
    before, calls, after = grammar.tag.model_dump()["format"]["elements"]
    (tag,) = calls["tags"]
    message = said("", "", [made("f", '{"x": 1}')] * 2)
    parameter = f'<{D}parameter name="x" string="false">1</{D}parameter>\n'
    call = tag["begin"] + parameter + tag["end"]
    assert written(message, False).text == before["value"] + call + calls["separator"] + call + after["value"] + EOS


def test_xgrammar_allows_what_we_render() -> None:
    for seed in range(40):
        rng = random.Random(seed)
        tools, calls = [], []
        for i in range(rng.randrange(1, 4)):
            given = arguments(rng, controls=False, plain=True)
            given = {k: "q" if isinstance(v, list | dict) else v for k, v in given.items()}
            tools.append(tool_for(f"f{i}", given))
            calls.append(made(f"f{i}", json.dumps(given, ensure_ascii=False)))
        for choice, reasoning in itertools.product(("auto", "required"), ("disabled", "enabled")):
            thinking = reasoning == "enabled"
            grammar = Grammar(tools, tool_choice=choice, reasoning=reasoning)
            text = written(said("", "R", calls), thinking).text.removesuffix(EOS)
            assert grammar.allows(text), text
            if choice == "required":  # and nothing that differs in a byte of the markup
                for found in re.finditer(rf"<{D}\w+( name=)?|</{D}(invoke|tool_calls)", text):
                    at = rng.randrange(*found.span())
                    assert not grammar.allows(text[:at] + "#" + text[at + 1 :])


def test_we_read_what_xgrammar_allows() -> None:
    tools = [tool_for("f", {"x": 1, "s": "t"}), tool_for("g", {}), tool_for("h", {"l": [], "b": True})]
    grammar = Grammar(tools, tool_choice="required", reasoning="disabled")
    drawn = [text for seed in range(60) if (text := grammar.draw(random.Random(seed)))]
    assert len(drawn) >= 15
    for text in drawn:
        reply = read_reply(text, thinking=False)
        assert reply.message["tool_calls"] and not reply.warnings and not reply.message["content"], text
