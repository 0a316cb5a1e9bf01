"""Matrix products by torch, in training. Without instructions for BF16 torch multiplies it many times slower than FP32:
there numbers are widened, multiplied in FP32 and the sums rounded once, as the instructions do it.
"""

import torch
from torch import Tensor

from dsv4.ops.cpu import library


def _widened(a: Tensor) -> bool:
    return a.dtype == torch.bfloat16 and library.isa() != "avx512bf16"


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a [n, K] b [K, m], of one dtype, in that dtype."""
    if not _widened(a):
        return torch.mm(a, b, out=out)
    product = a.float() @ b.float()
    return product.to(a.dtype) if out is None else out.copy_(product)


def add_mm(into: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """into [n, m] += a b, of the dtype of both, rounded once."""
    if not _widened(a):
        return into.addmm_(a, b)
    return into.copy_(torch.addmm(into.float(), a.float(), b.float()))


def into_gradient(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a b into a gradient of fp32, or of the dtype of both."""
    if out.dtype == a.dtype:
        mm(a, b, out=out)
    elif _widened(a):
        torch.mm(a.float(), b.float(), out=out)
    else:
        out.copy_(a @ b)
