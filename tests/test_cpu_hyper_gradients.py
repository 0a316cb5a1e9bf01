"""Failures caught here, in the C++ gradients of hyper-connections: one that is not the reference's, at any number of
streams, width or number of tokens (sizes that fill no vector, tokens that fill no group, many slices), or for strided
input; a step of Sinkhorn's left out of the backward pass; numbers read that nobody wrote or beyond an end; a token that
reaches another's gradient; a gradient that depends on the number of threads; more kept than is said; streams written
once more that are not those that were read.

Truth is ops/reference.py under autograd in fp64, of the same fp32 numbers. Every test runs with every set of
instructions that the machine has.
"""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from guards import guarded
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dsv4.ops import reference

cpu = pytest.importorskip("dsv4.ops.cpu", exc_type=ImportError)

pytestmark = pytest.mark.usefixtures("isa")
FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
ITERS, EPS, NORM_EPS = 20, 1e-6, 1e-6
SHAPES = [
    (4, 1),
    (4, 8),
    (4, 33),
    (4, 130),
    (1, 40),
    (2, 17),
    (3, 9),
    (5, 64),
    (6, 20),
    (7, 31),
    (8, 70),
]  # streams, width
TOKENS = (1, 2, 3, 5, 7, 13, 66, 131)
# Of a gradient, relative to its largest number: fp32 sums of up to a few hundred terms, some of which cancel (found: at
# most 2e-5). In bf16 what is read and the gradients are rounded to 8 bits.
CLOSE = {FP32: 5e-5, BF16: 2.0**-6}
ALONE = 1e-3  # one stream: the norm takes away its weight, so that what flows to it cancels but for eps


def enter_case(n: int, num: int, width: int, dtype: torch.dtype = FP32, iters: int = ITERS) -> tuple:
    outputs = (2 + num) * num
    fn = guarded(torch.randn(outputs, num * width) * (num * width) ** -0.5)
    parameters = fn, guarded(torch.randn(outputs)), guarded(torch.rand(3) + 0.5), guarded(torch.rand(width) + 0.5)
    return guarded((torch.randn(n, num, width) * 3).to(dtype)), *parameters, iters, EPS, NORM_EPS


def collapse_case(n: int, num: int, width: int, dtype: torch.dtype = FP32) -> tuple:
    x, fn, base, scale, *_ = enter_case(n, num, width, dtype)
    return x, fn[:num], base[:num], scale[:1], EPS, NORM_EPS


def write_case(n: int, num: int, width: int, dtype: torch.dtype = FP32) -> tuple:
    x, y = (guarded((torch.randn(shape) * 3).to(dtype)) for shape in ((n, num, width), (n, width)))
    return x, y, guarded(torch.rand(n, num)), guarded(torch.rand(n, num, num))


CASES = {"hyper_enter": enter_case, "head_collapse": collapse_case, "hyper_write": write_case}


def gradients(form: Callable, args: tuple, dtype: torch.dtype | None = None) -> list[Tensor]:
    """What comes out, and the gradients of all tensors; computed in another dtype where one is given."""
    given = [a.detach().to(dtype or a.dtype) if torch.is_tensor(a) else a for a in args]
    mine = [a.requires_grad_() if torch.is_tensor(a) else a for a in given]
    out = form(*mine)
    outs = out if isinstance(out, tuple) else (out,)
    seed = torch.Generator().manual_seed(5)
    above = [torch.randn(o.shape, generator=seed) for o in outs]
    torch.autograd.backward(outs, [a.to(o.dtype) for a, o in zip(above, outs, strict=True)])
    return [*(o.detach() for o in outs), *(m.grad for m in mine if torch.is_tensor(m) and m.grad is not None)]


def in_fp64(name: str) -> Callable:
    """The reference's op, in fp64 throughout: its own casts to fp32 are taken out."""

    def form(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "float", lambda self: self)
            return getattr(reference, name)(*args)

    return form


def apart(name: str, args: tuple) -> list[float]:
    """How far each result and gradient is from the truth, relative to its largest number."""
    tensors = [a for a in args if torch.is_tensor(a)]
    assert cpu.LIMITS[name].refuses(*(a.requires_grad_() if torch.is_tensor(a) else a for a in args)) == ""
    got, want = gradients(getattr(cpu, name), args), gradients(in_fp64(name), args, FP64)
    assert len(got) == len(want) > len(tensors)
    found = []
    for a, b in zip(got, want, strict=True):
        assert b.dtype == FP64 and a.shape == b.shape
        found.append(((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-12)).item() if b.numel() else 0.0)
    return found


