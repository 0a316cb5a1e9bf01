"""The next token's loss: logits for one block of tokens at a time."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv4.ops.blocked import blocks
from dsv4.ops.blocked.blocks import dot


class _CrossEntropy(torch.autograd.Function):
    """Logits exist for one block of tokens at a time; their gradients are taken at once, while they are there."""

    @staticmethod
    def forward(ctx: Any, hidden, head, targets, ignore: int):
        rows = max(1, blocks.BLOCK_NUMBERS // len(head))
        loss = hidden.new_zeros((), dtype=torch.float32)
        need = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        d_hidden = torch.empty_like(hidden) if need else None
        d_head = torch.zeros_like(head, dtype=torch.float32) if need else None
        for i in range(0, len(hidden), rows):
            h, t = hidden[i : i + rows], targets[i : i + rows]
            logits = dot(h, head.to(h.dtype).T)
            keep = t != ignore
            at = t.clamp_min(0)[:, None]
            lse = logits.logsumexp(dim=-1)
            loss = loss + ((lse - logits.gather(1, at)[:, 0]) * keep).sum()
            if d_hidden is not None and d_head is not None:
                p = logits.sub_(lse[:, None]).exp_()
                p.scatter_add_(1, at, torch.full_like(at, -1, dtype=torch.float32)).mul_(keep[:, None])
                p = p.to(h.dtype)
                d_hidden[i : i + rows] = dot(p, head.to(h.dtype))
                d_head += dot(p.T, h)
        ctx.save_for_backward(d_hidden, d_head)
        ctx.dtypes = hidden.dtype, head.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any):
        d_hidden, d_head = ctx.saved_tensors
        return (d_hidden * grads[0]).to(ctx.dtypes[0]), (d_head * grads[0]).to(ctx.dtypes[1]), None, None


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, ignore: int = -100) -> Tensor:
    return _CrossEntropy.apply(hidden, head, targets, ignore)  # type: ignore[return-value]
