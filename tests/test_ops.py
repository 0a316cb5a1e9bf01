"""Failures caught here: a fast op that is not the reference (values, gradients, awkward sizes, low precision), a tie
that falls differently, a mask off by one row, a gradient that overflows, memory that grows with the square of the
length.

Truth is ops/reference.py under autograd, in fp32. Tolerances are for fp32 sums of at most a few thousand terms of
order one. The reference itself is held to independent arithmetic here where that is short, and by test_quirks.py.
"""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import KINDS, differ, small_model, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4 import ops
from dsv4.model import Segment
from dsv4.ops import Spans, blocked, reference

SIZES = [1, 3, 63, 64, 65, 127, 128, 129, 130]


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def agree(name: str, args: tuple, inputs: tuple[int, ...], tolerance: float, exact: bool = False) -> None:
    """Both backends of op `name`: same outputs, and same gradients for the arguments at places `inputs`."""
    results = []
    for backend in ("reference", "blocked"):
        mine = list(args)
        for i in inputs:
            mine[i] = args[i].detach().clone().requires_grad_()
        out = ops.TABLE[name][backend](*mine)
        outs = [out] if isinstance(out, Tensor) else list(out)
        if name == "sparse_attention":
            outs = outs[:1]  # the log-sum-exp carries no gradient; it has a test of its own
        if inputs:
            # a weighted sum, so that no symmetry of the plain sum hides an error
            sum((o.float() * normal(*o.shape, seed=7 + i)).sum() for i, o in enumerate(outs)).backward()
        results.append(([o.detach() for o in outs], [mine[i].grad for i in inputs]))
    (want, want_grads), (got, got_grads) = results
    for i, (a, b) in enumerate(zip(want, got, strict=False)):
        assert a.dtype == b.dtype and a.shape == b.shape
        size = max(1.0, a.abs().max().item()) if a.numel() else 1.0
        assert torch.equal(a, b) if exact else differ_or_empty(a, b) <= tolerance * size, f"output {i} of {name}"
    for i, a, b in zip(inputs, want_grads, got_grads, strict=True):
        if a is None:
            assert b is None or not b.any(), f"argument {i} of {name} has no gradient in the reference"
            continue
        assert b is not None and a.dtype == b.dtype
        size = max(1.0, a.abs().max().item()) if a.numel() else 1.0
        assert differ_or_empty(a, b) <= tolerance * size, f"gradient of argument {i} of {name}"


def differ_or_empty(a: Tensor, b: Tensor) -> float:
    return differ(a, b) if a.numel() or b.numel() else 0.0


# --- the table ------------------------------------------------------------------------------------


def test_every_op_has_both_backends_and_one_docstring():
    for name, backends in ops.TABLE.items():
        assert list(backends) == ["reference", "blocked"]
        assert getattr(ops, name).__doc__ and getattr(ops, name).__name__ == name
        assert ops.active(name) == "blocked", "the best backend serves unless asked otherwise"


def test_every_op_is_compared_with_its_reference():
    """An op that joins the table needs a test here, so that no fast form goes unchecked."""
    text = Path(__file__).read_text(encoding="utf-8")
    compared = {name for name in ops.TABLE if f'agree("{name}"' in text}
    # choices are compared as integers, in tests of their own
    assert compared | {"index_scores_topk", "topk_lowest"} == set(ops.TABLE)


def test_using_switches_every_op_and_switches_back():
    with ops.using("reference"):
        assert {ops.active(name) for name in ops.TABLE} == {"reference"}
        with pytest.raises(RuntimeError), ops.using("blocked"):
            assert {ops.active(name) for name in ops.TABLE} == {"blocked"}
            raise RuntimeError
        assert ops.active("sinkhorn") == "reference"
    assert ops.active("sinkhorn") == "blocked"


