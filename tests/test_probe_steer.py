"""Failures caught here: index scores with a gradient that are not those that the model chooses by; a gradient that is
not theirs, or that stops at the indexer's layer; margins that are above 0 where the attacker does not have it; tokens
that a planted indexer likes and that are not found; a budget that is not k blocks when the model itself reads; an
attack on embeddings that leaves other tokens alone no more, or whose projected text is judged by anything but a run.
"""

import pytest
import torch

from dsv4.measure.subjects import small_model, tokens
from dsv4.model import Transformer
from dsv4.probe.attacks import search
from dsv4.probe.hijack import eviction
from dsv4.probe.indexed import NEG_INF, watch
from dsv4.probe.jacobian import without_parameters
from dsv4.probe.steer import Aim, Steered, bend, evicts, scores_of, swap_many, wins

LIKED, K, TOTAL = 7, 8, 80  # a token; index_topk of the small model; 80 tokens have 20 entries


@torch.no_grad()
def planted() -> Transformer:
    """A V4 whose first layer is CSA and whose indexer likes an entry the more, the more of its four tokens are LIKED.

    Embeddings are orthogonal. Channel 0 of a key grows with the tokens that are LIKED and channel 1 is the same for all
    tokens, each entry counts its own tokens alone; every query looks along channel 0, and all heads count as much.
    """
    model = small_model((4,), vocab_size=97, hidden_size=128)
    model.embed.weight.copy_(torch.eye(97, 128) * 128**0.5)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            p.fill_(1.0)
        elif "hc_" in name:
            p.zero_()
    attn = model.layers[0].attn
    indexer, width = attn.indexer, 16
    assert indexer is not None
    attn.wq_a.weight.fill_(1.0)
    for p in (indexer.wq_b.weight, indexer.compressor.wkv.weight, indexer.compressor.wgate.weight):
        p.zero_()
    indexer.compressor.ape.zero_()
    indexer.wq_b.weight.view(indexer.heads, width, -1)[:, 0] = 0.1
    indexer.weights_proj.weight.fill_(1.0)
    # of the two halves of a token's row, that which its own group pools
    own = indexer.compressor.wkv.weight.view(2, width, -1)[1]
    own[0, :97], own[0, LIKED], own[1, :97] = 0.1, 1.0, 1.0
    return model


