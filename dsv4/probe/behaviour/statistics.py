"""Shares and their intervals, agreement of two judges, and what a judge's own mistakes do to a share."""

import math
import random
from collections.abc import Sequence

from dsv4.probe.stats import wilson


def with_missing(successes: int, trials: int, missing: int, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of a share where `missing` further trials have no outcome: it holds whatever those had been."""
    low, _ = wilson(successes, trials + missing, confidence)
    _, high = wilson(successes + missing, trials + missing, confidence)
    return low, high


def kappa(a: Sequence[bool], b: Sequence[bool]) -> float | None:
    """Cohen's kappa of two judges: agreement beyond what their shares alone would bring, 1 at most. None where both
    always say the same one thing, so that nothing could be beyond it."""
    assert len(a) == len(b) > 0
    n = len(a)
    agreed = sum(x == y for x, y in zip(a, b, strict=True)) / n
    yes_a, yes_b = sum(a) / n, sum(b) / n
    chance = yes_a * yes_b + (1 - yes_a) * (1 - yes_b)
    return None if chance == 1 else (agreed - chance) / (1 - chance)


def f1(truth: Sequence[bool], said: Sequence[bool]) -> dict[str, float]:
    """precision, recall, specificity and f1 of a yes; a ratio without a denominator is 0."""
    pairs = list(zip(truth, said, strict=True))
    hits, false_yes = sum(t and s for t, s in pairs), sum(s and not t for t, s in pairs)
    missed, right_no = sum(t and not s for t, s in pairs), sum(not t and not s for t, s in pairs)

    def ratio(x: int, y: int) -> float:
        return x / y if y else 0.0

    return {
        "precision": ratio(hits, hits + false_yes),
        "recall": ratio(hits, hits + missed),
        "specificity": ratio(right_no, right_no + false_yes),
        "f1": ratio(2 * hits, 2 * hits + false_yes + missed),
    }


def rogan_gladen(share: float, recall: float, specificity: float) -> float | None:
    """The true share behind one that an imperfect judge sees (Rogan and Gladen, 1978), within [0, 1]; None for a judge
    that is no better than chance."""
    gain = recall + specificity - 1
    return None if gain <= 0 else min(1.0, max(0.0, (share + specificity - 1) / gain))


def paired_difference(
    a: Sequence[bool], b: Sequence[bool], *, seed: int = 0, draws: int = 2000, confidence: float = 0.95
) -> tuple[float, float, float]:
    """(mean, low, high) of the difference of two shares over the same cases: b minus a, by the paired bootstrap."""
    differences = [int(y) - int(x) for x, y in zip(a, b, strict=True)]
    n, rng = len(differences), random.Random(seed)
    assert n, "a difference of nothing"
    means = sorted(sum(rng.choices(differences, k=n)) / n for _ in range(draws))
    tail = (1 - confidence) / 2
    return sum(differences) / n, means[math.floor(tail * (draws - 1))], means[math.ceil((1 - tail) * (draws - 1))]
