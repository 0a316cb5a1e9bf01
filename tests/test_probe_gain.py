"""Failures caught here: a certificate that holds for mixers that break it, or is off for mixers whose products are
known; a gain that is not the largest singular value, or not of the map that it is said to be; a control that runs with
other weights; coefficients that move although they are replayed; a hidden state that embeddings do not reach.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from differences import differ

from dsv4 import Transformer, ops
from dsv4.measure.subjects import small_model, tokens
from dsv4.model import Segment
from dsv4.probe.gain import run_dynamic, run_jacobian, run_ratio
from dsv4.probe.jacobian import (
    blocks_of,
    coefficients_replayed,
    embeddings_to_hidden,
    gain,
    with_residual,
    without_parameters,
)
from dsv4.probe.lanczos import largest_singular
from dsv4.probe.mixing import certificate, mixers_of, needs, run
from dsv4.probe.subject import Settings, Subject

RATIOS = (0, 4, 128)


@dataclass(frozen=True)
class Few(Settings):
    """An eighth of what quick does: 8 tokens, 2 inputs, 1,250 tokens of mixers."""

    def pick(self, quick: int, full: int) -> int:  # type: ignore[override]
        return max(2, quick // 8)


# --- the certificate -------------------------------------------------------------------------------------------------


def stack(matrix: torch.Tensor, depth: int = 20, count: int = 3) -> torch.Tensor:
    return matrix.expand(depth, count, *matrix.shape).clone()


def test_identity_and_permutations_have_gain_one() -> None:
    for matrix in (torch.eye(4), torch.eye(4)[[2, 0, 3, 1]]):
        found = certificate(stack(matrix))
        assert (found.forward, found.backward, found.spectral, found.bound) == (1.0, 1.0, 1.0, 1.0) and found.holds


def test_all_streams_into_one() -> None:
    """C^T is row-stochastic with a column of ones: every new stream is the old first one."""
    matrix = torch.zeros(4, 4)
    matrix[0] = 1  # C[j, k]: stream j goes to stream k
    found = certificate(stack(matrix))
    assert (found.forward, found.backward) == (1.0, 4.0) and found.spectral == pytest.approx(2.0, abs=1e-12)
    assert found.holds
    assert not certificate(stack(matrix).transpose(-1, -2)).holds, "a transposed mixer must break it"


def test_sinkhorn_holds_and_its_transpose_does_not() -> None:
    """Logits of every size over a thousand tokens and 86 mixers; the forward bound is that of single mixers."""
    mixers = torch.stack([ops.sinkhorn(10 ** (i / 40) * torch.randn(50, 4, 4), 20, 1e-6) for i in range(86)])
    found = certificate(mixers)
    assert found.holds and found.forward <= found.bound < 1.0001 and found.spectral <= 2 and found.backward <= 4
    turned = certificate(mixers.transpose(-1, -2))
    assert not turned.holds and turned.forward > 1.001
    row_last = mixers / mixers.sum(dim=-1, keepdim=True)  # a Sinkhorn that ends with the row step
    assert not certificate(row_last).holds


def test_unconstrained_mixing_grows() -> None:
    found = certificate(torch.eye(4) + torch.tanh(torch.randn(86, 10, 4, 4)))
    assert not found.holds and found.spectral > 100


def test_products_are_taken_in_order_and_over_every_stretch() -> None:
    """Two mixers whose product is small in one order and large in the other; a stretch in the middle that grows."""
    a, b = torch.zeros(4, 4), torch.eye(4)
    a[0, 1] = 3.0  # stream 0 -> 1, times three
    b[1, 2] = 5.0
    assert certificate(torch.stack([a, b])[:, None]).forward == 15.0
    c = torch.zeros(4, 4)
    middle = certificate(torch.stack([c, b, c])[:, None])
    assert middle.forward == 6.0, "the new stream 2 is 5 times the old 1 and once the old 2"
    assert [row[0] for row in middle.by_depth] == [0.0, 0.0, 0.0]


def test_mixers_are_those_that_the_model_applies() -> None:
    model = small_model(RATIOS)
    ids = tokens(model, 140)
    found = mixers_of(model, ids)
    assert found.shape == (6, 140, 4, 4) and differ(found.sum(dim=-2), torch.ones(6, 140, 4)) < 2e-6
    one = mixers_of(model, ids[:50])
    assert differ(one, found[:, :50]) < 1e-5, "a mixer depends on what is before it alone"


def test_the_probe_answers_for_mhc_and_hc_and_not_for_plain() -> None:
    records = list(run(Subject(small_model(RATIOS)), Few()))
    assert records[0].detail["holds"] and records[0].value <= 1.001 and records[0].n == 1250
    assert records[0].detail["bound"] < 1.001
    other = list(run(Subject(small_model(RATIOS, residual="hc")), Few()))
    assert not other[0].detail["holds"] and "DOES NOT HOLD" in other[0].finding
    assert needs(small_model(RATIOS, residual="plain").config) and not needs(small_model(RATIOS).config)


# --- the largest singular value --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(30, 30), (12, 40), (40, 12), (1, 5)])
def test_known_singular_values(rows: int, columns: int) -> None:
    """A matrix with known ones, the two largest 3% apart."""
    num = min(rows, columns)
    left, _ = torch.linalg.qr(torch.randn(rows, num))
    right, _ = torch.linalg.qr(torch.randn(columns, num))
    values = torch.linspace(1, 2, num)
    values[-1] = 2.06
    matrix = (left * values) @ right.T
    found = largest_singular(lambda v: matrix @ v, lambda u: matrix.T @ u, torch.randn(columns), tolerance=1e-6)
    assert found.value == pytest.approx(2.06, rel=1e-5) and found.residual < 1e-4
    assert (matrix @ found.right).norm().item() == pytest.approx(2.06, rel=1e-4)


def test_orthogonal_and_empty_maps() -> None:
    turn, _ = torch.linalg.qr(torch.randn(20, 20))
    found = largest_singular(lambda v: turn @ v, lambda u: turn.T @ u, torch.randn(20))
    assert found.value == pytest.approx(1.0, abs=1e-6) and found.steps <= 2
    nothing = largest_singular(torch.zeros_like, torch.zeros_like, torch.randn(20))
    assert nothing.value == 0 and nothing.residual == 0


def test_it_is_never_below_power_iteration() -> None:
    matrix = torch.randn(60, 60)
    start = torch.randn(60)
    found = largest_singular(lambda v: matrix @ v, lambda u: matrix.T @ u, start, tolerance=0.0, most=6)
    v = start / start.norm()
    for _ in range(5):
        v = matrix.T @ (matrix @ v)
        v = v / v.norm()
    assert found.value >= (matrix @ v).norm().item() * (1 - 1e-6)


# --- gains of models -------------------------------------------------------------------------------------------------


def full_jacobian(f, x: torch.Tensor) -> torch.Tensor:
    point = x.clone().requires_grad_(True)
    y = f(point)
    rows = [
        torch.autograd.grad(y, point, one.view_as(y), retain_graph=True)[0].flatten() for one in torch.eye(y.numel())
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("residual", ["mhc", "plain", "hc"])
def test_within_one_percent_of_an_exact_svd(residual: str) -> None:
    """And the finite difference along the direction found agrees: no derivative is missing."""
    model = small_model((0, 4), hidden_size=16, residual=residual)
    ids = tokens(model, 6)
    f, x = embeddings_to_hidden(model, ids)
    with without_parameters(model):
        exact = torch.linalg.svdvals(full_jacobian(f, x).double())
        found = gain(f, x, torch.Generator().manual_seed(1))
    assert found.sigma == pytest.approx(float(exact[0]), rel=1e-3) and found.asymmetry < 1e-4
    assert found.random < found.sigma and found.random == pytest.approx(
        float(exact.square().sum().div(x.numel()).sqrt()), rel=0.3
    )
    assert all(p.requires_grad for p in model.parameters())


def test_a_finite_difference_agrees() -> None:
    model = small_model(RATIOS)
    ids = tokens(model, 20)
    f, x = embeddings_to_hidden(model, ids)
    with without_parameters(model), ops.using("reference"), torch.no_grad():
        found = gain(f, x, torch.Generator().manual_seed(1), directions=0)
        point = x.clone().requires_grad_(True)
        with torch.enable_grad():
            y = f(point)
        start = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
        g = torch.autograd.grad(y, point, torch.ones_like(y))[0]
        h = 1e-2 * start / start.norm()
        slope = (f(x + h) - f(x - h)).sum() / 2
    assert (g * h).sum().item() == pytest.approx(slope.item(), rel=1e-2)
    assert found.sigma > 0


def test_blocks_in_order_make_the_model() -> None:
    model = small_model(RATIOS)
    ids = tokens(model, 20)
    with torch.no_grad():
        *_, (last, x) = blocks_of(model, ids)
        assert torch.equal(last(x), model.trunk(ids, [Segment(20)]).streams)


def test_without_sublayers_the_gain_is_a_power_of_the_mixing() -> None:
    """A linear network: streams that all begin as the embedding, mixed eight times and read by the head."""
    torch.manual_seed(1)
    model = small_model((0, 4, 128, 4), residual="hc")
    logits = 0.8 * torch.randn(4, 4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("wo_b.weight", "experts.w2", "shared_experts.w2.weight", "_fn")):
                p.zero_()
            if name.endswith(("hc_attn_base", "hc_ffn_base")):
                p[8:] = logits.flatten()
    ids = tokens(model, 5)
    blocks = list(blocks_of(model, ids))
    mixed = torch.eye(4) + torch.tanh(logits)
    want = float(torch.linalg.svdvals(torch.linalg.matrix_power(mixed.double(), 8))[0])
    assert want > 50

    def through(x: torch.Tensor) -> torch.Tensor:
        for f, _ in blocks:
            x = f(x)
        return x

    with without_parameters(model):
        found = gain(through, blocks[0][1], torch.Generator().manual_seed(1), tolerance=1e-5)
    assert found.sigma == pytest.approx(want, rel=1e-4)


def test_controls_share_the_block_weights() -> None:
    model = small_model(RATIOS)
    for residual in ("plain", "hc"):
        other = with_residual(model, residual)
        assert other.config.residual == residual and other.layers[1].attn.wq_a.weight is not None
        own = dict(model.named_parameters())
        for name, p in other.named_parameters():
            assert p.data_ptr() == own[name].data_ptr(), name
    assert with_residual(model, "plain").num_parameters() < model.num_parameters()


def test_replayed_coefficients_give_the_clean_pass_and_stay() -> None:
    model = small_model(RATIOS)
    ids = tokens(model, 30)
    with torch.no_grad():
        clean = model.trunk(ids, [Segment(30)])
        moved = model.embedded(ids, None) * 3
        with coefficients_replayed(model, ids):
            again = model.trunk(ids, [Segment(30)])
            first = mixers_of(model, ids)
            model.trunk(ids, [Segment(30)], embedded=moved)
        assert differ(again.hidden, clean.hidden) < 1e-5
        assert differ(first, mixers_of(model, ids)) < 1e-6
        with coefficients_replayed(model, ids):
            other = mixers_of(model, tokens(model, 30, seed=5))
        assert torch.equal(other, first), "mixers of other ids are those that were recorded"


def test_frozen_static_coefficients_add_nothing() -> None:
    """Where fn is zero no coefficient depends on the input: D = 1."""
    model = small_model(RATIOS)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("_fn"):
                p.zero_()
    record = next(iter(run_dynamic(Subject(model), Few())))
    assert record.value == pytest.approx(1.0, abs=2e-3)
    lively = next(iter(run_dynamic(Subject(small_model(RATIOS)), Few())))
    assert abs(lively.value - 1) > 5e-3


def test_streams_that_are_a_plain_residual_have_ratio_one() -> None:
    """mHC with pre = 1/N, post = 1 and identity mixing is a plain residual: R = 1 for every input."""
    model = small_model(RATIOS)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("_fn"):
                p.zero_()
            if name.endswith(("hc_attn_base", "hc_ffn_base")):
                p[:4], p[4:8] = -math.log(3), 0.0  # sigmoid: 1/4, 2 sigmoid: 1
                p[8:] = 60 * torch.eye(4).flatten()
            if name == "hc_head_base":
                p.fill_(-math.log(3))
    first, second = run_ratio(Subject(model), Few())
    assert first.value == pytest.approx(1.0, rel=2e-3) and first.low <= first.value <= first.high
    # I + tanh of these logits doubles what streams carry at each mixing, beside which what blocks put in fades
    assert second.value > 1.2


def test_the_jacobian_probe_has_a_row_for_every_block() -> None:
    records = list(run_jacobian(Subject(small_model(RATIOS)), Few()))
    assert [r.name for r in records][-1] == "largest relative gain of a block"
    assert len(records[-1].detail["plot"]["x"]) == 3 and all(r.residual is None or r.residual < 2e-2 for r in records)
    rho, sigma, random = (r.value for r in records[:3])
    assert random < sigma and rho > 0


# --- the way in ------------------------------------------------------------------------------------------------------


def test_embeddings_given_are_those_of_the_ids_and_routing_stays_with_the_ids() -> None:
    model = small_model(RATIOS)
    ids, others = tokens(model, 40), tokens(model, 40, seed=1)
    with torch.no_grad():
        own = model.trunk(ids, [Segment(40)])
        given = model.trunk(ids, [Segment(40)], embedded=model.embed(ids))
        assert torch.equal(own.hidden, given.hidden)
        routed = model.trunk(others, [Segment(40)], embedded=model.embed(ids))
        assert torch.equal(routed.routing[0].chosen, model.layers[0].ffn.gate.tid2eid[others])
        assert not torch.equal(routed.hidden, own.hidden)
    with pytest.raises(AssertionError, match="a row for each id"):
        model.trunk(ids, [Segment(40)], embedded=model.embed(ids[:5]))
    assert isinstance(model, Transformer)
