"""The layers that everything is made of. Weights keep their own dtype and follow that of the activations."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dsv4 import ops


class Linear(nn.Module):
    """y = x W^T, W [out, in]; computed in x's dtype, or in fp32 where `fp32` (then the weight is held in fp32 too).

    In place of the parameter `weight` may be an ops.PackedMatrix.
    """

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, *, fp32: bool = False):
        super().__init__()
        self.fp32 = fp32
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.float32 if fp32 else dtype))

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x.float() if self.fp32 else x, self.weight)


class Weight(nn.Module):
    """A weight that its owner hands to an op together with others. It has no forward, so nothing can wrap it alone.

    In place of the parameter `weight` may be an ops.PackedMatrix, if it is a matrix that an op multiplies by.
    """

    def __init__(self, *shape: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype))


class _Unused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor):
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        return grads[0], *map(torch.zeros_like, ctx.saved_tensors)


def with_unused(x: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """x as it is, with a graph to parameters that it does not depend on: their gradient is a tensor of zeros.

    Where processes share a model, each must find a gradient for the same parameters, or they wait for each other.
    """
    trained = [p for p in parameters if p.requires_grad]
    return _Unused.apply(x, *trained) if trained and torch.is_grad_enabled() else x  # type: ignore[return-value]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in fp32, cast back to x's dtype; weight [dim] fp32, no +1."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class Embedding(nn.Embedding):
    """Rows by token id. On the meta device nothing is drawn: that would import torch's compiler, taking a second."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()
