"""Failures caught here: a batch that changes what a request gets, a chunk that changes a token, text that leaks a stop
string or breaks a character, one request's trouble that reaches another, a conversation that forgets or remembers
wrongly. The standard is a slow loop that runs the whole model on all tokens for each new one.
"""

import itertools
import math
import signal
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from dsv4.engine import Completion, Engine, SamplingParams, Session
from dsv4.engine.sampler import BROKEN, logprobs
from dsv4.engine.scheduler import Scheduler
from dsv4.engine.types import Request
from dsv4.engine.writer import TextWriter
from dsv4.errors import UserError
from dsv4.measure.subjects import KINDS, small_model
from dsv4.model import Transformer
from dsv4.text import ByteTokenizer

TOKENIZER = ByteTokenizer()
GREEDY = SamplingParams(temperature=0, max_tokens=12)
SHORT = SamplingParams(temperature=0, max_tokens=5)
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, seed=5, max_tokens=12)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return small_model(vocab_size=258)


@pytest.fixture
def engine(model) -> Engine:
    return Engine(model, TOKENIZER)


def prompt(length: int) -> list[int]:
    """Bytes of nothing in particular, different for every length."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(2, 258, (length,), generator=generator).tolist()


@torch.no_grad()
def slow_loop(model: Transformer, ids: list[int], params: SamplingParams) -> list[int]:
    """The new tokens, by definition: everything again for each of them; greedy, or drawn at a temperature."""
    generator, new = torch.Generator().manual_seed(params.seed or 0), []
    while len(new) < params.max_tokens and TOKENIZER.eos_id not in new:
        logits = model(torch.tensor([*ids, *new]))[-1]
        if params.temperature == 0:
            new.append(int(logits.argmax()))
            continue
        total = (logits.double() / params.temperature).softmax(0).cumsum(0)
        share = torch.rand((), generator=generator, dtype=torch.float64)
        new.append(int((total <= share).sum()))
    return new


def alone(model: Transformer, ids: list[int], params: SamplingParams) -> Completion:
    return Engine(model, TOKENIZER).generate([ids], params)[0]


def same(a: Completion, b: Completion) -> bool:
    """All but the request's number."""
    return replace(a, request=b.request) == b


def finish(engine: Engine) -> dict[int, Completion]:
    """Step until nothing is left: the completions by request."""
    done = {}
    while any(True for _ in engine.scheduler):
        done |= {e.request: e.completion for e in engine.step() if e.completion}
    return done


# --- the right tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 5, 126])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=1.3, seed=3, max_tokens=8)])
def test_the_engine_is_the_slow_loop(model, length, params):
    assert alone(model, prompt(length), params).ids == slow_loop(model, prompt(length), params)


BATCH = [(prompt(n), [GREEDY, SEEDED][i % 2]) for i, n in enumerate((130, 1, 7, 40, 3))]


@pytest.fixture(scope="module")
def by_itself(model) -> list[Completion]:
    return [alone(model, ids, params) for ids, params in BATCH]


@pytest.mark.parametrize(("max_batch", "budget"), [(16, 2048), (3, 3), (5, 7), (4, 64), (2, 131)])
def test_a_ragged_batch_is_each_alone(model, by_itself, max_batch, budget):
    """Waiting in line, chunks of every size, prefill beside decode: all the same tokens, text and memory."""
    engine = Engine(model, TOKENIZER, max_batch=max_batch, tokens_per_step=budget)
    ids, params = zip(*BATCH, strict=True)
    together = engine.generate(ids, params)
    assert all(same(a, b) for a, b in zip(together, by_itself, strict=True))


def test_requests_that_join_late(model, by_itself):
    engine = Engine(model, TOKENIZER, max_batch=4, tokens_per_step=32)
    numbers, done = [], {}
    for ids, params in BATCH:
        numbers.append(engine.add(ids, params))
        done |= {e.request: e.completion for _ in range(4) for e in engine.step() if e.completion}
    done |= finish(engine)
    assert all(same(done[n], c) for n, c in zip(numbers, by_itself, strict=True))


def test_no_step_exceeds_the_budget_and_each_is_one_call(model, monkeypatch):
    sizes = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, **kw: (sizes.append(len(ids)), forward(ids, **kw))[1])
    engine = Engine(model, TOKENIZER, max_batch=4, tokens_per_step=20)
    for ids, params in BATCH:
        engine.add(ids, params)
    steps = 0
    while any(True for _ in engine.scheduler):
        engine.step()
        steps += 1
    assert len(sizes) == steps and max(sizes) <= 20


def test_a_seed_fixes_the_text_and_no_seed_does_not(engine):
    unseeded = replace(SEEDED, seed=None)
    a, b = engine.generate([prompt(5)] * 2, SEEDED)
    c, d = engine.generate([prompt(5)] * 2, unseeded)
    e = engine.generate([prompt(5)], replace(SEEDED, seed=6))[0]
    assert a.ids == b.ids and c.ids != d.ids and e.ids != a.ids


