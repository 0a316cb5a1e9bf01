"""Failures caught here, in the C++ forms of sparse_attention, index_scores_topk, best_rows and topk_lowest: a value,
gradient or choice that is not the reference's (sizes that fill no vector, tails, empty intervals, no entries, ties, -1
rows); a row read that nobody sees; packed or paged rows read as other numbers than the format says; bits that change
with the batch, the cut into chunks, the threads, or the way in which the same rows are named; a call served that should
be refused.

Truth is ops/reference.py in fp32. Tolerances are relative to the largest number, for fp32 sums of a few thousand terms;
choices are compared exactly, on small integers, whose scores are exact and tie often.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4 import ops
from dsv4.ops import Spans, reference
from dsv4.ops.formats import Packed, PackedRows, PagedRows, Plain, RowFormat, v4_rows, v32_rows

cpu = pytest.importorskip("dsv4.ops.cpu", exc_type=ImportError)

NAN = float("nan")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_integers(*shape: int, seed: int = 0, size: int = 2) -> Tensor:
    return torch.randint(-size, size + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def spans(pairs: list[tuple[int, int]]) -> Spans:
    start, stop = zip(*pairs, strict=True)
    return Spans(torch.tensor(start, dtype=torch.int64), torch.tensor(stop, dtype=torch.int64))


def sliding(lengths: list[int], window: int) -> Spans:
    """What the tokens of documents of these lengths see of their rows, window rows at most."""
    base, pairs = 0, []
    for n in lengths:
        pairs += [(base + max(0, t + 1 - window), base + t + 1) for t in range(n)]
        base += n
    return spans(pairs)


def grouped(lengths: list[int], ratio: int) -> tuple[Spans, int]:
    """What they see of their entries, and the number of entries."""
    base, pairs = 0, []
    for n in lengths:
        pairs += [(base, base + (t + 1) // ratio) for t in range(n)]
        base += n // ratio
    return spans(pairs), base


def picked(visible: Spans, k: int, seed: int = 0) -> Tensor:
    """k random rows of each interval in ascending order, -1 first."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.full((len(visible), k), -1)
    for i, (lo, hi) in enumerate(zip(visible.start.tolist(), visible.stop.tolist(), strict=True)):
        some = lo + torch.randperm(hi - lo, generator=generator)[:k].sort().values
        rows[i, k - len(some) :] = some
    return rows


