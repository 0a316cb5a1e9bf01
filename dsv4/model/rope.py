"""Rotary embedding: the last `qk_rope_head_dim` channels, interleaved pairs, two tables.

Window layers use base 10000 and nothing else; all others base 160000 with YaRN frequencies for everything in the layer.
No amplitude factor anywhere. Angles are the fp32 product position x frequency. What rotates by them is `ops.rotate`.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from dsv4.config import ModelConfig, RopeScaling

TABLES = ("window", "compressed")


def frequencies(config: ModelConfig, table: str) -> Tensor:
    """Radians per position of each channel pair, fp32 [qk_rope_head_dim / 2]: of the table "window" or "compressed"."""
    assert table in TABLES, table
    if table == "window":
        return pair_frequencies(config.qk_rope_head_dim, config.rope_theta)
    return pair_frequencies(config.qk_rope_head_dim, config.compress_rope_theta, config.rope_scaling)


@lru_cache(maxsize=64)  # every step asks for the same; nobody writes to them
def pair_frequencies(dim: int, base: float, scaling: RopeScaling | None = None) -> Tensor:
    """base^(-2i/dim) radians per position for pair i, fp32 [dim / 2], slowed down as `scaling` says (YaRN)."""
    freq = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    if scaling is None or scaling.type == "default":
        return freq

    def pair_that_turns(times: float) -> float:
        """The (fractional) pair that makes `times` full turns within the original context length."""
        return dim * math.log(scaling.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), dim - 1)
    # low = high is possible in tiny configurations only
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low if high != low else 0.001)
    ramp = ramp.clamp(0, 1)
    return freq * (1 - ramp) + freq / scaling.factor * ramp


def turns(freq: Tensor, positions: Tensor) -> Tensor:
    """exp(i position frequency): complex64 [n, pairs] for positions int64 [n]; [2, n, pairs] for both frequencies."""
    angle = positions.float()[:, None] * freq.to(positions.device)
    return torch.polar(torch.ones_like(angle), angle)


def both_turns(config: ModelConfig, start: int, count: int, block: int) -> tuple[Tensor, int]:
    """`turns` of both TABLES, complex64 [.., 2, pairs], of positions in a row on the CPU, and the first of these: from
    the last multiple of `block` up to `start` on, to start + count - 1 at least. Kept, for the next step asks again."""
    number, of = start // block, (config.qk_rope_head_dim, config.rope_theta, config.compress_rope_theta)
    fits = start + count <= (number + 1) * block
    make = _kept_turns if fits else _both_turns
    return make(
        *of, config.rope_scaling, number * block, (number + 1) * block if fits else start + count
    ), number * block


def _both_turns(dim: int, base: float, compressed: float, scaling: RopeScaling | None, first: int, stop: int) -> Tensor:
    freq = torch.stack([pair_frequencies(dim, base), pair_frequencies(dim, compressed, scaling)])[:, None]
    return turns(freq, torch.arange(first, stop, device="cpu")).transpose(0, 1).contiguous()


_kept_turns = lru_cache(maxsize=128)(_both_turns)  # more than the sequences that take part in a step
