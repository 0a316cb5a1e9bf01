"""Failures caught here: a share that is not the softmax's; a token of the vocabulary that is ranked by other scores
than the layer's, put elsewhere, or one that no text can hold; a planted eclipse that is missed; an entry that is said
to mix texts and does not, or the other way, as the layer itself shows; padding that leaves a boundary inside a group.
"""

import pytest
import torch

from dsv4 import ops
from dsv4.measure.subjects import small_config, small_model, tokens
from dsv4.model import Segment, Transformer
from dsv4.probe.fidelity import (
    aligned,
    eclipses,
    gate_scores,
    mixed,
    needs_entries,
    needs_hca,
    predicted_shares,
    run_bleed,
    run_eclipse,
    shares,
    vocabulary_scores,
)
from dsv4.probe.subject import Settings, Subject

STRONG = 17
EVERY = torch.ones(97, dtype=torch.bool)


class Few(Settings):
    def pick(self, quick: int, full: int) -> int:  # type: ignore[override]
        return max(1, quick // 2)


def entries(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    """What the first layer's compressor pools, [E, D]."""
    found: list[torch.Tensor] = []

    def wrap(name, op):
        def compress(*arguments):
            found.append(op(*arguments))
            return found[-1]

        return compress

    with torch.no_grad(), ops.wrapped(["compress"], wrap):
        model.trunk(ids, [Segment(len(ids))])
    return next(f for f in found if f.shape[1] == model.config.head_dim)


# --- eclipse ---------------------------------------------------------------------------------------------------------


def test_shares_are_the_softmax_over_a_group() -> None:
    """log 3 beside three zeros is a half in one channel, a quarter where all are equal; the mean over channels."""
    scores = torch.zeros(4, 2)
    scores[1, 0] = torch.tensor(3.0).log()
    assert shares(scores).tolist() == pytest.approx([(1 / 6 + 1 / 4) / 2, 3 / 8, 5 / 24, 5 / 24])


def test_at_the_first_layer_the_ranking_is_exact() -> None:
    """Every prediction is the share that the model then has, and no token at any place has a larger one."""
    model, ids = small_model((128, 0)), tokens(small_model((0,)), 256)
    found = eclipses(model, ids, [5, 100], best=24, allowed=EVERY)
    assert len(found) == 24 and len({(e.place, e.token) for e in found}) == 24
    for e in found:
        assert e.measured == pytest.approx(e.predicted, rel=1e-4)
    scores, of_all = gate_scores(model, ids)[0], vocabulary_scores(model, 0)
    bias = model.layers[0].attn.compressor.ape.detach()
    assert torch.allclose(scores[1] - bias, of_all[ids[128:]], atol=1e-4)
    largest = max(float(predicted_shares(of_all, scores[1], bias, place).max()) for place in range(128))
    assert found[0].measured == pytest.approx(largest, rel=1e-4)
    text = ids.clone()
    text[128 + 7] = 50
    want = shares(gate_scores(model, text)[0][1])[7]
    assert float(predicted_shares(of_all, scores[1], bias, 7)[50]) == pytest.approx(float(want), rel=1e-4)


def test_a_planted_token_erases_its_neighbours_by_the_amount_in_closed_form() -> None:
    """Gate scores g for one token and 0 for all others, no bias: it takes e^g / (e^g + 127) of every channel."""
    model = small_model((128, 0), hidden_size=128)
    with torch.no_grad():
        first = model.layers[0]
        model.embed.weight.copy_(torch.eye(97, 128) * 128**0.5)  # a row of length sqrt(M): the norm leaves it alone
        first.attn_norm.weight.fill_(1.0)
        first.attn.compressor.ape.zero_()
        first.attn.compressor.wgate.weight.zero_()
        first.attn.compressor.wgate.weight[:, STRONG] = 6.0 / 128**0.5
    want = torch.tensor(6.0).exp() / (torch.tensor(6.0).exp() + 127)
    ids = tokens(model, 256)
    ids[ids == STRONG] = 3
    (found,) = eclipses(model, ids, [64], best=1, allowed=EVERY)
    assert found.token == STRONG and found.measured == pytest.approx(want.item(), rel=1e-3)
    allowed = torch.arange(97) != STRONG
    (other,) = eclipses(model, ids, [64], best=1, allowed=allowed)
    assert other.token != STRONG and other.measured == pytest.approx(1 / 128, rel=1e-3)
    subject = Subject(model)
    natural, top = run_eclipse(subject, Settings())
    group = subject.ids(512, Settings(), salt=14)[-128:]
    group[top.detail["place"]] = STRONG
    n = int((group == STRONG).sum())  # they share
    want = torch.tensor(6.0).exp() / (n * torch.tensor(6.0).exp() + 128 - n)
    assert top.detail["token"] == STRONG and top.value == pytest.approx(want.item(), rel=1e-3)
    assert natural.detail["uniform"] == 1 / 128


def test_the_probe_says_what_it_measured_in_deeper_layers() -> None:
    natural, top = run_eclipse(Subject(small_model((0, 4, 128, 128))), Few())
    assert set(natural.detail["by_layer"]) == {"2", "3"} and top.detail["layer"] in (2, 3)
    assert 1 / 128 < natural.value <= 1 and 1 / 128 < top.value <= 1
    assert needs_hca(small_config((0, 4))) and needs_entries(small_config((0,)))
    assert needs_hca(small_config((128,), max_position_embeddings=200)) and needs_entries(small_config((4,))) is None


# --- bleed -----------------------------------------------------------------------------------------------------------


def test_entries_that_mix_are_counted_by_residue() -> None:
    config = small_config((4, 128))
    csa, hca = config.layer_kind(0), config.layer_kind(1)
    assert mixed([6, 10], csa, own=True) == [1] and mixed([6, 10], csa, own=False) == [1, 2]
    assert mixed([8, 8], csa, own=True) == [] and mixed([8, 8], csa, own=False) == [2]
    assert mixed([8, 4, 8], csa, own=False) == [2, 3], "each reads one text and the neutral group, or it and one text"
    assert mixed([130, 300], hca, own=True) == mixed([130, 300], hca, own=False) == [1]
    assert mixed([128, 256], hca, own=False) == [] and mixed([200, 20], hca, own=False) == [], "an open group is none"
    assert mixed([1, 1, 1, 1], csa, own=True) == [0], "counted once, however many texts it mixes"


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_what_is_said_to_mix_is_what_the_layer_reads(ratio: int, shift: int) -> None:
    """Every token of one text changed: the entries that change while they also depend on the other text are those."""
    model = small_model((ratio, 0))
    kind = model.config.layer_kind(0)
    system, user = 2 * ratio + shift, 2 * ratio
    ids = tokens(model, system + user)
    clean, depends = entries(model, ids), []
    for part in (slice(0, system), slice(system, None)):
        other = ids.clone()
        other[part] = (other[part] + 1) % 97
        depends.append((entries(model, other) != clean).any(dim=1))
    assert (depends[0] & depends[1]).nonzero()[:, 0].tolist() == mixed([system, user], kind, own=False)


def test_padding_aligns_every_text() -> None:
    kind = small_config((128,)).layer_kind(0)
    for lengths in ([1, 127, 128, 300, 5], [256, 4], [7]):
        pads = aligned(lengths, 128)
        assert pads[-1] == 0 and all(0 <= p < 128 for p in pads)
        whole = [n + p for n, p in zip(lengths, pads, strict=True)]
        assert mixed(whole, kind, own=False) == [] and all(sum(whole[:i]) % 128 == 0 for i in range(len(whole)))
    assert aligned([], 128) == []


def test_the_probe_counts_every_residue() -> None:
    csa, hca, mass = run_bleed(Subject(small_model((0, 4, 128))), Few())
    assert csa.value == 3 / 4 and csa.detail["pooled_by_residue"] == [1, 2, 2, 2] and csa.detail["aligned"] == 0
    assert hca.value == 127 / 128 and hca.detail["own_group_by_residue"] == [0, *[1] * 127]
    measured = mass.detail["plot"]["series"]["measured"]
    assert all(a > b > 0 for a, b in zip(measured, measured[1:], strict=False)) and 0.2 < mass.value < 0.8


def test_equal_gates_give_each_token_the_same_mass() -> None:
    model = small_model((128,))
    with torch.no_grad():
        model.layers[0].attn.compressor.ape.zero_()
        model.layers[0].attn.compressor.wgate.weight.zero_()
    (_, mass) = run_bleed(Subject(model), Few())
    series = mass.detail["plot"]["series"]
    assert series["measured"] == pytest.approx(series["if all tokens weighed the same"])
    assert mass.value == pytest.approx(0.5)
