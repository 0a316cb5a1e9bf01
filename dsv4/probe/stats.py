"""Intervals and ranks: what stands beside a measured figure so that it can be defended.

All intervals are two-sided, 95% unless said otherwise. Nothing here draws from the global random state.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import torch
from torch import Tensor


def wilson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share; (0, 1) without a trial. Never empty, also at 0 and at all."""
    assert 0 <= successes <= trials
    if not trials:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, z2 = successes / trials, z * z / trials
    centre = (share + z2 / 2) / (1 + z2)
    half = z / (1 + z2) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    return low, 1.0 if successes == trials else min(1.0, centre + half)


def bootstrap(
    values: Sequence[float] | Tensor,
    statistic: Callable[[Tensor], Tensor] = lambda x: x.mean(dim=-1),
    *,
    seed: int = 0,
    draws: int = 2000,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """The percentile interval of a statistic over independent values [n]; `statistic` maps [draws, n] to [draws]."""
    x = torch.as_tensor(values, dtype=torch.float64).flatten()
    assert len(x), "an interval of nothing"
    generator = torch.Generator().manual_seed(seed)
    drawn = x[torch.randint(0, len(x), (draws, len(x)), generator=generator)]
    found = statistic(drawn)
    tail = (1 - confidence) / 2
    low, high = found.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def median(x: Tensor) -> Tensor:
    """The middle of the last dimension (the mean of the two middle ones), for `bootstrap`."""
    return x.quantile(0.5, dim=-1)


def ranks(x: Tensor) -> Tensor:
    """Ranks from 1 of values [n], equal values sharing the mean of theirs, fp64."""
    values, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]


def spearman(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation of two lists of numbers; 0 where one of them is constant."""
    a, b = ranks(x.flatten()), ranks(y.flatten())
    a, b = a - a.mean(), b - b.mean()
    size = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / size) if size > 0 else 0.0