@pytest.mark.parametrize("kind", KINDS)
def test_whole_models_agree(kind):
    """Logits and every gradient of a model, reference ops against blocked ones, three packed documents."""
    model = small_model(KINDS[kind], mtp=1)
    ids = tokens(model, 260)
    grads = {}
    for backend in ("reference", "blocked"):
        model.zero_grad()
        with ops.using(backend):
            trunk = model.trunk(ids, [Segment(7), Segment(150), Segment(103)])
            drafted, _, _ = model.predict_next(trunk, ids)
            (trunk.hidden * normal(260, 48)).sum().add((drafted * normal(257, 48, seed=1)).sum()).backward()
        grads[backend] = {"hidden": trunk.hidden.detach()} | {n: p.grad for n, p in model.named_parameters()}
    for name, want in grads["reference"].items():
        got = grads["blocked"][name]
        assert (want is None) == (got is None), name
        if want is not None:
            assert differ(want, got) <= 1e-4 * max(1.0, want.abs().max().item()), name


# --- spans ----------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=40), st.integers(1, 9))
def test_spans_say_what_a_plain_loop_says(steps, size):
    start, stop = [], []
    for move, length in steps:  # non-decreasing ends, empty intervals included
        start.append((start[-1] if start else 0) + move)
        stop.append(max(stop[-1] if stop else 0, start[-1] + length))
    spans = Spans(torch.tensor(start, dtype=torch.int64), torch.tensor(stop, dtype=torch.int64))
    assert len(spans) == len(steps)
    assert spans.longest == max((b - a for a, b in zip(start, stop, strict=True)), default=0)
    covered = []
    for i, j in spans.blocks(size):
        assert 0 < j - i <= size
        covered += range(i, j)
        lo, hi = spans.union(i, j)
        assert all(lo <= a and (b <= hi or a == b) for a, b in zip(start[i:j], stop[i:j], strict=True))
        hidden = spans.hidden(i, j, lo, hi + 2, torch.device("cpu"))
        want = [[not start[q] <= row < stop[q] for row in range(lo, hi + 2)] for q in range(i, j)]
        assert hidden.tolist() == want
    assert covered == list(range(len(steps)))


# --- top-k with the tie rule ----------------------------------------------------------------------

TIED = {
    "all equal": torch.zeros(2, 9),
    "signed zeros": torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1.0, 1.0]]),
    "pairs": torch.tensor([[3.0, 1.0, 3.0, 2.0, 1.0, 2.0, 3.0]]),
    "negative ties": torch.tensor([[-2.0, -1.0, -1.0, -3.0, -1.0]]),
    "subnormal": torch.tensor([[1e-42, 0.0, -1e-42, 1e-42, -0.0]]),
    "extremes": torch.tensor([[float("inf"), 3e38, -3e38, float("-inf"), 3e38, 0.0]]),
}