@pytest.mark.parametrize(("num", "width"), SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str, num: int, width: int) -> None:
    for n in TOKENS:
        found = apart(name, CASES[name](n, num, width))
        assert max(found) <= (CLOSE[FP32] if num > 1 else ALONE), (n, found)


@pytest.mark.parametrize(("num", "width"), [(4, 96), (3, 41)])
@pytest.mark.parametrize("name", CASES)
def test_gradients_in_bf16(name: str, num: int, width: int) -> None:
    found = apart(name, CASES[name](77, num, width, BF16))
    assert max(found) <= CLOSE[BF16], found


@pytest.mark.parametrize("num", range(1, 9))
@pytest.mark.parametrize("iters", [1, 2, 3, 20])
def test_gradients_through_every_step_of_sinkhorn(num: int, iters: int) -> None:
    found = apart("hyper_enter", enter_case(11, num, 24, iters=iters))
    assert max(found) <= (CLOSE[FP32] if num > 1 else ALONE), found


def test_strided_input_and_gradients() -> None:
    """x, y and the maps are read rightly, and what comes from above is, whatever the layout."""
    for name in ("hyper_enter", "hyper_write"):
        args = list(CASES[name](9, 4, 20))
        args[0] = args[0].transpose(0, 1).contiguous().transpose(0, 1)
        if name == "hyper_write":
            args[1:] = [args[1].T.contiguous().T, args[2].T.contiguous().T, args[3].transpose(1, 2).contiguous().mT]
        assert not args[0].is_contiguous() and max(apart(name, tuple(args))) <= CLOSE[FP32]
    x, y, post, comb = write_case(9, 4, 20)
    x.requires_grad_()
    cpu.hyper_write(x, y, post, comb).sum().backward()  # the gradient from above is one number, expanded
    assert x.grad is not None and torch.allclose(x.grad, comb.sum(2)[..., None].expand_as(x), rtol=1e-5)
    args = collapse_case(9, 4, 20)
    args[0].requires_grad_()
    cpu.head_collapse(*args).sum().backward()
    assert torch.equal(args[0].grad, gradients_of_ones(args))


def gradients_of_ones(args: tuple) -> Tensor:
    x = args[0].detach().clone().requires_grad_()
    out = cpu.head_collapse(x, *args[1:])
    out.backward(torch.ones_like(out))
    assert x.grad is not None
    return x.grad


def test_only_what_is_used_flows() -> None:
    """A map that nothing follows has a gradient of zero; the parameters alone may learn."""
    args = enter_case(10, 4, 24)
    for a in args[1:5]:
        a.requires_grad_()
    cpu.hyper_enter(*args)[0].sum().backward()
    want = enter_case(1, 4, 24)[1].shape
    base = args[2].grad
    assert args[0].grad is None and args[1].grad.shape == want
    assert base[:4].any() and not base[4:].any()  # only pre is in what was read


