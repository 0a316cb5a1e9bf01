"""Failures caught here: text that speculation changes, by a token where it is greedy, in its distribution where it is
drawn; a draft that is refused and leaves something in a memory; a request that ends among accepted tokens and keeps one
too many; a neighbour, a chunk or a stopped step that changes what is drawn; counts that are not what happened.
"""

import itertools
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4 import ops
from dsv4.bench import speculative as report
from dsv4.checkpoint import save
from dsv4.cli import main
from dsv4.config import ModelConfig, preset_of
from dsv4.controls import build
from dsv4.engine import Completion, Engine, SamplingParams, Session, speculative
from dsv4.engine.sampler import BROKEN, distributions, sample
from dsv4.engine.speculative import Ahead, residual, verify
from dsv4.engine.types import Draft
from dsv4.errors import UserError
from dsv4.measure.subjects import randomise, small_model
from dsv4.model import Segment, Transformer
from dsv4.text import ByteTokenizer

TOKENIZER = ByteTokenizer()
GREEDY = SamplingParams(temperature=0, max_tokens=12, logprobs=0)
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, seed=5, max_tokens=12)


@torch.no_grad()
def foreseeable(model: Transformer, noise: float) -> Transformer:
    """Make a model whose next token mostly follows from the last one, so that its drafter often foresees it: the more
    seldom, the more `noise` comes from the blocks, which read all of the context."""
    vocab, width = model.config.vocab_size, model.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    after = torch.randperm(vocab, generator=generator)
    embedded = torch.nn.functional.normalize(torch.randn(vocab, width, generator=generator)) * width**0.5
    model.embed.weight.copy_(embedded)
    model.head.weight[after] = 0.3 * embedded
    for name, p in model.named_parameters():
        if name.endswith(("wo_b.weight", "w2", "w2.weight")):
            p.mul_(noise)
    if model.config.dspark_stages:
        drafter = model.drafter.last
        drafter.norm.weight.mul_(0.1 * noise)
        drafter.markov_head.markov_w1.weight.copy_(embedded)
        drafter.markov_head.markov_w2.weight[after] = 0.3 * embedded
        return model
    block = model.mtp[0]
    block.e_proj.weight.copy_(torch.eye(width))
    block.h_proj.weight.mul_(noise)
    return model


DRAFTERS: dict[str, dict] = {"mtp": dict(mtp=1), "dspark": dict(dspark=3, dspark_markov_rank=48)}
BOTH = pytest.mark.parametrize("model", DRAFTERS, indirect=True)


def drafting(kind: str, noise: float, **changes) -> Transformer:
    return foreseeable(small_model(**{"vocab_size": 258, **DRAFTERS[kind], **changes}), noise)


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> Transformer:
    """With an MTP block, or the drafter that a test asks for."""
    return drafting(getattr(request, "param", "mtp"), 3)


def prompt(length: int) -> list[int]:
    """Bytes of nothing in particular, different for every length."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(2, 258, (length,), generator=generator).tolist()


def told(c: Completion) -> tuple:
    """What a caller gets for a prompt, whatever the memory held and however it was drafted."""
    return c.prompt_ids, c.ids, c.text, c.finish_reason


def same(a: Completion, b: Completion) -> bool:
    """The same, and the same log-probabilities: to the bit where a token's bits do not depend on what is beside it."""
    allowed = 0 if ops.active("linear") == "cpu" else 1e-4
    pairs = zip(a.logprobs, b.logprobs, strict=True)
    return told(a) == told(b) and all(x.token == y.token and abs(x.logprob - y.logprob) <= allowed for x, y in pairs)


class Oracle:
    """In place of the MTP block's drafts: the right token where `right(request number, position)`, else a wrong one.

    `judged` collects (position, whether it was accepted) of every draft that was judged.
    """

    def __init__(self, engine: Engine, known: dict[tuple[int, ...], list[int]], right: Callable[[int, int], bool]):
        assert engine.speculation is not None
        self.known, self.right, self.judged = known, right, list[tuple[int, bool]]()
        self.draw = engine.speculation.draw
        engine.speculation.choose = self.choose  # type: ignore[method-assign]
        engine.speculation.draw = self.watched  # type: ignore[method-assign]

    def choose(self, ahead: Sequence[Ahead], logits: Tensor) -> list[Draft | None]:
        out: list[Draft | None] = []
        for a in ahead:
            r, at = a.request, a.length + len(a.drafts)
            comes = self.known[tuple(r.ids[: r.num_prompt])]
            token = comes[at - r.num_prompt] if at - r.num_prompt < len(comes) else 5
            out.append(Draft(token if self.right(r.number, at) else (token + 1) % 258))
        return out

    def watched(self, shares):
        drawn = self.draw(shares)
        for one in drawn:
            at, accepted = len(one.request.ids), len(one.tokens) - 1
            self.judged += [(at + i, True) for i in range(accepted)]
            self.judged += [(at + accepted, False)] if accepted < len(one.request.drafts) else []
        return drawn


def finish(engine: Engine, numbers: Sequence[int]) -> list[Completion]:
    """Step until nothing is left: the completions of these requests."""
    done = {}
    while any(True for _ in engine.scheduler):
        done |= {e.request: e.completion for e in engine.step() if e.completion}
    return [done[number] for number in numbers]


def plain(model: Transformer, prompts: Sequence[list[int]], params: SamplingParams, **options) -> list[Completion]:
    return Engine(model, TOKENIZER, max_batch=64, **options).generate(prompts, params)