def test_a_text_prompt_gets_a_bos_and_ids_are_taken_as_they_are(engine):
    text, ids, none, empty = engine.generate(["é", [197], [], ""], GREEDY)
    assert text.prompt_ids == [0, 197, 171]
    assert ids.prompt_ids == [197]
    assert none.prompt_ids == empty.prompt_ids == [0] and none.ids == empty.ids


def test_padded_vocabulary_is_never_drawn():
    model = small_model(vocab_size=300)
    with torch.no_grad():
        model.head.weight[258:] *= 50
    params = SamplingParams(max_tokens=30, seed=0)
    done = Engine(model, TOKENIZER).generate(["a", "b"], [params, replace(params, temperature=0)])
    assert all(i < 258 for c in done for i in c.ids)


def test_a_tokenizer_larger_than_the_model():
    with pytest.raises(UserError, match="258 tokens but the model 97"):
        Engine(small_model(), TOKENIZER)


def test_memory_format_and_what_a_memory_holds(model):
    full, half = (Engine(model, TOKENIZER, memory_format=d) for d in (None, torch.bfloat16))
    a, b = (e.generate([prompt(40)], GREEDY)[0] for e in (full, half))
    assert 0 < b.memory_bytes < a.memory_bytes
    memory = model.new_cache(1, capacity=40, max_rewind=0)
    with torch.no_grad():
        model(torch.tensor([*prompt(40), *a.ids[:-1]])[None], cache=memory)
    assert a.memory_bytes == memory.bytes()


# --- how a request ends ----------------------------------------------------------------------------------------------


def forced(model: Transformer, engine: Engine, monkeypatch: pytest.MonkeyPatch, text: bytes, end: int = 1) -> None:
    """Make the model write `text`, then eos."""
    ids = [*(b + 2 for b in text), end]

    def run(work):
        ready = [w.request for w in work if w.request.pending == w.count]
        for w in work:
            w.request.memory = w.request.memory or model.new_cache(1)[0]
            w.request.memory.length += w.count
        logits = torch.zeros(len(ready), 258)
        for row, r in enumerate(ready):
            logits[row, ids[len(r.ids) - r.num_prompt]] = 9
        return ready, logits

    monkeypatch.setattr(engine.runner, "run", run)


@pytest.mark.parametrize("stop_ids", [(70, 99), (1,), ()])
def test_every_eos_of_the_model_ends_and_is_no_text(model, monkeypatch, stop_ids):
    """The model's own eos ids count beside the tokenizer's, also where that takes one for an ordinary token."""
    monkeypatch.setattr(model, "stop_ids", stop_ids)
    for end in {*stop_ids, TOKENIZER.eos_id}:
        engine = Engine(model, TOKENIZER)
        forced(model, engine, monkeypatch, b"xyz", end=end)
        done = engine.generate(["x"], GREEDY)[0]
        assert (done.text, done.finish_reason, done.ids[-1]) == ("xyz", "stop", end)
        session = Session(engine)
        assert [e.text for e in session.generate("x", GREEDY)] == ["x", "y", "z", ""]
        assert session.ids == [0, *TOKENIZER.encode("xxyz")], "an eos is not part of the timeline"


@pytest.mark.parametrize(("eos", "ids"), [(None, ()), (7, (7,)), (0, (0,)), ((3, 9), (3, 9))])
def test_the_stop_ids_of_a_model_are_its_configuration_s(eos, ids):
    assert small_model(KINDS["window"], eos_token_id=eos).stop_ids == ids


def test_eos_ends_and_is_no_text(model, engine, monkeypatch):
    forced(model, engine, monkeypatch, b"abc")
    done = engine.generate(["x"], GREEDY)[0]
    assert (done.text, done.finish_reason, done.ids[-1]) == ("abc", "stop", TOKENIZER.eos_id)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        (b"one two three", ["two"], "one "),
        (b"one two three", ["three", "two"], "one "),
        (b"aaab tail", ["aab"], "a"),
        (b"abcd", ["abcd", "bc"], "a"),  # bc is complete first
        (b"abab", ["abc"], "abab"),  # the beginning of a stop string at the end is text after all
        ("né à".encode(), ["é"], "n"),
        ("né à".encode(), ["à"], "né "),
        (b"x\xc3", ["\ufffd"], "x"),  # a broken character is complete only at the end
    ],
)  # fmt: skip
def test_stop_strings(model, engine, monkeypatch, text, stop, expected):
    forced(model, engine, monkeypatch, text)
    events = list(engine.stream("x", replace(GREEDY, stop=stop, max_tokens=50)))
    assert "".join(e.text for e in events) == expected == events[-1].completion.text
    assert events[-1].finish_reason == "stop"
    spoken = list(itertools.accumulate(e.text for e in events))
    assert all(expected.startswith(s) for s in spoken), "a stop string leaked"


