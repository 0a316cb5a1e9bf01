"""Failures caught here: margins, ties, flips or recall that are not those of hand-made scores; an attack that does not
find a planted key; a win or eviction rate that is not what the layers read; a budget that is not k blocks; pins that
leave anything evicted.
"""

from dataclasses import dataclass

import pytest
import torch

from dsv4 import ops
from dsv4.measure.subjects import small_model, tokens
from dsv4.ops import Spans
from dsv4.probe.hijack import budget, eviction, strongest_key, win_rates
from dsv4.probe.hijack import run as run_hijack
from dsv4.probe.indexed import NEG_INF, Asked, best, margins, needs_choice, overlap, watch
from dsv4.probe.selection import narrowed, noisy
from dsv4.probe.selection import run as run_stability
from dsv4.probe.subject import Settings, Subject

RATIOS = (0, 4, 128, 4)


@dataclass(frozen=True)
class Few(Settings):
    def pick(self, quick: int, full: int) -> int:  # type: ignore[override]
        return max(2, quick // 8)


def asked(q: torch.Tensor, keys: torch.Tensor, k: int) -> Asked:
    """One head of weight 1; every query sees every entry."""
    n, e = len(q), len(keys)
    visible = Spans(torch.zeros(n, dtype=torch.int64), torch.full((n,), e))
    return Asked(1, q[:, None], torch.ones(n, 1), keys, visible, k)


# --- margins and choices ---------------------------------------------------------------------------------------------


def test_margins_of_hand_made_scores() -> None:
    """Scores 9 7 4 1 and one that is not seen: k = 2 has the gap 3; their deviation is sqrt(9.1875)."""
    scores = torch.tensor([[4.0, 9.0, 1.0, 7.0, NEG_INF], [5.0, 5.0, 5.0, 1.0, 0.0]])
    gap, tie = margins(scores, 2)
    assert gap[0].item() == pytest.approx(3 / 9.1875**0.5) and gap[1].item() == 0
    assert tie.tolist() == [False, True]
    chosen = best(scores, 2)
    assert chosen.tolist() == [[False, True, False, True, False], [True, True, False, False, False]], "lowest first"
    jaccard, recall = overlap(chosen, torch.tensor([[True, True, False, False, False]] * 2))
    assert jaccard.tolist() == [pytest.approx(1 / 3), 1.0] and recall.tolist() == [0.5, 1.0]


def test_noise_flips_as_often_as_two_gaussians_cross() -> None:
    """Two entries whose scores are 1 and 1 - g, keys of width 2: noise of size e moves each score by e / sqrt(2) of a
    normal number, so the choice of one flips with probability Phi(-g / e)."""
    g, e, n = 0.02, 0.02, 4000
    flips = 0
    generator = torch.Generator().manual_seed(3)
    for _ in range(n):
        keys = torch.tensor([[1.0, 0.0], [1.0 - g, 0.0]])
        moved = noisy(keys, e, generator)
        flips += int(moved[1, 0] > moved[0, 0])
    want = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(-g / e)).item()
    assert flips / n == pytest.approx(want, abs=0.02)


def test_what_is_watched_is_what_is_chosen() -> None:
    model = small_model(RATIOS)
    questions, read = watch(model, tokens(model, 64))
    assert [a.layer for a in questions] == [1, 3] and len(read) == 2
    for layer, chosen in zip(questions, read, strict=True):
        rows = layer.choosers(1000, torch.Generator())
        assert rows.tolist() == list(range(35, 64)), "36 tokens have nine entries, one more than may be read"
        picked = torch.zeros(len(rows), 16, dtype=torch.bool).scatter_(1, chosen[rows], True)
        assert torch.equal(best(layer.scores(rows), layer.k), picked)
    assert needs_choice(model.config) is None and "no CSA layer" in (needs_choice(small_model((0, 128)).config) or "")
    assert "never sees more" in (needs_choice(small_model((4,), max_position_embeddings=32).config) or "")


def test_rounding_that_changes_nothing_recalls_everything() -> None:
    """Numbers that FP4 holds exactly even after the rotation: one number a row; and scores that BF16 tells apart."""
    keys = torch.zeros(8, 4)
    keys[:, 0] = torch.tensor([0.5, 1, 1.5, 2, 3, 4, 6, 12])
    layer = asked(torch.tensor([[1.0, 0, 0, 0]] * 3), keys, 3)
    rows = torch.arange(3)
    clean = best(layer.scores(rows), 3)
    for name, rounded in narrowed(layer, rows, layer.scores(rows)).items():
        assert overlap(best(rounded, 3), clean)[1].tolist() == [1.0] * 3, name
    close = asked(layer.q[:, 0], torch.tensor([[1.0, 0], [1.001, 0], [1.0, 0], [0.1, 0]]) @ torch.eye(2, 4), 1)
    assert (
        overlap(best(narrowed(close, rows, close.scores(rows))["bf16"], 1), best(close.scores(rows), 1))[1].max() == 0
    )


