"""Failures caught here: a way of reading that lets entries through or keeps windows away; a memory that the last token
does not read; an attack by entries alone that passes for one that works without them, or one by the window alone that
does not; a share of no attacks that has a value.
"""

import pytest
import torch

from dsv4.measure.subjects import small_model, tokens
from dsv4.model import Segment
from dsv4.probe import compression
from dsv4.probe.attacks import Found, Goal
from dsv4.probe.compression import ALL, OFF, ON, first_choice, goals, needs, reading, run, works
from dsv4.probe.subject import Settings, Subject

WINDOW = 8


class Few(Settings):
    def pick(self, quick: int, full: int) -> int:  # type: ignore[override]
        return max(2, quick // 3)


def last_logits(model, ids: torch.Tensor, way: str) -> torch.Tensor:
    with torch.no_grad(), reading(way):
        return model.logits(model.trunk(ids, [Segment(len(ids))]).hidden[-1:])[0]


@pytest.mark.parametrize("ratio", [4, 128])
def test_without_entries_a_layer_sees_its_window_and_nothing_else(ratio: int) -> None:
    """One layer of window 8: a token 9 or more before the last moves its logits through entries alone."""
    model = small_model((ratio,), sliding_window=WINDOW)
    ids = tokens(model, 140)
    far, near = ids.clone(), ids.clone()
    far[100], near[139 - WINDOW + 1] = (ids[100] + 1) % 97, (ids[139 - WINDOW + 1] + 1) % 97
    far = far if ratio == 4 else torch.cat([(ids[:1] + 1) % 97, ids[1:]])
    if ratio == 4:
        assert not torch.equal(last_logits(model, far, ALL), last_logits(model, ids, ALL))
    else:
        assert not torch.equal(last_logits(model, far, ON), last_logits(model, ids, ON))
    assert torch.equal(last_logits(model, far, OFF), last_logits(model, ids, OFF))
    assert not torch.equal(last_logits(model, near, OFF), last_logits(model, ids, OFF))


def test_every_entry_is_what_a_large_choice_reads() -> None:
    model = small_model((4,))
    wide = small_model((4,), index_topk=64)
    ids = tokens(model, 100)
    assert torch.allclose(last_logits(model, ids, ALL), last_logits(wide, ids, ON), atol=1e-5)
    assert not torch.allclose(last_logits(model, ids, ON), last_logits(wide, ids, ON), atol=1e-5)


def forced(model, ids: torch.Tensor, slots: torch.Tensor, way: str) -> tuple[Goal, Found]:
    """A text whose continuation is what it already makes the likeliest, read this way."""
    with reading(way):
        whole = torch.cat([ids, torch.tensor([first_choice(model, ids)])])
    return Goal(model, whole, slots), Found(whole, 0.0, 1)


def test_an_attack_by_entries_alone_is_gone_without_them() -> None:
    """Slots beyond the window of a single layer: without entries all fillings have the same first choice. Among random
    fillings some have another with entries: those work with compression and, whatever they are, not without."""
    model, slots = small_model((4,), sliding_window=WINDOW, index_topk=64), torch.arange(4, 40)
    ids = tokens(model, 64)
    without = {first_choice_of(model, ids, OFF)}
    attacks = 0
    for seed in range(30):
        text = ids.clone()
        text[slots] = tokens(model, len(slots), seed + 100)
        without.add(first_choice_of(model, text, OFF))
        goal, found = forced(model, text, slots, ON)
        if int(found.text[-1]) != first_choice_of(model, ids, OFF):
            attacks += 1
            assert works(goal, found) and works(goal, found, ON, "float32") and not works(goal, found, OFF)
    assert len(without) == 1 and attacks >= 3


def first_choice_of(model, ids: torch.Tensor, way: str) -> int:
    with reading(way):
        return first_choice(model, ids)


def test_an_attack_by_the_window_alone_works_in_every_way() -> None:
    """A model of a window layer alone, which has no entries: no way of reading changes anything."""
    model = small_model((0,), sliding_window=WINDOW)
    for seed in range(5):
        goal, found = forced(model, tokens(model, 40, seed), torch.arange(34, 38), ON)
        assert all(works(goal, found, way) for way in (ON, OFF, ALL))
        assert all(works(goal, found, ON, format) for format in ("float32", "bfloat16"))


@pytest.mark.parametrize("working", [True, False])
def test_the_probe(monkeypatch: pytest.MonkeyPatch, working: bool) -> None:
    model = small_model((0, 4, 128))
    monkeypatch.setattr(compression, "works", lambda *given: working)
    records = list(run(Subject(model), Few()))
    assert len(records) == (8 if working else 2) and all(r.probe == "attack.compression" for r in records)
    assert not records[0].detail["csa_leaves_out"]
    for r in records:
        assert r.n == 2 and r.value == working, "of no attacks there is no share"
        assert ("no pass" in r.finding) != working
    (goal, _) = goals(Subject(model), Few(), ON)
    assert int(goal.ids[-1]) != first_choice(model, goal.ids[:-1]), "the tenth, not the first"
    assert needs(small_model((0,)).config) and needs(model.config) is None