def test_events(model, engine, monkeypatch):
    """One for each token; text comes out as soon as it is certain."""
    forced(model, engine, monkeypatch, "aé<b</s".encode())
    events = list(engine.stream("x", replace(GREEDY, stop=["</s>"])))
    assert [e.text for e in events] == ["a", "", "é", "", "<b", "", "", "", "</s"]
    assert [t for e in events for t in e.tokens] == events[-1].completion.ids
    assert [e.finish_reason for e in events] == [None] * 8 + ["stop"]


def test_length_ends_with_what_was_held_back(model, engine, monkeypatch):
    forced(model, engine, monkeypatch, b"ab<c")
    done = engine.generate(["x"], SamplingParams(temperature=0, max_tokens=3, stop=["<c"]))[0]
    assert (done.text, done.finish_reason) == ("ab<", "length")


@given(st.data())
def test_text_does_not_depend_on_how_tokens_cut_it(data):
    """Against the definition: character by character, the first stop string to be complete ends the text."""
    text = data.draw(st.text("ab€", max_size=12))
    stop = data.draw(st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3))
    ends = [(at + len(s), at) for s in stop for at in [text.find(s)] if at >= 0]
    expected = text[: min(ends)[1]] if ends else text
    writer, out = TextWriter(TOKENIZER, stop), ""
    for i, byte in enumerate(text.encode()):
        out += writer.push(byte + 2)
        if writer.stopped:
            break
        seen = text.encode()[: i + 1].decode(errors="ignore")
        held = max((n for s in stop for n in range(len(s)) if n and seen.endswith(s[:n])), default=0)
        assert out == seen[: len(seen) - held], "held back more or less than may become a stop string"
    assert writer.stopped == bool(ends)
    assert out + writer.flush() == expected


@given(
    st.lists(st.text("abc", max_size=7), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 5)), max_size=3),
)
@example(["abcb"], [(0, 4), (1, 2)])  # a stop string inside another
def test_tokens_of_several_characters(pieces, spans):
    """The same text whether it comes in pieces or character by character."""
    text = "".join(pieces)
    stop = [text[at : at + n] for at, n in spans if text[at : at + n]]

    class Pieces:
        push, flush = staticmethod(str), staticmethod(str)

    def written(parts: list[str]) -> str:
        writer, out = TextWriter(TOKENIZER, stop), ""
        writer.decoder = Pieces()  # type: ignore[assignment]
        for part in parts:
            out += writer.push(part)  # type: ignore[arg-type]
            if writer.stopped:
                return out
        return out + writer.flush()

    assert written(pieces) == written(list("".join(pieces)))


def test_streamed_texts_are_the_completion(model, by_itself):
    for (ids, params), whole in zip(BATCH, by_itself, strict=True):
        events = list(Engine(model, TOKENIZER).stream(ids, params))
        assert "".join(e.text for e in events) == whole.text == TOKENIZER.decode(whole.ids)
        assert [t for e in events for t in e.tokens] == whole.ids


def test_the_end_of_the_context_is_a_length():
    engine = Engine(small_model(vocab_size=258, max_position_embeddings=40), TOKENIZER)
    params = SamplingParams(temperature=0, max_tokens=10)
    lengths = [len(c.ids) for c in engine.generate([prompt(n) for n in (29, 30, 31, 38, 39)], params)]
    reasons = {c.finish_reason for c in engine.generate([prompt(n) for n in (29, 30, 31, 38, 39)], params)}
    assert lengths == [10, 10, 9, 2, 1] and reasons == {"length"}
    for n in (40, 41, 1000):
        with pytest.raises(UserError, match=f"{n} tokens.*max_position_embeddings=40; shorten"):
            engine.add(prompt(n), params)


# --- requests leave each other alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [[258], [-1], [2, 3.5], [2] * 9000])
def test_a_bad_prompt_is_refused_before_anything_runs(model, by_itself, bad):
    engine = Engine(model, TOKENIZER)
    number = engine.add(*BATCH[0])
    engine.step()
    with pytest.raises(UserError):
        engine.add(bad)
    with pytest.raises(UserError):
        engine.generate([prompt(3), bad])
    assert len(list(engine.scheduler)) == 1, "nothing of a refused list is in line"
    assert same(finish(engine)[number], by_itself[0])


@pytest.mark.parametrize(
    "call",
    [
        lambda e: e.generate("text"),
        lambda e: e.generate(["a", "b"], [SamplingParams()]),
        lambda e: Engine(e.runner.model, TOKENIZER, max_batch=0),
        lambda e: Engine(e.runner.model, TOKENIZER, max_batch=9, tokens_per_step=8),
    ],
)
def test_wrong_calls(engine, call):
    with pytest.raises(UserError):
        call(engine)


