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


def student(values: Sequence[float] | Tensor, confidence: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of a few independent values [n], n >= 2: for runs, of which there are too few to
    draw from."""
    x = torch.as_tensor(values, dtype=torch.float64).flatten()
    assert len(x) > 1, "one value has no spread"
    half = student_quantile(0.5 + confidence / 2, len(x) - 1) * float(x.std()) / math.sqrt(len(x))
    return float(x.mean()) - half, float(x.mean()) + half


def student_quantile(p: float, freedom: int) -> float:
    """Of Student's t, p above 1/2: by bisection on its density's integral (Simpson's rule in the angle, where t =
    sqrt(freedom) tan a and the density is cos(a)^(freedom - 1))."""
    assert 0.5 < p < 1 and freedom > 0

    def area(angle: float) -> float:
        a = torch.linspace(0, angle, 2001, dtype=torch.float64)
        y = a.cos().clamp_min(0) ** (freedom - 1)
        return float((y[0] + y[-1] + 4 * y[1::2].sum() + 2 * y[2:-1:2].sum()) * angle / 6000)

    low, high, whole = 0.0, math.pi / 2, 2 * area(math.pi / 2)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 + area(middle) / whole < p else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def crossed(values: Tensor, *, seed: int = 0, draws: int = 2000, confidence: float = 0.95) -> tuple[float, float]:
    """The percentile interval of the mean of values [S, P] of which both rows and columns are samples, such as runs and
    the texts that all of them were asked: both are drawn anew, each apart. Of few rows it is too narrow: `student` over
    the rows' means stands beside it."""
    x = torch.as_tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randint(0, n, (draws, n), generator=generator) for n in x.shape)
    means = x[rows[:, :, None], columns[:, None, :]].mean(dim=(1, 2))
    tail = (1 - confidence) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
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
