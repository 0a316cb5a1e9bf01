"""The one way in which rows travel between processes while there are gradients: all-to-all, and back again."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Exchange(torch.autograd.Function):
    """torch's all_to_all_single with its gradient, which takes the same way back.

    torch's own differentiable one (distributed.nn.functional) is deprecated for a private one. A process to which no
    gradient comes sends zeros: the others wait for it.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.way_back = received, sent, group
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        return _Exchange.apply(grads[0], *ctx.way_back), None, None, None


def exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send the first sent[0] rows [n, ...] to the group's first process and so on; returns what comes from each, in
    order. Every process of the group must call it."""
    return _Exchange.apply(rows, sent, received, group)  # type: ignore[return-value]
