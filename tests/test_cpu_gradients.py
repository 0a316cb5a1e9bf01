"""Failures caught here, in the C++ forms of experts, mlp, the projections and the loss under autograd: a value or
gradient that is not the reference's (sizes that fill no vector, experts without tokens, clamped numbers, bf16 over
fp32 weights), numbers read that nobody wrote, a call served without its gradient. Attention's are in
test_cpu_attention.py.

Truth is ops/reference.py under autograd, in fp32. Tolerances are relative to the largest number, for fp32 sums of a few
hundred terms.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsv4.ops import reference

cpu = pytest.importorskip("dsv4.ops.cpu", exc_type=ImportError)
expert_gradients = pytest.importorskip("dsv4.ops.cpu.expert_gradients", exc_type=ImportError)
products = pytest.importorskip("dsv4.ops.cpu.products", exc_type=ImportError)
loss = pytest.importorskip("dsv4.ops.cpu.loss", exc_type=ImportError)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(form: Callable, args: tuple) -> list[Tensor]:
    """What comes out, and the gradient of every tensor of numbers."""
    mine = [a.detach().clone().requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    out = form(*mine)
    outs = out if isinstance(out, tuple) else (out,)
    sum((o.float() * normal(*o.shape, seed=9 + i)).sum() for i, o in enumerate(outs)).backward()
    return [*(o.detach() for o in outs), *(m.grad for m in mine if torch.is_tensor(m) and m.is_floating_point())]


def agree(name: str, args: tuple, tolerance: float) -> None:
    asked = [a.detach().requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    assert cpu.LIMITS[name].refuses(*asked) == ""
    got, want = gradients(getattr(cpu, name), args), gradients(getattr(reference, name), args)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        away = (a.float() - b.float()).abs().max().item()
        assert away <= tolerance * max(b.abs().max().item(), 1e-6), f"{name}, number {i}"


def experts_case(n: int, width: int, inner: int, count: int, k: int, dtype: torch.dtype = torch.float32) -> tuple:
    """The last expert gets no token, so its gradient is zero."""
    chosen = torch.rand(n, count - 1, generator=torch.Generator().manual_seed(1)).argsort(dim=1)[:, :k]
    weights = normal(n, k, seed=2).abs()
    w13, w2 = normal(count, 2, inner, width, seed=3), normal(count, width, inner, seed=4)
    return normal(n, width).to(dtype), chosen, weights, w13, w2, 1.5  # a limit that many numbers are beyond


SIZES = [(1, 3, 2, 2, 1), (5, 17, 7, 4, 2), (37, 48, 24, 6, 2), (130, 64, 33, 9, 4)]


FORMS = (expert_gradients.ExpertsInThreads, expert_gradients.ExpertsByTorch)
# With tokens of one expert that are more than a block, and than two.
TOGETHER = [*SIZES, (300, 20, 9, 2, 1), (700, 17, 16, 3, 1)]


def experts_by(form: type) -> Callable:
    def experts(x, chosen, weights, w13, w2, limit):
        return form.apply(x, chosen, weights, w13, w2, torch.bincount(chosen.flatten(), minlength=len(w13)), limit)

    return experts


@pytest.mark.parametrize("sizes", SIZES)
def test_experts(isa: str, sizes: tuple[int, ...]) -> None:
    agree("experts", experts_case(*sizes), 3e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", TOGETHER)
def test_both_forms_of_experts(isa: str, sizes: tuple[int, ...], form: type) -> None:
    """Sums of some hundred rows in another order: 3e-6 (found: 1.2e-6)."""
    args = experts_case(*sizes)
    for i, (a, b) in enumerate(zip(gradients(experts_by(form), args), gradients(reference.experts, args), strict=True)):
        assert (a - b).abs().max() <= 3e-6 * max(b.abs().max().item(), 1e-6), f"number {i}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", TOGETHER)
def test_both_forms_of_experts_in_bf16(isa: str, sizes: tuple[int, ...], form: type) -> None:
    """Weights, their gradients and what comes out are fp32; rows have 8 bits."""
    args = experts_case(*sizes, torch.bfloat16)
    for i, (a, b) in enumerate(zip(gradients(experts_by(form), args), gradients(reference.experts, args), strict=True)):
        assert a.dtype == b.dtype
        assert (a.float() - b.float()).abs().max() <= 2.0**-6 * max(b.abs().max().item(), 1e-6), f"number {i}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", TOGETHER)
def test_an_expert_has_the_same_bits_with_any_number_of_threads(isa: str, sizes: tuple[int, ...], dtype) -> None:
    form, found = experts_by(FORMS[0]), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(gradients(form, experts_case(*sizes, dtype)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_experts_are_left_to_threads_where_all_are_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread here, so four experts with tokens; not wider ones than a core has room for, nor weights in bf16."""
    taken = []
    for form in FORMS:
        apply = form.apply
        monkeypatch.setattr(form, "apply", lambda *a, f=form, g=apply: (taken.append(f), g(*a))[1])
    cases = [experts_case(60, 16, 8, count, 2) for count in (6, 3)]
    narrow = experts_case(60, 16, 8, 6, 2, torch.bfloat16)
    cases += [narrow, experts_case(60, 16, 513, 6, 2), (*narrow[:3], narrow[3].bfloat16(), *narrow[4:])]
    assert torch.get_num_threads() == 1
    for case in cases:
        gradients(cpu.experts, case)
    assert taken == [FORMS[0], FORMS[1], FORMS[0], FORMS[1], FORMS[1]]


