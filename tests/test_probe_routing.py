"""Failures caught here: a load factor or a collision that is not the table's; a planted set of ids that is not found; a
silenced expert that is still used, or stays silenced; a stream that is not removed, or another one.
"""

import math

import pytest
import torch
from test_probe_selection import Few

from dsv4.measure.subjects import small_model, tokens
from dsv4.model import Segment
from dsv4.model.moe import hash_table
from dsv4.probe.hashing import collisions, expected_pairs, hash_tables, load_factor, needs, rank_share
from dsv4.probe.hashing import run as run_hash
from dsv4.probe.routing import (
    gate_margins,
    run_learned,
    run_silence,
    run_streams,
    silenced,
    streams_changed,
)
from dsv4.probe.subject import Settings, Subject

RATIOS = (0, 4, 128)


def test_load_factors_in_closed_form() -> None:
    """One token repeated: X / K exactly; every expert once: 1; 3 of 4 tokens on expert 0, K = 1, X = 4: 3."""
    assert load_factor(torch.tensor([[5, 9]] * 7), 12) == 6.0
    assert load_factor(torch.arange(12).view(6, 2), 12) == 1.0
    assert load_factor(torch.tensor([[0], [0], [0], [2]]), 4) == 3.0
    model = small_model(RATIOS)
    table = hash_tables(model)[0]
    assert [load_factor(table[torch.tensor([t] * 9)], 6) for t in (0, 50, 96)] == [3.0] * 3


def test_a_planted_collision_of_ten_ids_is_found() -> None:
    """In any order of the experts; and only where all of them are the same."""
    table = torch.stack([torch.randperm(64)[:6] for _ in range(500)])
    planted = torch.tensor([3, 9, 11, 30, 41, 60])
    ids = list(range(17, 500, 50))
    for i in ids:
        table[i] = planted[torch.randperm(6)]
    table[100, :] = torch.tensor([3, 9, 11, 30, 41, 61])
    assert collisions(table)[0] == ids and len(collisions(table)[1]) == 1
    assert sum(len(found) for found in collisions(table)) == 500


def test_the_same_in_every_layer() -> None:
    """Two tables side by side: ids 0 and 1 agree in both, 2 in one; a mere exchange between them is no agreement."""
    both = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2], [0, 1, 2, 4], [2, 3, 0, 1]])
    assert collisions(both, 2) == [[0, 1], [2], [3]]


def test_collisions_of_random_tables_are_as_many_as_expected() -> None:
    """Pairs that share 2 of 8 experts among 400 ids: 2,850 expected, the number Poisson-like (within 5 deviations)."""
    table = torch.stack([torch.randperm(8)[:2] for _ in range(400)])
    pairs = sum(len(i) * (len(i) - 1) // 2 for i in collisions(table))
    want = expected_pairs(400, 8, 2)
    assert want == pytest.approx(400 * 399 / 2 / 28) and abs(pairs - want) < 5 * math.sqrt(want)


def test_ranks() -> None:
    """Experts 0 to 3 on rank 0 of two: ids that choose 0 and 1 give it all of the work, 0 and 5 half."""
    tables = {0: torch.tensor([[0, 1], [0, 5]])}
    assert rank_share(tables, torch.tensor([0, 0]), 8, 2) == 1.0
    assert rank_share(tables, torch.tensor([1, 1]), 8, 2) == 0.5
    assert rank_share(tables, torch.tensor([0, 1]), 8, 2) == 0.75


def test_the_hash_probe() -> None:
    model = small_model(RATIOS)
    records = {r.name: r for r in run_hash(Subject(model), Settings())}
    assert records["LF of one token repeated"].value == 3.0
    assert records["busiest expert of a table over the mean"].value < 1.05, "our own tables are balanced"
    assert torch.equal(hash_tables(model)[0], hash_table(model.config, 0))
    assert "no hash-routed layer" in (needs(small_model(RATIOS, num_hash_layers=0).config) or "")


def test_margins_of_hand_made_scores() -> None:
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0], [1.0, 1.0, 0.0, 1.0]])
    assert gate_margins(scores, 2).tolist() == [pytest.approx(1 / 1.25**0.5), 0.0]


