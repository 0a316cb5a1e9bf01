"""Weights in FP8 or FP4, as the published checkpoints have them: [out, in] as codes and power-of-two scales.

FP8: e4m3 codes, a scale for every block of 128 x 128. FP4: e2m1 codes, two to a byte (the even column in the low
nibble), a scale for every 32 numbers of a row. A scale is one byte, UE8M0: 2^(byte - 127), a multiplier.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4.ops.formats import Packed, e2m1_numbers, pack_rows, power_of_two_scale, to_e2m1, to_e4m3, unpack_rows

# code -> rows and columns that share a scale
BLOCKS = {"fp8": (128, 128), "fp4": (1, 32)}


class PackedMatrix(nn.Module):
    """A matrix [rows, columns] as bytes. A module without parameters: its bytes move and are saved with the model.

    codes: [rows, columns] (FP8) or [rows, columns / 2] (FP4); scales: [ceil(rows / block), ceil(columns / block)]; both
    of any one-byte dtype, kept as uint8. It has no gradient. rounds_inputs: what it multiplies is rounded to FP8 first
    (`round_inputs`), as the released code does.
    """

    codes: Tensor
    scales: Tensor
    rounds_inputs = False

    def __init__(self, code: str, codes: Tensor, scales: Tensor):
        super().__init__()
        self.code = code
        self.register_buffer("codes", codes.view(torch.uint8))
        self.register_buffer("scales", scales.view(torch.uint8))
        high, wide = BLOCKS[code]
        rows, columns = self.shape
        want = (-(-rows // high), -(-columns // wide))
        assert self.scales.shape == want, f"{code} [{rows}, {columns}] has scales {want}, not {tuple(scales.shape)}"

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns * (2 if self.code == "fp4" else 1)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def as_input(self, x: Tensor) -> Tensor:
        """x [..., columns] as it is multiplied by this matrix."""
        return round_inputs(x) if self.rounds_inputs else x

    def unpack(self, dtype: torch.dtype = torch.float32, part: range | None = None) -> Tensor:
        """Numbers [rows, columns], or those of a part of the rows. BF16 holds them exactly unless they are next to the
        smallest normal number."""
        part = range(self.shape[0]) if part is None else part
        return unpack_matrix(self.code, self.codes[part.start : part.stop], self.scales, part.start).to(dtype)


def unpack_matrix(code: str, codes: Tensor, scales: Tensor, first: int = 0) -> Tensor:
    """Numbers fp32 [n, columns] of rows first, first + 1, ... of a packed matrix: their codes, and the scales of all
    rows, uint8 (2^(byte - 127)) or fp32 multipliers."""
    values = e2m1_numbers(codes) if code == "fp4" else codes.view(torch.float8_e4m3fn).float()
    high, wide = BLOCKS[code]
    scale = scales if scales.dtype == torch.float32 else scales.view(torch.float8_e8m0fnu).float()
    scale = scale[torch.arange(first, first + len(codes), device=codes.device) // high]
    return values.mul_(scale.repeat_interleave(wide, dim=1)[:, : values.shape[1]])


def round_inputs(x: Tensor) -> Tensor:
    """x [..., n] through FP8 and back, in x's dtype, which holds the result exactly: e4m3, ties to even, for every 128
    numbers of a row a scale, the least power of two with which the largest of them is not above 448; a block whose
    numbers are all below 1e-4 is scaled as if that were its largest. Source: the released code's `act_quant`.
    """
    format = Packed(x.shape[-1], "fp8", 128, numbers=x.dtype)
    return unpack_rows(pack_rows(x.reshape(-1, x.shape[-1]), format), format).view(x.shape)


def pack_matrix(weight: Tensor, code: str) -> PackedMatrix:
    """Round finite weights [rows, columns] to FP8 or FP4 (then an even number of columns), ties to the even code.

    The scale is the least power of two with which a block's largest number is not above 448 (FP8) or 6 (FP4), and at
    least 2^-126. So packing what was unpacked changes no number.
    """
    high, wide = BLOCKS[code]
    rows, columns = weight.shape
    assert code == "fp8" or columns % 2 == 0, f"FP4 needs an even number of columns, not {columns}"
    blocks = F.pad(weight.detach().float(), (0, -columns % wide, 0, -rows % high))
    blocks = blocks.unflatten(1, (-1, wide)).unflatten(0, (-1, high))  # [row blocks, high, column blocks, wide]
    scale = power_of_two_scale(blocks.abs().amax(dim=(1, 3)), code)
    scaled = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1)[:rows, :columns]
    codes = to_e4m3(scaled) if code == "fp8" else to_e2m1(scaled)
    return PackedMatrix(code, codes, (scale.view(torch.int32) >> 23).to(torch.uint8))