# --- the rule, by enumeration ----------------------------------------------------------------------------------------


def grid(n: int) -> list[float]:
    return [(i + 0.5) / n for i in range(n)]


def as_logits(weights: Sequence[float]) -> Tensor:
    """Weightless tokens get logits so low that their probability is 0 in fp64."""
    return torch.tensor([math.log(w) if w else -1e4 for w in weights], dtype=torch.float64).float()


# Weights in sixteenths. The accept ratios are of quarters, the leftovers add up to what `left` says, so that grids of
# these sizes meet every share exactly.
RULES = {
    "overlapping": ([6, 1, 4, 5], [2, 4, 8, 2], 7),
    "drafts that are never drawn": ([0, 8, 4, 4], [8, 4, 4, 0], 8),
    "nothing in common": ([8, 8, 0, 0], [0, 0, 8, 8], 16),
    "equal": ([4, 4, 4, 4], [4, 4, 4, 4], 1),
    "one draft alone": ([4, 8, 3, 1], [0, 0, 16, 0], 13),
}


def drawn_by_rule(p: list[int], q: list[int], left: int, given: bool = True) -> Counter[int]:
    """First tokens over all (draft, number that judges it, number of the last token), each as often as it is likely."""
    shares = torch.tensor(q, dtype=torch.float64) / 16
    drafts = [x for x, weight in enumerate(q) for _ in range(weight)]
    cases = [([Draft(x, shares if given else None)], [u, v]) for x in drafts for u in grid(16) for v in grid(left)]
    logits = as_logits(p).repeat(2 * len(cases), 1)
    params = [SamplingParams()] * len(cases)
    return Counter(tokens[0] for tokens in verify(logits, params, [d for d, _ in cases], [u for _, u in cases]))


@pytest.mark.parametrize("case", RULES)
def test_the_first_token_is_distributed_as_the_model_says(case: str) -> None:
    p, q, left = RULES[case]
    got = drawn_by_rule(p, q, left)
    total = 16 * 16 * left
    assert [got[x] * 16 for x in range(4)] == [weight * total for weight in p]


def test_a_draft_that_was_not_drawn_is_one_of_a_certain_token() -> None:
    p, q, left = RULES["one draft alone"]
    assert drawn_by_rule(p, q, left, given=False) == drawn_by_rule(p, q, left)


@pytest.mark.parametrize("wrong", [lambda p, draft: p, lambda p, draft: (p - draft.probs).abs()])
def test_the_enumeration_notices_a_wrong_leftover(monkeypatch: pytest.MonkeyPatch, wrong) -> None:
    monkeypatch.setattr(speculative, "residual", wrong)
    p, q, left = RULES["overlapping"]
    got = drawn_by_rule(p, q, left)
    assert max(abs(got[x] / got.total() - p[x] / 16) for x in range(4)) > 0.02


def test_two_drafts_and_the_token_after_them_are_distributed_as_three_plain_draws() -> None:
    """Over three tokens, each of whose distributions depends on the one before; q is another such chain. What is drawn
    in one step is completed by plain draws, so that every case comes to three tokens."""
    p = {-1: [2, 1, 1], 0: [1, 2, 1], 1: [2, 0, 2], 2: [1, 1, 2]}  # quarters; -1: at the beginning
    q = {-1: [1, 2, 1], 0: [2, 1, 1], 1: [1, 2, 1], 2: [0, 2, 2]}
    tensors = {x: torch.tensor(weights, dtype=torch.float64) / 4 for x, weights in q.items()}
    want: Counter[tuple[int, ...]] = Counter()
    for x, y, z in itertools.product(range(3), repeat=3):
        want[x, y, z] = p[-1][x] * p[x][y] * p[y][z]
    cases = []
    for x, y in itertools.product(range(3), repeat=2):
        for weight in [q[-1][x] * q[x][y]]:
            for u, v, w in itertools.product(grid(4), grid(4), grid(4)):
                cases += [(x, y, [u, v, w])] * weight
    logits = torch.stack([as_logits(p[at]) for x, y, _ in cases for at in (-1, x, y)])
    drafts = [[Draft(x, tensors[-1]), Draft(y, tensors[x])] for x, y, _ in cases]
    out = verify(logits, [SamplingParams()] * len(cases), drafts, [u for _, _, u in cases])
    got: Counter[tuple[int, ...]] = Counter()
    for tokens in out:
        rest = [(tuple(tokens), 64)]
        while len(rest[0][0]) < 3:
            rest = [((*t, x), n * p[t[-1]][x] // 4) for t, n in rest for x in range(3)]
        for t, n in rest:
            got[t] += n
    assert {len(tokens) for tokens in out} == {1, 2, 3}
    assert {t: n / got.total() for t, n in got.items() if n} == {t: n / 64 for t, n in want.items() if n}


def test_filters_act_on_what_is_drawn_and_on_what_is_left() -> None:
    """A draft that top-k leaves out is always refused, and nothing that is left out comes instead of it."""
    logits = as_logits([6, 5, 4, 1]).repeat(2, 1)
    p = SamplingParams(top_k=2, temperature=0.5)
    q = distributions(as_logits([1, 4, 6, 5])[None], [p])[0]  # 2 and 3
    for u, v in itertools.product(grid(20), grid(20)):
        assert verify(logits, [p], [[Draft(2, q)]], [[u, v]])[0][0] in (0, 1)
    for v in grid(20):
        assert verify(logits, [p], [[Draft(0, q)]], [[0.99, v]])[0][0] == 0, "q has no share of it"


def test_greedy_and_drawn_requests_side_by_side_are_each_alone() -> None:
    """With rows that are not finite: accepted tokens stand, and what should come from such a row is BROKEN."""
    generator = torch.Generator().manual_seed(0)
    params, drafts, logits, uniform = [], [], [], []
    for i in range(40):
        rows = 1 + i % 4
        made = torch.randn(rows, 9, generator=generator)
        greedy = i % 3 == 0
        params.append(SamplingParams(temperature=0 if greedy else 0.8, top_p=0.9))
        q = torch.rand(rows, 9, generator=generator).double()
        q /= q.sum(dim=1, keepdim=True)
        best = made.argmax(dim=1).tolist()
        drafts.append([Draft(best[j]) if greedy and i % 2 else Draft(j, q[j]) for j in range(rows - 1)])
        uniform.append([] if greedy else torch.rand(rows, generator=generator).tolist())
        if i % 5 == 4:
            made[rows - 1, 3] = float("nan")
        logits.append(made)
    together = verify(torch.cat(logits), params, drafts, uniform)
    alone = [verify(x, [p], [d], [u])[0] for x, p, d, u in zip(logits, params, drafts, uniform, strict=True)]
    assert together == alone
    assert {len(tokens) for tokens in alone} == {1, 2, 3, 4}
    for i, tokens in enumerate(alone):
        assert all(0 <= t < 9 for t in tokens[:-1])
        assert (tokens[-1] == BROKEN) == (i % 5 == 4 and len(tokens) == len(logits[i]))
    assert verify(torch.empty(0, 9), [], [], []) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0, 1])
