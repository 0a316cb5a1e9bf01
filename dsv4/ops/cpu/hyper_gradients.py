"""Hyper-connections under autograd: of a call its arguments are kept, and of the products of its streams with fn a few
numbers a token; all else is computed again, in one pass over the streams.

Of streams that a write has made from streams that are kept, nothing is kept: the backward pass writes them once more,
which costs about a hundredth of a step. So every other one of a model's streams is in memory.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv4.ops.cpu.library import Kernel, address

_enter = Kernel("hyper_enter", "pililppppiffpppp")
_collapse = Kernel("head_collapse", "pililpppffpp")
_write = Kernel("hyper_write", "ppililppp")
_enter_backward = Kernel("hyper_enter_backward", "pililppppiffppppppppp")
_write_backward = Kernel("hyper_write_backward", "pppililpppppp")


def _described(x: Tensor) -> tuple[int, bool, int, int, int]:
    """Streams [n, N, M] as the library takes them."""
    n, num, width = x.shape
    return x.data_ptr(), x.dtype == torch.bfloat16, n, num, width


def entered(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, gain: Tensor, iters: int, eps: float, norm_eps: float,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The values of ops.hyper_enter; kept fp32 [n, (2+N)*N + 1]: filled with what the backward pass needs."""
    n, num, width = x.shape
    out, post, comb = x.new_empty(n, width), base.new_empty(n, num), base.new_empty(n, num, num)
    _enter(
        *_described(x), fn.data_ptr(), base.data_ptr(), scale.data_ptr(), gain.data_ptr(), iters, eps, norm_eps,
        out.data_ptr(), post.data_ptr(), comb.data_ptr(), address(kept),
    )  # fmt: skip
    return out, post, comb


def collapsed(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float, kept: Tensor | None = None
) -> Tensor:
    """The values of ops.head_collapse; kept fp32 [n, N + 1] likewise."""
    out = x.new_empty(len(x), x.shape[2])
    _collapse(
        *_described(x), fn.data_ptr(), base.data_ptr(), scale.data_ptr(), eps, norm_eps, out.data_ptr(), address(kept)
    )
    return out


def written(x: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """The values of ops.hyper_write."""
    out, (place, *kind) = torch.empty_like(x), _described(x)
    _write(place, y.data_ptr(), *kind, post.data_ptr(), comb.data_ptr(), out.data_ptr())
    return out


class _Kept:
    """The streams x that a node needs in its backward pass: as they are, or the write that made them."""

    def __init__(self, x: Tensor):
        node: Any = x.grad_fn
        can = isinstance(node, Write._backward_cls) and node.x.made_by is None
        self.made_by: Any = node if can and node.version == x._version else None  # as it was written, still
        self.saved = () if self.made_by is not None else (x,)
        if self.made_by is not None:
            self.made_by.readers += 1

    def value(self, saved: tuple[Tensor, ...]) -> Tensor:
        """x; saved: what the node has kept of `self.saved`."""
        return saved[0] if self.made_by is None else Write.again(self.made_by)


class Enter(torch.autograd.Function):
    """As ops.hyper_enter, of contiguous streams."""

    @staticmethod
    def forward(ctx: Any, x, fn, base, scale, gain, iters: int, eps: float, norm_eps: float):
        kept = base.new_empty(len(x), len(base) + 1)
        found = entered(x, fn, base, scale, gain, iters, eps, norm_eps, kept)
        ctx.x, ctx.rest = _Kept(x), (iters, eps, norm_eps)
        ctx.save_for_backward(fn, base, scale, gain, kept, *ctx.x.saved)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any):
        fn, base, scale, gain, kept, *saved = ctx.saved_tensors
        x = ctx.x.value(saved)
        d_out, d_post, d_comb = (g.contiguous() for g in grads)
        found = tuple(map(torch.empty_like, (x, fn, base, scale, gain)))
        _enter_backward(
            *_described(x), fn.data_ptr(), base.data_ptr(), scale.data_ptr(), gain.data_ptr(), *ctx.rest,
            kept.data_ptr(), d_out.data_ptr(), d_post.data_ptr(), d_comb.data_ptr(), *(d.data_ptr() for d in found),
        )  # fmt: skip
        return *found, None, None, None


class Collapse(torch.autograd.Function):
    """As ops.head_collapse, of contiguous streams."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float):
        kept = base.new_empty(len(x), len(base) + 1)
        out = collapsed(x, fn, base, scale, eps, norm_eps, kept)
        ctx.save_for_backward(x, fn, base, scale, kept)
        ctx.rest = 0, eps, norm_eps  # no Sinkhorn
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any):
        x, fn, base, scale, kept = ctx.saved_tensors
        d_out, found = grads[0].contiguous(), tuple(map(torch.empty_like, (x, fn, base, scale)))
        _enter_backward(
            *_described(x), fn.data_ptr(), base.data_ptr(), scale.data_ptr(), None, *ctx.rest, kept.data_ptr(),
            d_out.data_ptr(), None, None, *(d.data_ptr() for d in found), None,
        )  # fmt: skip
        return *found, None, None


class Write(torch.autograd.Function):
    """As ops.hyper_write, of contiguous tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, post: Tensor, comb: Tensor):
        ctx.x = _Kept(x)
        ctx.save_for_backward(y, post, comb, *ctx.x.saved)
        ctx.readers, ctx.waiting, ctx.given, ctx.made = 0, 0, None, None
        out = written(x, y, post, comb)
        ctx.version = out._version
        return out

    @staticmethod
    def again(ctx: Any) -> Tensor:
        """The streams that were written, for one of the nodes that read them, all of which come before this one in the
        backward pass; they are there until the last has asked."""
        if ctx.made is None:
            ctx.made, ctx.waiting = written(*Write.arguments(ctx)), ctx.readers
        made, ctx.waiting = ctx.made, ctx.waiting - 1
        if ctx.waiting <= 0:
            ctx.made = None
        return made

    @staticmethod
    def arguments(ctx: Any) -> tuple[Tensor, ...]:
        """x, y, post, comb. What is saved may be asked for once only in a backward pass, where it is computed again."""
        if ctx.given is None:
            y, post, comb, *saved = ctx.saved_tensors
            ctx.given = ctx.x.value(saved), y, post, comb
        return ctx.given

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any):
        x, y, post, comb = Write.arguments(ctx)
        ctx.given = None
        d_out, found = grads[0].contiguous(), tuple(map(torch.empty_like, (x, y, post, comb)))
        place, *kind = _described(x)
        _write_backward(
            place, y.data_ptr(), d_out.data_ptr(), *kind, post.data_ptr(), comb.data_ptr(),
            *(d.data_ptr() for d in found),
        )  # fmt: skip
        return found