def test_cancel(model, by_itself):
    """Running, in line, ended and unknown."""
    engine = Engine(model, TOKENIZER, max_batch=2)
    numbers = [engine.add(*request) for request in BATCH[:4]]
    engine.step()
    for gone in (numbers[0], numbers[3], 10**6):
        engine.cancel(gone)
    news = [e for _ in range(40) for e in engine.step()]
    assert {e.request for e in news} == set(numbers[1:3])
    done = {e.request: e.completion for e in news if e.completion}
    assert all(same(done[numbers[i]], by_itself[i]) for i in (1, 2))
    engine.cancel(numbers[1])
    assert not engine.step()


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("layer", [0, -1])
def test_a_step_that_is_stopped_half_way_loses_nothing(model, by_itself, monkeypatch, layer, error):
    engine = Engine(model, TOKENIZER, max_batch=4, tokens_per_step=90)
    numbers = [engine.add(*request) for request in BATCH]
    moe = model.layers[layer].ffn
    whole, calls, stops, done = moe.forward, itertools.count(), 0, {}

    def stopping(*args):
        if next(calls) % 5 == 2:
            raise error
        return whole(*args)

    monkeypatch.setattr(moe, "forward", stopping)
    for _ in range(60):
        try:
            done |= {e.request: e.completion for e in engine.step() if e.completion}
        except type(error):
            stops += 1
    assert stops > 5
    assert [done[n].ids for n in numbers] == [c.ids for c in by_itself]
    assert [done[n].text for n in numbers] == [c.text for c in by_itself]


def interrupted_in(monkeypatch: pytest.MonkeyPatch, model: Transformer, *calls: int, times: int = 1) -> None:
    """A Ctrl-C, or several, in the middle of these calls of the model (its last layer), counted from 0."""
    moe = model.layers[-1].ffn
    whole, count = moe.forward, itertools.count()

    def stopping(*args):
        if next(count) in calls:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return whole(*args)

    monkeypatch.setattr(moe, "forward", stopping)


@pytest.mark.parametrize("chunk", [0, 1, 3])
def test_ctrl_c_keeps_what_was_read(model, by_itself, monkeypatch, chunk):
    """In a chunk of a prompt, and while tokens are drawn: it is raised, nothing is computed twice, nothing is lost."""
    engine, got, stops = Engine(model, TOKENIZER, max_batch=4, tokens_per_step=40), {}, 0
    numbers = [engine.add(*request) for request in BATCH]
    sizes = computed(model, monkeypatch)
    interrupted_in(monkeypatch, model, chunk, chunk + 4, 11)
    while any(True for _ in engine.scheduler):
        try:
            got |= {e.request: e.completion for e in engine.step() if e.completion}
        except KeyboardInterrupt:
            stops += 1
    got |= {e.request: e.completion for e in engine.step() if e.completion}  # if the last step was interrupted
    assert stops == 3 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert all(same(got[n], c) for n, c in zip(numbers, by_itself, strict=True))
    assert sum(sizes) == sum(len(c.prompt_ids) + len(c.ids) - 1 for c in by_itself)


def test_a_second_ctrl_c_stops_a_step_at_once_and_costs_only_time(model, by_itself, monkeypatch):
    engine = Engine(model, TOKENIZER, tokens_per_step=40)
    number = engine.add(*BATCH[0])
    sizes = computed(model, monkeypatch)
    interrupted_in(monkeypatch, model, 2, times=2)
    engine.step()
    engine.step()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert same(finish(engine)[number], by_itself[0])
    assert sum(sizes) == 3 * 40 + 130 + len(by_itself[0].ids) - 1


@pytest.mark.parametrize("at", [0, 3, 11])
def test_tokens_of_an_interrupted_step_are_told_before_the_stream_ends(model, by_itself, monkeypatch, at):
    """Those of the last step too, with the completion."""
    engine, got = Engine(model, TOKENIZER), []
    interrupted_in(monkeypatch, model, at)
    with pytest.raises(KeyboardInterrupt):
        for event in engine.stream(*BATCH[0]):
            got.append(event)
    assert [t for e in got for t in e.tokens] == by_itself[0].ids[: at + 1] and not list(engine.scheduler)
    assert (got[-1].completion is not None) == (at + 1 == len(by_itself[0].ids))