@pytest.mark.parametrize(("n", "width", "inner", "count", "k"), SIZES)
def test_mlp(isa: str, n: int, width: int, inner: int, count: int, k: int) -> None:
    w1, w3, w2 = normal(inner, width, seed=1), normal(inner, width, seed=2), normal(width, inner, seed=3)
    agree("mlp", (normal(n, width), w1, w3, w2, 1.5), 3e-6)


def projections(
    n: int, dtype: torch.dtype = torch.float32, sizes: tuple[int, ...] = (13, 7, 10, 2)
) -> dict[str, tuple]:
    """Three heads of D numbers, of which 2 * pairs are rotated, from x of M and a latent of L numbers."""
    m, latent, d, pairs = sizes
    turn = torch.polar(torch.ones(n, pairs), normal(n, pairs, seed=7))
    x, wq_a = normal(n, m), normal(latent, m, seed=1)
    wq_b, wkv = normal(3 * d, latent, seed=2), normal(d, m, seed=3)
    gains, o = (1 + 0.1 * normal(latent, seed=4), 1 + 0.1 * normal(d, seed=5)), normal(n, 3, d, seed=6)
    into = (x.to(dtype), wq_a, gains[0], wq_b, wkv, gains[1], 3, 1e-6, turn)
    return {
        "project_in": into,
        "project_out": (o.to(dtype), turn, normal(3 * 5, d, seed=8), 3, normal(m, 15, seed=10)),
    }


@pytest.mark.parametrize("n", [1, 5, 130])
@pytest.mark.parametrize("name", ["project_in", "project_out"])
def test_projections(isa: str, name: str, n: int) -> None:
    agree(name, projections(n)[name], 5e-6)


@pytest.mark.parametrize("sizes", [(3, 4, 6, 1), (33, 16, 24, 12), (64, 48, 36, 5), (20, 70, 130, 8)])
@pytest.mark.parametrize("name", ["project_in", "project_out"])
def test_projections_of_other_sizes(isa: str, name: str, sizes: tuple[int, ...]) -> None:
    agree(name, projections(37, sizes=sizes)[name], 1e-5)


@pytest.mark.parametrize("used", range(4))
def test_what_follows_one_of_the_projections(isa: str, used: int) -> None:
    """Of the latent, the queries, the row and the rotated row: what the one used does not come from has no gradient."""
    args = projections(23)["project_in"]
    got, want = (gradients(lambda *a, f=form: f.project_in(*a)[used], args) for form in (cpu, reference))
    for a, b in zip(got, want, strict=True):
        b = torch.zeros_like(a) if b is None else b
        assert (a - b).abs().max() <= 5e-6 * max(b.abs().max().item(), 1e-6)


def test_projections_of_no_tokens_and_of_strided_rows(isa: str) -> None:
    for name, args in projections(0).items():
        assert all(g is None or not g.any() for g in gradients(getattr(cpu, name), args))
    for name, (x, *rest) in projections(37).items():
        wide = torch.cat([x, x], dim=-1)[..., : x.shape[-1]]
        assert not wide.is_contiguous()
        got, want = (
            [t.detach() for t in of(getattr(cpu, name), (a, *rest))] for of, a in ((outputs, wide), (outputs, x))
        )
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def outputs(form: Callable, args: tuple) -> list[Tensor]:
    """What comes out of x [n, ...] as it lies, which learns; and its gradient."""
    x = args[0].detach().requires_grad_()
    out = form(x, *args[1:])
    outs = out if isinstance(out, tuple) else (out,)
    sum(o.square().sum() for o in outs).backward()
    assert x.grad is not None
    return [*outs, x.grad]


