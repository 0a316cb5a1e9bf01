"""Matrix products in training: torch's, and in BF16 those that torch has not, with results in FP32.

Without instructions for BF16 torch multiplies it many times slower than FP32: there numbers are widened, multiplied in
FP32 and the sums rounded once, as the instructions do it.
"""

import torch
from torch import Tensor

from dsv4.ops.cpu import library
from dsv4.ops.cpu.library import Kernel

_dot = Kernel("dot", "pliplilllipl")


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


def dot(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """out fp32 [n, m] = a [n, K] b [K, m], both of one dtype, or added to it; sums are fp32."""
    if a.dtype == torch.float32 or _widened(a):
        return out.addmm_(a.float(), b.float(), beta=float(add))
    return dot_bf16(a, b, out, add)


def dot_bf16(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """As `dot`, of BF16, by the library."""
    assert out.stride(1) == 1 or out.shape[1] == 1
    a, b = (x if 1 in x.stride() else x.contiguous() for x in (a, b))  # such as a sum's gradient, one number everywhere
    _dot(*_lying(a), *_lying(b), *a.shape, b.shape[1], add, out.data_ptr(), out.stride(0))
    return out


def _lying(x: Tensor) -> tuple[int, int, bool]:
    """Where a matrix lies, from row to row, or where its columns lie in one piece from column to column."""
    rows, columns = x.stride()
    return (x.data_ptr(), rows, False) if columns == 1 else (x.data_ptr(), columns, True)


def into_gradient(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a b into a gradient of fp32, or of the dtype of both."""
    if out.dtype == a.dtype:
        mm(a, b, out=out)
    else:
        dot(a, b, out)