def test_who_has_a_handler_of_his_own_keeps_it(model, by_itself):
    seen = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        hook = model.layers[-1].register_forward_hook(lambda *_: signal.raise_signal(signal.SIGINT))
        assert same(alone(model, *BATCH[1]), by_itself[1]) and len(seen) == len(by_itself[1].ids)
        hook.remove()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_request_whose_logits_are_not_finite_ends_alone(model, by_itself, monkeypatch):
    engine = Engine(model, TOKENIZER)
    numbers = [engine.add(*request) for request in BATCH]
    run = engine.runner.run

    def damaged(work):
        ready, logits = run(work)
        for row, r in enumerate(ready):
            if r.number == numbers[2] and len(r.ids) == r.num_prompt + 4:
                logits[row, 3] = float("nan")
        return ready, logits

    monkeypatch.setattr(engine.runner, "run", damaged)
    done = finish(engine)
    broken = done.pop(numbers[2])
    assert broken.finish_reason == "error" and broken.ids == by_itself[2].ids[:4]
    assert all(same(done[n], by_itself[i]) for i, n in enumerate(numbers) if i != 2)


def test_streams_side_by_side_and_one_closed_early(model, by_itself):
    """Each follower gets its own news, whoever makes the engine step; step gives what nobody follows."""
    engine = Engine(model, TOKENIZER)
    plain = engine.add(*BATCH[0])
    a, b, c = (engine.stream(*request) for request in BATCH[1:4])
    got = [list(pair) for pair in zip(a, b, strict=False)]
    with closing(c):
        next(c)
    rest = [*a, *b]
    for number, i in ((0, 1), (1, 2)):
        request = got[0][number].request
        events = [pair[number] for pair in got] + [e for e in rest if e.request == request]
        assert [t for e in events for t in e.tokens] == by_itself[i].ids
    done = {e.request: e.completion for e in engine.step() if e.completion} | finish(engine)
    assert set(done) == {plain}, "the closed stream is cancelled"
    assert same(done[plain], by_itself[0])


CLOSINGS = {
    "close": lambda events: events.close(),
    "closing": lambda events: closing(events).__exit__(None, None, None),
    "dropped": lambda events: None,
}


@pytest.mark.parametrize("taken", [0, 2])
@pytest.mark.parametrize("how", CLOSINGS)
@pytest.mark.parametrize("opened", ["stream", "follow"])
def test_a_stream_that_is_closed_is_cancelled(model, by_itself, how, taken, opened):
    """Also before its first event, where a generator's `finally` never runs; others go on."""
    engine = Engine(model, TOKENIZER)
    other = engine.add(*BATCH[0])
    events = engine.stream(*BATCH[1]) if opened == "stream" else engine.follow(engine.add(*BATCH[1]))
    for _ in range(taken):
        next(events)
    CLOSINGS[how](events)
    if how != "dropped":
        assert list(events) == []
    del events
    assert [r.number for r in engine.scheduler] == [other]
    news = [*engine._news]
    assert all(e.request == other for e in news)
    done = {e.request: e.completion for e in engine.step() if e.completion} | finish(engine)
    assert set(done) == {other} and same(done[other], by_itself[0])


def test_a_stream_that_came_to_its_end_cancels_nothing_else(model):
    engine = Engine(model, TOKENIZER)
    events = engine.stream(*BATCH[1])
    assert list(events)[-1].completion and list(events) == []
    later = engine.add(*BATCH[2])
    events.close()
    del events
    assert [r.number for r in engine.scheduler] == [later]


# --- who runs when ---------------------------------------------------------------------------------------------------


class Length:
    """All that a scheduler sees of a memory."""

    def __init__(self):
        self.length = 0


class Lengths:
    """And of a pool that has room for all."""

    most_tokens = None

    def fits(self, tokens: int) -> bool:
        return True

    def new(self, capacity: int = 0) -> Length:
        return Length()

    def shortage(self, wanted) -> int:
        return 0


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 6)), max_size=12), st.integers(1, 4), st.integers(0, 9))
def test_scheduling_is_fair(requests, max_batch, spare):
    """The budget holds, nobody who decodes is skipped, some prompt always advances, first tokens come in order."""
    scheduler = Scheduler(max_batch, max_batch + spare, Lengths())  # type: ignore[arg-type]
    waiting = [Request(i, [2] * n, None, n + new, None, None) for i, (n, new) in enumerate(requests)]  # type: ignore
    for r in waiting:
        scheduler.add(r)
    first, steps = [], 0
    while work := scheduler.schedule():
        steps += 1
        assert steps < 1000 and len(scheduler.running) <= max_batch
        assert sum(w.count for w in work) <= scheduler.tokens_per_step
        assert {r for r in scheduler.running if r.pending == 1} <= {w.request for w in work}
        assert any(w.request.num_prompt == len(w.request.ids) for w in work) or all(
            r.num_prompt < len(r.ids) for r in scheduler.running
        )
        for w in work:
            w.memory.length += w.count
            if not w.request.pending:
                first += [w.request.number] if len(w.request.ids) == w.request.num_prompt else []
                w.request.ids.append(2)
                if len(w.request.ids) == w.request.limit:
                    scheduler.remove(w.request)
    assert sorted(first) == list(range(len(requests))) and not scheduler.running
    if max_batch == 1:
        assert first == sorted(first)


