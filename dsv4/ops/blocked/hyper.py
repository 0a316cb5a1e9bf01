"""Hyper-connections: maps, the streams read and written, with tokens where one wide operation serves them all."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv4.ops.reference import hyper_logits, hyper_read, rms_norm


def _normalise_(c: Tensor, dim: int, eps: float) -> Tensor:
    """c / (sum over dim + eps), in place; returns the divisor."""
    total = c.sum(dim=dim, keepdim=True).add_(eps)
    c.div_(total)
    return total


class _Sinkhorn(torch.autograd.Function):
    """Tokens run along the last, contiguous dimension, so that every step is one wide vector operation."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, iters: int, eps: float):
        ctx.save_for_backward(logits)
        ctx.iters, ctx.eps = iters, eps
        c = logits.detach().float().softmax(dim=-1).permute(1, 2, 0).contiguous().add_(eps)
        _normalise_(c, 0, eps)
        for _ in range(iters - 1):
            _normalise_(c, 1, eps)
            _normalise_(c, 0, eps)
        return c.permute(2, 0, 1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any):
        (logits,) = ctx.saved_tensors
        iters, eps = ctx.iters, ctx.eps
        out = torch.empty_like(logits)
        for i in range(0, len(logits), 4096):  # the 39 steps are replayed for a bounded number of tokens at a time
            out[i : i + 4096] = _sinkhorn_backward(logits[i : i + 4096], grads[0][i : i + 4096], iters, eps)
        return out, None, None


def _sinkhorn_backward(logits: Tensor, grad: Tensor, iters: int, eps: float) -> Tensor:
    """Every step is y = x / (sum x + eps), so dx = (dy - sum(dy y)) / (sum x + eps): bounded, nothing to overflow."""
    soft = logits.float().softmax(dim=-1).permute(1, 2, 0).contiguous()
    steps: list[tuple[int, Tensor, Tensor]] = []
    c = soft + eps
    for dim in [0] + [1, 0] * (iters - 1):
        total = c.sum(dim=dim, keepdim=True).add_(eps)
        c = c / total
        steps.append((dim, c, total))
    g = grad.permute(1, 2, 0).float().contiguous()
    for dim, y, total in reversed(steps):
        g = (g - (g * y).sum(dim=dim, keepdim=True)).div_(total)
    g = soft * (g - (g * soft).sum(dim=1, keepdim=True))
    return g.permute(2, 0, 1).to(logits.dtype).contiguous()


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    return _Sinkhorn.apply(logits, iters, eps)  # type: ignore[return-value]


class _HyperProject(torch.autograd.Function):
    """fn . (x / rms(x)) for x [n, N*M]; the norm is applied to the 24 results, and its gradient in one pass over x."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, fn: Tensor, norm_eps: float):
        rho = (torch.linalg.vector_norm(flat, dim=1, keepdim=True).square() / flat.shape[1] + norm_eps).rsqrt()
        product = flat @ fn.T
        ctx.save_for_backward(flat, fn, rho, product)
        return product * rho

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any):
        flat, fn, rho, product = ctx.saved_tensors
        d_product = grads[0] * rho
        # d rho / d x = -rho^3 x / (N*M)
        pull = (grads[0] * product).sum(dim=1, keepdim=True) * rho.pow(3) / -flat.shape[1]
        return torch.addcmul(d_product @ fn, flat, pull), d_product.T @ flat, None


def hyper_maps(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    projected: Tensor = _HyperProject.apply(x.flatten(1).float(), fn.float(), norm_eps)  # type: ignore[assignment]
    pre, post, comb = hyper_logits(projected, base, scale, x.shape[1])
    return torch.sigmoid(pre) + eps, 2 * torch.sigmoid(post), sinkhorn(comb, iters, eps)


def hyper_enter(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, gain: Tensor, iters: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    pre, post, comb = hyper_maps(x, fn, base, scale, iters, eps, norm_eps)
    return rms_norm(hyper_read(x, pre), gain, norm_eps), post, comb


class _HyperWrite(torch.autograd.Function):
    """The batched products of tiny matrices are fast only when the tiny matrix is contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, post: Tensor, comb: Tensor):
        ctx.save_for_backward(x, y, post, comb)
        out = torch.bmm(comb.transpose(1, 2).contiguous(), x.float())
        return out.addcmul_(post[:, :, None], y.float()[:, None]).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any):
        x, y, post, comb = ctx.saved_tensors
        g = grads[0].float()
        d_x = torch.bmm(comb, g).to(x.dtype)
        d_y = torch.bmm(post[:, None], g)[:, 0].to(y.dtype)
        return d_x, d_y, (g * y.float()[:, None]).sum(dim=2), torch.bmm(x.float(), g.transpose(1, 2))


def hyper_write(x: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    return _HyperWrite.apply(x, y, post, comb)  # type: ignore[return-value]