def test_a_token_that_is_not_a_number_keeps_to_itself() -> None:
    args = enter_case(13, 4, 24)
    clean = gradients(cpu.hyper_enter, args)[3]
    args[0].detach()[6, 1, 7] = float("nan")
    spoilt = gradients(cpu.hyper_enter, args)[3]
    others = [i for i in range(13) if i != 6]
    assert spoilt[6].isnan().all() and torch.equal(spoilt[others], clean[others])
    args = write_case(13, 4, 24)
    clean = gradients(cpu.hyper_write, args)
    args[0].detach()[6, 1, 7] = float("nan")
    spoilt = gradients(cpu.hyper_write, args)
    assert all(torch.equal(a[others], b[others]) for a, b in zip(spoilt, clean, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_threads_change_no_bit(name: str) -> None:
    torch.set_num_threads(2)
    args = CASES[name](301, 4, 100)
    both = gradients(getattr(cpu, name), args)
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(gradients(getattr(cpu, name), args), both, strict=True))


def test_no_tokens() -> None:
    for name, case in CASES.items():
        found = gradients(getattr(cpu, name), case(0, 4, 24))
        assert all(not g.any() for g in found)  # of the parameters: zeros, and not what lay in fresh memory


def test_little_is_kept() -> None:
    """Besides its arguments a call keeps at most 25 numbers a token, of 4 streams."""
    for name, case in CASES.items():
        args, kept = [a.requires_grad_() if torch.is_tensor(a) else a for a in case(40, 4, 64)], dict[int, int]()
        mine = {a.untyped_storage().data_ptr() for a in args if torch.is_tensor(a)}

        def note(t: Tensor, mine: set[int] = mine, kept: dict[int, int] = kept) -> Tensor:
            place = t.untyped_storage()
            kept.update({} if place.data_ptr() in mine else {place.data_ptr(): place.nbytes()})
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            out = getattr(cpu, name)(*args)
        assert sum(kept.values()) <= 40 * 25 * 4 and out is not None


def streams_after(form: object, x: Tensor, fns: list[Tensor], case: tuple) -> Tensor:
    """Three sublayers, the second's output read by two more writes than its enter."""
    _, _, base, scale, gain, *rest = case
    for fn in fns:
        h, post, comb = form.hyper_enter(x, fn, base, scale, gain, *rest)  # type: ignore[attr-defined]
        x = form.hyper_write(x, torch.tanh(h), post, comb)  # type: ignore[attr-defined]
    return form.hyper_write(x, h, post, comb) + form.hyper_write(x, 2 * h, post, comb)  # type: ignore[attr-defined]


def of_a_chain(form: object, n: int = 21, again: bool = False, recompute: bool = False) -> list[Tensor]:
    torch.manual_seed(3)
    case = enter_case(n, 4, 24)
    x, fns = case[0].clone().requires_grad_(), [case[1].clone().requires_grad_() for _ in range(4)]
    if recompute:
        out = checkpoint(streams_after, form, x, fns, case, use_reentrant=False)
    else:
        out = streams_after(form, x, fns, case)
    if again:
        out.square().sum().backward(retain_graph=True)
        for leaf in (x, *fns):
            leaf.grad = None
    out.square().sum().backward()
    return [out.detach(), *(leaf.grad for leaf in (x, *fns))]  # type: ignore[list-item]


@pytest.mark.parametrize("how", [{}, {"again": True}, {"recompute": True}])
def test_streams_that_are_written_once_more(how: dict[str, bool]) -> None:
    """In a second backward pass, and in one that computes everything again, too."""
    got, want = of_a_chain(cpu, **how), of_a_chain(reference)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 2e-5 * b.abs().max()
    for a, b in zip(got, of_a_chain(cpu), strict=True):
        assert torch.equal(a, b)


def test_a_gradient_of_some_of_a_chain() -> None:
    """Asked for on the way: those after it have run and those before it have not."""
    case = enter_case(9, 4, 24)
    x = case[0].clone().requires_grad_()
    h, post, comb = cpu.hyper_enter(x, *case[1:])
    middle = cpu.hyper_write(x, h, post, comb)
    out = cpu.hyper_enter(middle, *case[1:])[0]
    (part,) = torch.autograd.grad(out.sum(), middle, retain_graph=True)
    fresh = middle.detach().requires_grad_()
    cpu.hyper_enter(fresh, *case[1:])[0].sum().backward()
    assert fresh.grad is not None and torch.equal(part, fresh.grad)
    (whole,) = torch.autograd.grad(out.sum(), x)
    again = x.detach().requires_grad_()
    h, post, comb = cpu.hyper_enter(again, *case[1:])
    cpu.hyper_enter(cpu.hyper_write(again, h, post, comb), *case[1:])[0].sum().backward()
    assert again.grad is not None and torch.equal(whole, again.grad)


def test_streams_that_were_changed_in_place_are_not_written_again() -> None:
    case = enter_case(9, 4, 24)
    x = case[0].clone().requires_grad_()
    h, post, comb = cpu.hyper_enter(x, *case[1:])
    middle = cpu.hyper_write(x, h, post, comb)
    with torch.no_grad():
        middle[:, 1] = 0.5
    (got,) = torch.autograd.grad(cpu.hyper_enter(middle, *case[1:])[0].sum(), middle)
    fresh = middle.detach().clone().requires_grad_()
    (want,) = torch.autograd.grad(cpu.hyper_enter(fresh, *case[1:])[0].sum(), fresh)
    assert torch.equal(got, want)


def test_every_other_stream_is_in_memory() -> None:
    """Of what nine sublayers begin with, the first, the third, ...: the others do not outlive the next."""
    case = enter_case(64, 4, 32)
    x, storages = case[0].clone().requires_grad_(), []
    for _ in range(9):
        storages.append(weakref.ref(x.untyped_storage()))
        h, post, comb = cpu.hyper_enter(x, *case[1:])
        x = cpu.hyper_write(x, h, post, comb)
    del h, post, comb
    gc.collect()
    assert [s() is not None for s in storages] == [True, False] * 4 + [True]