def test_queries_are_kept_once(isa: str) -> None:
    """As they come out, which is how attention keeps them; not as they were before norm and rotation."""
    args = [
        a.requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in projections(40)["project_in"]
    ]
    kept = dict[int, int]()

    def note(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        _, q, _, _ = cpu.project_in(*args)
    assert q.untyped_storage().data_ptr() in kept and list(kept.values()).count(q.untyped_storage().nbytes()) == 1


@pytest.mark.parametrize("name", ["project_in", "project_out"])
def test_projections_in_bf16_over_fp32_weights(isa: str, name: str) -> None:
    agree(name, projections(37, torch.bfloat16)[name], 2.0**-6)


def test_in_bf16_over_fp32_weights(isa: str) -> None:
    """As training does; a few roundings to 8 bits, of which sums of a few dozen are taken."""
    agree("experts", experts_case(37, 48, 24, 6, 2, torch.bfloat16), 2.0**-6)
    args = normal(37, 48).bfloat16(), normal(24, 48, seed=1), normal(24, 48, seed=2), normal(48, 24, seed=3), 1.5
    agree("mlp", args, 2.0**-6)


def test_numbers_on_the_bound_and_numbers_that_are_none(isa: str) -> None:
    """A clamped number carries no gradient, one on the bound does; a NaN stays in its own row."""
    x = torch.tensor([[1.0], [2.0], [3.0], [-2.0], [-3.0], [float("nan")]])
    one = torch.ones(1, 1)
    got, want = (gradients(form.mlp, (x, one, one, one, 2.0)) for form in (cpu, reference))
    for a, b in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(a[:5], b[:5], rtol=1e-5, atol=1e-6)
    assert got[1][2] == 0 and got[1][1] != 0 and got[0][:5].isfinite().all() and got[0][5].isnan() and got[1][5].isnan()


def test_only_those_weights_that_learn_have_a_gradient(isa: str) -> None:
    x, chosen, weights, w13, w2, limit = experts_case(9, 17, 7, 4, 2)
    w2.requires_grad_()
    cpu.experts(x, chosen, weights, w13, w2, limit).sum().backward()
    assert w2.grad is not None and w2.grad[:3].any() and not w2.grad[3].any() and w13.grad is None


@pytest.mark.parametrize("shape", [(5, 7, 3), (64, 48, 33)])
def test_products_of_bf16_are_rounded_once(isa: str, shape: tuple[int, int, int]) -> None:
    """Whole numbers below 2^8, so that fp32 sums are exact and only the last rounding is left."""
    n, k, m = shape
    a, b, c = (normal(*s, seed=i).mul(3).round() for i, s in enumerate(((n, k), (k, m), (n, m))))
    exact = (a.double() @ b.double()).float()
    narrow, wide = a.bfloat16(), b.bfloat16()
    for x, y, out in ((narrow, wide, torch.bfloat16), (a, b, torch.float32)):
        assert torch.equal(products.mm(x, y), exact.to(out))
        columns = torch.full((n, 2 * m), torch.nan, dtype=out)
        assert torch.equal(products.mm(x, y, out=columns[:, m:]), exact.to(out)) and columns[:, :m].isnan().all()
        assert torch.equal(products.add_mm(c.clone().to(out), x, y), (c + exact).to(out))
        gradient = torch.full((n, m), torch.nan, dtype=torch.float32)
        products.into_gradient(x, y, gradient)
        assert torch.equal(gradient, exact)


@pytest.mark.parametrize(("n", "threads"), [(1, 1), (2, 1), (13, 1), (97, 1), (97, 3), (600, 1), (600, 3)])
def test_products_of_bf16_with_fp32_sums(isa: str, n: int, threads: int) -> None:
    """Of rows or columns that lie in one piece, among others of poison, into columns of a matrix, alone or added:
    whole numbers, so that sums are exact. Lengths that fill no unit, vector or tile, and more than one depth."""
    torch.set_num_threads(threads)

    def lying(rows: int, columns: int, turned: bool, seed: int) -> Tensor:
        shape = (columns, rows) if turned else (rows, columns)
        room = torch.full((shape[0], shape[1] + 3), torch.nan, dtype=torch.bfloat16)
        inner = room[:, 1:-2]
        inner.copy_(normal(*shape, seed=seed).mul(3).round())
        return inner.T if turned else inner

    for depth in (1, 2, 3, 16, 33, 1025, 2050) if threads == 1 else (33, 1025):
        for m in (1, 5, 31, 33, 100) if threads == 1 else (5, 100):
            for way in range(8):
                a, b = lying(n, depth, bool(way & 1), 1), lying(depth, m, bool(way & 2), 2)
                before = normal(n, m, seed=3).round() if way & 4 else torch.full((n, m), torch.nan)
                room = torch.full((n, m + 5), torch.nan)
                out = room[:, 2:-3]
                out.copy_(before)
                assert products.dot_bf16(a, b, out, add=bool(way & 4)) is out
                want = a.double() @ b.double() + (before.double() if way & 4 else 0)
                assert torch.equal(out.double(), want), (depth, m, way)
                assert room[:, :2].isnan().all() and room[:, -3:].isnan().all()


def test_a_gradient_that_is_one_number_everywhere(isa: str) -> None:
    """As that of a sum, which lies in no rows: an op in bf16 takes it as any other."""
    cases = {
        "mlp": (normal(37, 48).bfloat16(), normal(24, 48, seed=1), normal(24, 48, seed=2), normal(48, 24, seed=3), 1.5)
    }
    cases["project_out"] = projections(37, torch.bfloat16)["project_out"]
    for name, given in cases.items():
        found = []
        for ops in (cpu, reference):
            mine = [
                m.detach().clone().requires_grad_() if torch.is_tensor(m) and m.is_floating_point() else m
                for m in given
            ]
            getattr(ops, name)(*mine).sum().backward()
            found.append([m.grad.float() for m in mine if torch.is_tensor(m) and m.is_floating_point()])
        for got, want in zip(*found, strict=True):
            assert (got - want).abs().max() <= 2.0**-6 * want.abs().max(), name


def test_products_of_nothing(isa: str) -> None:
    nothing, out = torch.empty(0, 4, dtype=torch.bfloat16), torch.full((4, 4), torch.nan)
    assert not products.dot_bf16(nothing.T, nothing, out).any()
    assert torch.equal(products.dot_bf16(nothing.T, nothing, out.fill_(2), add=True), torch.full((4, 4), 2.0))
    products.dot_bf16(nothing, out.bfloat16(), torch.empty(0, 4))


# --- the next token's loss ---


def loss_case(n: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple:
    targets = torch.randint(0, vocab, (n,), generator=torch.Generator().manual_seed(2))
    targets[1::3] = -100
    return normal(n, 9).to(dtype), normal(vocab, 9, seed=1), targets


@pytest.mark.parametrize("numbers", [1 << 23, 1 << 9, 1])
@pytest.mark.parametrize(("n", "vocab"), [(1, 1), (2, 15), (67, 16), (130, 50), (33, 1000)])
def test_loss(isa: str, n: int, vocab: int, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of all rows, of some and of one."""
    monkeypatch.setattr(loss, "BLOCK_NUMBERS", numbers)
    agree("cross_entropy", loss_case(n, vocab), 2e-6)


@pytest.mark.parametrize("numbers", [1 << 23, 1 << 9])
def test_loss_in_bf16(isa: str, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head and what it multiplies have 8 bits, their sums 24; so has the gradient of the logits."""
    monkeypatch.setattr(loss, "BLOCK_NUMBERS", numbers)
    for head in (torch.float32, torch.bfloat16):
        x, w, targets = loss_case(130, 50, torch.bfloat16)
        agree("cross_entropy", (x, w.to(head), targets), 2.0**-7)
    exact = gradients(reference.cross_entropy, (x.float(), w.bfloat16().float(), targets))
    assert abs(gradients(cpu.cross_entropy, (x, w, targets))[0] - exact[0]) <= 2e-6 * exact[0]


def test_loss_of_huge_numbers_and_of_none(isa: str) -> None:
    """A NaN is the loss's, and stays in its own row; a target that is ignored carries nothing, whatever its row has."""
    x, w, targets = loss_case(40, 50)
    agree("cross_entropy", (100 * x, 100 * w, targets), 2e-6)
    x[4], targets[4], x[5], targets[5] = torch.nan, -100, 1.0, 3
    found = gradients(cpu.cross_entropy, (x, w, targets))
    assert found[0].isfinite() and not found[1][4].any() and found[1][5].any()
    targets[4] = 3
    found = gradients(cpu.cross_entropy, (x, w, targets))
    assert found[0].isnan() and found[1][4].isnan().all() and found[1][5].isfinite().all()


@pytest.mark.parametrize("target", [50, -1, 1 << 40])
def test_a_target_that_is_no_token(isa: str, target: int) -> None:
    x, w, targets = loss_case(40, 50)
    targets[7] = target
    with pytest.raises(IndexError, match=f"target {target} is no token of 50"):
        cpu.cross_entropy(x, w, targets)


def test_loss_without_a_gradient(isa: str) -> None:
    x, w, targets = loss_case(40, 50)
    with torch.no_grad():
        alone = cpu.cross_entropy(x, w, targets)
    assert alone == gradients(lambda *a: cpu.cross_entropy(*a)[None], (x, w, targets))[0]
    assert cpu.cross_entropy(x[:0], w, targets[:0]) == 0


def test_loss_has_the_same_bits_with_any_number_of_threads(isa: str) -> None:
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(gradients(cpu.cross_entropy, loss_case(700, 200, torch.bfloat16)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