def by_rule(row: list[float], k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("case", TIED)
def test_ties_go_to_the_lowest_index(backend, case):
    scores = TIED[case]
    for k in range(1, scores.shape[-1] + 1):
        chosen = ops.TABLE["topk_lowest"][backend](scores, k)
        assert chosen.dtype == torch.int64 and chosen.tolist() == [by_rule(row, k) for row in scores.tolist()]


@given(st.lists(st.sampled_from([-1.5, -1.0, -0.0, 0.0, 1e-40, 1.0, 2.0]), min_size=1, max_size=40), st.data())
def test_topk_follows_the_rule_on_any_list(row, data):
    k = data.draw(st.integers(1, len(row)))
    for backend in ("reference", "blocked"):
        assert ops.TABLE["topk_lowest"][backend](torch.tensor(row), k).tolist() == by_rule(row, k)


# --- indexer --------------------------------------------------------------------------------------


def entry_spans(lengths: list[int], ratio: int = 4) -> tuple[Spans, int]:
    """What the tokens of packed documents see of their compressed entries; also the number of entries."""
    start, stop, base = [], [], 0
    for n in lengths:
        start += [base] * n
        stop += [base + (t + 1) // ratio for t in range(n)]
        base += n // ratio
    return Spans(torch.tensor(start), torch.tensor(stop)), base


def window_spans(lengths: list[int], window: int) -> Spans:
    start, stop, base = [], [], 0
    for n in lengths:
        start += [base + max(0, t + 1 - window) for t in range(n)]
        stop += [base + t + 1 for t in range(n)]
        base += n
    return Spans(torch.tensor(start), torch.tensor(stop))


def cut(n: int) -> list[int]:
    """One document, or three of which the first is too short for an entry."""
    return [n] if n < 20 else [3, n // 3, n - 3 - n // 3]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("k", [1, 5, 64])
@pytest.mark.parametrize("numbers", [1 << 23, 1 << 9])
def test_index_scores_topk(n, k, numbers, monkeypatch):
    """Also with blocks so small that the keys come in several chunks and the best so far are merged."""
    monkeypatch.setattr(blocked, "_BLOCK_NUMBERS", numbers)
    for lengths in ([n], cut(n)):
        visible, entries = entry_spans(lengths)
        args = (normal(n, 3, 8), normal(n, 3, seed=1), normal(entries, 8, seed=2), visible, k)
        want = reference.index_scores_topk(*args)
        assert want.shape == (n, k)
        assert torch.equal(want, blocked.index_scores_topk(*args))


@pytest.mark.parametrize("numbers", [1 << 23, 1 << 8])
def test_index_ties_go_to_the_lowest_entry(numbers, monkeypatch):
    """All scores 0, some of them -0.0: the choice is the first visible entries, in both backends."""
    monkeypatch.setattr(blocked, "_BLOCK_NUMBERS", numbers)
    n, k = 90, 4
    visible, entries = entry_spans([n])
    q, keys = -torch.ones(n, 2, 4), torch.ones(entries, 4)  # relu makes every product 0, a negative weight -0.0
    weights = torch.where(torch.arange(n)[:, None] % 2 == 0, 1.0, -1.0).expand(n, 2)
    want = [[-1] * (k - min(k, (t + 1) // 4)) + list(range(min(k, (t + 1) // 4))) for t in range(n)]
    for backend in ("reference", "blocked"):
        assert ops.TABLE["index_scores_topk"][backend](q, weights, keys, visible, k).tolist() == want


def test_index_ties_across_key_chunks(monkeypatch):
    """Scores that take three values only, so that ties cross the borders of the chunks in which keys are read."""
    monkeypatch.setattr(blocked, "_BLOCK_NUMBERS", 64)
    n, k = 64, 7
    visible, entries = Spans(torch.zeros(n, dtype=torch.int64), torch.full((n,), 100)), 100
    keys = torch.tensor([0.0, 1.0, 2.0])[torch.randint(0, 3, (entries,))][:, None]
    args = (torch.ones(n, 1, 1), torch.ones(n, 1), keys, visible, k)
    want = sorted(by_rule(keys[:, 0].tolist(), k))
    assert all(row == want for row in blocked.index_scores_topk(*args).tolist())
    assert all(row == want for row in reference.index_scores_topk(*args).tolist())


def test_index_without_entries():
    visible, _ = entry_spans([3])
    for backend in ("reference", "blocked"):
        chosen = ops.TABLE["index_scores_topk"][backend](normal(3, 2, 4), normal(3, 2), normal(0, 4), visible, 5)
        assert chosen.tolist() == [[-1] * 5] * 3


def test_index_low_precision_inputs():
    """bf16 operands are widened before the product, so both backends choose the same entries."""
    visible, entries = entry_spans([130])
    args = (normal(130, 8, 16).bfloat16(), normal(130, 8, seed=1), normal(entries, 16, seed=2).bfloat16(), visible, 6)
    assert torch.equal(reference.index_scores_topk(*args), blocked.index_scores_topk(*args))


# --- attention ------------------------------------------------------------------------------------


def attention_case(n: int, lengths: list[int], k: int | None, dtype=torch.float32, ratio: int = 4, heads: int = 3):
    """q, window rows, spans, entries, visible, chosen, sink, scale. k None: all visible entries are read."""
    visible, entries = entry_spans(lengths, ratio)
    d = 10
    chosen = None
    if k is not None:
        chosen = reference.index_scores_topk(
            normal(n, 2, 4, seed=5), normal(n, 2, seed=6), normal(entries, 4, seed=8), visible, k
        )
    pool = normal(entries, d, seed=2).to(dtype)
    q, kv = normal(n, heads, d).to(dtype), normal(n, d, seed=1).to(dtype)
    return (q, kv, window_spans(lengths, 17), pool, visible, chosen, normal(heads, seed=3), d**-0.5)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("k", [None, 2, 5, 200])
def test_sparse_attention(n, k):
    """k = 2 gathers rows per query, 5 only where the pool is large, 200 has more room than entries."""
    for lengths in ([n], cut(n)):
        agree("sparse_attention", attention_case(n, lengths, k), (0, 1, 3, 6), 2e-5)


@pytest.mark.parametrize("k", [None, 1, 30])
@pytest.mark.parametrize("numbers", [1 << 23, 1 << 11, 1])
def test_sparse_attention_in_blocks_of_any_size(k, numbers, monkeypatch):
    monkeypatch.setattr(blocked, "_BLOCK_NUMBERS", numbers)
    agree("sparse_attention", attention_case(130, [40, 2, 88], k), (0, 1, 3, 6), 2e-5)


def test_both_ways_to_read_chosen_entries_are_taken(monkeypatch):
    """The case list above would prove less if every block went the same way."""
    ways = []
    whole = blocked._Piece.__init__

    def watch(self, keys, hidden, rows):
        ways.append("rows" if isinstance(rows, Tensor) else "interval")
        whole(self, keys, hidden, rows)

    monkeypatch.setattr(blocked._Piece, "__init__", watch)
    blocked.sparse_attention(*attention_case(130, [130], 5))
    assert ways == ["interval", "interval", "interval", "rows", "interval", "rows"], "three blocks: window, entries"


def test_window_only():
    q, kv, window, _, _, _, sink, scale = attention_case(65, [65], None)
    agree("sparse_attention", (q, kv, window, None, None, None, sink, scale), (0, 1, 6), 2e-5)
    empty = (q, kv, window, normal(0, 10), entry_spans([3])[0], None, sink, scale)
    short = tuple(a[:3] if isinstance(a, Tensor) and i < 2 else a for i, a in enumerate(empty))
    short = (*short[:2], window_spans([3], 17), *short[3:])
    agree("sparse_attention", short, (0, 1, 6), 2e-5)


def test_chosen_rows_are_enough():
    """Entries are read by interval or as chosen rows: with rows there need be no interval."""
    q, kv, window, pool, _, chosen, sink, scale = attention_case(129, [129], 3)
    agree("sparse_attention", (q, kv, window, pool, None, chosen, sink, scale), (0, 1, 3, 6), 2e-5)


def test_no_query_sees_an_entry():
    """A pool that exists but is hidden from all: chosen is -1 everywhere, or every interval is empty."""
    q, kv, window, pool, _, _, sink, scale = attention_case(66, [66], None)
    nothing = Spans(torch.zeros(66, dtype=torch.int64), torch.zeros(66, dtype=torch.int64))
    for chosen in (None, torch.full((66, 4), -1)):
        agree("sparse_attention", (q, kv, window, pool, nothing, chosen, sink, scale), (0, 1, 3, 6), 2e-5)


def test_log_sum_exp_of_both():
    for k in (None, 2):
        args = attention_case(130, [130], k)
        assert differ(reference.sparse_attention(*args)[1], blocked.sparse_attention(*args)[1]) < 1e-5


@pytest.mark.parametrize("sink", [-1e4, 0.0, 1e4])
def test_sinks_of_any_size(sink):
    """A sink far above all scores makes the output 0, one far below is as if there were none; both stay finite."""
    q, kv, window, pool, visible, _, _, scale = attention_case(65, [65], None)
    args = (q, kv, window, pool, visible, None, torch.full((3,), sink), scale)
    agree("sparse_attention", args, (0, 1, 3, 6), 2e-5)
    out = blocked.sparse_attention(*args)[0]
    assert out.isfinite().all() and (sink < 1e4 or not out.any())


def test_large_scores_stay_finite():
    q, kv, window, pool, visible, _, sink, scale = attention_case(65, [65], None)
    agree("sparse_attention", (q * 300, kv, window, pool, visible, None, sink, scale), (0, 1, 3, 6), 5e-4)


@pytest.mark.parametrize("k", [None, 2])
def test_attention_low_precision_inputs(k):
    """bf16 in, bf16 out, fp32 sums between: the difference is bf16's own rounding."""
    agree("sparse_attention", attention_case(129, [60, 69], k, torch.bfloat16), (0, 1, 3, 6), 2e-2)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("k", [None, 2])
def test_fp32_queries_read_a_bf16_cache(backend, k):
    """A memory may be held in bf16 under an fp32 model; the product is then in fp32."""
    q, kv, window, pool, visible, chosen, sink, scale = attention_case(129, [129], k)
    got, _ = ops.TABLE["sparse_attention"][backend](
        q, kv.bfloat16(), window, pool.bfloat16(), visible, chosen, sink, scale
    )
    rounded = (q, kv.bfloat16().float(), window, pool.bfloat16().float(), visible, chosen, sink, scale)
    assert got.dtype == torch.float32 and differ(got, reference.sparse_attention(*rounded)[0]) < 1e-5


def test_attention_by_hand():
    """Two keys, one entry, a sink: the probabilities are written out."""
    q, kv, pool = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[2.0, 0.0], [0.0, 5.0]]), torch.tensor([[1.0, 1.0]])
    row = Spans(torch.tensor([0]), torch.tensor([2])), Spans(torch.tensor([0]), torch.tensor([1]))
    p = torch.tensor([2.0 * 0.5, 0.0, 1.0 * 0.5, -1.0]).softmax(0)  # the sink is not scaled and its value is 0
    want = p[0] * kv[0] + p[1] * kv[1] + p[2] * pool[0]
    for backend in ("reference", "blocked"):
        op = ops.TABLE["sparse_attention"][backend]
        out, lse = op(q, kv, row[0], pool, row[1], None, torch.tensor([-1.0]), 0.5)
        assert differ(out[0, 0], want) < 1e-6
        assert abs(lse.item() - torch.tensor([1.0, 0.0, 0.5, -1.0]).logsumexp(0).item()) < 1e-6


# --- compression ----------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_compress_by_hand(overlap):
    r, d, groups = 4, 5, 3
    width = d * (2 if overlap else 1)
    values, scores = normal(groups * r, width), normal(groups * r, width, seed=1)
    first, previous = torch.arange(groups) * r, torch.arange(groups) > 0
    got = ops.compress(values, scores, first, previous, r, overlap)
    for g in range(groups):
        for channel in range(d):
            own = range(g * r, g * r + r)
            rows = [(s, channel + (d if overlap else 0)) for s in own]
            if overlap and g:
                rows += [(s, channel) for s in range(g * r - r, g * r)]  # first half: for the group after
            weight = torch.stack([scores[s, c] for s, c in rows]).softmax(0)
            want = sum(w * values[s, c] for w, (s, c) in zip(weight, rows, strict=True))
            assert abs(got[g, channel] - want) < 1e-5


def test_compress_gradients_are_finite_without_a_previous_group():
    values, scores = normal(8, 6).requires_grad_(), normal(8, 6, seed=1).requires_grad_()
    out = ops.compress(values, scores, torch.tensor([0, 4]), torch.tensor([False, False]), 4, True)
    out.square().sum().backward()
    for grad in (values.grad, scores.grad):
        assert grad.isfinite().all() and not grad[:, :3].any() and grad[:, 3:].any()


def test_compress_nothing():
    empty = torch.zeros(0, dtype=torch.int64)
    assert ops.compress(normal(3, 6), normal(3, 6), empty, empty.bool(), 4, True).shape == (0, 3)


# --- hyper-connections ----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 130, 4097])
def test_sinkhorn(n):
    agree("sinkhorn", (normal(n, 4, 4, scale=3.0), 20, 1e-6), (0,), 2e-5)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_sinkhorn_is_bounded(backend, scale):
    """Columns sum to 1 (the last step is a column step), rows nearly; huge logits give finite values and gradients."""
    logits = normal(500, 4, 4, scale=scale).requires_grad_()
    c = ops.TABLE["sinkhorn"][backend](logits, 20, 1e-6)
    assert (c >= 0).all() and (c.sum(dim=-2) - 1).abs().max() < 2e-5
    if scale == 1.0:
        assert (c.sum(dim=-1) - 1).abs().max() < 1e-3
    (c * normal(500, 4, 4, seed=9)).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("signs", [1.0, -1.0])
def test_sinkhorn_of_extreme_logits(signs):
    """+-1e4 in every pattern that leaves a row or a column without a large number."""
    patterns = torch.stack([torch.tensor([(p >> b) & 1 for b in range(16)]).view(4, 4) for p in range(0, 1 << 16, 37)])
    agree("sinkhorn", (signs * 1e4 * (2.0 * patterns - 1), 20, 1e-6), (0,), 1e-4)


def test_sinkhorn_gradient_against_differences():
    """The analytic backward, in fp32, against central differences of the reference in fp64."""
    logits, weight = normal(3, 4, 4, scale=1.0), normal(3, 4, 4, seed=4).double()

    def value(x: Tensor) -> Tensor:
        c = x.softmax(-1) + 1e-6
        c = c / (c.sum(-2, keepdim=True) + 1e-6)
        for _ in range(19):
            c = c / (c.sum(-1, keepdim=True) + 1e-6)
            c = c / (c.sum(-2, keepdim=True) + 1e-6)
        return (c * weight).sum()

    mine = logits.clone().requires_grad_()
    (ops.sinkhorn(mine, 20, 1e-6).double() * weight).sum().backward()
    want, step = torch.zeros_like(logits).double(), 1e-5
    for i in range(logits.numel()):
        move = torch.zeros(logits.numel(), dtype=torch.float64)
        move[i] = step
        move = move.view_as(logits)
        want.view(-1)[i] = (value(logits.double() + move) - value(logits.double() - move)) / (2 * step)
    assert differ(mine.grad, want) < 1e-5


@pytest.mark.parametrize("n", [1, 3, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hyper_maps(n, dtype):
    x, fn = normal(n, 4, 12).to(dtype), normal(24, 48, seed=1, scale=0.3)
    args = (x, fn, normal(24, seed=2), normal(3, seed=3), 20, 1e-6, 1e-6)
    agree("hyper_maps", args, (0, 1, 2, 3), 5e-5 if dtype == torch.float32 else 1e-2)
    pre, post, comb = ops.hyper_maps(*args)
    assert pre.dtype == post.dtype == comb.dtype == torch.float32
    assert (pre > 0).all() and (pre < 1 + 1e-5).all() and (post > 0).all() and (post < 2).all()


def test_read_and_write_by_hand():
    """write sums over the FIRST index of comb: stream k gets sum_j comb[j, k] x_j."""
    x, y, comb = normal(2, 4, 3), normal(2, 3, seed=1), normal(2, 4, 4, seed=4)
    pre, post = normal(2, 4, seed=2), normal(2, 4, seed=3)
    u, new = ops.hyper_read(x, pre), ops.hyper_write(x, y, post, comb)
    for n in range(2):
        assert differ(u[n], sum(pre[n, j] * x[n, j] for j in range(4))) < 1e-6
        for k in range(4):
            want = post[n, k] * y[n] + sum(comb[n, j, k] * x[n, j] for j in range(4))
            assert differ(new[n, k], want) < 1e-6
    low = x.bfloat16()
    assert ops.hyper_read(low, pre).dtype == ops.hyper_write(low, y, post, comb).dtype == torch.bfloat16


@pytest.mark.parametrize("n", [1, 3, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hyper_write(n, dtype):
    args = (normal(n, 4, 12).to(dtype), normal(n, 12, seed=1).to(dtype), normal(n, 4, seed=2), normal(n, 4, 4, seed=3))
    agree("hyper_write", args, (0, 1, 2, 3), 2e-5 if dtype == torch.float32 else 2e-2)


# --- experts --------------------------------------------------------------------------------------


def expert_case(n: int, dtype=torch.float32, experts: int = 5, k: int = 2, scale: float = 1.0):
    m, inner = 12, 7
    chosen = torch.stack([torch.randperm(experts, generator=torch.Generator().manual_seed(i))[:k] for i in range(n)])
    x, w13 = normal(n, m, scale=scale).to(dtype), normal(experts, 2, inner, m, seed=1).to(dtype)
    return (x, chosen, normal(n, k, seed=2).abs(), w13, normal(experts, m, inner, seed=3).to(dtype), 2.0)


@pytest.mark.parametrize("n", SIZES)
def test_experts(n):
    agree("experts", expert_case(n), (0, 2, 3, 4), 2e-5)


def test_experts_without_tokens():
    """Experts that no token chose get a zero gradient, not none and not what was in the memory before."""
    x, chosen, weights, w13, w2, limit = expert_case(6)
    args = (x, torch.tensor([[1, 3]] * 6), weights, w13, w2, limit)
    agree("experts", args, (0, 2, 3, 4), 2e-5)
    mine = [a.clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    ops.experts(*mine).sum().backward()
    for grad in (mine[3].grad, mine[4].grad):
        assert not grad[[0, 2, 4]].any() and grad[[1, 3]].abs().sum(dim=tuple(range(1, grad.ndim))).all()


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_clamps_act_and_stop_gradients(scale):
    """Where gate > limit or |up| > limit the value is cut and nothing flows back; a very negative gate is not cut."""
    case = expert_case(65, scale=scale)
    x, chosen, _, w13, _, limit = case
    hidden = torch.einsum("nm,ncim->nci", x, w13[chosen[:, 0]])
    assert (hidden[:, 0] > limit).any() and (hidden[:, 0] < -limit).any() and (hidden[:, 1].abs() > limit).any()
    agree("experts", case, (0, 2, 3, 4), 2e-5)


def test_clamp_by_hand():
    gate, up = torch.tensor([3.0, -3.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, -5.0, 5.0])
    want = [g / (1 + math.exp(-g)) * u for g, u in [(2, 1), (-3, 1), (1, -2), (1, 2)]]
    assert differ(ops.swiglu(gate, up, 2.0), torch.tensor(want)) < 1e-6


def test_experts_low_precision():
    agree("experts", expert_case(129, torch.bfloat16), (0, 2, 3, 4), 3e-2)


# --- loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("numbers", [1 << 23, 1 << 9, 1])
def test_cross_entropy(n, numbers, monkeypatch):
    monkeypatch.setattr(blocked, "_BLOCK_NUMBERS", numbers)
    targets = torch.randint(0, 50, (n,))
    targets[::3] = -100
    agree("cross_entropy", (normal(n, 9), normal(50, 9, seed=1), targets), (0, 1), 2e-5)


@pytest.mark.parametrize("ignore", [-100, 7])
def test_ignored_targets(ignore):
    targets = torch.full((20,), ignore)
    hidden, head = normal(20, 9).requires_grad_(), normal(50, 9, seed=1).requires_grad_()
    loss = ops.cross_entropy(hidden, head, targets, ignore)
    loss.backward()
    assert loss.item() == 0.0 and not hidden.grad.any() and not head.grad.any()
    targets[4] = 3
    agree("cross_entropy", (normal(20, 9), normal(50, 9, seed=1), targets, ignore), (0, 1), 2e-5)


def test_cross_entropy_of_huge_logits():
    args = (normal(66, 9, scale=100.0), normal(50, 9, seed=1, scale=100.0), torch.randint(0, 50, (66,)))
    agree("cross_entropy", args, (0, 1), 2e-5)


def test_cross_entropy_low_precision():
    """The blocked form multiplies bf16 as it is and sums in fp32, the reference widens first: bf16's rounding apart."""
    args = (normal(130, 9).bfloat16(), normal(50, 9, seed=1).bfloat16(), torch.randint(0, 50, (130,)))
    agree("cross_entropy", args, (0, 1), 2e-2)


# --- memory is linear -----------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Watches the largest number of elements of any tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.where = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            # what is stored counts, not how it is viewed: an expanded tensor holds one row
            if isinstance(t, Tensor):
                held = t.untyped_storage().nbytes() // t.element_size()
                if held > self.numel:
                    self.numel, self.where = held, f"{func} {tuple(t.shape)}"
        return out


def largest_tensor(model, length: int) -> Largest:
    """Over forward, MTP, loss and backward on one document."""
    ids = tokens(model, length)
    model.zero_grad(set_to_none=True)
    with Largest() as seen:
        trunk = model.trunk(ids, [Segment(length)])
        drafted, rows, _ = model.predict_next(trunk, ids)
        loss = ops.cross_entropy(trunk.hidden[:-1], model.head.weight, ids[1:])
        loss = loss + ops.cross_entropy(drafted[:-1], model.head.weight, ids[rows[:-1] + 2])
        loss.backward()
    assert model.embed.weight.grad is not None
    return seen


NARROW: dict = dict(
    vocab_size=29, hidden_size=8, num_attention_heads=2, head_dim=8, qk_rope_head_dim=4, q_lora_rank=8, o_groups=1,
    o_lora_rank=8, index_n_heads=2, index_head_dim=8, moe_intermediate_size=8, n_routed_experts=4, num_hash_layers=1,
    sliding_window=32, hc_mult=2, hc_sinkhorn_iters=4,
)  # fmt: skip


@pytest.mark.parametrize("topk", [8, 100])
def test_memory_is_linear(topk):
    """No tensor of S x S or S x S/4 elements, forward or backward, where entries are gathered or read dense (100)."""
    model = small_model((0, 4, 128), mtp=1, index_topk=topk, **NARROW)
    short, long = 2048, 4096
    seen = {length: largest_tensor(model, length) for length in (short, long)}
    assert seen[long].numel < long * (long // 4) / 8, seen[long].where
    assert seen[long].numel <= 2.1 * seen[short].numel, (seen[short].where, seen[long].where)


def test_the_watch_would_see_a_square():
    """The reference ops do make squares: the test above measures something."""
    model = small_model((0, 4, 128), mtp=1, **NARROW)
    with ops.using("reference"):
        assert largest_tensor(model, 1024).numel >= 1024 * 1024 // 4


def test_serving_memory_is_linear():
    """A long prompt into a memory in one call, then a token: nothing square either."""
    model = small_model((4, 128), index_topk=8, **NARROW)
    memory = model.new_cache()
    with Largest() as seen, torch.no_grad():
        model(tokens(model, 4096), segments=[(4096, memory[0])], last=True)
        model(tokens(model, 1), segments=[(1, memory[0])])
    assert seen.numel < 4096 * 1024 / 8, seen.where
