"""One pool of pages and slots under many sequences: what they share, what they copy, and what they give back.

Failures caught here: a page written while another sequence reads it, a page or slot that is lost or has two owners,
rows of a sequence that had the slot before, a call that finds too few pages half way and leaves torn memories, and a
shared prefix that is not exactly the prefix. The memory that nothing is shared with is the same model on a pool of its
own, and the whole sequence without a memory.
"""

from collections import Counter

import pytest
import torch
from differences import differ
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from dsv4.cache import OutOfPages, SequenceMemory
from dsv4.errors import UserError
from dsv4.measure.subjects import KINDS, small_model, tokens
from dsv4.model import Segment, Transformer
from dsv4.model.segments import plan

EXACT = 1e-5  # other sequences in a call change the order of sums
MOST = 40  # sequences at a time
PAGES = 48
RATIOS = KINDS["whole"]


def build() -> Transformer:
    return small_model(RATIOS, sliding_window=16).eval()


def feed(model: Transformer, memory: SequenceMemory, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, memory)


# --- random schedules ------------------------------------------------------------------------------------------------


class Sequence:
    """A sequence on the shared pool, its twin on a pool of its own, and what both should remember."""

    def __init__(self, memory: SequenceMemory, alone: SequenceMemory, past: Tensor):
        self.memory, self.alone, self.past = memory, alone, past


class Schedules(RuleBasedStateMachine):
    """Any order of add, run, fork, rewind, release, preempt and resume, of up to 40 sequences on 48 pages."""

    model = build()
    steps = 0  # of all schedules so far, a beginning counted with each

    def __init__(self) -> None:
        super().__init__()
        self.pool = self.model.new_pool(pages=PAGES, max_rewind=40)
        self.running: list[Sequence] = []
        self.waiting: list[tuple[dict[str, Tensor], Sequence]] = []  # preempted: a snapshot, and who it is
        self.drawn = 0

    def some(self, data: st.DataObject, most: int) -> list[Sequence]:
        places = st.lists(st.integers(0, len(self.running) - 1), unique=True, min_size=1, max_size=most)
        return [self.running[i] for i in data.draw(places)]

    def fresh(self, count: int) -> Tensor:
        self.drawn += 1
        return tokens(self.model, count, seed=self.drawn)

    @precondition(lambda self: len(self.running) + len(self.waiting) < MOST)
    @rule()
    def add(self) -> None:
        alone = self.model.new_pool(max_rewind=40).new()
        self.running.append(Sequence(self.pool.new(), alone, torch.zeros(0, dtype=torch.int64)))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), longest=st.sampled_from([1, 1, 1, 5, 70, 200]))
    def run(self, data: st.DataObject, longest: int) -> None:
        """Chunks of prompts and single tokens in one call; too few pages: a clear answer, and nothing has changed."""
        chosen = self.some(data, 12)
        parts = [self.fresh(1 + (self.drawn * 37) % longest) for _ in chosen]
        segments = [(len(part), s.memory) for part, s in zip(parts, chosen, strict=True)]
        short = self.pool.shortage([(s.memory, len(part)) for part, s in zip(parts, chosen, strict=True)])
        before = [(s.memory.length, [*s.memory.pages]) for s in chosen]
        try:
            with torch.no_grad():
                together = self.model(torch.cat(parts), segments=segments)
        except OutOfPages:
            assert short and before == [(s.memory.length, s.memory.pages) for s in chosen]
            return
        assert not short
        for s, part, got in zip(chosen, parts, together.split([len(p) for p in parts]), strict=True):
            assert differ(feed(self.model, s.alone, part), got) < EXACT
            s.past = torch.cat([s.past, part])

    @precondition(lambda self: self.running and len(self.running) + len(self.waiting) < MOST)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        (s,) = self.some(data, 1)
        self.running.append(Sequence(s.memory.fork(), s.alone.fork(), s.past))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), count=st.integers(0, 40))
    def rewind(self, data: st.DataObject, count: int) -> None:
        (s,) = self.some(data, 1)
        count = min(count, s.memory.max_rewind - (s.memory.newest - s.memory.length), s.memory.length)
        s.memory.rewind(count)
        s.alone.rewind(count)
        s.past = s.past[: len(s.past) - count]

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        (s,) = self.some(data, 1)
        s.memory.release()
        self.running.remove(s)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """A handle that nobody holds any more gives back what it had."""
        self.running.remove(self.some(data, 1)[0])

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        (s,) = self.some(data, 1)
        self.waiting.append((s.memory.snapshot(), s))
        s.memory.release()
        self.running.remove(s)

    @precondition(lambda self: self.waiting)
    @rule()
    def resume(self) -> None:
        snapshot, s = self.waiting[0]
        memory = self.pool.new()
        try:
            memory.restore(snapshot)
        except OutOfPages:
            assert self.pool.free_pages < self.pool.pages_for(len(s.past))
            return
        s.memory = memory
        self.running.append(self.waiting.pop(0)[1])

    @invariant()
    def every_page_has_its_holders(self) -> None:
        """No page lost, none free and held, none held by more or fewer than is counted; no slot twice."""
        Schedules.steps += 1
        held = Counter(page for s in self.running for page in s.memory.pages)
        assert all(self.pool.holders(page) == held[page] for page in range(PAGES))
        assert self.pool.free_pages == PAGES - len(held)
        slots = [s.memory.slot for s in self.running]
        assert len({*slots}) == len(slots) and self.pool.free_slots == self.pool.num_slots - len(slots)
        for s in self.running:
            assert s.memory.length == len(s.past) and s.memory.table.tolist() == s.memory.pages
            assert len(s.memory.pages) >= self.pool.pages_for(len(s.past))

    def teardown(self) -> None:
        """Who is left says once more what it remembers; then the counts are zero."""
        for s in self.running:
            if s.memory.length and not self.pool.shortage([(s.memory, 1)]):
                last = self.fresh(1)
                got = feed(self.model, s.memory, last)
                with torch.no_grad():
                    assert differ(self.model(torch.cat([s.past, last]))[-1:], got) < EXACT
            s.memory.release()
        assert self.pool.free_pages == PAGES and self.pool.free_slots == self.pool.num_slots


