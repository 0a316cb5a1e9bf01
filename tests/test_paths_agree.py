"""One function, however it is cut: the whole sequence = any chunking = token by token = packed = ragged; and the memory
is an object: fork, rewind, snapshot and restore are exact at every offset.

Failures caught here: a group that closes a token early or late, an overlap lost between two calls, a ring that wraps
wrongly, an entry that moves when its store grows, documents that see each other, a rewind that leaves something behind.
Different cuts add the same numbers in another order, so they agree to 1e-5; the same call on the same state is the same
computation and agrees to the bit.
"""

import pytest
import torch
from differences import differ
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dsv4 import ops
from dsv4.cache import BatchMemory, Pool, SequenceMemory
from dsv4.conform.plain import PlainV4
from dsv4.errors import UserError
from dsv4.measure.replay import choices
from dsv4.measure.subjects import KINDS, randomise, small_config, small_model, stream, tokens
from dsv4.model import Segment, Transformer
from dsv4.model.segments import plan

CHUNKS = [1, 3, 4, 5, 127, 128, 129, 130]
EXACT = 1e-5
# A short window wraps its ring many times and lets CSA and HCA layers reach beyond it.
CASES = {**{kind: {} for kind in KINDS}, "whole, window 16": {"sliding_window": 16}}


def build(case: str, **changes):
    return small_model(KINDS[case.split(",")[0]], **CASES[case], **changes).eval()


def whole(model, ids):
    with torch.no_grad():
        return model(ids)


