"""Failures caught here: pinned entries that are not read; a request without pins that changes by a bit, alone or beside
one with; entries beyond index_topk; other choices than pins and the best of the rest; pins lost in a memory, in chunks,
in a batch or with speculation; pins that a model without CSA, or without room, takes in silence.
"""

from collections.abc import Callable

import pytest
import torch

from dsv4 import Engine, Transformer, UserError, ops
from dsv4.engine import SamplingParams
from dsv4.measure.subjects import small_model, stream, tokens
from dsv4.model import Segment
from dsv4.model.indexer import choose_with_pins
from dsv4.ops.reference import index_scores
from dsv4.text import ByteTokenizer

RATIOS = (0, 4, 128, 4)


def choices(model: Transformer, run: Callable[[], object]) -> list[torch.Tensor]:
    """What CSA layers read in a run."""
    found: list[torch.Tensor] = []

    def watch(name: str, op: Callable) -> Callable:
        def attend(q, window_kv, window, entries, visible, chosen, sink, scale):
            if chosen is not None:
                found.append(chosen)
            return op(q, window_kv, window, entries, visible, chosen, sink, scale)

        return attend

    with torch.no_grad(), ops.wrapped(["sparse_attention"], watch):
        run()
    return found


def test_choice_is_pins_and_the_best_of_the_rest() -> None:
    """Against every query's scores sorted by hand; two sequences, one of which pins nothing; early queries see less."""
    torch.manual_seed(2)
    visible = ops.Spans(
        torch.tensor([0] * 60 + [15] * 40),
        torch.tensor([(t + 1) // 4 for t in range(60)] + [15 + (t + 1) // 4 for t in range(40)]),
    )
    q, weights, keys = torch.randn(100, 8, 16), torch.randn(100, 8), torch.randn(25, 16)
    pins = torch.tensor([3] * 60 + [0] * 40)
    got = choose_with_pins(q, weights, keys, visible, pins, 5)
    scores = index_scores(q, weights, keys)
    for i in range(100):
        lo, hi = int(visible.start[i]), int(visible.stop[i])
        seen = list(range(lo, hi))
        own = seen[: int(pins[i])]
        rest = sorted(seen[len(own) :], key=lambda e, i=i: (-scores[i, e].item(), e))[: 5 - int(pins[i])]
        want = sorted([*own, *rest])
        assert got[i].tolist() == [-1] * (5 - len(want)) + want
    assert torch.equal(got[60:], ops.index_scores_topk(q, weights, keys, visible, 5)[60:])
    full = choose_with_pins(q, weights, keys, visible, torch.full((100,), 5), 5)
    assert full[59].tolist() == [0, 1, 2, 3, 4] and full[99].tolist() == [15, 16, 17, 18, 19]


def test_pinned_entries_are_always_read_and_others_are_as_before() -> None:
    model = small_model(RATIOS)
    ids = tokens(model, 200)
    for found in choices(model, lambda: model(ids, segments=[Segment(200, pinned=18)])):
        late = found[60:]
        assert (late[:, :5] == torch.arange(5)).all(), "18 tokens are five entries, the last with two tokens of others"
        assert found.shape[1] == model.config.index_topk
    plain = choices(model, lambda: model(ids))
    assert not all((found[60:, :5] == torch.arange(5)).all() for found in plain)


@torch.no_grad()
def test_without_pins_nothing_changes_by_a_bit() -> None:
    """Alone, and beside a sequence that has pins."""
    model = small_model(RATIOS)
    ids, other = tokens(model, 150), tokens(model, 170, seed=1)
    alone = model(ids)
    assert torch.equal(model(ids, segments=[Segment(150, pinned=0)]), alone)
    both = model(torch.cat([ids, other]), segments=[Segment(150), Segment(170, pinned=12)])
    own = model(other, segments=[Segment(170, pinned=12)])
    assert torch.allclose(both[:150], alone, atol=1e-5) and torch.allclose(both[150:], own, atol=1e-5)
    if ops.active("sparse_attention") == "cpu":  # whose sums do not depend on the neighbours
        assert torch.equal(both[:150], alone) and torch.equal(both[150:], own)
    assert not torch.allclose(own, model(other), atol=1e-3)


@torch.no_grad()
def test_in_a_memory_and_in_every_chunking() -> None:
    model = small_model(RATIOS)
    ids = tokens(model, 150)
    whole = model(ids, segments=[Segment(150, pinned=18)])
    for chunk in (1, 37):
        memory = model.new_cache()[0]
        parts = [model(part, segments=[Segment(len(part), memory, 18)]) for part in ids.split(chunk)]
        assert torch.allclose(torch.cat(parts), whole, atol=2e-5)
    assert not torch.allclose(stream(model, ids, 37), whole, atol=1e-3)


def test_an_engine_pins_what_a_request_asks_for() -> None:
    """Greedy tokens are those of the model with pins; a neighbour without has its own; with speculation the same."""
    model = small_model(RATIOS, mtp=1, vocab_size=260)
    prompt = [1, *tokens(model, 140).tolist()]
    greedy = {"temperature": 0.0, "max_tokens": 8}
    pinned, plain = SamplingParams(**greedy, pinned=20), SamplingParams(**greedy)
    engine = Engine(model, ByteTokenizer())
    done = engine.generate([prompt, prompt], [pinned, plain])
    for completion, pins in zip(done, (20, 0), strict=True):
        ids = torch.tensor([*prompt, *completion.ids])
        with torch.no_grad():
            logits = model(ids, segments=[Segment(len(ids), pinned=pins)])[
                len(prompt) - 1 : -1, : engine.tokenizer.vocab_size
            ]
        assert logits.argmax(dim=1).tolist() == completion.ids
    speculative = Engine(model, ByteTokenizer(), speculative=1).generate([prompt], pinned)[0]
    assert speculative.ids == done[0].ids


def test_what_cannot_be_pinned_is_said() -> None:
    model = small_model(RATIOS)
    ids = tokens(model, 40)
    for wrong, sentence in ((33, "at most 32 can be pinned"), (-1, "must not be negative")):
        with pytest.raises(UserError, match=sentence):
            model(ids, segments=[Segment(40, pinned=wrong)])
    with pytest.raises(UserError, match="the model has none"):
        small_model((0, 128))(ids, segments=[Segment(40, pinned=4)])
    engine = Engine(small_model(RATIOS, vocab_size=260), ByteTokenizer())
    with pytest.raises(UserError, match="of a prompt of 3 tokens"):
        engine.add([1, 2, 3], SamplingParams(pinned=4))
    with pytest.raises(UserError, match="at most 32"):
        engine.add([1] * 60, SamplingParams(pinned=50))
    with pytest.raises(UserError, match="whole number"):
        SamplingParams(pinned=-1)
