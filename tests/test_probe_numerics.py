"""Failures caught here: a difference of bits that is not seen, or is seen where there is none; a sum that depends on
the batch and passes for invariant; a divergence that is not the known one; a flip that is not counted; repetitions or
cycles that are not those of a known text.
"""

import math

import pytest
import torch

from dsv4 import ops
from dsv4.measure.subjects import small_config, small_model, tokens
from dsv4.probe.numerics import (
    apart,
    cycle,
    differing,
    formats_of,
    greedy,
    last_logits,
    layouts,
    repeated,
    run_drift,
    run_invariance,
    run_loops,
)
from dsv4.probe.subject import Settings, Subject

RATIOS = (0, 4, 128)


class Few(Settings):
    def pick(self, quick: int, full: int) -> int:  # type: ignore[override]
        return max(2, quick // 4)


# --- invariance ------------------------------------------------------------------------------------------------------


def test_bits_are_counted() -> None:
    a = torch.tensor([1.0, -2.0, 0.0])
    b = torch.tensor([1.0, 2.0, -0.0])
    assert differing(a, a.clone()) == 0 and differing(a, b) == 2, "two signs"
    assert differing(a[:1], torch.nextafter(a[:1], torch.tensor(2.0))) == 1


def test_a_reordered_sum_is_reported() -> None:
    """The head's logits are summed in two halves where a call has more than 40 rows: not the same bits."""
    model = small_model(RATIOS)
    prompts = [tokens(model, n, seed=n) for n in (8, 20, 30)]

    def wrap(name, op):
        def linear(x, weight, *rest):
            if len(x) <= 40 or weight.shape != model.head.weight.shape:
                return op(x, weight, *rest)
            half = x.shape[1] // 2
            return op(x[:, half:].contiguous(), weight[:, half:].contiguous(), *rest) + op(
                x[:, :half].contiguous(), weight[:, :half].contiguous(), *rest
            )

        return linear

    with ops.wrapped(["linear"], wrap):
        found = layouts(model, prompts, 6, seed=0)
    assert any(bits for bits, _ in found["batch"]) and max(d for _, d in found["batch"]) < 1e-3


def test_the_ops_of_this_package_do_not_show_a_neighbour() -> None:
    pytest.importorskip("dsv4.ops.cpu.library", exc_type=ImportError)
    beside, chunks = run_invariance(Subject(small_model((*RATIOS, 4))), Few())
    assert beside.value == chunks.value == 1.0 and beside.n > 2 and not any(beside.detail["bits"])


# --- drift -----------------------------------------------------------------------------------------------------------


def test_divergence_and_flips_of_known_distributions() -> None:
    """KL of (1/2, 1/2) from (1/4, 3/4) is log(2) - log(3) / 2."""
    want, got = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log(), torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    kl, flip = apart(got, want)
    assert kl.tolist() == pytest.approx([math.log(2) - math.log(3) / 2, 0.0], abs=1e-6)
    assert flip.tolist() == [True, False]


def test_fp32_memories_do_not_drift_and_narrow_ones_do() -> None:
    model = small_model(RATIOS)
    ids = tokens(model, 700)
    want = last_logits(model, ids, "float32", 8)
    assert want.shape == (8, 97) and torch.allclose(want, model(ids)[-8:], atol=1e-4)
    sizes = {f: float(apart(last_logits(model, ids, f, 8), want)[0].mean()) for f in ("float32", "bfloat16", "packed")}
    assert 0 == sizes["float32"] < sizes["bfloat16"] < sizes["packed"]
    assert formats_of(small_config(RATIOS)) == ["packed", "bfloat16"]
    records = list(run_drift(Subject(model), Few()))
    assert [r.name.split(" memories")[0] for r in records] == [
        "KL with packed", "other likeliest tokens with packed",
        "KL with bfloat16", "other likeliest tokens with bfloat16",
    ]  # fmt: skip
    assert records[0].detail["lengths"] == [16, 64, 256] and records[0].value > records[2].value > 0


# --- loops -----------------------------------------------------------------------------------------------------------


def test_repetitions_and_cycles_of_known_texts() -> None:
    assert repeated(range(100)) == 0 and repeated([1, 2, 3]) == 0
    assert repeated([7] * 104) == pytest.approx(100 / 101)
    assert repeated([1, 2, 3, 4, 5] * 4) == pytest.approx(1 - 5 / 17)
    assert cycle([9, 8, 1, 2, 3, 1, 2, 3, 1, 2, 3]) == 3 and cycle([5] * 10) == 1
    assert cycle([9, 8, 7, 6, 5, 4, 1, 2, 3, 1, 2, 3]) == 0, "not three times over"
    assert cycle(range(200)) == 0


def test_greedy_text_is_the_likeliest_token_each_time() -> None:
    """And a model that prefers one token whatever comes repeats it for ever."""
    model = small_model(RATIOS)
    prompts = [tokens(model, 5), tokens(model, 9, seed=1)]
    for prompt, text in zip(prompts, greedy(model, prompts, 12), strict=True):
        whole = torch.cat([prompt, torch.tensor(text)])
        assert model(whole[:-1]).argmax(dim=1)[len(prompt) - 1 :].tolist() == text
    with torch.no_grad():
        model.head.weight[:] = 0
        model.norm.weight[:] = 0
    rate, loops = run_loops(Subject(model), Few())
    assert loops.value == 1.0 and set(loops.detail["periods"]) == {1} and rate.value == pytest.approx(60 / 61)