# --- cuts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_whole_is_every_chunking(case):
    """300 tokens: every residue mod 4 and mod 128 is a chunk border (chunk 1) and a last token."""
    model = build(case)
    ids = tokens(model, 300)
    with choices(model) as seen_whole:
        want = whole(model, ids)
    for layer in seen_whole.values():
        assert any(len(rows) < (t + 1) // 4 for t, rows in enumerate(layer)), "the indexer has nothing to choose"
    for chunk in CHUNKS:
        with choices(model) as seen:
            got = stream(model, ids, chunk)
        assert differ(want, got) < EXACT, f"chunks of {chunk}"
        assert seen == seen_whole, f"chunks of {chunk} read other entries"


@pytest.mark.parametrize("case", ["csa", "hca", "whole, window 16"])
def test_a_prompt_of_every_residue_then_tokens(case):
    """Prefill of L tokens, L mod 128 through all values, one token, and on past the next HCA edge, where a row that the
    prefill left wrong in the open group would come out."""
    model = build(case)
    ids = tokens(model, 258)
    want = whole(model, ids)
    for length in range(128, 256):
        memory = model.new_cache()[0]
        got = [logits_of(model, part, memory) for part in (ids[:length], ids[length : length + 1], ids[length + 1 :])]
        assert differ(want, torch.cat(got)) < EXACT, f"prompt of {length}"


@pytest.mark.parametrize("case", CASES)
def test_every_short_prompt(case):
    """Lengths at which groups and windows have not begun: alone, and continued by two tokens."""
    model = build(case)
    ids = tokens(model, 16)
    want = whole(model, ids)
    for length in range(1, 14):
        assert differ(want[:length], whole(model, ids[:length])) < EXACT
        memory = model.new_cache()
        stream(model, ids[:length], length, memory)
        assert differ(want[length : length + 2], stream(model, ids[length : length + 2], 2, memory)) < EXACT


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_paths_agree_in_every_backend(backend):
    model = build("whole")
    ids = tokens(model, 150)
    with ops.using(backend):
        want = whole(model, ids)
        for chunk in (1, 7, 129):
            assert differ(want, stream(model, ids, chunk)) < EXACT


# --- other ratios ---------------------------------------------------------------------------------

RATES = [(8, 32), (2, 64)]


def of_rates(csa: int, hca: int) -> Transformer:
    rates = {"compress_rate_csa": csa, "compress_rate_hca": hca}
    return small_model((0, csa, hca, csa), sliding_window=16, **rates).eval()


@pytest.mark.parametrize(("csa", "hca"), RATES)
def test_other_ratios_are_the_plain_model_however_they_are_cut(csa, hca):
    """A 4 or a 128 left somewhere: an overlap missed, a group closed at another token, entries that are not chosen."""
    model = of_rates(csa, hca)
    ids = tokens(model, 150)
    with choices(model) as seen_whole:
        want = whole(model, ids)
    assert differ(PlainV4(model.config, model.state_dict()).logits(ids), want) < EXACT
    for layer in seen_whole.values():
        assert any(len(rows) < (t + 1) // csa for t, rows in enumerate(layer)), "the indexer has nothing to choose"
    for chunk in (1, 3, csa, hca - 1, hca, hca + 1):
        with choices(model) as seen:
            got = stream(model, ids, chunk)
        assert differ(want, got) < EXACT, f"chunks of {chunk}"
        assert seen == seen_whole, f"chunks of {chunk} read other entries"


@pytest.mark.parametrize(("csa", "hca"), RATES)
def test_other_ratios_rewind_at_every_residue(csa, hca):
    """Open groups are kept for 128 tokens where they are shorter or longer than those of V4."""
    model = of_rates(csa, hca)
    ids = tokens(model, 3 * hca)
    want = whole(model, ids)
    for length in range(hca, 2 * hca):
        memory = model.new_cache(max_rewind=7)
        stream(model, ids[: length - 7], length, memory)
        stream(model, tokens(model, 7, seed=9), 7, memory)
        memory.rewind(7)
        got = stream(model, ids[length - 7 :], len(ids), memory)
        assert differ(want[length - 7 :], got) < EXACT, f"rewound to {length - 7}"


@given(st.data())
@settings(max_examples=12)
def test_any_course_of_events(data):
    """Chunks, rewinds, forks and restores in any order: every logit is that of the tokens that are remembered."""
    model = small_model(KINDS["whole"], sliding_window=16)
    memory, past = model.new_cache(max_rewind=40), torch.zeros(0, dtype=torch.int64)
    kept = (memory.snapshot(), past)
    for step in range(data.draw(st.integers(3, 8))):
        event = data.draw(st.sampled_from(["feed", "feed", "rewind", "fork", "keep", "restore"]))
        if event == "feed":
            chunk = tokens(model, data.draw(st.integers(1, 70)), seed=step)
            past = torch.cat([past, chunk])
            got = stream(model, chunk, len(chunk), memory)
            assert differ(whole(model, past)[-len(chunk) :], got) < EXACT
        elif event == "rewind":
            room = memory[0].max_rewind - (memory[0].newest - memory[0].length)
            count = data.draw(st.integers(0, min(room, len(past))))
            memory.rewind(count)
            past = past[: len(past) - count]
        elif event == "fork":
            old, memory = memory, memory.fork()
            stream(model, tokens(model, 5, seed=99), 5, old)  # what happens to the old one is not seen by the new
        elif event == "keep":
            kept = (memory.snapshot(), past)
        else:
            memory.restore(kept[0])
            past = kept[1]
        assert memory.lengths == [len(past)]


# --- many sequences in one call -------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_packed_documents_are_each_alone(case):
    """A packed row of documents: each reads as if it were alone, whatever its length mod 4 and mod 128."""
    model = build(case)
    lengths = [1, 130, 3, 4, 5, 127, 2, 128, 17]
    parts = tokens(model, sum(lengths)).split(lengths)
    with choices(model) as packed:
        got = model(torch.cat(parts), segments=lengths).split(lengths)
    with choices(model) as alone:
        for part, logits in zip(parts, got, strict=True):
            assert differ(whole(model, part), logits) < EXACT
    assert packed == alone


@pytest.mark.parametrize("case", CASES)
def test_ragged_batch_is_each_alone(case):
    """Decoding beside prefill beside new documents, some with memories, some without, in one call."""
    model = build(case)
    past = [tokens(model, n, seed=i) for i, n in enumerate((200, 3, 0, 131))]
    memories = [model.new_cache()[0] for _ in past]
    for ids, memory in zip(past, memories, strict=True):
        if len(ids):
            stream(model, ids, len(ids), [memory])
    new = [tokens(model, n, seed=10 + i) for i, n in enumerate((1, 130, 7, 5, 40, 9))]
    run = [(1, memories[0]), 130, (7, memories[1]), Segment(5), (40, memories[2]), (9, memories[3])]
    history = [past[0], None, past[1], None, past[2], past[3]]
    got = model(torch.cat(new), segments=run).split([len(n) for n in new])
    for before, ids, logits in zip(history, new, got, strict=True):
        alone = whole(model, ids if before is None else torch.cat([before, ids]))[-len(ids) :]
        assert differ(alone, logits) < EXACT
    assert [m.length for m in memories] == [201, 10, 40, 140]
    # and once more, with rows="last": one row of logits for each segment
    one = tokens(model, 2, seed=50)
    rows = model(one, segments=[(1, memories[0]), (1, memories[3])], rows="last")
    assert rows.shape == (2, model.config.vocab_size)
    assert differ(whole(model, torch.cat([past[3], new[5], one[1:]]))[-1], rows[1]) < EXACT


@pytest.mark.parametrize("case", ["whole"])
def test_batched_input_is_every_row_alone(case):
    """[B, T] is B segments; with a cache, one memory per row, which may have different lengths."""
    model = build(case)
    ids = tokens(model, 3 * 140).view(3, 140)
    got = whole(model, ids)
    assert got.shape == (3, 140, model.config.vocab_size) and got.dtype == torch.float32
    memory = model.new_cache(batch=3)
    stream(model, tokens(model, 5, seed=3), 5, [memory[1]])  # row 1 is ahead
    cached = torch.cat([model(part, cache=memory) for part in ids.split(61, dim=1)], dim=1)
    for row in (0, 2):
        assert differ(whole(model, ids[row]), got[row]) < EXACT
        assert differ(got[row], cached[row]) < EXACT
    assert differ(whole(model, torch.cat([tokens(model, 5, seed=3), ids[1]]))[5:], cached[1]) < EXACT
    assert memory.lengths == [140, 145, 140]
    assert model(ids[:, :4], rows="last").shape == (3, model.config.vocab_size)


def test_int32_ids_and_a_batch_of_one():
    model = build("whole")
    ids = tokens(model, 30)
    assert torch.equal(whole(model, ids.int()), whole(model, ids))
    assert torch.equal(whole(model, ids[None])[0], whole(model, ids))
    memory = model.new_cache()
    assert torch.equal(model(ids, cache=memory), model(ids[None], cache=model.new_cache())[0])
    assert torch.equal(model(ids[:1], segments=[(1, memory)]), model(ids[:1], segments=[(1, _after(model, ids))]))


def _after(model, ids):
    memory = model.new_cache()
    model(ids, cache=memory)
    return memory[0]


# --- the memory is an object ----------------------------------------------------------------------


def logits_of(model, ids, memory):
    with torch.no_grad():
        return model(ids, segments=[(len(ids), memory)])


@pytest.mark.parametrize("case", KINDS)
def test_fork_rewind_snapshot_restore_at_every_offset(case):
    """At each length from 128 to 255 each of the four leaves exactly the state that never saw other tokens.

    What follows is long enough to close every group that was open, where a wrong row in it would come out.
    """
    model = build(case)
    ids, other = tokens(model, 400), tokens(model, 9, seed=1)
    memory = model.new_cache(max_rewind=16)[0]
    want = whole(model, ids)
    logits_of(model, ids[:128], memory)
    for length in range(128, 256):
        following = ids[length : length + 130]
        snapshot, astray = memory.snapshot(), memory.fork()
        logits_of(model, other, astray)  # over a CSA edge always, over an HCA edge at some offsets
        lost = astray.fork() if length % 2 else model.new_cache(max_rewind=16)[0]
        astray.rewind(len(other))
        rewound = logits_of(model, following, astray)
        lost.restore(snapshot)
        restored = logits_of(model, following, lost)
        untouched = memory.fork()
        straight = logits_of(model, following, untouched)
        assert differ(want[length : length + 130], straight) < EXACT
        assert torch.equal(rewound, straight), f"rewound to {length}"
        assert torch.equal(restored, straight), f"restored at {length}"
        logits_of(model, ids[length : length + 1], memory)  # the forks have taken nothing from it
    assert memory.length == 256 and differ(want[256:], logits_of(model, ids[256:], memory)) < EXACT


@pytest.mark.parametrize("case", CASES)
def test_rewind_far(case):
    """From 262 tokens back by up to 130: within the open group, over CSA edges, over the HCA edge at 256."""
    model = build(case)
    ids = tokens(model, 400)
    want = whole(model, ids)
    memory = model.new_cache(max_rewind=130)[0]
    logits_of(model, ids[:262], memory)
    for count in (0, 1, 2, 3, 4, 5, 6, 7, 8, 64, 126, 127, 128, 129, 130):
        mine, back = memory.fork(), 262 - count
        mine.rewind(count)
        assert differ(want[back : back + 130], logits_of(model, ids[back : back + 130], mine)) < EXACT


def test_rewind_to_nothing_and_start_again():
    model = build("whole, window 16")
    ids = tokens(model, 20)
    memory = model.new_cache()[0]
    first = logits_of(model, ids, memory)
    memory.rewind(20)
    assert memory.length == 0 and torch.equal(logits_of(model, ids, memory), first)


def test_rewinds_add_up_and_new_tokens_take_their_place():
    """The limit counts from the newest row that was ever written; going back, on, and back again stays exact."""
    model = build("whole, window 16")
    ids, other = tokens(model, 200), tokens(model, 200, seed=1)
    memory = model.new_cache(max_rewind=20)[0]
    logits_of(model, ids[:100], memory)
    memory.rewind(12)
    logits_of(model, other[:5], memory)
    memory.rewind(8)  # 85: 15 before the newest
    straight = torch.cat([ids[:85], other[:30]])
    assert differ(whole(model, straight)[85:], logits_of(model, other[:30], memory)) < EXACT
    assert (memory.length, memory.newest) == (115, 115)
    memory.rewind(20)
    assert differ(whole(model, straight)[95:97], logits_of(model, straight[95:97], memory)) < EXACT


def state_of(memory: SequenceMemory):
    return {name: tensor.clone() for name, tensor in memory.snapshot().items()}


def same_state(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("count", "words"), [(21, "max_rewind=21"), (61, "holds 60"), (-1, "cannot rewind -1")])
def test_refused_rewind_changes_nothing(count, words):
    model = build("whole, window 16")
    ids = tokens(model, 70)
    memory = model.new_cache(max_rewind=20)[0]
    logits_of(model, ids[:60], memory)
    before = state_of(memory)
    with pytest.raises(UserError, match=words):
        memory.rewind(count)
    assert same_state(before, state_of(memory))
    assert differ(whole(model, ids)[60:], logits_of(model, ids[60:], memory)) < EXACT


@pytest.mark.parametrize("through_a_snapshot", [False, True])
def test_the_limit_counts_from_the_newest_row_ever_written(through_a_snapshot):
    """A rewind, and tokens after it, bring no lost row back: the rings still end at the newest one."""
    model = build("whole, window 16")
    memory = model.new_cache(max_rewind=20)[0]
    logits_of(model, tokens(model, 100), memory)
    for feed, back, allowed in (
        (0, 12, True),
        (0, 9, False),
        (5, 14, False),
        (0, 13, True),
        (0, 1, False),
        (19, 20, False),
    ):
        if feed:
            logits_of(model, tokens(model, feed, seed=1), memory)
        if through_a_snapshot:
            snapshot, memory = memory.snapshot(), model.new_cache(max_rewind=20)[0]
            memory.restore(snapshot)
        length = memory.length
        if allowed:
            memory.rewind(back)
            assert memory.length == length - back
        else:
            with pytest.raises(UserError, match="keeps rows for 20"):
                memory.rewind(back)
            assert memory.length == length
    assert (memory.length, memory.newest) == (99, 100)


def test_refused_rewind_of_a_batch_changes_no_row():
    model = build("whole")
    batch = model.new_cache(batch=2, max_rewind=20)
    logits_of(model, tokens(model, 50), batch[0])
    logits_of(model, tokens(model, 8), batch[1])
    with pytest.raises(UserError, match="holds 8"):
        batch.rewind(9)
    assert batch.lengths == [50, 8]
    batch.rewind(8)
    assert batch.lengths == [42, 0]


def test_batch_operations_apply_to_every_row():
    model = build("whole")
    ids = tokens(model, 2 * 30).view(2, 30)
    batch = model.new_cache(batch=2)
    model(ids, cache=batch)
    following = tokens(model, 6, seed=2).view(2, 3)
    kept, forked = batch.snapshot(), batch.fork()
    want = model(following, cache=forked)
    model(following, cache=batch)
    batch.rewind(3)
    assert torch.equal(model(following, cache=batch), want)
    batch.restore(kept)
    assert torch.equal(model(following, cache=batch), want)
    assert batch.bytes() == batch[0].pool.bytes() and batch[0].pool is batch[1].pool
    with pytest.raises(UserError, match="1 snapshots for 2 rows"):
        batch.restore(kept[:1])
    with pytest.raises(UserError):
        batch.restore([kept[0], {}])
    assert batch.lengths == [33, 33], "if one row does not fit, none is restored"


class Stop(Exception):
    pass


def torn_memory(model, ids):
    """A memory whose call was stopped in the second layer."""
    memory = model.new_cache()[0]
    logits_of(model, ids, memory)

    def stop(*_):
        raise Stop

    handle = model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        logits_of(model, ids[:5], memory)
    handle.remove()
    return memory


def test_an_interrupted_call_leaves_a_memory_that_refuses():
    """Layers then disagree on how far they are; nothing but a restore may use such a memory."""
    model = build("whole")
    ids = tokens(model, 20)
    clean = model.new_cache()[0]
    logits_of(model, ids, clean)
    kept = clean.snapshot()
    memory = torn_memory(model, ids)
    for use in (
        lambda: logits_of(model, ids[:1], memory), lambda: memory.rewind(1), memory.fork, memory.snapshot,
        lambda: BatchMemory([memory]).snapshot(), lambda: memory.rewind(0),
    ):  # fmt: skip
        with pytest.raises(UserError, match="stopped half way"):
            use()
    memory.restore(kept)
    assert torch.equal(logits_of(model, ids[:3], memory), logits_of(model, ids[:3], clean))


def test_a_torn_memory_does_not_take_others_with_it():
    """A call that is refused for one memory leaves the others as they were."""
    model = build("whole")
    ids = tokens(model, 20)
    good, torn = model.new_cache()[0], torn_memory(model, ids)
    logits_of(model, ids, good)
    before = state_of(good)
    with pytest.raises(UserError, match="stopped half way"):
        model(ids[:4], segments=[(2, good), (2, torn)])
    assert same_state(before, state_of(good))


# --- snapshots ------------------------------------------------------------------------------------


def test_snapshot_through_a_file(tmp_path):
    model = build("whole")
    ids = tokens(model, 150)
    memory = model.new_cache()[0]
    logits_of(model, ids[:145], memory)
    snapshot = memory.snapshot()
    save_file(snapshot, tmp_path / "memory.safetensors")
    other = model.new_cache(capacity=1000)[0]
    other.restore(load_file(tmp_path / "memory.safetensors"))
    assert torch.equal(logits_of(model, ids[145:], memory), logits_of(model, ids[145:], other))
    logits_of(model, ids, other)
    for name, tensor in snapshot.items():
        assert torch.equal(tensor, load_file(tmp_path / "memory.safetensors")[name]), "a snapshot is a copy"


def test_snapshots_that_do_not_fit_are_refused_and_change_nothing():
    model = build("whole")
    memory = model.new_cache()[0]
    logits_of(model, tokens(model, 70), memory)
    before = state_of(memory)

    def spoil(**changes):
        broken = {**memory.snapshot(), **changes}
        return {name: tensor for name, tensor in broken.items() if tensor is not None}

    entries = memory.snapshot()["layers.1.attention.entries"]
    for snapshot, words in [
        ({}, "no length"),
        (spoil(length=torch.tensor([71, 70])), "length 71"),
        (spoil(length=torch.tensor([-1, 70])), "length -1"),
        (spoil(length=torch.tensor([70, 70, 0])), "no length"),
        (spoil(length=torch.tensor([10, 9999])), "length 10"),
        (spoil(**{"layers.1.attention.entries": None}), "layers.1.attention.entries is missing"),
        (spoil(**{"layers.1.attention.entries": entries[:-1]}), "expected"),
        (spoil(**{"layers.1.attention.entries": entries.double()}), "float64"),
        (spoil(**{"layers.9.window": entries}), "layers.9.window is unknown"),
        (small_model(KINDS["csa"]).new_cache()[0].snapshot(), "missing"),
        (model.new_cache(max_rewind=5)[0].snapshot(), "expected"),
    ]:
        with pytest.raises(UserError, match=words):
            memory.restore(snapshot)
        assert same_state(before, state_of(memory))


# --- the MTP block's window -----------------------------------------------------------------------


def drafts(model, ids, after, memory, chunk):
    """Hidden states of the MTP block for ids [T], whose last row is followed by the token `after`; in chunks."""
    following, out = torch.cat([ids[1:], after]), []
    for part, after_each in zip(ids.split(chunk), following.split(chunk), strict=True):
        out.append(model.draft(model.trunk(part, [Segment(len(part), memory)]), after_each)[0])
    return torch.cat(out)


def whole_drafts(model, ids):
    """What training's `predict_next` says of all rows but the last, in one call without a memory."""
    with torch.no_grad():
        return model.predict_next(model.trunk(ids, [Segment(len(ids))]), ids)[0]


@pytest.mark.parametrize("window", [128, 16])
@pytest.mark.parametrize("chunk", [1, 3, 127, 128, 130, 300])
def test_drafting_with_a_memory_is_drafting_whole(window, chunk):
    """The MTP window wraps, is read across calls, and is that of the whole sequence."""
    model = small_model(mtp=1, sliding_window=window)
    ids = tokens(model, 301)
    memory = model.new_cache(mtp=True)[0]
    got = drafts(model, ids[:300], ids[300:], memory, chunk)
    assert differ(whole_drafts(model, ids), got) < EXACT and memory.drafted == memory.length == 300


@pytest.mark.parametrize("case", ["rewound", "forked", "restored"])
def test_drafting_after_a_rewind_a_fork_and_a_restore(case):
    """As in speculation: tokens that turn out wrong are drafted, taken back, and leave nothing in the MTP window."""
    model = small_model(mtp=1, sliding_window=16)
    ids, wrong = tokens(model, 200), tokens(model, 9, seed=1)
    want = whole_drafts(model, ids)
    for start in range(100, 190, 7):
        memory = model.new_cache(mtp=True, max_rewind=16)[0]
        drafts(model, ids[:start], ids[start : start + 1], memory, 50)
        kept, twin = memory.snapshot(), memory.fork()
        drafts(model, wrong, wrong[:1], memory, 4)
        if case == "rewound":
            memory.rewind(len(wrong))
        elif case == "forked":
            memory = twin
        else:
            memory.restore(kept)
        assert memory.drafted == start
        got = drafts(model, ids[start:199], ids[199:], memory, 5)
        assert differ(want[start:], got) < EXACT, start


def test_another_token_after_a_row_takes_that_row_again():
    """A row keeps the token it was given; rewinding to that row and running it again gives it the new one."""
    model = small_model(mtp=1, sliding_window=16)
    ids = tokens(model, 60)
    memory = model.new_cache(mtp=True)[0]
    drafts(model, ids[:40], (ids[40:41] + 1) % 97, memory, 40)
    memory.rewind(1)
    assert differ(whole_drafts(model, ids)[39:], drafts(model, ids[39:59], ids[59:], memory, 7)) < EXACT


def test_ragged_drafts_are_each_alone():
    model = small_model(mtp=1, sliding_window=16)
    one, two = model.new_cache(batch=2, mtp=True)
    a, b, c = tokens(model, 31), tokens(model, 8, seed=1), tokens(model, 6, seed=2)
    drafts(model, a[:20], a[20:21], one, 20)
    run, following = torch.cat([a[20:30], b[:7], c[:5]]), torch.cat([a[21:], b[1:], c[1:]])
    got = model.draft(model.trunk(run, [Segment(10, one), Segment(7, two), Segment(5)]), following)[0].split([10, 7, 5])
    for ids, hidden in zip((a, b, c), got, strict=True):
        assert differ(whole_drafts(model, ids)[-len(hidden) :], hidden) < EXACT


def test_packed_drafts_read_rounded_rows():
    """The MTP window has the format of the trunk's windows, also for the rows of the call itself."""
    model = small_model((0,), mtp=1)
    ids = tokens(model, 200)
    exact, packed = (
        drafts(model, ids[:199], ids[199:], model.new_cache(format=f, mtp=True)[0], 199) for f in ("float32", "packed")
    )
    assert 0 < (exact - packed).abs().mean() < 0.1 * exact.std()
    chunked = drafts(model, ids[:199], ids[199:], model.new_cache(format="packed", mtp=True)[0], 7)
    assert (packed - chunked).abs().mean() < 2e-3
    memory = model.new_cache(format="packed", mtp=True)[0]
    (view,) = memory.mtp
    assert view.window.data.dtype == torch.uint8
    assert memory.snapshot()["mtp.0.window"].shape == (256, view.window.data.shape[1])


def test_a_memory_has_the_mtp_window_only_where_it_is_asked_for():
    model = small_model(mtp=1)
    plain, more = model.new_cache()[0], model.new_cache(mtp=True)[0]
    assert more.bytes() - plain.bytes() == 256 * model.config.head_dim * 4
    assert set(more.snapshot()) - set(plain.snapshot()) == {"mtp.0.window"}
    for memory, other in ((plain, more), (more, plain)):
        with pytest.raises(UserError, match="max_rewind and mtp"):
            memory.restore(other.snapshot())
    with pytest.raises(UserError, match="no MTP block"):
        small_model().new_cache(mtp=True)


def test_drafts_out_of_order_are_refused_and_write_nothing():
    """A call of the trunk that was not drafted would leave a hole in the window; drafting twice would lose rows."""
    model = small_model(mtp=1)
    ids = tokens(model, 30)
    memory = model.new_cache(mtp=True)[0]
    trunk = model.trunk(ids[:9], [Segment(9, memory)])
    for following, words in ((ids[:9] - 200, "outside the vocabulary"), (ids[:8], "each of the 9 rows")):
        with pytest.raises(UserError, match=words):
            model.draft(trunk, following)
    model.draft(trunk, ids[1:10])
    before = state_of(memory)
    with pytest.raises(UserError, match="once after each call"):
        model.draft(trunk, ids[1:10])
    assert same_state(before, state_of(memory))
    later = model.trunk(ids[9:20], [Segment(11, memory)])
    memory.rewind(2)
    with pytest.raises(UserError, match="before any rewind"):
        model.draft(later, ids[10:21])
    hole = model.trunk(ids[18:20], [Segment(2, memory)])
    with pytest.raises(UserError, match="cannot draft rows 18 to 19"):
        model.draft(hole, ids[19:21])
    with pytest.raises(UserError, match="mtp=True"):
        model.draft(model.trunk(ids[:3], [Segment(3, model.new_cache()[0])]), ids[1:4])


@pytest.mark.parametrize("start", [1, 15, 16, 17, 127, 128, 129, 150])
def test_deeper_drafts_are_the_block_on_its_own_streams(start):
    """Three of them with a memory are what the block makes, without one, of the trunk's streams and then its own; when
    they are taken back, across the end of a page too, nothing of them is left."""
    model = small_model(mtp=1, sliding_window=16)
    ids, guesses = tokens(model, 220), tokens(model, 4, seed=1)
    memory = model.new_cache(mtp=True, max_rewind=8)[0]
    trunk = model.trunk(ids[:start], [Segment(start, memory)])
    following = torch.cat([ids[1:start], guesses[:1]])
    hidden, streams, _ = model.draft(trunk, following)
    all_streams, last, got = trunk.streams, streams[-1:], [hidden]
    for guess in guesses[1:].split(1):
        hidden, fresh, _ = model.draft_deeper(last, guess, [memory])
        all_streams, following, last = torch.cat([all_streams, last]), torch.cat([following, guess]), fresh
        got.append(hidden)
    run = plan(model.config, [Segment(start + 3)], model.device)
    with torch.no_grad():
        want, _, _ = model._mtp(all_streams, following, run, [None])
    assert differ(want, torch.cat(got)) < EXACT
    assert (memory.length, memory.newest, memory.drafted) == (start + 3, start + 3, start)
    memory.rewind(3)
    assert memory.length == memory.drafted == start
    memory.rewind(1)  # its row had read a guess
    whole = whole_drafts(model, ids)
    assert differ(whole[start - 1 : 219], drafts(model, ids[start - 1 : 219], ids[219:], memory, 9)) < EXACT


def test_deeper_drafts_of_many_are_each_alone_and_wrong_ones_write_nothing():
    model = small_model(mtp=1, sliding_window=16)
    ids = tokens(model, 40)
    memories, streams, alone = model.new_cache(batch=3, mtp=True), [], []
    for n, memory in zip((1, 17, 30), memories, strict=True):
        _, made, _ = model.draft(model.trunk(ids[:n], [Segment(n, memory)]), ids[1 : n + 1])
        streams.append(made[-1:])
        alone.append(model.draft_deeper(streams[-1], (ids[:1] + n) % 97, [memory.fork()])[0])
    before = [state_of(memory) for memory in memories]
    wrong = torch.tensor([1, 2, 97])
    with pytest.raises(UserError, match="outside the vocabulary"):
        model.draft_deeper(torch.cat(streams), wrong, list(memories))
    with pytest.raises(UserError, match="mtp=True"):
        model.draft_deeper(torch.cat(streams), ids[:3], [*memories[:2], model.new_cache()[0]])
    assert all(same_state(a, state_of(m)) for a, m in zip(before, memories, strict=True))
    together = model.draft_deeper(torch.cat(streams), (ids[:1] + torch.tensor([1, 17, 30])) % 97, list(memories))[0]
    assert differ(torch.cat(alone), together) < EXACT


def test_a_draft_that_was_stopped_half_way_leaves_the_memory_torn(monkeypatch):
    model = small_model(mtp=1)
    ids = tokens(model, 10)
    memory = model.new_cache(mtp=True)[0]
    trunk = model.trunk(ids[:9], [Segment(9, memory)])
    monkeypatch.setattr(model.mtp[0].block.ffn, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.draft(trunk, ids[1:])
    with pytest.raises(UserError, match="stopped half way"):
        memory.rewind(1)


# --- bytes, growth --------------------------------------------------------------------------------


def test_bytes_are_what_the_formula_says():
    """Ring of window + max_rewind rows; entries; 2 x 4 (CSA) or 128 (HCA) open rows of value and score in fp32."""
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        config = small_config((0, 4, 128))
        memory = Pool(config, format=dtype, max_rewind=10).new(capacity=1280)
        d, index = config.head_dim, config.index_head_dim
        window = 3 * (128 + 10) * d * size
        csa = 320 * d * size + (8 + 10) * 2 * (2 * d) * 4
        indexer = 320 * index * size + (8 + 10) * 2 * (2 * index) * 4
        hca = 10 * d * size + (128 + 10) * 2 * d * 4
        assert memory.bytes() == window + csa + indexer + hca
        assert memory.pool.bytes() == memory.bytes(), "and no more is allocated"


def places_of(memory: SequenceMemory) -> list[int]:
    return [store.data.data_ptr() for _, _, store in memory.pool.stores()]


def test_capacity_is_allocated_once():
    model = build("whole")
    memory = model.new_cache(capacity=300)[0]
    where, before = places_of(memory), memory.pool.bytes()
    stream(model, tokens(model, 300), 77, [memory])
    assert memory.pool.bytes() == before and places_of(memory) == where


def test_stores_grow_in_pages_and_seldom():
    """Token by token without a capacity: stores move a handful of times, never once per entry, and stay small."""
    model = build("csa")
    memory = model.new_cache()[0]
    places = set()
    for n, part in enumerate(tokens(model, 2400).split(4)):
        logits_of(model, part, memory)
        places.add(tuple(places_of(memory)))
        assert len(memory.pages) == -(-4 * (n + 1) // 128)
        assert len(memory.layers[0].attention.entries.data) == memory.pool.num_pages * 32
        assert memory.pool.num_pages <= max(2, len(memory.pages) * 3 // 2)
    assert len(places) <= 9 and memory.entries(memory.layers[0].attention.entries, 600)[:].shape == (600, 32)


def test_window_and_open_rows_do_not_grow():
    """What grows with the text are entries: 1/4 and 1/128 of it."""
    model = build("whole")
    memory = model.new_cache()[0]
    stream(model, tokens(model, 200), 200, [memory])
    rings = {name: store.data.shape for name, _, store in memory.pool.stores() if "entries" not in name}
    stream(model, tokens(model, 600), 600, [memory])
    assert rings == {name: store.data.shape for name, _, store in memory.pool.stores() if "entries" not in name}
    assert len(rings) == 6


def test_wrong_sizes():
    model = build("window")
    for changes in ({"capacity": -1}, {"max_rewind": -1}):
        with pytest.raises(UserError, match="must not be negative"):
            model.new_cache(**changes)
    with pytest.raises(UserError, match="batch=0"):
        model.new_cache(batch=0)


# --- a memory in bf16 -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_bf16_memory(case):
    """Under an fp32 model a memory may be bf16: close to fp32, fewer bytes, and nearly the same for every cut.

    Every row is rounded once, when it is made. A token whose expert or entry falls on the other side of a near tie
    differs visibly, hence means and not maxima; between cuts this takes an fp32 value near a border of two roundings.
    """
    model = build(case)
    ids = tokens(model, 200)
    want = whole(model, ids)
    memory = model.new_cache(format=torch.bfloat16)
    one = stream(model, ids, 200, memory)
    assert one.dtype == torch.float32 and 0 < (want - one).abs().mean() < 0.02
    assert (one - stream(model, ids, 7, model.new_cache(format=torch.bfloat16))).abs().mean() < 0.005
    assert memory.bytes() < stream_bytes(model, 200)
    kept = memory.snapshot()[0]
    assert kept["layers.0.window"].dtype == torch.bfloat16
    with pytest.raises(UserError, match="bfloat16"):
        model.new_cache()[0].restore(kept)


def stream_bytes(model, count: int) -> int:
    memory = model.new_cache()
    stream(model, tokens(model, count), count, memory)
    return memory.bytes()


def test_a_bf16_model_streams():
    """Whole and streamed agree as far as bf16 goes; streams stay bf16, logits are fp32."""
    model = randomise(Transformer(small_config(), "bfloat16"))
    ids = tokens(model, 140)
    want = whole(model, ids)
    got = stream(model, ids, 3)
    assert want.dtype == got.dtype == torch.float32 and model.embed.weight.dtype == torch.bfloat16
    assert (want - got).abs().mean() < 0.05 and want.std() > 0.3
