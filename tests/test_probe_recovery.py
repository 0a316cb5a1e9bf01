"""Failures caught here: bits that are not those a constructed entry carries, or of another place; bits read from noise;
a decoder that beats a channel's capacity; needles asked of more than HCA; a model that cannot retrieve passing for one
whose HCA is empty, or the other way.
"""

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch

from dsv4.measure.subjects import small_config, small_model, tokens
from dsv4.probe import needles as needles_file
from dsv4.probe import recovery
from dsv4.probe.fidelity import gate_scores
from dsv4.probe.needles import IdTask, Needle
from dsv4.probe.recovery import (
    Asked,
    by_needles,
    decode,
    decoded,
    entries_of,
    needs,
    put_in,
    run,
    spread_places,
    told,
)
from dsv4.probe.subject import Recorder, Settings, Subject
from tests.test_probe_fidelity import entries as first_entries

ONE, OTHER = 90, 91


class Few(Settings):
    def pick(self, quick: int, full: int) -> int:  # type: ignore[override]
        return max(4, quick // 16)


def recorder(model: torch.nn.Module) -> Recorder:
    return Recorder("fidelity.hca", Subject(model), Settings())  # type: ignore[arg-type]


def test_entries_are_what_the_layer_pools() -> None:
    model = small_model((128, 0, 128))
    groups = torch.stack([tokens(model, 128, seed=i) for i in range(40)])
    found = entries_of(model, groups)
    assert set(found) == {0, 2} == set(gate_scores(model, groups[0])) and found[0].shape == (40, 32)
    assert torch.allclose(found[0][39], first_entries(model, groups[39])[0], atol=1e-5)


@pytest.mark.parametrize("carried", [0, 5, 12])
def test_an_entry_that_carries_so_many_bits_is_read_for_as_many(carried: int) -> None:
    """Channel j takes the token at place j alone and tells which of two it is, for the first `carried` of 16 places;
    the other channels are empty. A sample of 128 never shows certainty: 0.6% of a bit is kept back. A place that says
    nothing is read for 0 within some 0.03 (a calibration by 128 is 0.09 off); the largest of 16 is within 0.12."""
    model = small_model((128,), hidden_size=128)
    places = spread_places(128, 16)
    with torch.no_grad():
        first = model.layers[0]
        model.embed.weight.copy_(torch.eye(97, 128) * 128**0.5)
        first.attn_norm.weight.fill_(1.0)
        pool = first.attn.compressor
        pool.wgate.weight.zero_()
        pool.wkv.weight.zero_()
        pool.ape.zero_()
        for j in range(carried):
            pool.ape[places[j], j] = 60.0
            pool.wkv.weight[j, ONE], pool.wkv.weight[j, OTHER] = 1.0, -1.0
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 90, (512, 128), generator=generator)
    bits = torch.randint(0, 2, (512, 16), generator=generator)
    pairs = torch.tensor([[OTHER, ONE]]).expand(16, 2)
    found = decode(entries_of(model, put_in(ids, pairs, bits, places))[0], bits)
    assert float(found.bits.mean()) == pytest.approx(carried, abs=0.25)
    assert bool((found.by_place[:carried] > 0.99).all()) and bool((found.by_place[carried:].abs() < 0.12).all())


def test_a_noisy_channel_is_read_up_to_its_capacity_and_not_beyond() -> None:
    """Four bits, each a number of plus or minus one with normal noise of size one: 0.4859 bits each, by integration."""
    x = torch.linspace(-9, 11, 200001, dtype=torch.float64)
    density = (-(x - 1).square() / 2).exp() / math.sqrt(2 * math.pi)
    capacity = 1 - float(torch.trapezoid(density * torch.log1p((-2 * x).exp()), x)) / math.log(2)
    assert capacity == pytest.approx(0.4859, abs=1e-4)
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 2, (8192, 4), generator=generator)
    noise = torch.randn(8192, 12, generator=generator)
    noise[:, :4] += bits * 2 - 1
    found = decode(noise @ torch.randn(12, 12, generator=generator), bits)
    error = float(found.bits.std()) / len(found.bits) ** 0.5
    assert abs(float(found.bits.mean()) - 4 * capacity) < 4 * error < 0.15


