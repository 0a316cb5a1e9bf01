"""The next token's loss: logits for one block of tokens at a time, whose gradients are taken at once."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv4.ops.cpu.library import PLAIN, Kernel, address
from dsv4.ops.cpu.products import dot, mm
from dsv4.ops.limits import Limits

_losses = Kernel("losses", "pplllpip")

BLOCK_NUMBERS = 1 << 23  # logits that are there at a time: 32 MiB


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, ignore: int = -100) -> Tensor:
    return _CrossEntropy.apply(hidden, head, targets, ignore)  # type: ignore[return-value]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, ignore: int):
        (n, dtype), vocab = (len(hidden), hidden.dtype), len(head)
        rows, targets = max(1, BLOCK_NUMBERS // vocab), targets.contiguous()
        wrong = (targets != ignore) & ((targets < 0) | (targets >= vocab))
        if wrong.any():  # the library would read, and write, what is not there
            raise IndexError(f"target {targets[wrong][0].item()} is no token of {vocab}")
        need = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        hidden, weight = hidden.contiguous(), head.to(dtype)
        losses = hidden.new_empty(n, dtype=torch.float32)
        logits = losses.new_empty(min(n, rows), vocab)
        d = (logits if dtype == torch.float32 else logits.new_empty(logits.shape, dtype=dtype)) if need else None
        d_hidden = torch.empty_like(hidden) if need else None
        d_head = torch.zeros_like(head, dtype=torch.float32) if need else None
        for i in range(0, n, rows):
            h, t, out = hidden[i : i + rows], targets[i : i + rows], losses[i : i + rows]
            dot(h, weight.T, logits[: len(h)])
            _losses(
                logits.data_ptr(), t.data_ptr(), len(h), vocab, ignore, address(d), dtype == torch.bfloat16,
                out.data_ptr(),
            )  # fmt: skip
            if d is not None and d_hidden is not None and d_head is not None:
                mm(d[: len(h)], weight, out=d_hidden[i : i + rows])
                dot(d[: len(h)].T, h, d_head, add=True)
        ctx.save_for_backward(d_hidden, d_head)
        ctx.dtypes = dtype, head.dtype
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any):
        d_hidden, d_head = ctx.saved_tensors
        return (d_hidden * grads[0]).to(ctx.dtypes[0]), (d_head * grads[0]).to(ctx.dtypes[1]), None, None


def _fit(hidden: Tensor, head: Tensor, targets: Tensor, ignore: int = -100) -> str:
    if targets.dtype != torch.int64:
        return "targets that are not int64"
    return "" if head.is_contiguous() else "a head that is not contiguous"


LIMITS = {"cross_entropy": Limits(devices=("cpu",), dtypes=PLAIN, also=_fit)}