def test_no_draft_is_accepted_by_a_row_that_is_not_finite(bad: float, temperature: float) -> None:
    """Not even the token on which an infinity stands."""
    logits = torch.zeros(3, 5)
    logits[0, 2], logits[1, 4] = 50, bad
    drafts = [Draft(2), Draft(4)]
    assert verify(logits, [SamplingParams(temperature=temperature)], [drafts], [[0.5] * 3]) == [[2, BROKEN]]


def test_without_drafts_it_is_the_plain_draw() -> None:
    logits, params = torch.randn(30, 50), [SamplingParams(temperature=(i % 3) / 2, top_k=i % 4) for i in range(30)]
    generators = [torch.Generator().manual_seed(i) for i in range(30)]
    uniform = [speculative.numbers(torch.Generator().manual_seed(i), 1) for i in range(30)]
    assert verify(logits, params, [[]] * 30, uniform) == [[t] for t in sample(logits, params, generators)]


def test_where_nothing_is_left_but_roundings_the_model_s_own_distribution_is() -> None:
    p = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    more = p.nextafter(torch.ones(()).double())
    assert torch.equal(residual(p, Draft(1, more)), p)
    assert torch.equal(residual(torch.tensor([0.0, 1.0]).double(), Draft(1)), torch.tensor([0.0, 1.0]).double())
    assert torch.equal(residual(p, Draft(1)), torch.tensor([0.5, 0, 0]).double())


# --- greedy: the tokens of plain decoding ----------------------------------------------------------------------------


def test_a_thousand_prompts_get_the_tokens_of_plain_decoding() -> None:
    """On the tiny preset, over all residues mod 128 of the prompt's length; drafts are refused and accepted at each."""
    tiny = foreseeable(randomise(Transformer(ModelConfig.preset("tiny")), 0), 1.3)
    prompts = [prompt(1 + i % 128)[:-1] + [2 + i % 250] for i in range(1000)]
    params = SamplingParams(temperature=0, max_tokens=5)
    engines = [Engine(tiny, TOKENIZER, max_batch=64, speculative=depth) for depth in (0, 1)]
    want, got = (finish(engine, [engine.add(ids, params) for ids in prompts]) for engine in engines)
    assert [c.ids for c in got] == [c.ids for c in want]
    accepted: Counter[int] = Counter()
    refused: Counter[int] = Counter()
    for c in got:
        accepted[len(c.prompt_ids) % 128] += c.accepted
        refused[len(c.prompt_ids) % 128] += c.drafted - c.accepted
    assert all(accepted[n] for n in range(128)) and all(refused[n] for n in range(128))


def test_blocks_of_drafts_change_no_token_at_any_residue() -> None:
    """The drafter's own blocks, of the length that it was trained for: some of each are accepted and some refused."""
    model = drafting("dspark", 4.5)
    prompts, params = [prompt(100 + i) for i in range(128)], replace(GREEDY, max_tokens=9)
    want = plain(model, prompts, params)
    got = Engine(model, TOKENIZER, max_batch=64, speculative=5).generate(prompts, params)
    assert all(same(a, b) for a, b in zip(got, want, strict=True))
    accepted, drafted = sum(c.accepted for c in got), sum(c.drafted for c in got)
    assert 0.2 < accepted / drafted < 0.8
    assert sum(0 < c.accepted < c.drafted for c in got) > 100


