"""Weights in FP8 or FP4, as the published checkpoints have them: [out, in] as codes and power-of-two scales.

FP8: e4m3 codes, a scale for every block of 128 x 128. FP4: e2m1 codes, two to a byte (the even column in the low
nibble), a scale for every 32 numbers of a row. A scale is one byte, UE8M0: 2^(byte - 127), a multiplier.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4.ops.formats import e2m1_numbers, power_of_two_scale, to_e2m1, to_e4m3

# code -> rows and columns that share a scale
BLOCKS = {"fp8": (128, 128), "fp4": (1, 32)}


class PackedMatrix(nn.Module):
    """A matrix [rows, columns] as bytes. A module without parameters: its bytes move and are saved with the model.

    codes: [rows, columns] (FP8) or [rows, columns / 2] (FP4); scales: [ceil(rows / block), ceil(columns / block)]; both
    of any one-byte dtype, kept as uint8. It has no gradient.
    """

    codes: Tensor
    scales: Tensor

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

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers [rows, columns]. BF16 holds them exactly unless they are next to the smallest normal number."""
        rows, columns = self.shape
        values = e2m1_numbers(self.codes) if self.code == "fp4" else self.codes.view(torch.float8_e4m3fn).float()
        scale = self.scales.view(torch.float8_e8m0fnu).float()
        for dim, block in enumerate(BLOCKS[self.code]):
            scale = scale.repeat_interleave(block, dim=dim)
        return (values * scale[:rows, :columns]).to(dtype)


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
