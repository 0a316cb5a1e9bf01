"""Failures caught here: a product in C++ that is not the reference's in some format, size or set of instructions, that
depends on what else is computed beside it or on the number of threads, that reads beyond its rows or is given what it
does not serve; a library that is stale, missing or for another machine and is not said to be.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from differences import differ
from torch import Tensor

from dsv4 import ops
from dsv4.ops import reference
from dsv4.ops.weights import PackedMatrix, pack_matrix

cpu = pytest.importorskip("dsv4.ops.cpu", exc_type=ImportError)

BOUNDS = {torch.float32: 5e-6, torch.bfloat16: 8e-3}  # BF16: one rounding of a result, or of a sum's order, is 2^-8
FORMATS = ("fp32", "bf16", "fp8", "fp4")


@pytest.fixture(autouse=True)
def no_gradients(isa: str) -> Iterator[None]:
    with torch.no_grad():
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight(form: str, rows: int, columns: int, seed: int = 1) -> Tensor | PackedMatrix:
    plain = normal(rows, columns, seed=seed) * columns**-0.5
    if form in ("fp8", "fp4"):
        return pack_matrix(plain, form)
    return plain.bfloat16() if form == "bf16" else plain


def served(name: str, *args: object) -> Tensor:
    """The C++ form's result; it must serve the call."""
    assert not cpu.LIMITS[name].refuses(*args), cpu.LIMITS[name].refuses(*args)
    return getattr(cpu, name)(*args)


def dtypes_of(form: str) -> list[torch.dtype]:
    return [torch.float32] if form == "fp32" else [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("columns", [2, 14, 32, 50, 130, 516])
def test_linear(form: str, columns: int) -> None:
    for rows in (1, 3, 4, 129):
        w = weight(form, rows, columns)
        for dtype in dtypes_of(form):
            for n in (0, 1, 2, 5, 13, 31, 290):
                x = normal(n, columns, seed=n).to(dtype)
                got, want = served("linear", x, w), reference.linear(x, w)
                assert got.dtype == dtype and got.shape == want.shape
                assert differ(got, want) <= BOUNDS[dtype] * max([1.0, *want.abs().flatten().tolist()]), (rows, n, dtype)


@pytest.mark.parametrize("form", FORMATS)
def test_a_row_is_the_same_bits_in_every_company(form: str) -> None:
    w = weight(form, 259, 390)
    for dtype in dtypes_of(form):
        x = normal(700, 390).to(dtype)
        whole = served("linear", x, w)
        for i, j in ((0, 1), (699, 700), (5, 7), (3, 16), (100, 400)):
            assert torch.equal(served("linear", x[i:j], w), whole[i:j]), (i, j)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("n", [0, 1, 2, 7, 300])
def test_experts(form: str, n: int) -> None:
    """Experts without a token, with one and with many; the same bits for a token alone; both clamps at work."""
    experts, k, inner, width = 5, 3, 128, 256
    w13, w2 = weight(form, experts * 2 * inner, width), weight(form, experts * width, inner, seed=2)
    if isinstance(w13, Tensor) and isinstance(w2, Tensor):
        w13, w2 = w13.view(experts, 2, inner, width), w2.view(experts, width, inner)
    chosen = torch.randn(n, 4, generator=torch.Generator().manual_seed(4)).argsort(dim=1)[:, :k]
    weights = normal(n, k, seed=3).abs()
    for dtype in dtypes_of(form):
        args = (normal(n, width).to(dtype) * 2, chosen, weights, w13, w2, 0.7)
        got, want = served("experts", *args), reference.experts(*args)
        assert got.dtype == torch.float32
        assert differ(got, want) <= BOUNDS[dtype] * max([1.0, *want.abs().flatten().tolist()])
        last = served("experts", args[0][-1:], chosen[-1:], weights[-1:], w13, w2, 0.7)
        assert torch.equal(last, got[-1:])


@pytest.mark.parametrize("inner", [1, 20, 66])
def test_experts_of_awkward_sizes(inner: int) -> None:
    w13, w2 = normal(3, 2, inner, 37, seed=1), normal(3, 37, inner, seed=2)
    chosen = torch.tensor([[0, 2], [2, 1], [1, 0]])
    args = (normal(3, 37), chosen, normal(3, 2, seed=3), w13, w2, 2.0)
    assert differ(served("experts", *args), reference.experts(*args)) <= 1e-5 * 100
    shared = (args[0], chosen, args[2], w13[:1].expand(3, -1, -1, -1), w2[:1].expand(3, -1, -1), 2.0)
    assert differ(served("experts", *shared), reference.experts(*shared)) <= 1e-5 * 100


@pytest.mark.parametrize("form", FORMATS)
def test_mlp(form: str) -> None:
    w1, w3, w2 = weight(form, 66, 130), weight(form, 66, 130, 2), weight(form, 130, 66, 3)
    for dtype in dtypes_of(form):
        for n in (1, 4, 65, 70):
            args = (normal(n, 130).to(dtype), w1, w3, w2, 0.5)
            got, want = served("mlp", *args), reference.mlp(*args)
            assert got.dtype == dtype
            assert differ(got, want) <= BOUNDS[dtype] * max(1.0, want.abs().max().item())
            assert torch.equal(served("mlp", args[0][:1], w1, w3, w2, 0.5), got[:1])


def turn(n: int, pairs: int) -> Tensor:
    return torch.polar(torch.ones(n, pairs), normal(n, pairs, seed=9))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("heads", "width", "pairs"), [(3, 10, 2), (8, 128, 16), (2, 24, 12)])