def test_the_stability_probe() -> None:
    records = {r.name: r for r in run_stability(Subject(small_model(RATIOS)), Few())}
    flips = records["queries with another choice at 1% noise"].detail["flips"]
    assert flips == sorted(flips) and flips[-1] > flips[0]
    bf16, fp8, fp4 = (records[f"recall of the fp32 choice in {name}"].value for name in ("bf16", "fp8", "fp4"))
    assert 1 >= bf16 >= fp8 > fp4 > 0.5
    assert records["choices decided by the tie rule"].value == 0, "32 heads do not tie"
    assert records["median margin"].low <= records["median margin"].value <= records["median margin"].high


# --- the hijack ------------------------------------------------------------------------------------------------------


def test_a_planted_key_is_found() -> None:
    """All queries lie around one direction, natural keys do not: a key along it wins for every query."""
    torch.manual_seed(4)
    target = torch.nn.functional.normalize(torch.randn(16), dim=0)
    q = target + 0.05 * torch.randn(40, 16)
    keys = torch.nn.functional.normalize(torch.randn(60, 16), dim=1)
    keys = keys - 0.5 * (keys @ target)[:, None] * target
    layer = asked(q, keys, 8)
    assert strongest_key(layer, torch.arange(40), Settings()) == (40, 40)


def test_what_no_query_likes_is_not_won() -> None:
    """Heads of weight -1 alone: a score is 0 at best, and natural keys have it already."""
    torch.manual_seed(5)
    layer = asked(torch.randn(20, 8), torch.randn(30, 8), 4)
    negative = Asked(1, layer.q, -layer.weights, layer.keys, layer.visible, 4)
    assert strongest_key(negative, torch.arange(20), Settings())[0] == 0


def test_rates_are_counts() -> None:
    read = torch.tensor([[-1, 0, 3], [1, 3, 4], [3, 4, 5], [2, 3, 5]])
    assert win_rates(read, 6)[0].tolist() == [0.25, 0.25, 0.25, 1.0, 0.5, 0.5]
    assert eviction(read, 2) == 0.5 and eviction(read, 1) == 0.75 and eviction(read, 6) == 0.0


@pytest.mark.parametrize("k", [4, 8])
def test_the_budget_is_k_blocks_and_not_one_fewer(k: int) -> None:
    """Planted: the system prompt's two blocks score above all others but the attacker's."""
    torch.manual_seed(6)
    keys = torch.cat([torch.full((2, 1), 5.0), torch.rand(20, 1)])
    q = torch.ones(3, 1)
    assert budget(asked(q, keys, k).scores(torch.arange(3)), 2, k).tolist() == [k] * 3
    for count, evicted in ((k - 1, 0.0), (k, 1.0)):
        planted = torch.cat([keys, torch.full((count, 1), 9.0)])
        layer = asked(q, planted, k)
        read = ops.index_scores_topk(layer.q, layer.weights, planted, layer.visible, k)
        assert eviction(read, 2) == evicted


def test_what_stands_above_already_is_not_needed() -> None:
    scores = torch.tensor([[3.0, 2.0, 5.0, 3.0, 4.0, 1.0], [9.0, 2.0, 5.0, 3.0, 4.0, 1.0]])
    assert budget(scores, 2, 4).tolist() == [2, 4], "an equal score goes to the older block"


def test_the_hijack_probe_and_its_defence() -> None:
    records = {r.name: r for r in run_hijack(Subject(small_model(RATIOS)), Few())}
    assert records["V with the system prompt pinned"].value == 0.0
    assert records["V with the system prompt pinned"].detail["every_entry_read"]
    first, second = records["W of the best key (level 1)"], records["W of the best four tokens (level 2)"]
    assert first.value > first.detail["natural"] and second.value >= second.detail["before"]
    worst = records["V of the worst text (level 3)"]
    assert worst.value >= worst.detail["by_kind_of_layer"]["csa"]["ordinary text"] and worst.detail["tokens"] == 64
    tokens_needed = records["tokens that evict for every query"]
    assert 0 < tokens_needed.value <= tokens_needed.detail["formula"] == 32
