"""Products of activations with weights: plain FP32 and BF16, and FP8 and FP4 as published."""

import torch
from torch import Tensor

from dsv4.ops.cpu.library import DTYPES, Kernel, address, values_only
from dsv4.ops.weights import PackedMatrix

_linear = Kernel("linear", "pillppillp")


def linear(x: Tensor, weight: Tensor | PackedMatrix) -> Tensor:
    x = x.contiguous()
    columns = x.shape[-1]
    rows = x.numel() // columns if columns else 0
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    packed = isinstance(weight, PackedMatrix)
    data, scales = (weight.codes, weight.scales) if packed else (weight, None)
    kind = DTYPES[weight.code if packed else weight.dtype]
    stride = columns if packed else weight.stride(0)
    _linear(
        x.data_ptr(), x.dtype == torch.bfloat16, rows, columns, data.data_ptr(), address(scales), kind, stride,
        weight.shape[0], out.data_ptr(),
    )  # fmt: skip
    return out


def _shape(x: Tensor, weight: Tensor | PackedMatrix) -> str:
    if isinstance(weight, Tensor) and weight.stride(-1) != 1:
        return "a weight whose rows are not contiguous"
    if isinstance(weight, Tensor) and x.dtype == torch.bfloat16 != weight.dtype:
        return "a weight in more precision than what it multiplies"
    return ""


LIMITS = {"linear": values_only(_shape)}