def test_project_in_and_out(form: str, heads: int, width: int, pairs: int) -> None:
    """Also the same bits for a token alone; nothing that was given is written to."""
    m, low, groups, rank = 66, 34, 2 if heads % 2 == 0 else 1, 128 if form == "fp8" else 6
    wq_a, wq_b, wkv = weight(form, low, m), weight(form, heads * width, low, 2), weight(form, width, m, 3)
    wo_a, wo_b = weight(form, groups * rank, heads * width // groups, 4), weight(form, m, groups * rank, 5)
    for dtype in dtypes_of(form):
        for n in (1, 5, 40):
            x, at = normal(n, m).to(dtype), turn(n, pairs)
            args = (x, wq_a, normal(low, seed=6), wq_b, wkv, normal(width, seed=7), heads, 1e-6, at)
            outs = served("project_in", *args)
            for got, want in zip(outs, reference.project_in(*args), strict=True):
                assert got.dtype == dtype and got.shape == want.shape
                assert differ(got, want) <= 3 * BOUNDS[dtype] * max(1.0, want.abs().max().item())
            alone = served("project_in", x[-1:], *args[1:-1], at[-1:])
            assert all(torch.equal(a, b[-1:]) for a, b in zip(alone, outs, strict=True))
            o = normal(n, heads, width, seed=8).to(dtype)
            kept, last = o.clone(), (at, wo_a, groups, wo_b)
            got, want = served("project_out", o, *last), reference.project_out(o, *last)
            assert differ(got, want) <= 3 * BOUNDS[dtype] * max(1.0, want.abs().max().item())
            assert torch.equal(o, kept)
            assert torch.equal(served("project_out", o[-1:], at[-1:], *last[1:]), got[-1:])


@pytest.mark.parametrize("width", [6, 64, 129])
def test_compressor_rows(width: int) -> None:
    wkv, wgate, ape = normal(width, 50, seed=1), normal(width, 50, seed=2), normal(4, width, seed=3)
    for dtype in (torch.float32, torch.bfloat16):
        x, positions = normal(9, 50).to(dtype), torch.arange(70, 79)
        got = served("compressor_rows", x, wkv, wgate, ape, positions)
        want = reference.compressor_rows(x, wkv, wgate, ape, positions)
        assert got.dtype == torch.float32 and differ(got, want) <= 1e-5 * want.abs().max().item()
        assert torch.equal(served("compressor_rows", x[3:4], wkv, wgate, ape, positions[3:4]), got[3:4])


def test_every_op_in_cpp_has_a_test_of_its_form() -> None:
    text = "".join(p.read_text(encoding="utf-8") for p in Path(__file__).parent.glob("test_cpu_*.py"))
    for name in cpu.__all__:
        assert name == "LIMITS" or f'"{name}"' in text or f"cpu.{name}(" in text, name


def test_a_nan_stays_where_it_is() -> None:
    x, w = normal(3, 40), weight("fp32", 9, 40)
    x[1, 7] = float("nan")
    out = served("linear", x, w)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()
    got = served("mlp", x, w, w, weight("fp32", 40, 9), 1.0)
    assert got[1].isnan().all() and got[[0, 2]].isfinite().all()


def test_the_number_of_threads_changes_no_bit() -> None:
    x, w = normal(300, 390), weight("fp32", 259, 390)
    args = (
        x[:, :256].contiguous(),
        torch.arange(300)[:, None] % 4,
        torch.ones(300, 1),
        normal(4, 2, 64, 256),
        normal(4, 256, 64),
        5.0,
    )
    seen = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        seen.append((served("linear", x, w), served("experts", *args)))
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_what_is_not_served_goes_to_another_form() -> None:
    """Weights that the caller's dtype would round, rows that do not lie together, and whatever needs a gradient."""
    x, w = normal(3, 8), normal(8, 5).T
    assert "not contiguous" in cpu.LIMITS["linear"].refuses(x, w)
    assert "more precision" in cpu.LIMITS["linear"].refuses(x.bfloat16(), w.contiguous())
    assert torch.equal(ops.linear(x, w), reference.linear(x, w))
    with torch.enable_grad():
        assert cpu.LIMITS["linear"].refuses(x, w.clone().requires_grad_()) == "a gradient is needed"
    assert cpu.LIMITS["linear"].refuses(x.double(), w.double()) == "dtype float64"