@torch.no_grad()
def test_a_silenced_expert_is_never_chosen_and_comes_back() -> None:
    model = small_model(RATIOS)
    ids = tokens(model, 60)
    before = model.trunk(ids, [Segment(60)]).routing[1]
    expert = int(before.chosen[0, 0])
    with silenced(model, 1, expert):
        during = model.trunk(ids, [Segment(60)]).routing[1]
    assert (before.chosen == expert).any() and not (during.chosen == expert).any()
    assert torch.isfinite(during.weights).all()
    assert torch.equal(model.trunk(ids, [Segment(60)]).routing[1].chosen, before.chosen)


class Constant(Subject):
    """Asked with one token over and over."""

    def ids(self, count: int, settings: Settings, salt: int = 0) -> torch.Tensor:
        return torch.full((count,), 7)


@torch.no_grad()
def test_a_planted_expert_carries_everything() -> None:
    """All routed experts give zero but one, which raises the logit of the token that always comes: it is the worst to
    silence, and all of the harm there is."""
    model = small_model(RATIOS)
    seen: list[torch.Tensor] = []
    handle = model.layers[2].ffn.gate.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    for block in model.layers[1:]:
        block.ffn.experts.w2.zero_()
        block.ffn.gate.bias.zero_()
    model(torch.full((128,), 7))
    handle.remove()
    direction = seen[0][64] / seen[0][64].norm()
    experts = model.layers[2].ffn.experts
    experts.w13[4, :, 0] = direction  # gate and up are both positive for what comes in
    experts.w2[4, :, 0] = 2 * model.head.weight[7]
    model.layers[2].ffn.gate.bias[4] = 10.0
    record = next(iter(run_silence(Constant(model), Settings())))
    assert (record.detail["layer"], record.detail["expert"]) == (2, 4) and record.detail["of"] == 12
    assert record.value > 0.1 and record.detail["share_of_all_harm"] == pytest.approx(1.0, abs=1e-4)


@torch.no_grad()
def test_a_removed_stream_is_removed() -> None:
    """What the layer is given: zeros in one stream, the others as they were."""
    model = small_model(RATIOS)
    ids, seen = tokens(model, 20), []
    handle = model.layers[2].attn_norm.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    keep = torch.tensor([1.0, 1.0, 0.0, 1.0])
    with streams_changed(model, 2, lambda x: x * keep[:, None]):
        model(ids)
    model(ids)
    handle.remove()
    assert not seen[0][:, 2].any() and torch.equal(seen[0][:, [0, 1, 3]], seen[1][:, [0, 1, 3]])
    assert seen[1][:, 2].any()


def test_streams_that_all_carry_the_same_can_each_be_spared_alike() -> None:
    """Without sublayers and with identity mixing all streams stay the embedding: each costs the same."""
    model = small_model(RATIOS)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("wo_b.weight", "experts.w2", "shared_experts.w2.weight", "_fn")):
                p.zero_()
            if name.endswith(("hc_attn_base", "hc_ffn_base")):
                p[8:] = 60 * torch.eye(4).flatten()
            if name == "hc_head_base":
                p.zero_()
    record = next(iter(run_streams(Subject(model), Few())))
    bars = record.detail["plot"]["series"].values()
    assert max(map(max, bars)) - min(map(min, bars)) < 1e-5, "the norm undoes the smaller sum"
    assert all(abs(v - 1) < 0.2 for v in record.detail["rescue"]["2"]) or record.detail["all_removed"]["2"] <= 0


def test_the_learned_probe() -> None:
    records = {r.name: r for r in run_learned(Subject(small_model(RATIOS)), Few())}
    assert (
        0 < records["median margin"].value
        and records["5th percentile of margins"].value < records["median margin"].value
    )
    assert 1 <= records["largest LF of one token repeated"].value <= 3.0