def paged(rows: Tensor, format: RowFormat, per_page: int = 4, seed: int = 0) -> PagedRows:
    """The rows in pages that lie in random order among others, which hold what nobody wrote."""
    count = -(-len(rows) // per_page)
    pages = np.random.default_rng(seed).permutation(2 * count)[:count].astype(np.int64)
    kept = format.pack(rows)
    data = torch.full((2 * count * per_page, *format.shape), 255 if format.dtype == torch.uint8 else NAN).to(kept.dtype)
    table = torch.from_numpy(pages)
    at = torch.arange(len(rows))
    data[table[at // per_page] * per_page + at % per_page] = kept
    return PagedRows(data, format, table, pages, per_page)


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    if got.numel():
        assert (got.float() - want.float()).abs().max() <= tolerance * max(1.0, want.abs().max().item())


def attention_agrees(*args) -> tuple[Tensor, Tensor]:
    assert not cpu.LIMITS["sparse_attention"].refuses(*args)
    q, window_kv, window, entries, *rest = args
    out, lse = cpu.sparse_attention(*args)
    # what nobody wrote is hidden, but the reference multiplies it by zero
    seen = None if entries is None else entries[:].float().nan_to_num()
    want, want_lse = reference.sparse_attention(q.float(), window_kv[:].float().nan_to_num(), window, seen, *rest)
    # a number in bf16 may fall to either side of what fp32 gives: half a step of the largest
    close(out.float(), want, 1e-5 if q.dtype == torch.float32 else 2.0**-8)
    close(lse, want_lse)
    assert out.dtype == q.dtype
    return out, lse


# --- attention: gradients ---------------------------------------------------------------------------


def gradients(form, args: tuple) -> list[Tensor]:
    """Of queries, rows, entries (if there are any) and sinks, for a direction that is the same for every form."""
    places = [i for i in (0, 1, 3, 6) if args[i] is not None]
    mine = list(args)
    for i in places:
        mine[i] = args[i].detach().clone().requires_grad_()
    out, lse = form(*mine)
    assert not lse.requires_grad
    (out.float() * normal(*out.shape, seed=9)).sum().backward()
    return [mine[i].grad for i in places]


def gradient_case(
    lengths: list[int], heads: int, width: int, k: int | None, dtype: torch.dtype = torch.float32
) -> tuple:
    """Documents with a window of 20 and entries of 4 tokens each: all of them (None), k chosen ones, or none (0)."""
    n, visible, count = sum(lengths), *grouped(lengths, 4)
    q, kv, entries = normal(n, heads, width), normal(n, width, seed=1), normal(count, width, seed=2)
    chosen = picked(visible, k) if k else None
    read = (None, None, None) if k == 0 else (entries.to(dtype), visible, chosen)
    return q.to(dtype), kv.to(dtype), sliding(lengths, 20), *read, normal(heads, seed=3), width**-0.5


@pytest.mark.parametrize("k", [None, 5, 0])
@pytest.mark.parametrize(("lengths", "heads", "width"), [
    ([1], 1, 2), ([2, 5], 3, 10), ([37], 8, 128), ([130, 1, 3], 9, 48), ([65], 20, 17), ([129], 4, 64), ([40], 64, 512),
])  # fmt: skip
def test_gradients(isa: str, lengths: list[int], heads: int, width: int, k: int | None) -> None:
    """Of every head and channel count; lengths of every residue of groups, over several blocks of queries."""
    args = gradient_case(lengths, heads, width, k)
    for got, want in zip(
        gradients(cpu.sparse_attention, args), gradients(reference.sparse_attention, args), strict=True
    ):
        close(got, want)


@pytest.mark.parametrize("k", [None, 6])
@pytest.mark.parametrize("heads, width", [(8, 64), (1, 2), (3, 10), (5, 17), (9, 34), (20, 48), (40, 130)])
def test_gradients_in_bf16(isa: str, heads: int, width: int, k: int | None) -> None:
    """Also of an odd number of channels, and of rows and heads that fill no vector."""
    args = gradient_case([70, 3], heads, width, k, torch.bfloat16)
    for got, want in zip(
        gradients(cpu.sparse_attention, args), gradients(reference.sparse_attention, args), strict=True
    ):
        assert got.dtype == want.dtype
        close(got.float(), want.float(), 2.0**-7)  # probabilities of scores that were rounded, then one rounding each


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_do_not_depend_on_threads_or_on_what_is_beside(isa: str, dtype: torch.dtype) -> None:
    """By no bit: not on the threads, nor, of a document's queries, on another document in the run."""
    args = gradient_case([90, 40], 8, 48, 6, dtype)
    alone = gradients(cpu.sparse_attention, args)
    with on_threads(3):
        for one, three in zip(alone, gradients(cpu.sparse_attention, args), strict=True):
            assert torch.equal(one, three)
    q, kv, window, entries, visible, chosen, sink, scale = args
    part = q[:90], kv[:90], window.of(torch.arange(90)), entries[:22], visible.of(torch.arange(90)), chosen[:90]
    direction = normal(130, 8, 48, seed=9)[:90]
    mine = [t.clone().requires_grad_() for t in (part[0], part[1], part[3])]
    out, _ = cpu.sparse_attention(mine[0], mine[1], part[2], mine[2], part[4], part[5], sink, scale)
    (out * direction).sum().backward()
    for whole, one in zip(alone, mine, strict=False):
        assert torch.equal(whole[: len(one)], one.grad)


def test_the_gradient_of_a_row_that_nobody_sees_is_zero(isa: str) -> None:
    """Rows full of NaN between those that are read, and entries of which none is chosen."""
    q, kv, window, entries, visible, _, sink, scale = gradient_case([30], 4, 16, 3)
    window = spans([(0, 5) if i < 15 else (9, 14) for i in range(30)])
    chosen = torch.full((30, 3), -1)
    chosen[20:, 2] = 2
    kv[5:9], kv[14:], entries[:2], entries[3:] = NAN, NAN, NAN, NAN
    found = gradients(cpu.sparse_attention, (q, kv, window, entries, visible, chosen, sink, scale))
    assert all(not g.isnan().any() for g in found)
    assert not found[1][5:9].any() and not found[1][14:].any() and found[1][:5].any() and found[1][9:14].all()
    assert not found[2][:2].any() and not found[2][3:].any() and found[2][2].any()


# --- attention: values ------------------------------------------------------------------------------

SHAPES = [(1, 1), (3, 10), (8, 128), (7, 33), (9, 48), (16, 64), (20, 17), (40, 130), (64, 512)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, width", SHAPES)
def test_attention_of_any_shape(isa, heads, width, dtype):
    """Window and entries by interval, or chosen ones; two documents, so that intervals begin apart."""
    for n, window in ((1, 1), (3, 2), (21, 17), (150, 128)):
        if n * heads * width > 150 * 20 * 130:
            continue
        lengths = [n // 3, n - n // 3]
        visible, count = grouped(lengths, 2)
        args = [
            normal(n, heads, width).to(dtype), normal(n, width, seed=1).to(dtype), sliding(lengths, window),
            normal(count, width, seed=2).to(dtype), visible, None, normal(heads, seed=3), width**-0.5,
        ]  # fmt: skip
        attention_agrees(*args)
        for k in (1, 5, 200):
            args[5] = picked(visible, k)
            attention_agrees(*args)


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8, 127, 128, 129, 255, 256, 257, 1025])
def test_attention_over_any_number_of_rows(isa, rows):
    """One query, few queries and many: chunks that are full, that hold one row, that are not there."""
    for n in (1, 3, 40):
        pool, window = normal(rows + 40, 24, seed=1), spans([(i, i + rows) for i in range(n)])
        entries, visible = normal(rows, 24, seed=2), spans([(0, rows)] * n)
        args = (normal(n, 5, 24), pool, window, entries, visible, None, normal(5, seed=3), 0.2)
        attention_agrees(*args)
        attention_agrees(*args[:3], None, None, None, *args[6:])


def test_attention_reads_what_it_sees_and_nothing_else(isa):
    """Rows beside the intervals and rows that are not chosen are NaN here; so are rows of no width."""
    n, width = 60, 20
    pool, entries = torch.full((200, width), NAN), torch.full((90, width), NAN)
    pool[70:150], entries[20:50] = normal(80, width), normal(30, width, seed=1)
    window = spans([(70 + i, 80 + i + i % 3) for i in range(n)])
    visible = spans([(20, 20 + i // 2) for i in range(n)])
    for chosen in (None, picked(visible, 7)):
        out, lse = cpu.sparse_attention(
            normal(n, 3, width), pool, window, entries, visible, chosen, normal(3), width**-0.5
        )
        assert out.isfinite().all() and lse.isfinite().all()


def test_attention_where_nothing_is_seen(isa):
    """Only the sink is left: zero, and its logit."""
    nothing, sink = spans([(3, 3)] * 4), normal(3, seed=1)
    for entries, visible, chosen in (
        (None, None, None),
        (normal(0, 8), spans([(0, 0)] * 4), None),
        (normal(5, 8), nothing, None),
        (normal(5, 8), None, torch.full((4, 6), -1)),
        (normal(0, 8), None, torch.full((4, 6), -1)),
    ):
        args = (normal(4, 3, 8), normal(9, 8), nothing, entries, visible, chosen, sink, 1.0)
        out, lse = attention_agrees(*args)
        assert not out.any() and torch.equal(lse, sink.expand(4, 3))
    none = Spans(nothing.start[:0], nothing.stop[:0])
    out, lse = cpu.sparse_attention(normal(0, 3, 8), normal(9, 8), none, None, None, None, sink, 1.0)
    assert out.shape == (0, 3, 8) and lse.shape == (0, 3)


@pytest.mark.parametrize("size", [1e-3, 300.0, 1e4])
def test_attention_with_scores_and_sinks_of_any_size(isa, size):
    """Large scores leave one row, whose number is exact to rounding; nothing overflows."""
    window = sliding([70], 9)
    q, kv = normal(70, 4, 16) * size, normal(70, 16, seed=1)
    for sink in (-1e4, 0.0, 1e4, float("-inf")):
        args = (q, kv, window, None, None, None, torch.full((4,), sink), 0.25)
        out, lse = cpu.sparse_attention(*args)
        want, want_lse = reference.sparse_attention(*args)
        close(out, want, 1e-5 * max(1.0, size))
        close(lse, want_lse)


def test_numbers_that_are_none_go_through(isa):
    """A NaN in a row or a query shows in what reads it, and in nothing else."""
    q, kv, window = normal(40, 3, 16), normal(40, 16, seed=1), sliding([40], 5)
    q[3, 1, 2], kv[20, 4] = NAN, NAN
    out, _ = cpu.sparse_attention(q, kv, window, None, None, None, normal(3), 0.3)
    want, _ = reference.sparse_attention(q, torch.where(kv.isnan(), 0.0, kv), window, None, None, None, normal(3), 0.3)
    seen = torch.zeros(40, 3, dtype=torch.bool)
    seen[3, 1] = seen[20:25] = True
    assert torch.equal(out.isnan().any(dim=2), seen)
    close(out[~seen], want[~seen])


# --- attention: memories ----------------------------------------------------------------------------

PACKED = {
    "fp8": v4_rows(112, 16, 32, "packed", torch.float32)[0],
    "fp8 with a short block": v4_rows(70, 14, 32, "packed", torch.bfloat16)[0],
    "fp4": Packed(64, "fp4", 32),
    "fp4 of an odd width": Packed(37, "fp4", 32, tail=2),
    "fp8 without a tail": Packed(50, "fp8", 64, align=16, numbers=torch.bfloat16),
    "fp8 of V3.2": v32_rows(160, 16, 64, "packed")[0],
    "fp4 with FP32 scales": Packed(70, "fp4", 32, tail=4, fp32_scales=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PACKED)
def test_attention_reads_packed_rows(isa, name, dtype):
    """Straight from their bytes, in pages or not; decoding and prefill, by interval and chosen."""
    format = PACKED[name]
    width, (visible, count) = format.width, grouped([90, 50], 1)
    rows = normal(count, width, seed=1)
    for pool in (paged(rows, format), PackedRows(format.pack(rows), format)):
        for chosen in (None, picked(visible, 9)):
            for n in (2, 140):
                some = Spans(visible.start[-n:], visible.stop[-n:])
                args = [normal(n, 5, width).to(dtype), normal(140, width).to(dtype)]
                args += [Spans(*(x[-n:] for x in (sliding([140], 8).start, sliding([140], 8).stop))), pool, some]
                attention_agrees(*args, None if chosen is None else chosen[-n:], normal(5), 0.1)


@pytest.mark.parametrize("queries", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_attention_reads_plain_pages(isa, queries, kept):
    """fp32 queries read a bf16 memory too; the window may lie in pages as well, and rows may have a stride."""
    width, n = 40, 70
    window, (visible, _) = sliding([n], 300), grouped([n], 1)
    wide = normal(n, width + 3, seed=2).to(kept)
    for pool in (paged(normal(n, width, seed=1), Plain((width,), kept)), wide[:, 1 : width + 1]):
        for chosen in (None, picked(visible, 4)):
            attention_agrees(normal(n, 6, width).to(queries), pool, window, pool, visible, chosen, normal(6), 0.2)


# --- attention: bits --------------------------------------------------------------------------------


def bits_case(dtype: torch.dtype, packed: bool, heads: int = 8, width: int = 64, n: int = 90):
    lengths = [n // 3, n - n // 3]
    visible, count = grouped(lengths, 1)
    format = v4_rows(width, 16, 32, "packed", dtype)[0]
    rows = normal(count, width, seed=1).to(dtype)
    pool = paged(rows, format) if packed else rows
    return normal(n, heads, width).to(dtype), rows, sliding(lengths, 33), pool, visible, normal(heads, seed=2), 0.15


def part(case: tuple, i: int, j: int, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    q, kv, window, pool, visible, sink, scale = case
    window, visible = (Spans(s.start[i:j], s.stop[i:j]) for s in (window, visible))
    return cpu.sparse_attention(q[i:j], kv, window, pool, visible, chosen, sink, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("heads", [3, 8, 40])
def test_attention_bits_do_not_depend_on_the_batch(isa, dtype, packed, heads):
    """A query alone, in batches of any size, and with one thread, two, or more than queries."""
    case = bits_case(dtype, packed, heads)
    chosen = picked(case[4], 50)
    for some in (None, chosen):
        out, lse = part(case, 0, 90, some)
        for threads, sizes in ((1, (1, 2, 7, 31, 90)), (2, (1, 31, 90)), (5, (1, 3))):
            for size, i in ((s, i) for s in sizes for i in range(0, 90, 17 if s in (1, 3) else s)):
                j = min(i + size, 90)
                with on_threads(threads):
                    a, b = part(case, i, j, None if some is None else some[i:j])
                assert torch.equal(a, out[i:j]) and torch.equal(b, lse[i:j]), (threads, size, i)


def test_attention_bits_are_those_of_the_rows(isa):
    """The same rows by interval, or chosen with any number of -1 before them; in place, in pages, at another place."""
    q, kv, window, entries, visible, sink, scale = bits_case(torch.float32, False, n=200)
    want, _ = cpu.sparse_attention(q, kv, window, entries, visible, None, sink, scale)
    for room in (140, 200):
        chosen = picked(visible, room)
        assert torch.equal(cpu.sparse_attention(q, kv, window, entries, None, chosen, sink, scale)[0], want)
    assert isinstance(entries, Tensor)
    pages = paged(entries, Plain((64,), torch.float32))
    assert torch.equal(cpu.sparse_attention(q, kv, window, pages, visible, None, sink, scale)[0], want)
    moved = torch.cat([normal(5, 64, seed=9), kv])
    later = Spans(window.start + 5, window.stop + 5)
    assert torch.equal(cpu.sparse_attention(q, moved, later, entries, visible, None, sink, scale)[0], want)


def test_attention_bits_of_far_sequences(isa):
    """Sequences of a decoding batch, whose intervals lie far apart and have other lengths."""
    n, heads, width = 12, 16, 32
    lengths = [1, 130, 700, 5, 128, 300, 2, 0, 1100, 64, 257, 129]
    first = np.cumsum([0, *lengths[:-1]])
    visible = spans([(int(a), int(a) + b) for a, b in zip(first, lengths, strict=True)])
    pool, kv = normal(sum(lengths), width, seed=1), normal(n * 20, width, seed=2)
    window = spans([(20 * i, 20 * i + 1 + i) for i in range(n)])
    args = (normal(n, heads, width), kv, window, pool, visible, None, normal(heads, seed=3), 0.2)
    want, lse = attention_agrees(*args)
    for threads in (1, 2):
        with on_threads(threads):
            assert torch.equal(cpu.sparse_attention(*args)[0], want)
            for i in range(n):
                w, v = (Spans(s.start[i : i + 1], s.stop[i : i + 1]) for s in (window, visible))
                out = cpu.sparse_attention(args[0][i : i + 1], kv, w, pool, v, None, args[6], 0.2)
                assert torch.equal(out[0][0], want[i]) and torch.equal(out[1][0], lse[i])


# --- the indexer ------------------------------------------------------------------------------------


def choice_agrees(q: Tensor, weights: Tensor, keys: Tensor | PackedRows, visible: Spans, k: int) -> None:
    args = (q, weights, keys, visible, k)
    assert not cpu.LIMITS["index_scores_topk"].refuses(*args)
    got = cpu.index_scores_topk(*args)
    assert got.dtype == torch.int64 and torch.equal(got, reference.index_scores_topk(*args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, width", [(1, 1), (3, 10), (8, 64), (7, 33), (9, 48), (16, 32), (40, 20), (64, 128)])
def test_index_of_any_shape(isa, heads, width, dtype):
    """Integers, so that ties are many and scores exact whatever their order; documents, then sequences far apart."""
    for lengths, ratio, k in (([1], 1, 3), ([30, 70], 2, 4), ([140], 1, 40), ([3], 1, 1), ([200, 9, 60], 1, 7)):
        visible, count = grouped(lengths, ratio)
        n = sum(lengths)
        q, weights = small_integers(n, heads, width).to(dtype), small_integers(n, heads, seed=1)
        choice_agrees(q, weights, small_integers(count, width, seed=2, size=1).to(dtype), visible, k)
    apart = spans([(0, 700), (700, 700), (700, 703), (703, 1700)])
    q, weights = small_integers(4, heads, width).to(dtype), small_integers(4, heads, seed=1)
    for k in (1, 50, 128, 699, 900, 3000):
        choice_agrees(q, weights, small_integers(1700, width, seed=2, size=1).to(dtype), apart, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [32, 37, 64, 128])
def test_index_reads_packed_keys(isa, width, dtype):
    """FP4 and FP8, in pages or not: integers up to 2 survive the packing, so that the choice is exact."""
    visible, count = grouped([260, 40], 1)
    n, rows = 300, small_integers(300, width, seed=2)
    q, weights = small_integers(n, 8, width).to(dtype), small_integers(n, 8, seed=1)
    for format in (Packed(width, "fp4", 32, numbers=dtype), Packed(width, "fp8", 32, tail=3, numbers=dtype)):
        for keys in (paged(rows, format), PackedRows(format.pack(rows), format)):
            assert torch.equal(keys[:count].float(), rows)
            choice_agrees(q, weights, keys, visible, 11)
            some = Spans(visible.start[255:258], visible.stop[255:258])
            choice_agrees(q[255:258], weights[255:258], keys, some, 11)


def test_index_reads_a_memory_of_v4(isa):
    """Rotated FP4 keys under queries that are rotated and rounded as they are; scores of any numbers."""
    _, format = v4_rows(64, 16, 128, "packed", torch.bfloat16)
    q = format.as_query(normal(3, 64, 128).bfloat16())
    keys, weights = paged(normal(900, 128, seed=1).bfloat16(), format, per_page=32), normal(3, 64, seed=2)
    visible = spans([(0, 900), (0, 901), (0, 925)])
    keys.data[keys.data == 255] = 0  # the last page's rest is seen here
    got, want = (f(q, weights, keys, visible, 70) for f in (cpu.index_scores_topk, reference.index_scores_topk))
    scores = reference.index_scores(q, weights, keys[:])
    for i in range(3):  # a sum in another order may move one row across the border, no further
        a, b = scores[i][got[i]].sort().values, scores[i][want[i]].sort().values
        assert len(set(got[i].tolist()) & set(want[i].tolist())) >= 69 and (a - b).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, width", [(1, 32), (8, 64), (9, 32), (16, 128), (40, 64), (3, 96), (64, 128)])
def test_index_multiplies_rounded_queries_as_whole_numbers(isa, heads, width, dtype):
    """Queries that were rounded as FP4 keys are, beside some that were not, and one that is no number: every choice is
    of the best by the reference's scores, and its bits are those of the query alone."""
    format = Packed(width, "fp4", 32, numbers=dtype)
    n, count, k = 12, 1500, 70
    q = format.as_read(normal(n * heads, width).to(dtype) * 3).view(n, heads, width)
    weights = normal(n, heads, seed=2)
    q[1] = 0
    q[3], q[7] = normal(heads, width, seed=3).to(dtype), q[7] * 1.375  # not in the grid; in a finer one
    q[9, 0, 0] = NAN
    rows = normal(count, width, seed=1) * torch.logspace(-8, 8, count, base=2)[:, None]
    keys, visible = paged(rows.to(dtype), format), spans([(0, count - n + i) for i in range(n)])
    got = cpu.index_scores_topk(q, weights, keys, visible, k)
    scores = reference.index_scores(q.float(), weights, keys[:].float())
    for i in (i for i in range(n) if i != 9):
        own = scores[i, : visible.stop[i]]
        least = own.sort(descending=True).values[k - 1]
        assert own[got[i]].min() >= least - 1e-5 * own.abs().max() and len(set(got[i].tolist())) == k
    for threads in (1, 2):
        for i in range(n):
            some = Spans(visible.start[i : i + 1], visible.stop[i : i + 1])
            with on_threads(threads):
                assert torch.equal(cpu.index_scores_topk(q[i : i + 1], weights[i : i + 1], keys, some, k)[0], got[i])


def test_index_reads_a_memory_of_v32(isa):
    """Rotated FP8 keys, each with an FP32 scale, which BF16 would round; a query of either dtype."""
    _, format = v32_rows(64, 16, 128, "packed")
    for dtype in (torch.float32, torch.bfloat16):
        q = format.as_query(normal(3, 64, 128)).to(dtype)
        keys, weights = paged(normal(900, 128, seed=1), format, per_page=30), normal(3, 64, seed=2)
        assert ((keys[:].bfloat16().float() - keys[:]).abs() > 1e-3).any(), "BF16 would do as well"
        visible = spans([(0, 900), (0, 899), (100, 850)])
        got = cpu.index_scores_topk(q, weights, keys, visible, 70)
        assert not cpu.LIMITS["index_scores_topk"].refuses(q, weights, keys, visible, 70)
        scores = reference.index_scores(q, weights, keys[:])
        for i, want in enumerate(reference.index_scores_topk(q, weights, keys, visible, 70)):
            a, b = scores[i][got[i]].sort().values, scores[i][want].sort().values
            assert len(set(got[i].tolist()) & set(want.tolist())) >= 69 and (a - b).abs().max() < 1e-3


def test_index_scales_at_the_ends_of_their_range(isa):
    """Scale bytes next to 0 and 254 take numbers out of what a shortcut in BF16 can hold."""
    format = Packed(32, "fp4", 32, numbers=torch.bfloat16)
    data = torch.randint(0, 256, (256, 17), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data[:, 16] = torch.arange(256).clamp(1, 250)
    data[200:210, 16] = 0
    keys = PackedRows(data, format)
    q = torch.zeros(1, 1, 32, dtype=torch.bfloat16)
    q[0, 0, 5] = 1.0
    choice_agrees(q, torch.ones(1, 1), keys, spans([(3, 250)]), 60)


def test_index_ties_at_the_border_and_zeros_of_either_sign(isa):
    """Three values of the score, in an order that fills the list of candidates again and again; then only zeros."""
    rising = torch.arange(5000)[:, None].float()
    one = torch.ones(1, 1, 1)
    for keys in (rising, rising.flip(0), (rising % 3), rising * 0, (rising // 100) % 7):
        for k in (1, 2, 127, 1000, 4999):
            choice_agrees(one, one[0], keys, spans([(0, 5000)]), k)
            choice_agrees(one, -one[0], keys, spans([(17, 4801)]), k)
    weights = torch.where(torch.arange(90)[:, None] % 2 == 0, 1.0, -1.0).expand(90, 2)
    choice_agrees(-torch.ones(90, 2, 4), weights, torch.ones(22, 4), grouped([90], 4)[0], 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, width", [(1, 8), (5, 12), (8, 33), (64, 128)])
def test_equal_keys_tie_wherever_they_lie(isa, heads, width, dtype):
    """Random numbers, so that a sum in another order at the edge of a tile would prefer a later one of equal keys."""
    three = normal(3, width, seed=2).to(dtype)
    for rows in (1, 2, 5, 7, 9, 15, 17, 31, 33, 63, 65, 127, 129, 255, 257):
        q, weights = normal(3, heads, width, seed=rows).to(dtype), normal(3, heads, seed=rows + 1)
        keys = three[torch.arange(rows) % 3]
        choice_agrees(q, weights, keys, spans([(0, rows)] * 3), (rows + 1) // 2)


def test_index_reads_what_it_sees_and_nothing_else(isa):
    """A NaN key would be the best of all: here every key that is not seen is one."""
    keys = torch.full((400, 16), NAN)
    keys[100:300] = normal(200, 16)
    visible = spans([(100, 100 + 3 * i) for i in range(60)])
    got = cpu.index_scores_topk(normal(60, 4, 16), normal(60, 4), keys, visible, 9)
    held = got[got >= 0]
    assert ((held >= 100) & (held < 300)).all()
    want = reference.index_scores_topk(normal(60, 4, 16), normal(60, 4), torch.nan_to_num(keys), visible, 9)
    assert torch.equal(got < 0, want < 0)


def test_scores_that_are_none_come_first(isa):
    """A key of NaN is chosen before all others, as the reference's sort has it."""
    keys = normal(500, 8)
    keys[[3, 77, 400]] = NAN
    got = cpu.index_scores_topk(normal(2, 3, 8), normal(2, 3), keys, spans([(0, 500)] * 2), 5)
    assert all({3, 77, 400} <= set(row) for row in got.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_index_choice_does_not_depend_on_the_batch_or_the_threads(isa, dtype):
    """Of numbers, whose scores differ in the last bit if they are summed in another order; near-ties decide."""
    n, count = 40, 3000
    keys = (1 + 1e-6 * normal(count, 64, seed=2)).to(dtype)
    for heads in (3, 8, 24, 64):
        q, weights = normal(n, heads, 64).to(dtype), normal(n, heads, seed=1)
        visible = spans([(0, count - n + i) for i in range(n)])
        want = cpu.index_scores_topk(q, weights, keys, visible, 100)
        for threads in (1, 2):
            for size, i in ((s, i) for s in (1, 3, 16, 40) for i in range(0, n, 13 if s < 4 else s)):
                j = min(i + size, n)
                some = Spans(visible.start[i:j], visible.stop[i:j])
                with on_threads(threads):
                    got = cpu.index_scores_topk(q[i:j], weights[i:j], keys, some, 100)
                assert torch.equal(got, want[i:j]), (heads, threads, size)


# --- scores that are given --------------------------------------------------------------------------


def test_best_rows_of_any_interval(isa):
    """Ties, zeros of either sign, -inf and NaN; counts from none to more than there are."""
    scores = small_integers(3000, size=3) * torch.where(torch.rand(3000) < 0.5, 1.0, -0.0)
    scores[::50], scores[7::400] = float("-inf"), NAN
    for pairs in ([(0, i) for i in range(300)], [(30 * i, 30 * i + i % 40) for i in range(95)], [(0, 3000)] * 3):
        visible = spans(pairs)
        counts = torch.arange(len(pairs)) % 15
        for k in (0, 1, 14, 40):
            args = (scores, visible, counts.clamp(max=k), k)
            assert torch.equal(cpu.best_rows(*args), reference.best_rows(*args))
    assert cpu.best_rows(normal(0), spans([(0, 0)]), torch.tensor([2]), 3).tolist() == [[-1] * 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_lowest_of_any_size(isa, dtype):
    """In the order of the choice; also all of a row, of rows in three dimensions, and of none."""
    for shape in ((1,), (40,), (3, 7), (50, 33), (2, 3, 16), (7, 384), (0, 5)):
        scores = (small_integers(*shape) * torch.where(torch.rand(shape) < 0.5, 1.0, -0.0)).to(dtype)
        if scores.numel():
            scores.flatten()[::11] = float("-inf")
            scores.flatten()[5::13] = NAN
        for k in {1, min(6, shape[-1]), shape[-1]}:
            got = cpu.topk_lowest(scores, k)
            assert got.dtype == torch.int64 and torch.equal(got, reference.topk_lowest(scores, k))
    turned = small_integers(20, 6).T
    assert torch.equal(cpu.topk_lowest(turned, 4), reference.topk_lowest(turned, 4))


# --- what is served ---------------------------------------------------------------------------------


def test_the_forms_stand_in_the_table():
    """Imported by the first call of any op that has a tensor on the CPU."""
    ops.topk_lowest(normal(3), 1)
    for name in ("sparse_attention", "index_scores_topk", "best_rows", "topk_lowest"):
        for dtype in (torch.float32, torch.bfloat16):
            assert ops.explain(name, dtype=dtype)["cpu"] == "", name


def test_what_is_refused():
    q, kv, window, sink = normal(4, 3, 64), normal(4, 64), sliding([4], 2), normal(3)
    attention, index = cpu.LIMITS["sparse_attention"], cpu.LIMITS["index_scores_topk"]

    def refuses(q=q, kv=kv, entries=None, visible=None, chosen=None) -> str:
        return attention.refuses(q, kv, window, entries, visible, chosen, sink, 1.0)

    assert refuses() == ""
    assert refuses(q=q.double()) == "dtype float64"
    assert refuses(q=q.half(), kv=kv.half()) == "dtype float16"
    assert refuses(q=q.clone().requires_grad_()) == ""
    assert refuses(kv=normal(4, 128)[:, ::2]) == "a pool whose rows are not contiguous"
    assert refuses(kv=normal(4, 32)) == "rows of 32 numbers for queries of 64"
    chosen = torch.zeros(4, 2, dtype=torch.int32)
    assert refuses(entries=kv, visible=window, chosen=chosen) == "chosen rows that are not int64"
    v32, keys32 = v32_rows(48, 16, 64, "packed")
    narrow = "packed rows with FP32 scales that are read in less than FP32"
    assert refuses(entries=paged(kv, v32), visible=window) == ""
    assert refuses(entries=paged(kv, replace(v32, numbers=torch.bfloat16)), visible=window) == narrow
    assert refuses(entries=paged(kv, Packed(64, "fp8", 24)), visible=window) == "blocks of 24 numbers"
    half = paged(kv, Plain((64,), torch.float16))
    assert refuses(entries=half, visible=window) == "a memory in float16"
    half.table = half.table.repeat(2)[::2]
    assert refuses(entries=half, visible=window) == "a memory in float16"
    gaps = paged(kv, Plain((64,), torch.float32), per_page=1)
    gaps.table = gaps.table.repeat_interleave(2)[::2]
    assert refuses(entries=gaps, visible=window) == "a page table with gaps"
    assert index.refuses(q, normal(4, 3), paged(kv, keys32), window, 2) == ""
    assert index.refuses(q, normal(4, 3), paged(kv, replace(keys32, numbers=torch.bfloat16)), window, 2) == narrow
    assert index.refuses(q.requires_grad_(), normal(4, 3), kv, window, 2) == "", "a choice has no gradient"
    whole = torch.arange(5)
    assert cpu.LIMITS["topk_lowest"].refuses(whole, 2) == "scores that are whole numbers"