def test_places_are_spread_and_bits_are_put_there() -> None:
    assert spread_places(128, 1).tolist() == [64] and spread_places(128, 128).tolist() == list(range(128))
    ids = torch.zeros(2, 8, dtype=torch.int64)
    pairs, bits = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[0, 1], [1, 0]])
    assert put_in(ids, pairs, bits, torch.tensor([2, 6])).tolist() == [
        [0, 0, 1, 0, 0, 0, 4, 0],
        [0, 0, 2, 0, 0, 0, 3, 0],
    ]
    assert not ids.any()


# --- the model itself ------------------------------------------------------------------------------------------------


def asked(*, alone: bool, everything: bool, texts: int = 40) -> dict[int, Asked]:
    """Models that are certain of a value: the right one, or one drawn without looking."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for m in (1, 4):
        values = torch.randint(0, 16, (texts, m), generator=generator)
        others = torch.randint(0, 16, (texts, m), generator=generator)
        right, wrong = (50.0 * torch.nn.functional.one_hot(v, 16).double() for v in (values, others))
        found[m] = Asked(right if alone else wrong, right if everything else wrong, values)
    return found


def test_needles_that_hca_gives_whole_are_counted_in_bits() -> None:
    (r,) = told(recorder(small_model((0, 128))), asked(alone=True, everything=True), 16)
    assert r.value == pytest.approx(16.0) and r.detail["needles"] == 4 and r.detail["bits_put_in"] == 16
    assert r.detail["by_needles"]["1"]["alone"] == 1 and r.n == 20


def test_a_model_that_finds_needles_elsewhere_has_no_bits_by_hca() -> None:
    (r,) = told(recorder(small_model((0, 128))), asked(alone=False, everything=True), 16)
    assert r.status == "measured" and r.value == pytest.approx(0.0, abs=0.05) and r.detail["temperature_factor"] == 0
    assert "100% of the same needles" in r.finding


def test_a_model_that_retrieves_nothing_is_asked_nothing_of_hca() -> None:
    (r,) = told(recorder(small_model((0, 128))), asked(alone=False, everything=False), 16)
    assert r.status == "skipped" and "does not retrieve" in r.reason


def test_needles_lie_in_one_group_and_are_asked_of_hca_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    task = IdTask(keys=range(64, 80), values=range(80, 96), fill=range(64))
    hidden, kinds = list[list[int]](), set[str]()

    def text_of(task, length, needles, places, generator):
        hidden.append(places)
        return needles_file.text_of(task, length, needles, places, generator)

    def reading(config, kind, questions):
        kinds.add(kind)
        return needles_file.reading(config, kind, questions)

    monkeypatch.setattr(recovery, "text_of", text_of)
    monkeypatch.setattr(recovery, "reading", reading)
    found = by_needles(small_model((4, 128), index_topk=128), task, Few())
    assert sorted(found) == [1, 2, 4, 8, 16] and found[4].alone.shape == (4, 4, 16) and kinds == {"hca"}
    assert all(128 <= place < 256 for places in hidden for place in places)
    assert not torch.equal(found[4].alone, found[4].everything)


def test_needles_whose_names_have_more_tokens_at_times_find_room() -> None:
    drawn = itertools.count()

    @dataclass(frozen=True)
    class Named(IdTask):
        def needles(self, count: int, generator: torch.Generator) -> list[Needle]:
            longer = 1 if next(drawn) < 3 else 12
            found = super().needles(count, generator)
            return [replace(n, before=n.before.repeat(longer), question=n.question.repeat(longer)) for n in found]

    task = Named(keys=range(64, 80), values=range(80, 96), fill=range(64))
    found = by_needles(small_model((4, 128), index_topk=128), task, Few())
    assert sorted(found) == [1, 2, 4, 8], "16 of up to 13 tokens are more than 128"


def test_the_probe_says_what_it_cannot_measure() -> None:
    model = small_model((0, 4, 128))
    linear, own = run(Subject(model), Few())
    assert linear.value is not None and 0 <= linear.detail["put_in"] <= 128 and own.status == "skipped"
    assert decoded(recorder(model), Subject(model), Few()).detail["numbers"] == 32
    assert needs(small_config((0, 4))) and needs(small_config((128,), max_position_embeddings=300))
    assert needs(small_config((128,))) is None