# --- too few pages for all -------------------------------------------------------------------------------------------


def test_who_finds_no_pages_waits_or_gives_way_and_gets_the_same(model) -> None:
    """Twelve requests on 5 pages of 128 tokens: the youngest are preempted again and again, and every request gets what
    it gets where there is room for all, to the last draw; in the end every page is free."""
    prompts = [prompt(n) for n in (100, 120, 127, 128, 129, 30, 250, 1, 126, 125, 60, 124)]
    params = [replace(SEEDED if i % 2 else GREEDY, max_tokens=20, logprobs=0) for i in range(len(prompts))]
    want = Engine(model, TOKENIZER).generate(prompts, params)
    engine, preempted, together = Engine(model, TOKENIZER, pages=5, tokens_per_step=200), [], 0
    computed = 0
    preempt, schedule = engine.scheduler._preempt, engine.scheduler.schedule

    def noted(request: Request) -> None:
        preempted.append(request.pending > 1)
        preempt(request)

    def checked():
        nonlocal together, computed
        work = schedule()
        together = max(together, len(work))
        computed += sum(w.count for w in work)
        numbers = [r.number for r in engine.scheduler]
        assert numbers == sorted(numbers), "the line is in order of arrival, who gave way included"
        return work

    engine.scheduler._preempt, engine.scheduler.schedule = noted, checked  # type: ignore[method-assign]
    got = engine.generate(prompts, params)
    assert [c.ids for c in got] == [c.ids for c in want] and together > 2
    for a, b in zip(got, want, strict=True):
        assert all(abs(x.logprob - y.logprob) < 1e-4 for x, y in zip(a.logprobs, b.logprobs, strict=True))
    assert computed == sum(len(c.prompt_ids) + len(c.ids) - 1 for c in got), "nothing is computed twice"
    assert len(preempted) > 3 and not all(preempted), "some gave way while they were decoding"
    assert engine.pool.free_pages == 5 and engine.pool.free_slots == engine.pool.num_slots  # type: ignore[attr-defined]


def test_what_no_pages_can_hold_is_refused_at_once(model) -> None:
    engine = Engine(model, TOKENIZER, pages=2)
    with pytest.raises(
        UserError, match="a prompt of 250 tokens and up to 12 new ones do not fit: the cache has pages for 256"
    ):
        engine.add(prompt(250), GREEDY)
    with pytest.raises(UserError, match="do not fit"):
        engine.generate([prompt(10), prompt(250)], GREEDY)
    assert not list(engine.scheduler), "all are checked before any waits"
    session = Session(engine)
    with pytest.raises(UserError, match="make the engine with more pages"):
        session.generate("x" * 250, GREEDY)
    assert not session.undo(), "a turn that was refused is none"
    assert engine.generate([prompt(244)], GREEDY)[0].finish_reason in ("length", "stop")


def test_a_conversation_survives_giving_way(model) -> None:
    """A turn that is preempted goes on, and so does the next one, as if it had been alone."""
    alone, engine = Session(Engine(model, TOKENIZER)), Engine(model, TOKENIZER, pages=3)
    session = Session(engine)
    other = engine.add(prompt(240), replace(GREEDY, max_tokens=30))
    texts = [[event.text for event in s.generate("x" * 100, replace(GREEDY, max_tokens=40))] for s in (alone, session)]
    assert texts[0] == texts[1]
    engine.cancel(other)
    assert [e.text for e in alone.generate("y", SHORT)] == [e.text for e in session.generate("y", SHORT)]


# --- a session -------------------------------------------------------------------------------------------------------


def say(session: Session, text: str, params: SamplingParams = SHORT) -> list[int]:
    return [t for e in session.generate(text, params) for t in e.tokens]  # type: ignore[misc]


