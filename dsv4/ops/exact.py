"""Products whose bits do not depend on where a row lies: sums of whole numbers, which are exact in any order.

A matrix product of a library adds up the rows at the edge of its tiles in another order than those inside (MKL on AVX2
at odd sizes), so two equal keys get scores that differ in the last bit and a tie is none. Numbers in FP64 that are
whole and small enough never round when they are multiplied and added, whatever the order, tiles, threads and device.
"""

import torch
from torch import Tensor

_MANTISSA = 53  # bits that FP64 holds of a whole number


def whole_numbers(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., d] as whole numbers [..., d] times a power of two for each row [..., 1], both FP64.

    They are as large as lets a sum of d products of two of them be exact: 23 bits for d = 128, so that what is lost is
    at most 2^-24 of the row's largest number. A row of NaN or infinity stays without meaning.
    """
    bits = (_MANTISSA - (x.shape[-1] - 1).bit_length()) // 2
    x = x.double()
    exponent = torch.frexp(x.abs().amax(dim=-1, keepdim=True)).exponent  # the largest is below 2^exponent
    unit = torch.exp2((exponent - bits).double())
    return (x / unit).round_(), unit