class TestSchedules(Schedules.TestCase):
    settings = settings(max_examples=6, stateful_step_count=80)


@pytest.mark.slow
class TestLongSchedules(Schedules.TestCase):
    settings = settings(max_examples=120, stateful_step_count=250)

    def runTest(self) -> None:
        before = Schedules.steps
        super().runTest()
        assert Schedules.steps - before >= 10_000


# --- prefixes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["float32", "packed"])
def test_a_shared_prefix_of_every_residue_is_the_prefix(format: str) -> None:
    """256 + r tokens, r through all values: two that go on from the shared prefix, one after the other and past the
    next edge of a page, have the bits of an unshared one; its whole pages are held once, its open one while unwritten.
    """
    model, ends = build(), [tokens(build(), 150, seed=s) for s in (1, 2)]
    prompt = tokens(model, 256 + 127)
    pool = model.new_pool(format)
    growing = pool.new()
    feed(model, growing, prompt[:256])
    for r in range(128):
        if r:
            feed(model, growing, prompt[255 + r : 256 + r])
        prefix = growing.fork()
        held = pool.num_pages - pool.free_pages
        shared = [prefix.fork() for _ in ends]
        assert held == pool.num_pages - pool.free_pages == -(-(256 + r) // 128) == len(prefix.pages)
        for memory, end in zip(shared, ends, strict=True):
            alone = model.new_pool(format).new()
            alone.restore(growing.snapshot())
            assert torch.equal(feed(model, memory, end), feed(model, alone, end)), r
            assert memory.pages[:2] == growing.pages[:2]
        assert pool.holders(growing.pages[0]) == pool.holders(growing.pages[1]) == 4
        own = {page for memory in shared for page in memory.pages[2:]} - {*prefix.pages}
        assert len(own) == sum(len(memory.pages) - 2 for memory in shared), "what is written is not shared"
        assert torch.equal(prefix.snapshot()["layers.1.attention.entries"],
                           growing.snapshot()["layers.1.attention.entries"])  # fmt: skip
        for memory in (prefix, *shared):
            memory.release()


def test_the_last_holder_writes_where_it_is() -> None:
    model = build()
    one = model.new_pool().new()
    feed(model, one, tokens(model, 130))
    two = one.fork()
    feed(model, one, tokens(model, 1))
    assert one.pages[0] == two.pages[0] and one.pages[1] != two.pages[1]
    page = two.pages[1]
    feed(model, two, tokens(model, 1))
    assert two.pages[1] == page and one.pool.num_pages - one.pool.free_pages == 3


# --- too few pages, slots that had another owner ---------------------------------------------------------------------


def test_too_few_pages_is_said_before_anything_is_written() -> None:
    """Also where one of two pools in a call is too small, and the other could have grown."""
    model = build()
    small, wide = model.new_pool(pages=2), model.new_pool()
    one, two, other = small.new(), small.new(), wide.new()
    feed(model, one, tokens(model, 128)), feed(model, two, tokens(model, 127)), feed(model, other, tokens(model, 128))
    before = [m.snapshot() for m in (one, two, other)]
    with pytest.raises(OutOfPages, match="0 of its 2 pages of 128 tokens free, and 1 are needed: release a memory"):
        model(tokens(model, 3), segments=[(1, other), (1, two), (1, one)])
    assert (one.length, two.length, other.length) == (128, 127, 128) and len(other.pages) == wide.num_pages == 1
    for memory, kept in zip((one, two, other), before, strict=True):
        now = memory.snapshot()
        assert all(torch.equal(now[name], kept[name]) for name in kept)
    assert small.shortage([(one, 1)]) == 1 and small.shortage([(two, 1)]) == 0 and wide.shortage([(other, 9999)]) == 0
    feed(model, two, tokens(model, 1))
    with pytest.raises(OutOfPages):
        small.new(capacity=1)
    two.release()
    feed(model, one, tokens(model, 128))
    assert small.free_pages == 0 and small.free_slots == 1


def test_a_call_stopped_half_way_loses_no_page() -> None:
    model = build()
    pool = model.new_pool(pages=4)
    memory = pool.new()
    handle = model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        feed(model, memory, tokens(model, 300))
    handle.remove()
    with pytest.raises(UserError, match="stopped half way"):
        memory.fork()
    memory.release()
    assert pool.free_pages == 4 and pool.free_slots == pool.num_slots
    with pytest.raises(UserError, match="released"):
        feed(model, memory, tokens(model, 1))
    memory.release()
    assert pool.free_slots == pool.num_slots, "giving back twice gives back once"


def test_nothing_of_who_had_the_slot_before() -> None:
    """A new memory is that of a fresh pool, to the bit: its snapshot may be kept, and shown to somebody else."""
    model = build()
    pool = model.new_pool()
    first = pool.new()
    feed(model, first, tokens(model, 300))
    first.release()
    memory, clean = pool.new(), model.new_pool().new()
    for each in (memory, clean):
        feed(model, each, tokens(model, 9, seed=3))
    now, want = memory.snapshot(), clean.snapshot()
    assert now.keys() == want.keys() and all(torch.equal(now[name], want[name]) for name in want)


# --- the plan of a run -----------------------------------------------------------------------------------------------


def test_one_part_for_one_pool() -> None:
    """However many sequences of a pool there are, a layer makes one call of each op; another pool is another part."""
    model = build()
    pool, other = model.new_pool(), model.new_pool()
    segments = [Segment(n, pool.new()) for n in (1, 3, 130, 1)]
    assert len(plan(model.config, segments, torch.device("cpu")).parts) == 1
    mixed = [segments[0], Segment(5), Segment(2, other.new()), segments[1], Segment(4)]
    parts = plan(model.config, mixed, torch.device("cpu")).parts
    assert [p.tokens.tolist() for p in parts if p.tokens is not None] == [
        [0, 8, 9, 10], [1, 2, 3, 4, 5, 11, 12, 13, 14], [6, 7],
    ]  # fmt: skip


def test_sequences_of_several_pools_and_formats_in_one_call() -> None:
    model = build()
    ids = tokens(model, 40)
    memories = [model.new_pool(f).new() for f in ("float32", "packed", "float32")]
    alone = [model.new_pool(f).new() for f in ("float32", "packed", "float32")]
    with torch.no_grad():
        got = model(ids, segments=[(7, memories[0]), 5, (9, memories[1]), (12, memories[2]), 7]).split([7, 5, 9, 12, 7])
        parts = ids.split([7, 5, 9, 12, 7])
        want = [feed(model, alone[0], parts[0]), model(parts[1]), feed(model, alone[1], parts[2]),
                feed(model, alone[2], parts[3]), model(parts[4])]  # fmt: skip
    assert all(differ(a, b) < EXACT for a, b in zip(want, got, strict=True))
