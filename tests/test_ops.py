"""Failures caught here: a fast op that is not the reference (values, gradients, awkward sizes, low precision), a tie
that falls differently or hangs on where equal keys lie, a mask off by one row, a gradient that overflows, memory that
grows with the square of the length; a call that goes to a form which does not serve it, or in silence to a slower one;
a packed weight that reads as other numbers.

Truth is ops/reference.py under autograd, in fp32. Tolerances are for fp32 sums of at most a few thousand terms of
order one. The reference itself is held to independent arithmetic here where that is short, and by test_quirks.py.
"""

import inspect
import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from differences import differ
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4 import ops
from dsv4.cli.doctor import backends
from dsv4.measure.subjects import KINDS, small_model, tokens
from dsv4.model import Segment
from dsv4.model.layers import Linear
from dsv4.ops import PackedMatrix, Spans, blocked, reference, table
from dsv4.ops.blocked import blocks
from dsv4.ops.exact import whole_numbers
from dsv4.ops.formats import v4_rows
from dsv4.ops.weights import pack_matrix

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
        with ops.using(backend):
            out = getattr(ops, name)(*mine)
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


def test_every_op_has_a_signature_and_every_form_has_the_same():
    """A reader, and the type checker, see arguments; a form with other parameters would be called wrongly."""
    for name, forms in ops.TABLE.items():
        op = getattr(ops, name)
        signature = inspect.signature(op)
        assert op.__doc__ and "reference" in forms
        for parameter in signature.parameters.values():
            assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.annotation is not parameter.empty
        assert signature.return_annotation is not signature.empty
        for form in forms.values():
            assert list(inspect.signature(form).parameters) == list(signature.parameters), name


def test_every_op_is_compared_with_its_reference():
    """An op that joins the table needs a test here: against its reference, or if that is all there is, by hand."""
    text = Path(__file__).read_text(encoding="utf-8")
    for name, forms in ops.TABLE.items():
        if name in ("index_scores_topk", "topk_lowest"):
            continue  # choices are compared as integers, in tests of their own
        assert (f'agree("{name}"' if "blocked" in forms else f"ops.{name}(") in text, name


def test_using_switches_every_op_and_switches_back():
    fast = {name for name, forms in ops.TABLE.items() if "blocked" in forms}
    before = {name: ops.active(name) for name in ops.TABLE}
    with ops.using("reference"):
        assert {ops.active(name) for name in ops.TABLE} == {"reference"}
        with pytest.raises(RuntimeError), ops.using("blocked"):
            assert {name for name in ops.TABLE if ops.active(name) == "blocked"} == fast
            raise RuntimeError
        assert ops.active("sinkhorn") == "reference"
    assert {name: ops.active(name) for name in ops.TABLE} == before


@pytest.mark.parametrize("asked", ["auto", "reference", "blocked", "cpu", "triton", "tritn"])
def test_the_environment_chooses(asked):
    """In a process of its own: read once, at the first call, and a name that is none is an error in one sentence."""
    program = (
        "import torch; from dsv4 import ops\n"
        "from dsv4.errors import UserError\n"
        "try: print(ops.wanted(), ops.active('sinkhorn'), ops.sinkhorn(torch.zeros(1, 2, 2), 3, 0.0)[0, 0, 0].item())\n"
        "except UserError as e: print(e)\n"
    )
    environment = {**os.environ, "DSV4_OPS": asked}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    if asked == "tritn":
        assert done.stdout == "DSV4_OPS='tritn' is unknown: use one of auto, reference, blocked, cpu, triton\n"
    else:
        assert done.stdout.split()[0] == asked and done.stdout.split()[2] == "0.5", done.stderr
    if asked in ("reference", "blocked"):
        assert not done.stderr and done.stdout.split()[1] == asked
    if asked == "auto":
        assert done.stdout.split()[1] == ops.active("sinkhorn")


# --- which form serves a call ---------------------------------------------------------------------

STUB = """
import torch
from dsv4.ops import reference
from dsv4.ops.limits import Limits

CALLS = []

def sinkhorn(logits, iters, eps):
    CALLS.append("sinkhorn")
    return reference.sinkhorn(logits, iters, eps)

def linear(x, weight):
    CALLS.append("linear")
    return reference.linear(x, weight)

def unpack_rows(data, format):
    CALLS.append("unpack_rows")
    return reference.unpack_rows(data, format)

def four(logits, iters, eps):
    return "" if logits.shape[-1] == 4 else f"{logits.shape[-1]} streams"

small = dict(devices=("cpu",), dtypes=(torch.float32,), gradient=False)
LIMITS = {"sinkhorn": Limits(**small, also=four), "linear": Limits(**small, packed=False)}
"""


@pytest.fixture
def stub(monkeypatch, tmp_path) -> Iterator[None]:
    """A `cpu` backend of three ops, two of which serve fp32 without gradient; the table is put back afterwards."""
    yield from with_backend(monkeypatch, tmp_path, STUB)


