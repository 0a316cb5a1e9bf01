"""The number formats once more, plainly: FP8 and FP4 rounding, rows of a packed memory, quantised weights; float64.

Written from the released kernels' rules and apart from ops/formats.py. `flips` names a mistake of mistakes.MEMORY or
mistakes.WEIGHTS; others are passed over.
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

FP8_FLOOR, FP4_FLOOR = 1e-4, 6 * 2.0**-126  # of a block's largest number
Flips = Collection[str]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def e4m3(x: Tensor, *, truncate: bool = False) -> Tensor:
    """The nearest numbers of e4m3, ties to even: 3 bits after the first, down to steps of 2^-9, up to 448."""
    return _rounded(x, bits=3, lowest=-6, largest=448.0, truncate=truncate)


def e2m1(x: Tensor, *, truncate: bool = False) -> Tensor:
    """The nearest numbers of e2m1, ties to even: 0, 0.5, 1, 1.5, 2, 3, 4, 6."""
    return _rounded(x, bits=1, lowest=0, largest=6.0, truncate=truncate)


def _rounded(x: Tensor, bits: int, lowest: int, largest: float, truncate: bool) -> Tensor:
    exponent = (torch.frexp(x.abs()).exponent - 1).clamp_min(lowest)
    step = torch.ldexp(torch.ones_like(x), exponent - bits)
    whole = (x.abs() / step).floor() if truncate else (x.abs() / step).round()
    return torch.copysign((whole * step).clamp_max(largest), x)


def scale_of(largest: Tensor, limit: float) -> Tensor:
    """2^ceil(log2(largest / limit)), at least 2^-126."""
    mantissa, exponent = torch.frexp(largest / limit)
    exponent = (exponent - (mantissa == 0.5).int()).clamp_min(-126)
    return torch.ldexp(torch.ones_like(largest), exponent)


def fp8(x: Tensor, block: int, flips: Flips = ()) -> Tensor:
    """x [..., n] through e4m3, `block` numbers with one scale (the last block may be shorter)."""
    blocks = F.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    if "rows without a floor" not in flips:
        largest = largest.clamp_min(FP8_FLOOR)
    scale = scale_of(largest.clamp_min(1e-300), 448.0)
    if "row scales not powers of two" in flips:
        scale = (largest / 448.0).clamp_min(1e-300)
    if "row scales rounded down" in flips:
        exact = largest / 448.0
        scale = torch.where(scale > exact, scale / 2, scale)
    scaled = (blocks / scale).clamp(-448.0, 448.0)
    return (e4m3(scaled, truncate="rows truncated" in flips) * scale).flatten(-2)[..., : x.shape[-1]]


def row(x: Tensor, tail: int, flips: Flips = ()) -> Tensor:
    """A window row or entry [..., D] as a packed memory gives it back: FP8 in blocks of 64, a BF16 tail."""
    if "rows not rounded" in flips:
        return x.float().bfloat16().double()
    if "rotary channels in FP8" in flips:
        tail = 0
    head, rest = x[..., : x.shape[-1] - tail], x[..., x.shape[-1] - tail :]
    block = 128 if "rows in blocks of 128" in flips else 64
    return torch.cat([fp8(head, block, flips), rest.float().bfloat16().double()], dim=-1)


def hadamard(x: Tensor) -> Tensor:
    """x [..., n] times the Sylvester matrix of order n, times n^-0.5."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < x.shape[-1]:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return x @ matrix * x.shape[-1] ** -0.5


def index_row(x: Tensor, flips: Flips = (), *, bf16: bool = False) -> Tensor:
    """An index query or key [..., n] as it is met: rotated, then FP4 in blocks of 32. bf16: it came in BF16, and its
    rotation is rounded to that."""
    if "index rows not rotated" not in flips:
        x = hadamard(x)
    if bf16 and "rotated index rows not rounded" not in flips:
        x = x.float().bfloat16().double()
    if "index rows in FP8" in flips:
        return fp8(x, 128)
    blocks = x.unflatten(-1, (-1, min(32, x.shape[-1])))
    scale = scale_of(blocks.abs().amax(dim=-1, keepdim=True).clamp_min(FP4_FLOOR), 6.0)
    return (e2m1((blocks / scale).clamp(-6.0, 6.0), truncate="index rows truncated" in flips) * scale).flatten(-2)


def meeting(q: Tensor, keys: Tensor, flips: Flips = ()) -> tuple[Tensor, Tensor]:
    """Index queries and keys as their product takes them."""
    unrotated = ("index rows not rotated",)
    q_flips = unrotated if "Hadamard on keys only" in flips else flips
    k_flips = unrotated if "Hadamard on queries only" in flips else flips
    return index_row(q, q_flips), index_row(keys, k_flips)


def power(scales: Tensor, flips: Flips) -> Tensor:
    """Scale bytes as multipliers."""
    if "scale bytes read as numbers" in flips:
        return scales.double()
    return torch.ldexp(torch.ones_like(scales, dtype=torch.float64), scales.int() - 127)


def fp8_weights(codes: Tensor, scales: Tensor, flips: Flips = ()) -> Tensor:
    """Codes uint8 [n, m] of e4m3 and scale bytes [n / 128, m / 128] as numbers."""
    sign, exponent, mantissa = codes.int() >> 7, (codes.int() >> 3) & 15, (codes.int() & 7).double()
    bias = 8 if "codes read as FNUZ" in flips else 7
    one = torch.ones_like(mantissa)
    small = torch.ldexp(mantissa / 8, torch.full_like(exponent, 1 - bias))
    values = torch.where(exponent == 0, small, torch.ldexp(one + mantissa / 8, exponent - bias)) * (1 - 2 * sign)
    if "codes read as FNUZ" in flips:
        values = torch.where(codes == 0x80, torch.nan, values)
    scale = power(scales, flips)
    if "scale blocks transposed" in flips and scale.shape[0] == scale.shape[1]:
        scale = scale.T
    wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: values.shape[0], : values.shape[1]]
    return values / wide if "scales divide" in flips else values * wide


def fp4_weights(codes: Tensor, scales: Tensor, flips: Flips = ()) -> Tensor:
    """Codes uint8 [n, m / 2] of e2m1, two to a byte, and scale bytes [n, m / 32] as numbers [n, m]."""
    low, high = codes.int() & 15, codes.int() >> 4
    pair = [high, low] if "nibbles exchanged" in flips else [low, high]
    table = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=torch.float64)
    values = table[torch.stack(pair, dim=-1).flatten(-2)]
    scale, block = power(scales, flips), 16 if "FP4 scales per 16 columns" in flips else 32
    wide = scale.repeat_interleave(block, 1)
    wide = torch.cat([wide, wide], 1)[:, : values.shape[1]]
    return values / wide if "scales divide" in flips else values * wide
