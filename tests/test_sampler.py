"""Failures caught here: a filter that keeps or drops the wrong token, rows that influence each other, a draw that is
not of the stated distribution, and settings that make no sense. Distributions are compared exactly: `pick` is given
every share on a fine grid instead of luck.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv4.engine import SamplingParams
from dsv4.engine.sampler import BROKEN, pick, probabilities, restrict, sample
from dsv4.errors import UserError

# few distinct values, so that ties are common
LOGITS = st.lists(st.integers(-8, 8).map(lambda i: i / 2), min_size=1, max_size=12)


def row(values: list[float]) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def kept(values: list[float], top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> set[int]:
    """The ids that the filters leave, with their logits unchanged."""
    out = restrict(row(values), one(top_k), one(top_p), one(min_p))[0]
    left = out > float("-inf")
    assert torch.equal(out[left], row(values)[0][left])
    return set(left.nonzero()[:, 0].tolist())


def by_rank(values: list[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def shares(values: list[float]) -> list[float]:
    weights = [math.exp(v - max(values)) for v in values]
    return [w / sum(weights) for w in weights]


@given(LOGITS, st.integers(0, 14))
def test_top_k_keeps_exactly_the_k_best_by_logit_then_id(values, k):
    assert kept(values, top_k=k) == set(by_rank(values)[: k or len(values)])


@given(LOGITS, st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_set_that_reaches_p(values, p):
    got, share, order = kept(values, top_p=p), shares(values), by_rank(values)
    assert got == set(order[: len(got)]), "a less likely token stayed while a more likely one went"
    assert sum(share[i] for i in got) >= p - 1e-12
    assert sum(share[i] for i in order[: len(got) - 1]) < p + 1e-12


@given(LOGITS, st.floats(0.0, 1.0))
def test_min_p_compares_with_the_most_likely(values, p):
    share = shares(values)
    clear = [i for i, s in enumerate(share) if abs(s - p * max(share)) > 1e-9]  # not decided by rounding
    assert kept(values, min_p=p) & set(clear) == {i for i in clear if share[i] >= p * max(share)}
    assert values.index(max(values)) in kept(values, min_p=p)


@given(LOGITS, st.integers(0, 14), st.floats(0.01, 1.0), st.floats(0.0, 1.0))
def test_filters_together(values, k, p, low):
    """Each counts in what the one before it left, and something always is left."""
    step = kept(values, top_k=k)
    after_k = [v if i in step else -1e9 for i, v in enumerate(values)]
    step &= kept(after_k, top_p=p)
    after_p = [v if i in step else -1e9 for i, v in enumerate(values)]
    step &= kept(after_p, min_p=low) if low else step
    assert kept(values, k, p, low) == step != set()


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=40))
def test_everything_off_changes_no_bit(values):
    assert torch.equal(restrict(row(values), one(0), one(1.0), one(0.0)), row(values))


def test_top_p_of_one_keeps_what_rounding_would_drop():
    values = [0.0] + [-40.0] * 1000  # the first share rounds to 1
    assert len(kept(values, top_p=1.0)) == 1001
    assert len(kept(values, top_p=0.999)) == 1


def test_a_filter_order_that_can_be_told_apart():
    """Shares 0.4, 0.3, 0.2, 0.1: top-k 2 leaves 4/7 and 3/7, so that p = 0.5 is reached by the first alone."""
    values = [math.log(s) for s in (0.4, 0.3, 0.2, 0.1)]
    assert kept(values, top_p=0.5) == {0, 1}
    assert kept(values, top_k=2, top_p=0.5) == {0}
    half = probabilities(row(values), one(0.5), one(0), one(0.5), one(0))  # 16 : 9 : 4 : 1, and 16/30 > 0.5
    assert half[0].tolist() == [1.0, 0, 0, 0], "temperature comes before top-p"


@given(LOGITS, st.floats(0.05, 20.0))
def test_temperature_divides_logits(values, t):
    got = probabilities(row(values), one(t), one(0), one(1.0), one(0.0))[0]
    torch.testing.assert_close(got, torch.tensor(shares([v / t for v in values]), dtype=torch.float64))


@pytest.mark.parametrize("t", [1e-320, 1e-45, 1e-9, 1e30])
def test_extreme_temperatures_stay_numbers(t):
    for size in (1e4, 1e37):
        got = probabilities(row([size, -size, 0.9 * size, 0.0]), one(t), one(0), one(0.9), one(0.1))[0]
        assert got.isfinite().all() and abs(got.sum() - 1) < 1e-12
        assert t > 1 or got.tolist() == [1, 0, 0, 0]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any))
def test_pick_follows_the_distribution(weights):
    """Over a grid of N shares every token comes up in its proportion, to one grid point; a weightless one never."""
    n, total = 1000, sum(weights)
    probs = torch.tensor([weights], dtype=torch.float64) / total
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    count = pick(probs.expand(n, -1), uniform).bincount(minlength=len(weights))
    for got, weight in zip(count.tolist(), weights, strict=True):
        assert abs(got - n * weight / total) <= 1
        assert weight or not got


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=50), st.integers(1, 3))
def test_the_ends_of_the_unit_interval_pick_allowed_tokens(values, k):
    probs = probabilities(row(values), one(1.0), one(k), one(1.0), one(0.0))
    for share in (0.0, 1 - 2**-53):
        assert probs[0, pick(probs, one(share))] > 0


def settings(n: int) -> list[SamplingParams]:
    kinds = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.7),
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.6),
        SamplingParams(temperature=1.5, min_p=0.1, top_k=9, top_p=0.9),
    ]
    return [kinds[i % len(kinds)] for i in range(n)]


def seeded(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(n)]


def test_a_row_draws_the_same_whatever_is_beside_it():
    logits, params = torch.randn(20, 300), settings(20)
    together = sample(logits, params, seeded(20))
    alone = [sample(logits[i : i + 1], params[i : i + 1], [g])[0] for i, g in enumerate(seeded(20))]
    reversed_ = sample(logits.flip(0), params[::-1], seeded(20)[::-1])[::-1]
    assert together == alone == reversed_


def test_the_draw_is_the_inverse_of_the_running_sum():
    logits = torch.randn(1, 300)
    for seed in range(50):
        u = torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).item()
        total, i = 0.0, -1
        while total <= u:
            i += 1
            total += logits[0].double().softmax(0)[i].item()
        assert sample(logits, [SamplingParams()], [torch.Generator().manual_seed(seed)]) == [i]


def test_greedy_takes_the_lowest_of_equal_ids_and_no_random_number():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert sample(logits, [SamplingParams(temperature=0)], [generator]) == [1]
    assert torch.equal(generator.get_state(), before)


def test_a_sampled_row_takes_one_number_of_its_generator():
    """Also beside a greedy row, whatever the vocabulary."""
    g, h = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    sample(torch.randn(2, 77), settings(2), [torch.Generator(), g])
    torch.rand((), generator=h, dtype=torch.float64)
    assert torch.equal(g.get_state(), h.get_state())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_is_marked_and_alone(bad):
    logits = torch.randn(5, 50)
    expected = sample(logits, settings(5), seeded(5))
    for i in range(5):
        damaged = logits.clone()
        damaged[i, 7] = bad
        assert sample(damaged, settings(5), seeded(5)) == [*expected[:i], BROKEN, *expected[i + 1 :]]


def test_no_rows():
    assert sample(torch.empty(0, 10), [], []) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"temperature": "hot"},
        {"top_k": -1}, {"top_k": 2.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": float("nan")}, {"min_p": -0.1},
        {"min_p": 1.5}, {"min_p": float("nan")}, {"seed": -1}, {"seed": 2**63}, {"seed": 1.5}, {"max_tokens": 0},
        {"max_tokens": True}, {"stop": "word"}, {"stop": [""]}, {"stop": [3]},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SamplingParams(**wrong)