@pytest.mark.parametrize(
    ("model", "depth", "format"),
    [
        ("mtp", 1, "float32"),
        ("mtp", 1, "packed"),
        ("mtp", 3, "float32"),
        ("mtp", 4, "packed"),
        ("dspark", 2, "packed"),
        ("dspark", 5, "float32"),
    ],
    indirect=["model"],
)
def test_every_way_of_being_accepted_at_every_residue(model: Transformer, depth: int, format: str) -> None:
    """Prompts of every residue mod 128, decoded across the edges of groups and pages; half of the drafts are right."""
    prompts = [prompt(60 + i) for i in range(128)]
    params = replace(GREEDY, max_tokens=24)
    want = plain(model, prompts, params, memory_format=format)
    engine = Engine(model, TOKENIZER, max_batch=40, memory_format=format, speculative=depth)
    known = {tuple(c.prompt_ids): c.ids for c in want}
    oracle = Oracle(engine, known, lambda number, at: random.Random(f"{number} {at}").random() < 0.5)
    got = engine.generate(prompts, params)
    assert all(same(a, b) for a, b in zip(got, want, strict=True))
    assert {(at % 128, accepted) for at, accepted in oracle.judged} == set(itertools.product(range(128), (True, False)))
    assert sum(c.accepted for c in got) <= sum(accepted for _, accepted in oracle.judged), "an end may cut some off"
    runs = Counter(len(list(run)) for ok, run in itertools.groupby(oracle.judged, key=lambda j: j[1]) if ok)
    assert max(runs) >= depth and len(runs) >= depth


@pytest.mark.parametrize(
    ("model", "depth", "max_batch", "budget"),
    [("mtp", d, *b) for d in (1, 2, 5) for b in ((16, 2048), (2, 12), (5, 30), (3, 131))]
    + [("dspark", 5, 2, 12), ("dspark", 3, 16, 2048)],
    indirect=["model"],
)
def test_a_ragged_batch_is_each_alone(model: Transformer, depth: int, max_batch: int, budget: int) -> None:
    """Greedy and drawn, waiting in line, chunks of every size beside drafts: what is drawn, and how it was drafted."""
    batch = [(prompt(n), [GREEDY, SEEDED][i % 2]) for i, n in enumerate((130, 1, 7, 40, 3, 127, 128, 2))]
    alone = [Engine(model, TOKENIZER, speculative=depth).generate([ids], p)[0] for ids, p in batch]
    engine = Engine(model, TOKENIZER, max_batch=max_batch, tokens_per_step=budget, speculative=depth)
    for again in range(2):  # the second time beside others, which join one by one
        numbers, done = [], {}
        for i, (ids, p) in enumerate(batch):
            if again:
                engine.add(prompt(10 + i), replace(SEEDED, seed=i, max_tokens=3 + i))
                done |= {e.request: e.completion for e in engine.step() if e.completion}
            numbers.append(engine.add(ids, p))
        while any(True for _ in engine.scheduler):
            done |= {e.request: e.completion for e in engine.step() if e.completion}
        for number, one in zip(numbers, alone, strict=True):
            assert same(done[number], one) and (done[number].drafted, done[number].accepted) == (
                one.drafted,
                one.accepted,
            )
    for (ids, p), one in zip(batch, alone, strict=True):
        if p is GREEDY:
            assert same(one, plain(model, [ids], p)[0])
    assert 0 < sum(c.accepted for c in alone) < sum(c.drafted for c in alone)


@BOTH
def test_too_few_pages_change_nothing(model: Transformer) -> None:
    """Twelve requests on 5 pages: who gives way keeps its drafts, and every page is free in the end."""
    prompts = [prompt(n) for n in (100, 120, 127, 128, 129, 30, 250, 1, 126, 125, 60, 124)]
    params = [replace(SEEDED if i % 2 else GREEDY, max_tokens=60) for i in range(len(prompts))]
    want = Engine(model, TOKENIZER, speculative=3).generate(prompts, params)
    engine, preempted = Engine(model, TOKENIZER, pages=5, tokens_per_step=200, speculative=3), []
    preempt = engine.scheduler._preempt
    engine.scheduler._preempt = lambda r: (preempted.append(len(r.drafts)), preempt(r))[1]  # type: ignore
    got = engine.generate(prompts, params)
    assert all(same(a, b) for a, b in zip(got, want, strict=True))
    assert [c.accepted for c in got] == [c.accepted for c in want]
    assert len(preempted) > 3 and max(preempted) == 3, "some gave way while they held drafts"
    assert engine.pool.free_pages == 5 and engine.pool.free_slots == engine.pool.num_slots  # type: ignore[attr-defined]


@BOTH
@pytest.mark.parametrize("length", [238, 250, 251, 252, 253])
def test_a_request_that_fills_all_pages_ends_in_them(model: Transformer, length: int) -> None:
    """Drafts never reach beyond what the request may take, deeper ones included."""
    params = replace(GREEDY, max_tokens=256 - length)
    engine = Engine(model, TOKENIZER, pages=2, speculative=4)
    want = plain(model, [prompt(length)], params)[0]
    Oracle(engine, {tuple(want.prompt_ids): want.ids}, lambda number, at: at % 6 > 0)
    got = engine.generate([prompt(length)], params)[0]
    assert same(got, want) and got.finish_reason == "length" and got.accepted


@pytest.mark.parametrize("kind", DRAFTERS)
def test_the_end_of_the_context(kind: str) -> None:
    short = drafting(kind, 3, max_position_embeddings=40)
    prompts = [prompt(n) for n in (29, 30, 31, 36, 37, 38, 39)]
    for depth in (1, 3):
        got = Engine(short, TOKENIZER, speculative=depth).generate(prompts, GREEDY)
        assert all(same(a, b) for a, b in zip(got, plain(short, prompts, GREEDY), strict=True))
        assert [len(c.ids) for c in got] == [11, 10, 9, 4, 3, 2, 1]