def with_backend(monkeypatch, folder: Path, source: str) -> Iterator[None]:
    (folder / "stub_ops.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(table.LAZY, "cpu", table.Lazy("stub_ops", "cpu"))
    for state in ("_tried", "_said", "_limits", "_tries"):
        monkeypatch.setattr(table, state, type(getattr(table, state))())
    for name, forms in ops.TABLE.items():
        plain = {form: op for form, op in forms.items() if form in ("reference", "blocked")}
        monkeypatch.setitem(ops.TABLE, name, plain)
    assert "stub_ops" not in sys.modules
    try:
        yield
    finally:
        sys.modules.pop("stub_ops", None)


def calls_of_stub() -> list[str]:
    return sys.modules["stub_ops"].CALLS if "stub_ops" in sys.modules else []


LOGITS4 = normal(5, 4, 4)


def test_a_backend_is_imported_at_the_first_call_that_may_want_it(stub):
    """Not by `import dsv4`, not for a tensor on another device, not where a slower form was asked for."""
    with ops.using("blocked"):
        ops.sinkhorn(LOGITS4, 3, 1e-6)
    ops.linear(torch.empty(2, 3, device="meta"), torch.empty(4, 3, device="meta"))
    assert "stub_ops" not in sys.modules
    ops.rotate(normal(2, 4), torch.ones(2, 1, dtype=torch.complex64))  # it may have this op: who knows before
    assert "stub_ops" in sys.modules and ops.TABLE["sinkhorn"].keys() == {"reference", "blocked", "cpu"}


def test_the_fastest_form_that_serves_wins(stub, caplog):
    caplog.set_level(logging.INFO, "dsv4")
    assert table.ORDER.index("triton") < table.ORDER.index("cpu") < table.ORDER.index("blocked")
    want = reference.sinkhorn(LOGITS4, 20, 1e-6)
    assert torch.equal(ops.sinkhorn(LOGITS4, 20, 1e-6), want) and calls_of_stub() == ["sinkhorn"]
    with torch.no_grad():  # what would need a gradient elsewhere needs none here
        ops.linear(normal(2, 3), normal(4, 3).requires_grad_())
    assert calls_of_stub() == ["sinkhorn", "linear"] and ops.active("sinkhorn") == "cpu"
    row, _ = v4_rows(64, 16, 32, "packed", torch.float32)
    assert torch.equal(row.unpack(row.pack(normal(3, 64))), row.as_read(normal(3, 64)))
    assert calls_of_stub()[2:] == ["unpack_rows"] * 2, "the memory's own reading goes by the table too"
    assert not caplog.records


REFUSED = {
    "dtype": ((LOGITS4.double(), 20, 1e-6), "sinkhorn", "dtype float64"),
    "low precision": ((LOGITS4.bfloat16(), 20, 1e-6), "sinkhorn", "dtype bfloat16"),
    "gradient": ((LOGITS4.clone().requires_grad_(), 20, 1e-6), "sinkhorn", "a gradient is needed"),
    "shape": ((normal(5, 3, 3), 20, 1e-6), "sinkhorn", "3 streams"),
    "packed": ((normal(2, 64), pack_matrix(normal(3, 64), "fp4")), "linear", "a packed weight"),
    "meta": ((torch.empty(2, 4, 4, device="meta"), 20, 1e-6), "sinkhorn", ""),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_a_form_refuses_goes_to_the_next_and_is_said_once(why, stub, caplog):
    caplog.set_level(logging.INFO, "dsv4")
    args, name, reason = REFUSED[why]
    best = list(ops.TABLE[name])[-1]  # blocked where there is one
    want = ops.TABLE[name][best](*args)
    for _ in range(3):
        got = getattr(ops, name)(*args)
        assert got.device.type == "meta" or torch.equal(got, want)
        assert got.requires_grad == want.requires_grad
    assert not calls_of_stub()
    said = [f"the cpu form of {name} does not serve: {reason}"] if reason else []
    assert [r.getMessage() for r in caplog.records] == said
    assert all(r.name == "dsv4" and r.levelno == logging.INFO for r in caplog.records)


def test_another_reason_is_said_too(stub, caplog):
    caplog.set_level(logging.INFO, "dsv4")
    for _ in range(2):
        for why in ("dtype", "shape", "gradient"):
            ops.sinkhorn(*REFUSED[why][0])
    assert [r.getMessage().rpartition(": ")[2] for r in caplog.records] == [
        "dtype float64", "3 streams", "a gradient is needed"
    ]  # fmt: skip


def test_a_forced_backend_that_does_not_serve_falls_back_aloud(stub, caplog):
    """Asked for by name it warns; where a slower backend is asked for by name, it is not asked at all."""
    args = REFUSED["dtype"][0]
    want = blocked.sinkhorn(*args)
    with ops.using("cpu"):
        assert torch.equal(ops.sinkhorn(*args), want) and torch.equal(ops.sinkhorn(*args), want)
        ops.rotate(normal(2, 4), torch.ones(2, 1, dtype=torch.complex64))  # it has no such op: nothing to say
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", "the cpu form of sinkhorn does not serve: dtype float64")
    ]
    caplog.clear()
    table._said.clear()
    with ops.using("reference"):
        assert torch.equal(ops.sinkhorn(LOGITS4, 20, 1e-6), reference.sinkhorn(LOGITS4, 20, 1e-6))
        ops.sinkhorn(*args)
    assert not caplog.records and not calls_of_stub()


def test_a_backend_that_is_not_built(stub, monkeypatch, caplog):
    """In silence unless it was asked for by name; then said once, whatever the number of ops."""
    caplog.set_level(logging.INFO, "dsv4")
    monkeypatch.setitem(table.LAZY, "cpu", table.Lazy("stub_that_is_not_there", "cpu"))
    want = blocked.sinkhorn(LOGITS4, 20, 1e-6)
    assert torch.equal(ops.sinkhorn(LOGITS4, 20, 1e-6), want) and not caplog.records
    with ops.using("cpu"):
        assert torch.equal(ops.sinkhorn(LOGITS4, 20, 1e-6), want)
        ops.linear(normal(2, 3), normal(4, 3))
    assert [r.getMessage() for r in caplog.records] == ["the cpu form of any op does not serve: not built"]
    assert ops.explain("sinkhorn")["cpu"] == "not built"


def test_a_backend_that_this_machine_cannot_import(monkeypatch, tmp_path, caplog):
    """Tried once and said once, also where nobody asked for it: it was built, so somebody wants it."""
    for _ in with_backend(monkeypatch, tmp_path, "raise ImportError('no AVX2 here')"):
        want = blocked.sinkhorn(LOGITS4, 20, 1e-6)
        for _ in range(3):
            assert torch.equal(ops.sinkhorn(LOGITS4, 20, 1e-6), want)
        assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
            ("WARNING", "the cpu ops cannot be imported: no AVX2 here")
        ]
        assert ops.explain("sinkhorn")["cpu"] == "cannot be imported: no AVX2 here"
        assert ops.active("sinkhorn") == "blocked"