def rows_of(total: int = TOTAL) -> torch.Tensor:
    return torch.arange(total - total // 4, total)


def ordinary(model: Transformer, seed: int = 0) -> torch.Tensor:
    ids = tokens(model, TOTAL, seed)
    return torch.where(ids == LIKED, LIKED + 1, ids)


def anything(model: Transformer) -> torch.Tensor:
    return torch.ones(model.config.vocab_size, dtype=torch.bool)


# --- scores and gradients --------------------------------------------------------------------------------------------


def test_scores_are_those_that_are_chosen_by() -> None:
    model = small_model((0, 4, 128, 4))
    texts, rows = torch.stack([tokens(model, 64), tokens(model, 64, seed=1)]), torch.tensor([35, 50, 63])
    with torch.no_grad():
        found = scores_of(model, texts, model.embedded(texts.flatten(), None), rows)
    assert [layer.shape for layer in found] == [(2, 3, 16)] * 2
    for i, text in enumerate(texts):
        for layer, asked in zip(found, watch(model, text)[0], strict=True):
            want = asked.scores(rows)
            assert torch.equal(layer[i] == NEG_INF, want == NEG_INF)
            torch.testing.assert_close(layer[i], want, rtol=1e-4, atol=1e-4)


def test_the_gradient_is_that_of_the_loss_through_the_layers_below() -> None:
    model = small_model((0, 4, 128, 4))
    ids, rows = tokens(model, 64), torch.arange(48, 64)
    aim = Aim(lambda scores: scores[:, 1:3] - scores[:, 4:6], 1)  # without the spread, which is held
    goal = Steered(model, ids, torch.arange(8, 48), rows, aim, anything(model))
    with without_parameters(model):
        x = goal.embedded(ids[None])
        _, slope = goal.slope(ids, x)
        step = 1e-4 * torch.nn.functional.normalize(slope, dim=1)
        apart = goal.loss(ids[None], x + step) - goal.loss(ids[None], x - step)
    assert apart.item() == pytest.approx(2 * (slope * step).sum().item(), rel=0.03)
    assert slope[8:48].norm() > 0 and slope[63].norm() > 0, "keys and queries both"
    assert all(p.requires_grad for p in model.parameters())


# --- margins ---------------------------------------------------------------------------------------------------------


def test_margins_say_who_is_read() -> None:
    scores = torch.tensor([[3.0, 2.0, 5.0, 3.5, 4.0, NEG_INF], [9.0, 2.0, 5.0, 3.0, 4.0, 1.0]])
    assert evicts(2, 3).reached(scores).tolist() == [True, False], "three others are above 3; none is above 9"
    assert not evicts(2, 4).reached(scores).any()
    assert wins(3, 2).reached(scores).tolist() == [False, False] and wins(4, 2).reached(scores).tolist() == [
        True,
        False,
    ]
    assert wins(2, 2).reached(scores).all() and not wins(4, 1).reached(scores).any()
    far = evicts(2, 3).loss(torch.tensor([[9.0, 9.0, 0.0, 0.0, 0.0]]))
    assert far.item() == pytest.approx(1.0, abs=0.01) and (evicts(2, 3).loss(scores) < far).all()


def test_the_share_is_what_the_model_reads() -> None:
    model = small_model((0, 4, 128, 4))
    ids, rows = tokens(model, 64), torch.arange(48, 64)
    goal = Steered(model, ids, torch.arange(8, 48), rows, evicts(1, K), anything(model))
    read = watch(model, ids)[1]
    assert goal.rate(ids) == pytest.approx(sum(eviction(r[rows], 1) for r in read) / 2)
    assert 0 < goal.rate(ids) < 1


# --- a planted indexer -----------------------------------------------------------------------------------------------


def test_a_planted_token_wins_and_the_budget_is_k_blocks() -> None:
    """With k - 1 blocks of LIKED the system prompt's block is still read by every query, with k by none."""
    model, rows = planted(), rows_of()
    for count in (1, K - 1, K):
        ids = ordinary(model)
        ids[0] = LIKED  # the system prompt's own block is the best of what is not the attacker's
        ids[8 : 8 + 4 * count] = LIKED
        (read,) = watch(model, ids)[1]
        for block in range(2, 2 + count):
            assert bool((read[rows] == block).any(dim=1).all()), "W = 1"
        assert eviction(read[rows], 1) == (1.0 if count >= K else 0.0)
        goal = Steered(model, ids, torch.arange(8, 12), rows, evicts(1, K), anything(model))
        assert goal.rate(ids) == (1.0 if count >= K else 0.0)


def test_the_gradient_finds_the_planted_token_at_once() -> None:
    model, rows, slots = planted(), rows_of(), torch.arange(40, 44)
    goal = Steered(model, ordinary(model), slots, rows, wins(10, K), anything(model))
    with without_parameters(model):
        predicted = goal.gradient(goal.ids)
        assert predicted.argmin(dim=1).tolist() == [LIKED] * 4
        found = search(goal, 9, torch.Generator().manual_seed(1), top=1, batch=4)
        by_chance = search(goal, 9, torch.Generator().manual_seed(1), batch=4)
    assert LIKED in found.text[slots].tolist() and found.loss < by_chance.loss and goal.rate(found.text) == 1.0


def test_eviction_by_gradient_ends_where_the_planted_optimum_is() -> None:
    """LIKED everywhere, or enough of it: found within a few rounds, and nothing beside the slots is touched."""
    model, rows = planted(), rows_of()
    ids = ordinary(model)
    ids[0] = LIKED
    slots = torch.arange(8, 60)
    goal = Steered(model, ids, slots, rows, evicts(1, K), anything(model))
    with without_parameters(model):
        before = goal.rate(ids)
        text, loss = swap_many(goal, ids, 60, torch.Generator().manual_seed(1))
        assert before == 0.0 and goal.rate(text) == 1.0
        assert loss == pytest.approx(float(goal.losses(text[None])[0])), "the loss of the text as it is run"
        untouched = torch.ones(TOTAL, dtype=torch.bool)
        untouched[slots] = False
        assert torch.equal(text[untouched], ids[untouched])


def test_embeddings_are_an_upper_bound_and_the_projected_text_is_run() -> None:
    model, rows = planted(), rows_of()
    ids = ordinary(model)
    ids[0] = LIKED
    goal = Steered(model, ids, torch.arange(8, 60), rows, evicts(1, K), anything(model))
    with without_parameters(model):
        best, text, share = bend(goal, ids, 24)
        liked = torch.where(torch.isin(torch.arange(TOTAL), goal.slots), LIKED, ids)
        same = bend(goal, liked, 1)
    assert goal.rate(ids) == 0.0 and best == 1.0 and share == goal.rate(text)
    assert torch.equal(text[:8], ids[:8]) and torch.equal(text[60:], ids[60:])
    assert same[0] == same[2] == 1.0 and torch.equal(same[1], liked), "an embedding's nearest token is its own"