def computed(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of tokens of every model call."""
    sizes: list[int] = []
    trunk = model.trunk
    monkeypatch.setattr(model, "trunk", lambda ids, cut: (sizes.append(len(ids)), trunk(ids, cut))[1])
    return sizes


@pytest.mark.parametrize("rewind", [0, 8, 200])
def test_a_session_is_one_long_prompt(model, monkeypatch, rewind):
    """Every reply is what the whole timeline as a prompt gives, and no token is computed twice."""
    session, fresh = Session(Engine(model, TOKENIZER, max_rewind=rewind)), Engine(model, TOKENIZER)
    sizes = computed(model, monkeypatch)
    before = 0
    for text in ("It was a dark", " and stormy night" * 8, "", "x"):
        ids = session.ids + TOKENIZER.encode(text)
        sizes.clear()
        reply = say(session, text)
        assert sum(sizes) == len(ids) + len(reply) - 1 - before
        before = len(ids) + len(reply) - 1
        assert reply == fresh.generate([ids], SHORT)[0].ids
        assert session.ids == ids + reply


@pytest.mark.parametrize("rewind", [0, 8])
def test_undo(model, monkeypatch, rewind):
    """Back to any turn's start, and the replies from there are the same again."""
    session = Session(Engine(model, TOKENIZER, max_rewind=rewind))
    texts, starts, replies = ["It was", " a dark" * 20, " and stormy night"], [], []
    for text in texts:
        starts.append(list(session.ids))
        replies.append(say(session, text))
    sizes = computed(model, monkeypatch)
    for back in (1, 2, 3):
        for _ in range(back):
            assert session.undo()
        assert session.ids == starts[-back]
        for text, reply in list(zip(texts, replies, strict=True))[-back:]:
            assert say(session, text) == reply
        if back == 1:  # of the turns before nothing is computed again
            assert sum(sizes) <= 1 + len(texts[-1]) + len(replies[-1])
    assert all(session.undo() for _ in texts) and session.ids == [0]
    assert not session.undo()


@pytest.mark.parametrize("where", ["inside a step", "between steps"])
@pytest.mark.parametrize("turn", [0, 2])
def test_an_interrupted_reply_leaves_a_usable_timeline(model, monkeypatch, where, turn):
    session, fresh = Session(Engine(model, TOKENIZER)), Engine(model, TOKENIZER)
    for _ in range(turn):
        say(session, "It was a dark and stormy night." * 3)
    start = list(session.ids)
    moe = model.layers[-1].ffn
    whole, calls, got = moe.forward, itertools.count(), []

    def stopping(*args):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return whole(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if where == "inside a step":
            patch.setattr(moe, "forward", stopping)
        with closing(session.generate("Then", GREEDY)) as events:
            for event in events:
                got.extend(event.tokens)
                if where == "between steps" and len(got) == 5:
                    raise KeyboardInterrupt
    assert len(got) == 5 and session.ids == start + TOKENIZER.encode("Then") + got
    sizes = computed(model, monkeypatch)
    ids = session.ids + TOKENIZER.encode(" on")
    reply = say(session, " on")
    assert sum(sizes) <= len(ids) - len(start) + len(reply), "the turns before were computed again"
    assert reply == fresh.generate([ids], SHORT)[0].ids
    assert session.undo() and session.undo() and session.ids == start


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("chunk", [0, 2])
def test_a_long_text_that_is_interrupted_is_read_on(model, monkeypatch, turn, chunk):
    """Only the rest is computed: what follows has the same bits, whatever comes next."""
    session, text = Session(Engine(model, TOKENIZER, tokens_per_step=50)), "It was a dark and stormy night. " * 5
    for _ in range(turn):
        say(session, "Once upon a time.")
    start, known = list(session.ids), session.memory.length if session.memory else 0
    ids = start + TOKENIZER.encode(text)
    want = Engine(model, TOKENIZER).generate([ids], replace(SHORT, logprobs=3))[0]
    sizes = computed(model, monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_in(patch, model, chunk)
        list(session.generate(text, SHORT))
    read = known + 50 * (chunk + 1)
    assert session.ids == ids and session.unread == len(ids) - read and sum(sizes) == read - known
    events = list(session.generate("", replace(SHORT, logprobs=3)))
    assert [t for e in events for t in e.tokens] == want.ids
    assert [x for e in events for x in e.logprobs] == list(want.logprobs)
    assert sum(sizes) == len(ids) - known + len(want.ids) - 1, "a token was read twice"
    assert session.undo() and session.undo() and session.ids == start


@pytest.mark.parametrize("how", CLOSINGS)
def test_a_turn_closed_before_its_first_event_was_said(model, how):
    """Its text is in the timeline, nothing stays in line, and `undo` takes back this turn and not the one before."""
    engine = Engine(model, TOKENIZER)
    session = Session(engine)
    say(session, "It was")
    start = list(session.ids)
    events = session.generate(" a dark", GREEDY)
    CLOSINGS[how](events)
    del events
    assert not list(engine.scheduler) and session.ids == start + TOKENIZER.encode(" a dark")
    assert say(session, "") == Engine(model, TOKENIZER).generate([start + TOKENIZER.encode(" a dark")], SHORT)[0].ids
    assert session.undo() and session.undo() and session.ids == start


@pytest.mark.parametrize("taken", [0, 3])
def test_what_comes_next_closes_an_open_turn(model, taken):
    """A second turn, an undo or a reset while events of a turn are still held: one timeline, nothing left in line."""
    engine = Engine(model, TOKENIZER)
    session = Session(engine)
    events = session.generate("It was", GREEDY)
    told = [t for _ in range(taken) for t in next(events).tokens]
    ids = [0, *TOKENIZER.encode("It was"), *told, *TOKENIZER.encode(" so")]
    assert say(session, " so") == Engine(model, TOKENIZER).generate([ids], SHORT)[0].ids
    assert list(events) == [] and not list(engine.scheduler)
    held = session.generate("x", GREEDY)
    assert session.undo() and session.ids[: len(ids)] == ids and not list(engine.scheduler)
    again = session.generate("y", GREEDY)
    session.reset()
    assert session.ids == [0] and list(held) == list(again) == [] and not list(engine.scheduler)


def test_a_turn_that_does_not_fit_is_refused_at_once(model):
    session = Session(Engine(small_model(vocab_size=258, max_position_embeddings=20), TOKENIZER))
    with pytest.raises(UserError, match="shorten"):
        session.generate("x" * 20)
    assert session.ids == [0] and not session.undo()


def test_a_session_drops_the_eos_and_goes_on(model, monkeypatch):
    """Also by an empty line, when there is nothing new for the model to run."""
    engine = Engine(model, TOKENIZER)
    session = Session(engine)
    with monkeypatch.context() as patch:
        patch.setattr("dsv4.engine.engine.sample", lambda logits, params, generators: [TOKENIZER.eos_id])
        say(session, "The end")
    assert session.ids == [0, *TOKENIZER.encode("The end")]
    ids = list(session.ids)
    assert say(session, "") == Engine(model, TOKENIZER).generate([ids], SHORT)[0].ids


def test_rewind_by_tokens(model):
    session = Session(Engine(model, TOKENIZER, max_rewind=4))
    for text in ("It was a dark", " and stormy"):
        say(session, text)
    for count in (3, 5, 0, 9):
        session.rewind(count)
        ids = list(session.ids)
        assert say(session, "!") == Engine(model, TOKENIZER).generate([[*ids, 35]], SHORT)[0].ids
    for wrong in (-1, len(session.ids)):
        with pytest.raises(UserError, match="cannot rewind"):
            session.rewind(wrong)
    session.rewind(len(session.ids) - 1)
    assert session.ids == [0] and not session.undo()


def test_a_turn_that_does_not_fit_changes_nothing():
    session = Session(Engine(small_model(vocab_size=258, max_position_embeddings=60), TOKENIZER))
    reply = say(session, "It was a dark")
    ids = list(session.ids)
    with pytest.raises(UserError, match="shorten"):
        say(session, "x" * 60)
    assert session.ids == ids
    say(session, "and")
    assert session.undo() and session.ids == ids
    assert session.undo() and say(session, "It was a dark") == reply


# --- log-probabilities -----------------------------------------------------------------------------------------------


def test_logprobs_are_the_models_own(model: Transformer) -> None:
    """Of the drawn tokens and the likeliest, whatever temperature and filters did, alone or beside others."""
    tokenizer = ByteTokenizer()
    engine = Engine(model, tokenizer)
    asked = SamplingParams(temperature=0.7, top_k=5, seed=1, max_tokens=6, logprobs=3)
    silent = SamplingParams(temperature=0, max_tokens=9)
    one, other = engine.generate(["abc", "a longer prompt"], [asked, silent])
    assert other.logprobs == () and len(one.logprobs) == len(one.ids)
    for at, got in enumerate(one.logprobs):
        ids = torch.tensor([*one.prompt_ids, *one.ids[:at]])
        with torch.no_grad():
            want = model(ids)[-1, : tokenizer.vocab_size].double().log_softmax(dim=0)
        assert got.token == one.ids[at]
        assert abs(got.logprob - want[got.token].item()) < 1e-5
        values, order = want.sort(descending=True, stable=True)
        assert [i for i, _ in got.top] == order[:3].tolist()
        assert all(abs(a - b) < 1e-5 for (_, a), b in zip(got.top, values.tolist(), strict=False))
    events = list(engine.stream("abc", asked))
    assert [x for e in events for x in e.logprobs] == list(events[-1].completion.logprobs)  # type: ignore[union-attr]
    assert [x.token for e in events for x in e.logprobs] == [t for e in events for t in e.tokens]


def test_logprobs_of_ties_and_of_none() -> None:
    logits = torch.zeros(2, 5)
    got = logprobs(logits, [SamplingParams(logprobs=2), SamplingParams(logprobs=0)], [4, BROKEN])
    assert got[1] is None and got[0] is not None
    assert [i for i, _ in got[0].top] == [0, 1] and got[0].logprob == pytest.approx(-math.log(5))
    got = logprobs(logits, [SamplingParams(logprobs=0), SamplingParams()], [3, 3])
    assert got[0] is not None and got[0].top == () and got[1] is None
    for wrong in (-1, 101, 1.5, True):
        with pytest.raises(UserError, match="logprobs="):
            SamplingParams(logprobs=wrong)  # type: ignore[arg-type]
