"""Failures caught here: a gradient that is not that of the relaxed one-hot; swaps of another slot, for the token that
is there, or for one that is not allowed; a fidelity that is not the known one, or that hides what hash layers do; a
planted trigger that is not found; a search that spends more than its budget, ends higher than it began, or is beaten by
chance.
"""

import pytest
import torch
import torch.nn.functional as F

from dsv4.measure.subjects import small_model, tokens
from dsv4.model import Segment, Transformer
from dsv4.model.rope import frequencies
from dsv4.probe import stats
from dsv4.probe.attacks import Goal, any_swaps, best_swaps, fidelity, run, search
from dsv4.probe.jacobian import without_parameters
from dsv4.probe.subject import Settings, Subject

RATIOS = (0, 4)
VOCAB, WIDTH = 255, 256
LENGTH, SLOTS, WANTED = 12, torch.tensor([3, 5, 6, 9]), 90
BUDGET = 512


class Few(Settings):
    def pick(self, quick: int, full: int) -> int:  # type: ignore[override]
        return max(2, quick // 4)


# --- a model with a known trigger ------------------------------------------------------------------------------------


@torch.no_grad()
def planted(seed: int) -> tuple[Transformer, Goal, torch.Tensor]:
    """A V4 of a window and a CSA layer that likes WANTED the more, the more its window's rows agree with a direction w:
    the model, the goal, and what a token adds to the agreement in each slot, fp64 [L, V].

    Embeddings are orthogonal; a query is zero, so attention is the mean of the rows; rows turn by their distance, so
    each slot has a best token of its own. All else writes nothing. The logit is monotone in the sum of agreements, so
    the loss has its minimum at each slot's best token, and nowhere else.
    """
    model = small_model(RATIOS, seed=seed, vocab_size=VOCAB, hidden_size=WIDTH, qk_rope_head_dim=16)
    for name, p in model.named_parameters():
        if name.endswith(("norm.weight", "norm.ape")):
            p.fill_(1.0)
        elif name.endswith(("wq_b.weight", "wo_a.weight", "wo_b.weight", "w2", "w2.weight")) or "hc_" in name:
            p.zero_()
    first = model.layers[0].attn
    first.attn_sink.fill_(-1e9)
    model.embed.weight.copy_(torch.eye(VOCAB, WIDTH) * WIDTH**0.5)
    w = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    w[:16] = 0  # the channels that do not turn would have the same best token in all slots
    first.wo_a.weight[0, :32] = w / w.norm()
    first.wo_b.weight[-1, 0] = 16.0
    model.head.weight.zero_()
    model.head.weight[WANTED, -1] = 0.5
    ids = torch.cat([tokens(model, LENGTH, seed), torch.tensor([WANTED])])
    rows = first.wkv.weight.double()[:, :VOCAB].T
    rows = rows / rows.norm(dim=1, keepdim=True)
    turned = torch.view_as_complex(rows[:, 16:].reshape(VOCAB, 8, 2).contiguous())
    along = torch.view_as_complex((w / w.norm())[16:].double().view(8, 2))
    distance = (SLOTS - (LENGTH - 1)).double()[:, None] * frequencies(model.config, "window").double()
    turn = torch.polar(torch.ones_like(distance), distance)  # [L, 8]
    return model, Goal(model, ids, SLOTS), (turned[None] * turn[:, None] * along.conj()).real.sum(dim=2)


def test_the_planted_loss_is_what_the_agreements_say() -> None:
    """Over random fillings the loss falls as the sum of agreements rises, without exception; slots differ."""
    model, goal, agreement = planted(0)
    fill = torch.randint(0, VOCAB, (200, 4), generator=torch.Generator().manual_seed(1))
    fill[0] = agreement.argmax(dim=1)
    texts = goal.ids.repeat(200, 1)
    texts[:, SLOTS] = fill
    losses = goal.losses(texts)
    total = agreement[torch.arange(4), fill].sum(dim=1)
    assert stats.spearman(losses, -total) > 0.99999 and losses.argmin() == 0
    assert losses.max() - losses.min() > 1 and len(set(fill[0].tolist())) > 1


def attack(seed: int) -> tuple[bool, float]:
    """Whether GCG found the planted trigger, and by how much it ended below random search."""
    model, goal, agreement = planted(seed)
    with without_parameters(model):
        found = search(goal, BUDGET, torch.Generator().manual_seed(seed), top=16, batch=32)
        other = search(goal, BUDGET, torch.Generator().manual_seed(seed), batch=8)
    assert found.cost <= BUDGET and other.cost <= BUDGET
    return torch.equal(found.text[SLOTS], agreement.argmax(dim=1)), other.loss - found.loss


def test_the_planted_trigger_is_found() -> None:
    """Random search finds it too now and then (seed 1): then the losses are equal."""
    results = [attack(seed) for seed in range(4)]
    assert all(found and below >= 0 for found, below in results) and sum(below > 0 for _, below in results) >= 3


@pytest.mark.slow  # a minute
def test_the_planted_trigger_is_found_from_a_hundred_seeds() -> None:
    """In at least 99, and below random search at equal budget in at least 95."""
    results = [attack(seed) for seed in range(100)]
    found, below = sum(found for found, _ in results), sum(less > 0 for _, less in results)
    print(f"found {found}, below random search {below} of 100")
    assert found >= 99 and below >= 95


# --- gradients and swaps ---------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_relaxed_one_hot() -> None:
    """Through every kind of layer, with two wanted tokens: autograd on a one-hot matrix times the embeddings."""
    model = small_model((0, 4, 128, 4))
    ids = tokens(model, 150)
    slots = torch.tensor([2, 100, 147])
    goal = Goal(model, ids, slots, wanted=2)
    one_hot = F.one_hot(ids[:-1], 97).float().requires_grad_(True)
    trunk = model.trunk(ids[:-1], [Segment(149)], embedded=one_hot @ model.embed.weight)
    loss = F.cross_entropy(model.head(trunk.hidden[-2:]), ids[-2:])
    want = torch.autograd.grad(loss, one_hot)[0][slots]
    got = goal.gradient(ids)
    assert got.shape == (3, 97) and torch.allclose(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
    assert float(goal.losses(ids[None])[0]) == pytest.approx(loss.item(), rel=1e-4)


def test_texts_are_run_alone_and_with_their_own_ids() -> None:
    """A batch is its texts one by one; routing held to a text's own ids changes nothing, to another's it does."""
    model = small_model(RATIOS)
    goal = Goal(model, tokens(model, 20), torch.tensor([4, 5]))
    texts = torch.stack([tokens(model, 20, seed) for seed in range(5)])
    losses = goal.losses(texts)
    assert torch.allclose(losses, torch.cat([goal.losses(t[None]) for t in texts]), atol=1e-5)
    assert torch.allclose(goal.losses(texts[:1], routed_as=texts[0]), losses[:1], atol=1e-5)
    assert (goal.losses(texts[:1], routed_as=texts[1]) - losses[0]).abs() > 1e-3


def test_swaps_change_one_slot_for_another_allowed_token() -> None:
    model = small_model((0,))
    allowed = torch.zeros(97, dtype=torch.bool)
    allowed[:6] = True
    ids = tokens(model, 10) % 6
    goal = Goal(model, ids, torch.tensor([1, 4, 7]), allowed=allowed)
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(3, 97, generator=generator)
    for swaps in (any_swaps(goal, ids, 200, generator), best_swaps(goal, ids, gradient, 3, 100, generator)):
        texts = swaps.of(ids, goal.slots)
        changed = texts != ids
        assert (changed.sum(dim=1) == 1).all() and changed[:, [1, 4, 7]].any(dim=0).all()
        assert allowed[texts[changed]].all()
        want = gradient[swaps.place, swaps.token] - gradient[swaps.place, ids[goal.slots[swaps.place]]]
        assert torch.equal(swaps.predicted(gradient, ids, goal.slots), want)
    assert len(swaps.token) == 9 and len(texts.unique(dim=0)) == 9, "3 slots x 3 tokens, each once"
    for slot, of in enumerate(ids[goal.slots].tolist()):
        others = [v for v in range(6) if v != of]
        best = sorted(others, key=lambda v: float(gradient[slot, v]))[:3]
        assert sorted(swaps.token[swaps.place == slot].tolist()) == sorted(best)
    gradient[:, 3:] = torch.inf
    left = best_swaps(goal, ids, gradient, 97, 100, generator)
    assert sorted(left.token.tolist()) == sorted(v for of in ids[goal.slots].tolist() for v in range(3) if v != of)


# --- fidelity --------------------------------------------------------------------------------------------------------


class Linear(Goal):
    """A loss that is a sum over slots of what each token costs there: its gradient says all."""

    costs = torch.randn(3, 97, generator=torch.Generator().manual_seed(5))

    def losses(self, texts: torch.Tensor, routed_as: torch.Tensor | None = None) -> torch.Tensor:
        return self.costs[torch.arange(3), texts[:, self.slots]].double().sum(dim=1)

    def gradient(self, text: torch.Tensor) -> torch.Tensor:
        return self.costs.double()


def test_the_fidelity_of_a_linear_loss_is_one() -> None:
    model = small_model((0,))
    goal = Linear(model, tokens(model, 12), torch.tensor([2, 3, 8]))
    assert fidelity(goal, 512, torch.Generator().manual_seed(0)) == (pytest.approx(1.0), pytest.approx(1.0))
    found = search(goal, 200, torch.Generator().manual_seed(0), top=4, batch=12)
    assert found.text[goal.slots].tolist() == goal.costs.argmin(dim=1).tolist()
    for top in (4, None):
        for budget in range(1, 40):
            assert search(goal, budget, torch.Generator().manual_seed(0), top=top, batch=7).cost <= budget
    ended = search(goal, 10_000, torch.Generator().manual_seed(0), batch=32)
    assert ended.text.equal(found.text) and ended.cost < 3000, "no swap of the best text is left: the search ends"


def test_what_only_hash_layers_see_has_no_gradient() -> None:
    """All tokens have the same embedding: swaps change the loss by their experts alone, fidelity is 0; with routing
    held they change nothing at all."""
    model = small_model(RATIOS)
    with torch.no_grad():
        model.embed.weight[:] = model.embed.weight[0]
    goal = Goal(model, tokens(model, 20), torch.tensor([10, 11, 15]))
    generator = torch.Generator().manual_seed(0)
    texts = any_swaps(goal, goal.ids, 64, generator).of(goal.ids, goal.slots)
    assert goal.losses(texts).std() > 1e-3
    held = goal.losses(texts, routed_as=goal.ids)
    assert (held - held[0]).abs().max() < 1e-5
    swaps = any_swaps(goal, goal.ids, 64, generator)
    assert swaps.predicted(goal.gradient(goal.ids), goal.ids, goal.slots).abs().max() < 1e-5
    own, _ = fidelity(goal, 256, generator)
    assert abs(own) < 0.2


def test_the_fidelity_of_the_planted_model_is_high() -> None:
    """Its loss is a curve of a sum over slots; a gradient misses only what the norm of a row does."""
    model, goal, _ = planted(1)
    own, held = fidelity(goal, 512, torch.Generator().manual_seed(0))
    assert own > 0.6 and held == pytest.approx(own)


# --- the probe -------------------------------------------------------------------------------------------------------


def test_the_probe_reports_both_searches() -> None:
    records = list(run(Subject(small_model((0, 4, 128))), Few()))
    own, held, won, forced = records
    assert -1 <= own.low <= own.value <= own.high <= 1 and "hash routing held" in held.name
    detail = won.detail
    for before, after in zip(detail["loss_before"], detail["loss_gcg"], strict=True):
        assert after <= before
    assert won.value == sum(a < b for a, b in zip(detail["loss_gcg"], detail["loss_random"], strict=True)) / won.n
    assert forced.detail["survives_as_text"] is None
    unhashed = run(Subject(small_model((0, 4), num_hash_layers=0)), Few())
    assert not any("held" in r.name for r in unhashed)