def test_the_table_that_doctor_prints(stub):
    """For every op the form that serves plain fp32 tensors on the CPU, and why the others do not."""
    found = backends()
    assert set(found) == set(ops.TABLE)
    assert found["sinkhorn"] == "cpu, then blocked, reference (triton: not built)"
    assert found["experts"] == "blocked, then reference (triton: not built; cpu: has no form of it)"
    assert found["rotate"] == "reference (triton: not built; cpu: has no form of it; blocked: has no form of it)"
    assert ops.explain("sinkhorn", dtype=torch.bfloat16)["cpu"] == "dtype bfloat16"
    with ops.using("reference"):
        assert set(backends().values()) == {"reference"}


def test_wrapped_ops_are_seen_whatever_form_serves(stub):
    """Wraps nest, see the form that a call goes to, and are gone after an error."""
    seen = []

    def wrap(name, op):
        def call(*args):
            seen.append(name)
            return op(*args)

        return call

    with pytest.raises(RuntimeError), ops.wrapped(["sinkhorn", "rotate"], wrap):
        with ops.wrapped(["sinkhorn", "linear"], wrap):
            ops.sinkhorn(LOGITS4, 3, 1e-6)
            ops.linear(normal(2, 3), normal(4, 3))
            ops.rotate(normal(2, 4), torch.ones(2, 1, dtype=torch.complex64))
        with ops.using("reference"):
            ops.sinkhorn(LOGITS4, 3, 1e-6)
        raise RuntimeError
    ops.sinkhorn(LOGITS4, 3, 1e-6)
    assert seen == ["sinkhorn", "sinkhorn", "linear", "rotate", "sinkhorn"]
    assert calls_of_stub() == ["sinkhorn", "linear", "sinkhorn"]


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
    monkeypatch.setattr(blocks, "BLOCK_NUMBERS", numbers)
    for lengths in ([n], cut(n)):
        visible, entries = entry_spans(lengths)
        args = (normal(n, 3, 8), normal(n, 3, seed=1), normal(entries, 8, seed=2), visible, k)
        want = reference.index_scores_topk(*args)
        assert want.shape == (n, k)
        assert torch.equal(want, blocked.index_scores_topk(*args))