@pytest.mark.parametrize("depth", [1, 3])
def test_drafts_are_what_the_mtp_block_says_of_the_whole_text(model: Transformer, depth: int) -> None:
    """The first of each step, from the trunk's streams and the tokens that were drawn, whatever was refused before."""
    engine, drafted = Engine(model, TOKENIZER, tokens_per_step=64, speculative=depth), dict[int, int]()
    assert engine.speculation is not None
    choose = engine.speculation.choose

    def noted(ahead: Sequence[Ahead], logits: Tensor) -> list[Draft | None]:
        made = choose(ahead, logits)
        drafted.update({a.length: d.token for a, d in zip(ahead, made, strict=True) if d and not a.drafts})
        return made

    engine.speculation.choose = noted  # type: ignore[method-assign]
    done = engine.generate([prompt(101)], replace(GREEDY, max_tokens=60))[0]
    ids = torch.tensor([*done.prompt_ids, *done.ids])
    with torch.no_grad():
        hidden, rows, _ = model.predict_next(model.trunk(ids, [Segment(len(ids))]), ids)
        says = dict(zip((rows + 2).tolist(), model.logits(hidden).argmax(dim=1).tolist(), strict=True))
    assert len(drafted) > 20 and drafted == {at: says[at] for at in drafted}
    assert 0 < done.accepted < done.drafted


# --- a request that ends among accepted tokens -----------------------------------------------------------------------


def right(number: int, at: int) -> bool:
    return True


class Letters(ByteTokenizer):
    """Every token is a letter of its own, so that stop strings can begin and end with any of them."""

    @cached_property
    def token_table(self) -> list[bytes]:
        return [b"", b"", *(chr(0x100 + i).encode() for i in range(256))]


@pytest.mark.parametrize("end", range(1, 12))
@pytest.mark.parametrize(("model", "depth"), [("mtp", 1), ("mtp", 2), ("mtp", 6), ("dspark", 5)], indirect=["model"])
def test_a_request_ends_where_plain_decoding_ends(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, depth: int, end: int
) -> None:
    """By a stop id, a stop string or max_tokens at each place of the drafts, all of which are right."""
    letters, ids = Letters(), prompt(33)
    whole = Engine(model, letters).generate([ids], GREEDY)[0]
    assert len(set(whole.ids)) == 12 == len(whole.text)
    for way in ("stop id", "stop string", "length"):
        monkeypatch.setattr(model, "stop_ids", (whole.ids[end],) if way == "stop id" else ())
        params = replace(GREEDY, stop=[whole.text[end - 1 : end + 1]] if way == "stop string" else [])
        params = replace(params, max_tokens=end) if way == "length" else params
        want = Engine(model, letters).generate([ids], params)[0]
        assert len(want.ids) == end + (way != "length"), way
        engine = Engine(model, letters, speculative=depth)
        Oracle(engine, {tuple(ids): whole.ids}, right)
        events = list(engine.stream(ids, params))
        got = events[-1].completion
        assert got is not None and same(got, want), way
        assert [t for e in events for t in e.tokens] == got.ids
        assert "".join(e.text for e in events) == got.text
        assert [x for e in events for x in e.logprobs] == list(got.logprobs)
        steps = sum(1 for e in events if e.tokens)
        cut = 0 if way == "length" else int(got.accepted != len(got.ids) - steps)  # it ended with an accepted draft
        assert got.accepted == len(got.ids) - steps + cut, "every other step adds a token to those accepted"
        assert got.drafted >= got.accepted and (got.accepted or len(got.ids) < 3)
        assert got.drafted == got.accepted or way != "length", "nothing is drafted that has no place"


def say(session: Session, text: str, params: SamplingParams) -> list[int]:
    return [t for e in session.generate(text, params) for t in e.tokens]


@pytest.mark.parametrize("rewind", [0, 8])
@pytest.mark.parametrize(("model", "depth"), [("mtp", 1), ("mtp", 3), ("dspark", 5)], indirect=["model"])
def test_a_session_is_one_long_prompt(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, rewind: int, depth: int
) -> None:
    """Turn after turn, over eos and stop strings among accepted tokens, with undo and rewind."""
    engine = Engine(model, TOKENIZER, max_rewind=rewind, speculative=depth)
    session, short = Session(engine), replace(GREEDY, max_tokens=7)
    starts: list[list[int]] = []
    for turn, text in enumerate(("It was a dark", " and stormy night" * 8, "", "x", "", "yz")):
        starts.append(list(session.ids))
        ids = session.ids + TOKENIZER.encode(text)
        want = plain(model, [ids], short)[0]
        with monkeypatch.context() as patch:
            if turn % 2:
                patch.setattr(engine, "stop_ids", frozenset({want.ids[turn]}))
                want = replace(want, ids=want.ids[: want.ids.index(want.ids[turn]) + 1])
            reply = say(session, text, short)
            assert reply == want.ids
            ended = reply[-1] in engine.stop_ids
        engine.stop_ids = frozenset({TOKENIZER.eos_id})
        assert session.ids == ids + (reply[:-1] if turn % 2 and ended else reply)
    assert session.undo() and session.ids == starts[5]
    assert say(session, "!", short) == plain(model, [[*starts[5], 35]], short)[0].ids
    for count in (3, 5, 9):
        session.rewind(count)
        ids = [*session.ids, 35]
        assert say(session, "!", short) == plain(model, [ids], short)[0].ids