@pytest.mark.parametrize("numbers", [1 << 23, 1 << 8])
def test_index_ties_go_to_the_lowest_entry(numbers, monkeypatch):
    """All scores 0, some of them -0.0: the choice is the first visible entries, in both backends."""
    monkeypatch.setattr(blocks, "BLOCK_NUMBERS", numbers)
    n, k = 90, 4
    visible, entries = entry_spans([n])
    q, keys = -torch.ones(n, 2, 4), torch.ones(entries, 4)  # relu makes every product 0, a negative weight -0.0
    weights = torch.where(torch.arange(n)[:, None] % 2 == 0, 1.0, -1.0).expand(n, 2)
    want = [[-1] * (k - min(k, (t + 1) // 4)) + list(range(min(k, (t + 1) // 4))) for t in range(n)]
    for backend in ("reference", "blocked"):
        assert ops.TABLE["index_scores_topk"][backend](q, weights, keys, visible, k).tolist() == want


def test_index_ties_across_key_chunks(monkeypatch):
    """Scores that take three values only, so that ties cross the borders of the chunks in which keys are read."""
    monkeypatch.setattr(blocks, "BLOCK_NUMBERS", 64)
    n, k = 64, 7
    visible, entries = Spans(torch.zeros(n, dtype=torch.int64), torch.full((n,), 100)), 100
    keys = torch.tensor([0.0, 1.0, 2.0])[torch.randint(0, 3, (entries,))][:, None]
    args = (torch.ones(n, 1, 1), torch.ones(n, 1), keys, visible, k)
    want = sorted(by_rule(keys[:, 0].tolist(), k))
    assert all(row == want for row in blocked.index_scores_topk(*args).tolist())
    assert all(row == want for row in reference.index_scores_topk(*args).tolist())


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("numbers", [1 << 23, 1 << 9])
@pytest.mark.parametrize("heads, width", [(1, 8), (5, 12), (8, 33), (64, 128)])
def test_equal_keys_tie_wherever_they_lie(backend, numbers, heads, width, monkeypatch):
    """Random numbers, whose scores a library adds up in another order at the edge of a tile: of each of three keys,
    which come again and again, the first ones must be chosen. One sequence, then some that lie far apart."""
    monkeypatch.setattr(blocks, "BLOCK_NUMBERS", numbers * heads)
    three = normal(3, width, seed=2)
    for rows in (1, 2, 3, 4, 5, 7, 8, 9, 15, 17, 31, 33, 36, 63, 65, 100, 127, 129):
        for n, apart in ((1, 0), (3, 0), (3, 2000)):
            q, weights = normal(n, heads, width, seed=rows), normal(n, heads, seed=rows + 1)
            start = torch.arange(n) * (rows + apart)
            scores = torch.einsum("nh,nhe->ne", weights, torch.einsum("nhd,ed->nhe", q, three).relu())
            keys = three[torch.arange(int(start[-1]) + rows) % 3]
            k = (rows + 1) // 2
            choose = ops.TABLE["index_scores_topk"][backend]
            for i, row in enumerate(choose(q, weights, keys, Spans(start, start + rows), k).tolist()):
                seen = range(int(start[i]), int(start[i]) + rows)
                assert row == sorted(sorted(seen, key=lambda e: (-scores[i, e % 3].item(), e))[:k]), (rows, n, apart)


@given(st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_sums_of_whole_numbers_are_exact(width, seed):
    """In any order, so in any library; and what is lost is less than half a unit of a row's largest number."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, width, generator=generator) * torch.logspace(-20, 20, 4)[:, None]
    x[1, 1:], x[2] = 0, 0
    whole, unit = whole_numbers(x)
    assert torch.equal(whole, whole.round()) and ((whole * unit - x.double()).abs() <= unit / 2).all()
    bits = (53 - math.ceil(math.log2(width))) // 2
    assert bits >= 22 and (unit <= x.double().abs().amax(1, keepdim=True) * 2.0 ** (1 - bits))[[0, 1, 3]].all()
    whole = torch.full_like(whole, 2.0**bits)  # the largest sum there may be
    assert (whole[:1] @ whole[1:2].T).item() == width * 4**bits <= 2**53
    exact = [int(n) for n in whole[0].tolist()]
    assert sum(n * n for n in exact) == width * 4**bits


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


def best_by_hand(scores: torch.Tensor, spans: Spans, counts: list[int], k: int) -> list[list[int]]:
    out = []
    for lo, hi, count in zip(spans.start.tolist(), spans.stop.tolist(), counts, strict=True):
        best = sorted(sorted(range(lo, hi), key=lambda j: (-scores[j].item(), j))[:count])
        out.append([-1] * (k - len(best)) + best)
    return out


@pytest.mark.parametrize("numbers", [1 << 23, 1 << 10])
def test_best_rows(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties to the lowest row, zeros of either sign alike; packed documents, and sequences that lie far apart."""
    monkeypatch.setattr(blocks, "BLOCK_NUMBERS", numbers)
    scores = torch.randint(-2, 3, (3000,)).float() * torch.where(torch.rand(3000) < 0.5, 1.0, -0.0)
    near = Spans(torch.tensor([0] * 150 + [150] * 90), torch.tensor([*range(1, 151), *range(151, 241)]))
    apart = Spans(torch.arange(0, 3000, 30), torch.arange(0, 3000, 30) + torch.arange(100) % 30)
    for spans in (near, apart):
        counts = [math.isqrt(max(0, n - 1)) + 1 for n in (spans.stop - spans.start).tolist()]
        want = best_by_hand(scores, spans, counts, 14)
        args = (scores, spans, torch.tensor(counts), 14)
        agree("best_rows", args, (), 0.0, exact=True)
        assert ops.best_rows(*args).tolist() == want


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
    monkeypatch.setattr(blocks, "BLOCK_NUMBERS", numbers)
    agree("sparse_attention", attention_case(130, [40, 2, 88], k), (0, 1, 3, 6), 2e-5)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("k", [None, 2, 5, 200])
def test_index_kl(n, k):
    """The definition itself is in test_indexer.py."""
    for lengths in ([n], cut(n)):
        attn_q, _, _, pool, visible, chosen, _, scale = attention_case(n, lengths, k)
        asked = (normal(n, 2, 4, seed=5), normal(n, 2, seed=6), normal(len(pool), 4, seed=8))
        lse = 2 + normal(n, 3, seed=9)
        agree("index_kl", (*asked, attn_q, pool, lse, visible, chosen, scale), (0, 1, 2), 2e-5)


def test_both_ways_to_read_chosen_entries_are_taken(monkeypatch):
    """The case list above would prove less if every block went the same way."""
    ways = []
    whole = blocks.Piece.__init__

    def watch(self, keys, hidden, rows):
        ways.append("rows" if isinstance(rows, Tensor) else "interval")
        whole(self, keys, hidden, rows)

    monkeypatch.setattr(blocks.Piece, "__init__", watch)
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
    out, lse = blocked.sparse_attention(q, kv, nothing, None, None, None, sink, scale)  # nor any token: the sink alone
    assert not out.any() and torch.equal(lse, sink.expand_as(lse))


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


def turns(n: int, pairs: int) -> Tensor:
    return torch.polar(torch.ones(n, pairs), normal(n, pairs, seed=11, scale=3.0))


def compress(values: Tensor, scores: Tensor, first: Tensor, previous: Tensor, r: int, overlap: bool, dtype=None):
    """The op with a gain and turns of its own."""
    dtype = dtype or torch.float32
    d = values.shape[1] // (2 if overlap else 1)
    gain = 1 + normal(d, seed=12, scale=0.1)
    return ops.compress(values, scores, first, previous, r, overlap, gain, 1e-6, turns(len(first), d // 4), dtype)


def finished(pooled: Tensor) -> Tensor:
    """Entries [G, d] normed and rotated, written out."""
    d = pooled.shape[1]
    gain, turn = 1 + normal(d, seed=12, scale=0.1), turns(len(pooled), d // 4)
    x = pooled / (pooled.square().mean(dim=1, keepdim=True) + 1e-6).sqrt() * gain
    for g in range(len(x)):
        for i in range(d // 4):
            at = d - 2 * (d // 4) + 2 * i
            a, b, c, s = x[g, at].item(), x[g, at + 1].item(), turn[g, i].real.item(), turn[g, i].imag.item()
            x[g, at], x[g, at + 1] = a * c - b * s, a * s + b * c
    return x


@pytest.mark.parametrize("overlap", [False, True])
def test_compress_by_hand(overlap):
    r, d, groups = 4, 6, 3
    width = d * (2 if overlap else 1)
    values, scores = normal(groups * r, width), normal(groups * r, width, seed=1)
    first, previous = torch.arange(groups) * r, torch.arange(groups) > 0
    got = compress(values, scores, first, previous, r, overlap)
    want = torch.empty(groups, d)
    for g in range(groups):
        for channel in range(d):
            own = range(g * r, g * r + r)
            rows = [(s, channel + (d if overlap else 0)) for s in own]
            if overlap and g:
                rows += [(s, channel) for s in range(g * r - r, g * r)]  # first half: for the group after
            weight = torch.stack([scores[s, c] for s, c in rows]).softmax(0)
            want[g, channel] = sum(w * values[s, c] for w, (s, c) in zip(weight, rows, strict=True))
    assert differ(got, finished(want)) < 1e-5


def test_compress_rounds_once_before_the_norm_and_once_after():
    """In a bf16 model the pooled entry is cast, normed in fp32, cast, rotated in fp32, cast."""
    values, scores, first = normal(256, 16), normal(256, 16, seed=1), torch.tensor([0, 128])
    got = compress(values, scores, first, first > 0, 128, False, torch.bfloat16)
    pooled = reference.pool_groups(values, scores, first, first > 0, 128, False).bfloat16().float()
    normed = pooled / (pooled.square().mean(dim=1, keepdim=True) + 1e-6).sqrt() * (1 + normal(16, seed=12, scale=0.1))
    want = ops.rotate(normed.bfloat16(), turns(2, 4))
    assert got.dtype == torch.bfloat16 and (got != want).float().mean() < 0.1 and differ(got, want) < 0.02


def test_compress_gradients_are_finite_without_a_previous_group():
    values, scores = normal(8, 8).requires_grad_(), normal(8, 8, seed=1).requires_grad_()
    out = compress(values, scores, torch.tensor([0, 4]), torch.tensor([False, False]), 4, True)
    (out * normal(2, 4, seed=2)).sum().backward()
    for grad in (values.grad, scores.grad):
        assert grad.isfinite().all() and not grad[:, :4].any() and grad[:, 4:].any()


def test_compress_nothing():
    empty = torch.zeros(0, dtype=torch.int64)
    assert compress(normal(3, 8), normal(3, 8), empty, empty.bool(), 4, True).shape == (0, 4)


@pytest.mark.parametrize("shape", [(1, 6), (3, 8), (5, 2, 6), (0, 3, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotate_by_hand(shape, dtype):
    """The last channels, in neighbouring pairs; the rest is untouched; the conjugate turns back."""
    x, turn = normal(*shape).to(dtype), turns(shape[0], 2)
    got, want = ops.rotate(x, turn), x.clone()
    for n in range(shape[0]):
        for i in range(2):
            at = shape[-1] - 4 + 2 * i
            a, b = x[n, ..., at].float(), x[n, ..., at + 1].float()
            c, s = turn[n, i].real, turn[n, i].imag
            want[n, ..., at], want[n, ..., at + 1] = (a * c - b * s).to(dtype), (a * s + b * c).to(dtype)
    assert got.dtype == dtype and differ_or_empty(got, want) < (1e-6 if dtype == torch.float32 else 0.02)
    assert differ_or_empty(ops.rotate(got, turn.conj()), x) < (1e-6 if dtype == torch.float32 else 0.03)


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


@pytest.mark.parametrize("n", [1, 3, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hyper_enter(n, dtype):
    """Against the reference, and against its parts written out."""
    x, fn, gain = normal(n, 4, 12).to(dtype), normal(24, 48, seed=1, scale=0.3), 1 + normal(12, seed=4, scale=0.1)
    args = (x, fn, normal(24, seed=2), normal(3, seed=3), gain, 20, 1e-6, 1e-6)
    agree("hyper_enter", args, (0, 1, 2, 3, 4), 5e-5 if dtype == torch.float32 else 2e-2)
    h, post, comb = ops.hyper_enter(*args)
    pre, *rest = ops.hyper_maps(*args[:4], *args[5:])
    assert torch.equal(post, rest[0]) and torch.equal(comb, rest[1])
    u = sum(pre[:, j, None] * x[:, j].float() for j in range(4)).to(dtype).float()
    want = u / (u.square().mean(dim=1, keepdim=True) + 1e-6).sqrt() * gain
    assert h.dtype == dtype and differ(h, want.to(dtype)) < (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("n", [1, 3, 130])
def test_head_collapse_by_hand(n):
    x, fn, base, scale = normal(n, 4, 12), normal(4, 48, seed=1, scale=0.3), normal(4, seed=2), normal(1, seed=3)
    flat = x.flatten(1).double()
    mixed = flat @ fn.T.double() / (flat.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    weight = 1 / (1 + (-(mixed * scale + base)).exp()) + 1e-2
    want = torch.einsum("nj,njm->nm", weight, x.double())
    assert differ(ops.head_collapse(x, fn, base, scale, 1e-2, 1e-6).double(), want) < 1e-5
    assert ops.head_collapse(x.bfloat16(), fn, base, scale, 1e-2, 1e-6).dtype == torch.bfloat16


# --- linear ---------------------------------------------------------------------------------------


def grid(code: str) -> list[float]:
    """What each code of FP8 e4m3 (128 and more: negative) or FP4 e2m1 (8 and more) stands for, from its bits."""
    if code == "fp4":
        half = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    else:
        half = [2.0**-9 * m if not e else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)]
        half[-1] = math.nan
    return half + [-v for v in half]


SHAPES = [(1, 2), (3, 32), (5, 34), (127, 130), (128, 128), (129, 258)]


@pytest.mark.parametrize("code", ["fp8", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_weights_are_the_nearest_numbers_at_the_least_scale(code, shape):
    """Ties to the even code; a scale for each 128 x 128 block (FP8), or 32 numbers of a row (FP4); short blocks too."""
    high, wide, largest = (128, 128, 448.0) if code == "fp8" else (1, 32, 6.0)
    weight = normal(*shape) * 2.0 ** (torch.arange(shape[1]) // 32 * 3.0)
    weight[0] = (weight[0] * 8).round() / 8  # ties, now and then
    packed = pack_matrix(weight, code)
    assert packed.shape == shape and packed.codes.dtype == packed.scales.dtype == torch.uint8
    assert packed.codes.shape == (shape[0], shape[1] if code == "fp8" else shape[1] // 2)
    values = torch.tensor([v for v in grid(code) if not math.isnan(v)], dtype=torch.float64)
    odd = torch.tensor([c % 2 for c, v in enumerate(grid(code)) if not math.isnan(v)], dtype=torch.float64)
    want = torch.empty(shape, dtype=torch.float64)
    for i in range(0, shape[0], high):
        for j in range(0, shape[1], wide):
            block = weight[i : i + high, j : j + wide].double()
            scale = 2.0**-126
            while block.abs().max().item() > largest * scale:
                scale *= 2
            assert packed.scales[i // high, j // wide] == math.log2(scale) + 127
            away = (block[..., None] / scale - values).abs() + 1e-9 * odd  # a tie goes to the even code
            want[i : i + high, j : j + wide] = values[away.argmin(dim=-1)] * scale
    assert torch.equal(packed.unpack().double(), want)
    assert torch.equal(pack_matrix(packed.unpack(), code).unpack(), packed.unpack()), "what was read packs to itself"
    assert torch.equal(packed.unpack(torch.bfloat16).double(), want), "bf16 holds them exactly"


@pytest.mark.parametrize("code", ["fp8", "fp4"])
def test_packed_weights_as_published(code):
    """Codes and scales of the checkpoints' dtypes: the low nibble is the even column, a scale multiplies."""
    values = grid(code)
    if code == "fp8":
        codes = torch.randint(0, 120, (130, 200)) + 128 * torch.randint(0, 2, (130, 200))  # no NaN
        numbers, stored = codes, codes.to(torch.uint8).view(torch.float8_e4m3fn)
    else:
        numbers = torch.randint(0, 16, (130, 200))
        stored = (numbers[:, 0::2] | numbers[:, 1::2] << 4).to(torch.uint8).view(torch.int8)
    high, wide = (128, 128) if code == "fp8" else (1, 32)
    exponents = torch.randint(0, 200, (-(-130 // high), -(-200 // wide)))
    exponents[0, 0] = 0  # 2^-127
    packed = PackedMatrix(code, stored, exponents.to(torch.uint8).view(torch.float8_e8m0fnu))
    got = packed.unpack().double()
    for row, column in ((0, 0), (0, 1), (1, 33), (127, 127), (128, 128), (129, 199), (5, 100)):
        scale = 2.0 ** (exponents[row // high, column // wide].item() - 127)
        assert got[row, column].item() == values[numbers[row, column].item()] * scale


def test_a_tiny_weight_is_packed_and_a_zero_stays_zero():
    """The floor of a memory's rows (1e-4) is not that of a weight: what a checkpoint holds must not be lost."""
    weight = torch.zeros(256, 128)
    weight[:128] = 1e-9 * normal(128, 128)
    for code, allowed in (("fp8", 1 / 16), ("fp4", 0.5)):
        read = pack_matrix(weight, code).unpack()
        assert not read[128:].any() and read.isfinite().all()
        assert (read - weight).norm() < allowed * weight.norm()


def test_packed_scales_that_do_not_fit_are_refused():
    with pytest.raises(AssertionError, match="has scales"):
        PackedMatrix("fp8", torch.zeros(130, 10, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.uint8))


@pytest.mark.parametrize("n", [1, 3, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_reads_plain_and_packed_weights(n, dtype):
    """One entry point: y = x W^T in x's dtype; x gets its gradient, a packed weight has none."""
    x, weight = normal(n, 34).to(dtype), normal(5, 34, seed=1)
    close = 1e-5 if dtype == torch.float32 else 0.1
    for w in (weight, weight.bfloat16(), pack_matrix(weight, "fp8"), pack_matrix(weight, "fp4")):
        numbers = (w.unpack() if isinstance(w, PackedMatrix) else w).to(dtype).double()
        mine = x.clone().requires_grad_()
        got = ops.linear(mine, w)
        got.float().square().sum().backward()
        want = x.double() @ numbers.T
        assert got.dtype == dtype and differ(got.double(), want) < close
        assert differ(mine.grad.double(), 2 * want @ numbers) < close * want.abs().max().item() * 4
    assert ops.linear(normal(2, 3, 34).to(dtype), pack_matrix(weight, "fp4")).shape == (2, 3, 5)


def test_a_layer_with_a_packed_weight_computes_moves_and_is_saved():
    layer = Linear(64, 6, torch.float32)
    torch.nn.init.normal_(layer.weight)
    plain = layer.weight.detach().clone()
    del layer.weight
    layer.weight = pack_matrix(plain, "fp4")  # type: ignore[assignment]
    x = normal(3, 64)
    want = F.linear(x, pack_matrix(plain, "fp4").unpack())
    with ops.using("reference"):
        assert torch.equal(layer(x), want) and not list(layer.parameters())
    assert differ(layer(x), want) <= 1e-6 * want.abs().max().item()
    kept = {name: tuple(t.shape) for name, t in layer.state_dict().items()}
    assert kept == {"weight.codes": (6, 32), "weight.scales": (6, 2)}
    assert layer.to("meta").weight.codes.is_meta and layer.bfloat16().weight.codes.dtype == torch.uint8


# --- packed rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1])
def test_rows_are_packed_by_the_table(which):
    """The format's own methods are the ops, of any leading shape when read (bytes by hand: test_formats.py)."""
    format = v4_rows(512, 64, 128, "packed", torch.bfloat16)[which]
    rows = normal(7, format.width)
    data = ops.pack_rows(rows, format)
    assert data.shape == (7, format.row_bytes) and torch.equal(data, format.pack(rows))
    read = ops.unpack_rows(data[:6].view(2, 3, -1), format)
    assert read.shape == (2, 3, format.width) and read.dtype == torch.bfloat16
    assert torch.equal(read.flatten(0, 1), format.as_read(rows)[:6])


# --- gate -----------------------------------------------------------------------------------------


def gate_case(n: int, dtype=torch.float32, experts: int = 7, k: int = 3) -> tuple:
    return (normal(n, 12).to(dtype), normal(experts, 12, seed=1, scale=0.5), normal(experts, seed=2), None, k, 1.5)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate(n, dtype):
    """Chosen by score and bias, or given: both forms, values and gradients."""
    case = gate_case(n, dtype)
    agree("gate", case, (0, 1), 2e-5)
    agree("gate", (*case[:2], None, torch.randint(0, 7, (n, 3)), *case[4:]), (0, 1), 2e-5)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_gate_by_hand(backend):
    """sqrt(softplus); the bias chooses and does not weigh; ties go to the lowest expert; weights sum to the scale."""
    x, weight, bias, _, k, scale = gate_case(20)
    weight[5] = weight[2]  # two equal experts
    bias[5] = bias[2]
    with ops.using(backend):
        scores, chosen, weights = ops.gate(x, weight, bias, None, k, scale)
        given = ops.gate(x, weight, None, chosen, k, scale)
    for n in range(20):
        want = [math.sqrt(math.log1p(math.exp(z))) for z in (weight @ x[n]).tolist()]
        assert differ(scores[n], torch.tensor(want)) < 1e-5
        assert chosen[n].tolist() == by_rule((scores[n] + bias).tolist(), k)
        picked = [want[e] for e in chosen[n].tolist()]
        assert differ(weights[n], torch.tensor([p / sum(picked) * scale for p in picked])) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(given, (scores, chosen, weights), strict=True))


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_gate_of_hopeless_logits_keeps_a_finite_gradient(backend):
    """Below -87 softplus underflows, and the square root of 0 has no slope."""
    x, weight, bias, _, k, scale = gate_case(4)
    mine = (weight - 300 * x[0]).requires_grad_()
    with ops.using(backend):
        scores, _, weights = ops.gate(x[:1], mine, bias, None, k, scale)
    assert (scores > 0).all()
    (weights * normal(1, k)).sum().backward()
    assert mine.grad.isfinite().all()


# --- what one op computes of several products -------------------------------------------------------


def test_project_in_is_its_parts():
    x, wq_a, wq_b, wkv = normal(5, 12), normal(6, 12, seed=1), normal(3 * 8, 6, seed=2), normal(8, 12, seed=3)
    gains, turn = (normal(6, seed=4), normal(8, seed=5)), torch.polar(torch.ones(5, 2), normal(5, 2, seed=6))
    qr, q, kv, row = ops.project_in(x, wq_a, gains[0], wq_b, wkv, gains[1], 3, 1e-6, turn)
    low, key = x @ wq_a.T, x @ wkv.T
    assert differ(qr, low / low.square().mean(1, keepdim=True).sqrt() * gains[0]) < 1e-5
    heads = (qr @ wq_b.T).view(5, 3, 8)
    assert differ(q, ops.rotate(heads / heads.square().mean(2, keepdim=True).sqrt(), turn)) < 1e-5
    assert differ(kv, key / key.square().mean(1, keepdim=True).sqrt() * gains[1]) < 1e-5
    assert differ(row, ops.rotate(kv, turn)) < 1e-5


def test_project_out_is_its_parts():
    o, wo_a, wo_b = normal(5, 4, 8), normal(2 * 3, 16, seed=1), normal(12, 6, seed=2)
    turn = torch.polar(torch.ones(5, 2), normal(5, 2, seed=6))
    back = ops.rotate(o, turn.conj()).reshape(5, 32)
    low = torch.cat([back[:, :16] @ wo_a[:3].T, back[:, 16:] @ wo_a[3:].T], dim=1)
    assert differ(ops.project_out(o, turn, wo_a, 2, wo_b), low @ wo_b.T) < 1e-5


def test_compressor_rows_are_values_and_biased_scores():
    x, wkv, wgate, ape = normal(5, 12), normal(6, 12, seed=1), normal(6, 12, seed=2), normal(4, 6, seed=3)
    rows = ops.compressor_rows(x, wkv, wgate, ape, torch.tensor([3, 4, 5, 6, 7]))
    assert differ(rows[:, 0], x @ wkv.T) < 1e-5
    assert differ(rows[:, 1], x @ wgate.T + ape[[3, 0, 1, 2, 3]]) < 1e-5


def test_mlp_is_one_expert_of_all_tokens():
    x, w1, w3, w2 = normal(5, 12), normal(6, 12, seed=1), normal(6, 12, seed=2), normal(12, 6, seed=3)
    want = reference.experts(x, torch.zeros(5, 1).long(), torch.ones(5, 1), torch.stack([w1, w3])[None], w2[None], 1.5)
    assert differ(ops.mlp(x, w1, w3, w2, 1.5), want) < 1e-5


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
    monkeypatch.setattr(blocks, "BLOCK_NUMBERS", numbers)
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
        model(tokens(model, 4096), segments=[(4096, memory[0])], rows="last")
        model(tokens(model, 1), segments=[(1, memory[0])])
    assert seen.numel < 4096 * 1024 / 8, seen.where