@BOTH
def test_a_timeline_drafts_as_if_it_had_been_read_at_once(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the drafter remembers of a turn is what it reads in one long prompt, also where the turn ended with an eos
    that is not part of the timeline, and after a rewind: else drawn text would depend on it."""
    engine = Engine(model, TOKENIZER, max_rewind=30, speculative=2)
    for way in ("said", "ended", "rewound", "undone"):
        session = Session(engine)
        first = say(session, "It was", replace(GREEDY, max_tokens=9))
        if way == "ended":
            session.reset()
            with monkeypatch.context() as patch:
                patch.setattr(engine, "stop_ids", frozenset({first[4]}))
                say(session, "It was", replace(GREEDY, max_tokens=9))
                # closes the turn while the eos is one
                assert session.ids[-1] != first[4]
        if way == "rewound":
            session.rewind(3)
        if way == "undone":
            say(session, " so", GREEDY)
            session.undo()
        for text in ("", " then"):
            twin = Engine(model, TOKENIZER, speculative=2).generate([session.ids + TOKENIZER.encode(text)], SEEDED)[0]
            events = list(session.generate(text, SEEDED))
            done = events[-1].completion
            assert done is not None and told(done) == told(twin)
            assert (done.drafted, done.accepted) == (twin.drafted, twin.accepted), (way, text)
            session.undo()


@BOTH
@pytest.mark.parametrize("where", range(1, 40, 3))
def test_forks_go_their_own_ways(model: Transformer, where: int) -> None:
    """A request that is `where` events old, its memory forked with drafts in flight: all three go on exactly."""
    ids = prompt(118)
    params = replace(GREEDY, max_tokens=60)
    want = plain(model, [ids], params)[0]
    engine = Engine(model, TOKENIZER, speculative=3)
    Oracle(engine, {tuple(ids): want.ids}, lambda number, at: at % 5 > 0)
    request = engine.prepare(ids, params)
    events = engine.follow(engine.submit(request))
    for _ in range(where):
        event = next(events)
        if event.completion:
            return
    assert request.memory is not None
    known = list(request.ids)
    other = [*known[:-1], (known[-1] + 1) % 250 + 2]  # a fork has not read the last token
    short = replace(GREEDY, max_tokens=12)
    twins = [engine.prepare(x, short, request.memory.fork(), lasting=True) for x in (known, other)]
    engine.speculation.choose = type(engine.speculation).choose.__get__(engine.speculation)  # type: ignore
    numbers = [engine.submit(twin) for twin in twins]
    done = {e.request: e.completion for n in numbers for e in engine.follow(n) if e.completion}
    for number, x in zip(numbers, (known, other), strict=True):
        assert same(done[number], plain(model, [x], short)[0])
    last = [e.completion for e in events if e.completion][-1]
    assert last is not None and same(last, want)


# --- drawn: the distribution of plain decoding -----------------------------------------------------------------------


@torch.no_grad()
def likelihood(model: Transformer, ids: list[int], params: SamplingParams) -> dict[tuple[int, ...], float]:
    """Every text of max_tokens tokens that plain decoding may draw, and how likely it is."""
    out = {(): 1.0}
    for _ in range(params.max_tokens):
        texts = list(out)
        logits = torch.stack([model(torch.tensor([*ids, *t]))[-1, : TOKENIZER.vocab_size] for t in texts])
        probs = distributions(logits, [params] * len(texts))
        out = {
            (*t, int(x)): out[t] * probs[row, x].item()
            for row, t in enumerate(texts)
            for x in probs[row].nonzero()[:, 0]
        }
    return out


def unlikely(got: Counter[tuple[int, ...]], likely: dict[tuple[int, ...], float]) -> float:
    """Pearson's chi-square of counted texts."""
    n = got.total()
    assert set(got) <= set(likely)
    return sum((got[t] - n * p) ** 2 / (n * p) for t, p in likely.items())


@pytest.mark.parametrize(("kind", "rule"), [("mtp", "ours"), ("mtp", "leftover ignored"), ("dspark", "ours")])
def test_drawn_texts_are_as_likely_as_plain_ones(monkeypatch: pytest.MonkeyPatch, kind: str, rule: str) -> None:
    """16 texts of four tokens, 3000 seeds with two drafts a step: within what 1 of 1000 honest samplers exceeds
    (37.7 with 15 degrees of freedom); and a wrong leftover is far outside."""
    if rule != "ours":
        monkeypatch.setattr(speculative, "residual", lambda p, draft: p)
    model = drafting(kind, 1.5)
    params, ids = SamplingParams(temperature=8, top_k=2, max_tokens=4), [17]
    likely = likelihood(model, ids, params)
    assert len(likely) == 16 and abs(sum(likely.values()) - 1) < 1e-6 and min(likely.values()) > 1e-3
    assert not any(TOKENIZER.eos_id in text for text in likely)
    engine = Engine(model, TOKENIZER, max_batch=128, speculative=2)
    done = finish(engine, [engine.add(ids, replace(params, seed=i)) for i in range(3000)])
    share = sum(c.accepted for c in done) / sum(c.drafted for c in done)
    assert 0.2 < share < 0.9, "both accepted and refused"
    found = unlikely(Counter(tuple(c.ids) for c in done), likely)
    assert found < 37.7 if rule == "ours" else found > 75


def test_a_seed_fixes_the_text_and_no_seed_does_not(model: Transformer) -> None:
    engine = Engine(model, TOKENIZER, speculative=2)
    a, b, c = engine.generate([prompt(5)] * 3, [SEEDED, SEEDED, replace(SEEDED, seed=6)])
    d, e = engine.generate([prompt(5)] * 2, replace(SEEDED, seed=None))
    assert a.ids == b.ids != c.ids and d.ids != e.ids


# --- trouble ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    ("model", "where"),
    [("mtp", "trunk"), ("mtp", "draft"), ("mtp", "deeper draft"), ("dspark", "trunk"), ("dspark", "draft")],
    indirect=["model"],
)
def test_a_step_that_is_stopped_half_way_loses_nothing(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    """No token, no draft and no random number: all is drawn as if nothing had happened, chunks included."""
    batch = [(prompt(n), [GREEDY, SEEDED][i % 2]) for i, n in enumerate((130, 1, 7, 40, 3))]
    ids, params = zip(*batch, strict=True)
    want = Engine(model, TOKENIZER, speculative=3).generate(ids, params)
    engine = Engine(model, TOKENIZER, max_batch=4, tokens_per_step=50, speculative=3)
    numbers = [engine.add(*request) for request in batch]
    block = model.layers[-1] if where == "trunk" else model.mtp[0].block
    moe, calls, stops, done, deep = block.ffn, itertools.count(), 0, {}, []
    every = 3 if model.config.dspark_stages and where == "draft" else 5  # a drafter of blocks is called less often
    whole, deeper = moe.forward, model.draft_deeper

    def stopping(*args):
        if bool(deep) == (where == "deeper draft") and next(calls) % every == every - 1:
            raise error
        return whole(*args)

    def noted(*args):
        deep.append(True)
        try:
            return deeper(*args)
        finally:
            deep.pop()

    monkeypatch.setattr(moe, "forward", stopping)
    monkeypatch.setattr(model, "draft_deeper", noted)
    for _ in range(80):
        try:
            done |= {e.request: e.completion for e in engine.step() if e.completion}
        except type(error):
            stops += 1
    assert stops > 3
    for number, one in zip(numbers, want, strict=True):
        assert same(done[number], one)
        assert (done[number].drafted, done[number].accepted) == (one.drafted, one.accepted)


@BOTH
@pytest.mark.parametrize("budget", [4, 5, 6])
def test_lost_memories_are_computed_again_up_to_the_drafts(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """In chunks that would end among the drafts: these are verified together with the token before them."""
    params = replace(SEEDED, max_tokens=24)
    want = Engine(model, TOKENIZER, speculative=3).generate([prompt(9)], params)[0]
    trunk = model.trunk
    for lost in range(4, 9):
        engine, calls = Engine(model, TOKENIZER, max_batch=1, tokens_per_step=budget, speculative=3), itertools.count()

        def stopping(*args, lost=lost, calls=calls):
            if next(calls) == lost:
                raise KeyboardInterrupt
            return trunk(*args)

        with monkeypatch.context() as patch:
            patch.setattr(model, "trunk", stopping)
            number = engine.add(prompt(9), params)
            with pytest.raises(KeyboardInterrupt):
                finish(engine, [number])
            got = finish(engine, [number])[0]
        assert told(got) == told(want) and (got.drafted, got.accepted) == (want.drafted, want.accepted)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_request_whose_logits_are_not_finite_ends_alone(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    """At each place of its drafts: the tokens before it stand, as in plain decoding, and the others go on."""
    prompts = [prompt(n) for n in (130, 7, 40)]
    want = plain(model, prompts, GREEDY)
    for bad in range(1, 9):
        engine = Engine(model, TOKENIZER, speculative=depth)
        Oracle(engine, {tuple(c.prompt_ids): c.ids for c in want}, right)
        assert engine.speculation is not None
        logits = engine.speculation._run

        def damaged(shares, run=logits, bad=bad):
            trunk, out = run(shares)
            row = 0
            for share in shares:
                r, count = share.request, 1 + len(share.request.drafts)
                if share.request.pending:
                    continue
                if r.number == 1:
                    at = len(r.ids) - r.num_prompt
                    out[row : row + count][[at + i == bad for i in range(count)], 3] = float("nan")
                row += count
            return trunk, out

        engine.speculation._run = damaged  # type: ignore[method-assign]
        got = engine.generate(prompts, GREEDY)
        assert got[1].finish_reason == "error" and got[1].ids == want[1].ids[:bad]
        assert same(got[0], want[0]) and same(got[2], want[2])


@pytest.mark.parametrize("kind", DRAFTERS)
def test_a_drafter_that_is_not_finite_costs_its_drafts_alone(kind: str) -> None:
    broken = drafting(kind, 3)
    with torch.no_grad():
        broken.mtp[-1].norm.weight.fill_(float("nan"))  # type: ignore[union-attr]
    got = Engine(broken, TOKENIZER, speculative=2).generate([prompt(5), prompt(130)], GREEDY)
    assert all(same(a, b) for a, b in zip(got, plain(broken, [prompt(5), prompt(130)], GREEDY), strict=True))
    assert all(c.drafted == c.accepted == 0 for c in got)


@pytest.mark.parametrize("kind", DRAFTERS)
def test_padded_vocabulary_is_neither_drafted_nor_drawn(kind: str) -> None:
    padded = drafting(kind, 3, vocab_size=300)
    with torch.no_grad():
        padded.head.weight[258:] *= 50
    params = [SamplingParams(max_tokens=30, seed=0), SamplingParams(max_tokens=30, temperature=0)]
    engine = Engine(padded, TOKENIZER, speculative=2)
    choose, drafted = engine.speculation.choose, list[Draft]()  # type: ignore[union-attr]
    engine.speculation.choose = lambda a, x: [drafted.append(d) or d for d in choose(a, x)]  # type: ignore
    done = engine.generate(["a", "b"], params)
    assert all(i < 258 for c in done for i in c.ids) and all(d.token < 258 for d in drafted)
    drawn = [d.probs for d in drafted if d.probs is not None]
    assert 0 < len(drawn) < len(drafted), "the drawn request's drafts know their distribution, greedy ones have none"
    assert all(len(q) == 258 and abs(q.sum().item() - 1) < 1e-9 for q in drawn)
    assert all(d.probs is None or d.probs[d.token] > 0 for d in drafted)


# --- wrong use -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_speculated_with_is_refused_at_once(model: Transformer, tmp_path: Path) -> None:
    for wrong in (-1, 1.5, True, "2"):
        with pytest.raises(UserError, match="speculative="):
            Engine(model, TOKENIZER, speculative=wrong)  # type: ignore[arg-type]
    bare = small_model(vocab_size=258)
    controls = build(preset_of("v32", "tiny").with_(vocab_size=258), "float32")
    for other in (bare, controls):
        with pytest.raises(UserError, match="speculative=1, but the model has no MTP block"):
            Engine(other, TOKENIZER, speculative=1)
    with pytest.raises(UserError, match="tokens_per_step=40 must be at least max_batch=16 x .1 . 2 drafted"):
        Engine(model, TOKENIZER, tokens_per_step=40, speculative=2)
    save(bare, tmp_path / "bare")
    TOKENIZER.save(tmp_path / "bare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsv4.engine.engine.load", lambda *a, **k: pytest.fail("weights were read"))
        with pytest.raises(UserError, match="no MTP block"):
            Engine.open(tmp_path / "bare", speculative=1)


def test_off_is_off(model: Transformer) -> None:
    """No window for the MTP block, none of its calls, no counts."""
    engine = Engine(model, TOKENIZER)
    assert engine.speculation is None and not engine.pool.mtp  # type: ignore[attr-defined]
    done = engine.generate(["a"], GREEDY)[0]
    assert done.drafted == done.accepted == 0


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report_s_rows_hold_together(model: Transformer) -> None:
    subject = report.Subject("foreseeable", model, TOKENIZER, "float32")
    notes: list[str] = []
    rows = report.measure(subject, [1, 3], [1, 3], [0.0, 1.0], 9, 2, notes.append)
    assert [(r["temperature"], r["batch"], r["drafts"]) for r in rows] == list(
        itertools.product((0, 1), (1, 3), (0, 1, 3))
    )
    assert len(notes) == 8
    for r in rows:
        assert r["slowest"] <= r["tokens_per_second"] <= r["fastest"] and r["repeats"] == 2
        assert r["same_as_plain"] is (None if r["temperature"] else True)
        if r["drafts"]:
            assert r["acceptance"] == r["accepted"] / r["drafted"] and 1 <= r["tokens_per_call"] <= 1 + r["drafts"]
        else:
            plain_rate = r["tokens_per_second"]
            assert r["acceptance"] is None and r["tokens_per_call"] == 1 == r["times_plain"]
        assert r["times_plain"] == r["tokens_per_second"] / plain_rate
    greedy = next(r for r in rows if r["drafts"] == 1)
    # each pass: 8 tokens after the first, in `calls` calls, all but the last of which had a draft
    assert greedy["accepted"] > 0 and greedy["tokens_per_call"] > 1
    text = report.lines(rows)
    assert len(text) == 13 and "those of plain decoding" in text[1] and "drawn" in text[-1]


def test_a_report_says_so_where_tokens_differ(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculative, "verify", lambda logits, params, drafts, uniform: [[7] for _ in params])
    subject = report.Subject("foreseeable", model, TOKENIZER, "float32")
    rows = report.measure(subject, [1], [1], [0.0], 4, 1, lambda _: None)
    assert rows[1]["same_as_plain"] is False and "OTHERS" in report.lines(rows)[2]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["tiny", "--drafts", "one"], "--drafts 'one' must be numbers"),
        (["tiny", "--drafts", "0"], "must be from 1"),
        (["tiny", "--cache", "paper"], "'paper' is unknown"),
    ],
)
def test_a_wrong_option_of_the_report_ends_in_one_sentence(
    options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["dsv4", "bench", "speculative", *options, "--out", str(tmp_path / "x.json")])
    with pytest.raises(SystemExit) as stop:
        main()
    told = capsys.readouterr().err
    assert stop.value.code == 2 and says in told and told.count("\n") == 1 and not (tmp_path / "x.json").exists()


def test_the_verb_writes_and_prints_the_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a saved model, with its tokenizer and its own MTP block."""
    save(foreseeable(small_model(vocab_size=258, mtp=1), 1), tmp_path / "m")
    TOKENIZER.save(tmp_path / "m")
    out = tmp_path / "deep" / "rows.json"
    options = ["--drafts", "2", "--batch", "2", "--temperature", "0", "--tokens", "7", "--repeats", "1", "--json"]
    monkeypatch.setattr(sys, "argv", ["dsv4", "bench", "speculative", str(tmp_path / "m"), *options, "--out", str(out)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows == json.loads(out.read_text(encoding="utf-8"))["rows"] and [r["drafts"] for r in rows] == [0, 2]
    assert rows[1]["acceptance"] > 0.9 and rows[1]["same_as_plain"] is True
