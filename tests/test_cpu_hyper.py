"""Failures caught here: a map or a choice of experts that differs from the reference's; a rounding left out or added;
streams mixed by the wrong index of a map; a tie that goes to another expert than the lowest; a tail that is left out or
read past; a token whose result depends on its batch or on the number of threads; a call that is served though it
should be refused.

Every test runs with every set of instructions that the machine has.
"""

import pytest
import torch
from differences import differ
from guards import guarded
from torch import Tensor

from dsv4 import ops
from dsv4.ops import reference

cpu = pytest.importorskip("dsv4.ops.cpu", exc_type=ImportError)

pytestmark = pytest.mark.usefixtures("isa")
FP32, BF16 = torch.float32, torch.bfloat16
ITERS, EPS, NORM_EPS = 20, 1e-6, 1e-6
TOKENS = (1, 2, 5, 6, 7, 13, 50)


def close(a: Tensor, b: Tensor) -> bool:
    """FP32: within 1e-5 of the largest number. BF16: the same but for a few sums next to a tie.

    Such a sum may be a step apart, and two steps where it is rounded again after a product.
    """
    assert a.dtype == b.dtype and a.shape == b.shape
    if not a.numel():
        return True
    largest = b.abs().max().clamp_min(1e-30).item()
    if a.dtype == FP32:
        return differ(a, b) <= 1e-5 * largest
    apart = (a.float() - b.float()).abs()
    return bool((apart <= 2.0**-6 * b.float().abs() + 1e-5 * largest).all() and (apart > 0).float().mean() < 0.05)


def parameters(num: int, width: int, outputs: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    outputs = (2 + num) * num if outputs is None else outputs
    fn = torch.randn(outputs, num * width) * (num * width) ** -0.5
    return guarded(fn), guarded(torch.randn(outputs)), guarded(torch.rand(3) + 0.5)


def streams(n: int, num: int, width: int, dtype: torch.dtype) -> Tensor:
    return guarded((torch.randn(n, num, width) * 3).to(dtype))


SHAPES = [(4, 1), (4, 8), (4, 33), (4, 512), (4, 1030), (1, 40), (2, 17), (3, 9), (5, 64), (6, 20), (7, 31), (8, 300)]


# --- hyper-connections -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("num, width", SHAPES)
def test_maps_enter_write_and_collapse(num, width, dtype):
    for n in TOKENS:
        x, maps, gain = streams(n, num, width, dtype), parameters(num, width), guarded(torch.rand(width) + 0.5)
        for got, want in zip(
            cpu.hyper_maps(x, *maps, ITERS, EPS, NORM_EPS), reference.hyper_maps(x, *maps, ITERS, EPS, NORM_EPS),
            strict=True,
        ):  # fmt: skip
            assert got.dtype == FP32 and close(got, want)
        want = reference.hyper_enter(x, *maps, gain, ITERS, EPS, NORM_EPS)
        got = cpu.hyper_enter(x, *maps, gain, ITERS, EPS, NORM_EPS)
        assert all(close(a, b) for a, b in zip(got, want, strict=True))
        y = streams(n, 1, width, dtype)[:, 0]
        assert close(cpu.hyper_write(x, y, *want[1:]), reference.hyper_write(x, y, *want[1:]))
        fn, base, scale = maps[0][:num], maps[1][:num], maps[2][:1]
        args = (x, fn, base, scale, EPS, NORM_EPS)
        assert close(cpu.head_collapse(*args), reference.head_collapse(*args))


@pytest.mark.parametrize("num", range(1, 9))
@pytest.mark.parametrize("iters", [1, 2, 20])
def test_sinkhorn(num, iters):
    for n in (0, 1, 3, 4, 5, 19, 70):
        for size in (1.0, 30.0, 1e4):
            logits = guarded(torch.randn(n, num, num) * size)
            got = cpu.sinkhorn(logits, iters, EPS)
            assert close(got, reference.sinkhorn(logits, iters, EPS))
            assert n == 0 or size > 1 or differ(got.sum(1), torch.ones(n, num)) < 1e-5


def test_columns_sum_to_one_and_rows_are_scaled_first():
    """A matrix whose two orders of steps differ: after one iteration only the columns are exact."""
    logits = torch.tensor([[[3.0, 0, 0, 0], [3, 0, 0, 1], [0, 0, 2, 0], [0, 0, 0, 0]]])
    got = cpu.sinkhorn(logits, 1, 0.0)[0]
    assert differ(got.sum(0), torch.ones(4)) < 1e-6 < differ(got.sum(1), torch.ones(4))


def test_write_sums_over_the_first_index():
    x, y, post = torch.randn(1, 4, 3), torch.zeros(1, 3), torch.zeros(1, 4)
    comb = torch.zeros(1, 4, 4)
    comb[0, 2, 1] = 1.0  # stream 1 becomes stream 2
    assert torch.equal(cpu.hyper_write(x, y, post, comb)[0, 1], x[0, 2])


def test_long_rows_whose_parts_are_summed_apart():
    """More numbers in a token than one part has, with few tokens and with many."""
    torch.set_num_threads(2)
    for num, width in ((4, 2600), (3, 1400)):
        x, maps, gain = streams(40, num, width, FP32), parameters(num, width), torch.rand(width)
        whole = cpu.hyper_enter(x, *maps, gain, ITERS, EPS, NORM_EPS)
        want = reference.hyper_enter(x, *maps, gain, ITERS, EPS, NORM_EPS)
        assert all(close(a, b) for a, b in zip(whole, want, strict=True))
        for threads in (2, 1):
            torch.set_num_threads(threads)
            for n in (1, 3, 11):
                few = cpu.hyper_enter(x[:n], *maps, gain, ITERS, EPS, NORM_EPS)
                assert all(torch.equal(a, b[:n]) for a, b in zip(few, whole, strict=True))


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("num, width", [(4, 500), (4, 1100), (3, 70), (8, 130)])
def test_a_token_alone_has_the_same_bits(num, width, dtype):
    torch.set_num_threads(2)
    n = 131
    x, maps, gain = streams(n, num, width, dtype), parameters(num, width), torch.rand(width)
    y = streams(n, 1, width, dtype)[:, 0]
    head = maps[0][:num], maps[1][:num], maps[2][:1]

    def results(rows: slice) -> list[Tensor]:
        out, post, comb = cpu.hyper_enter(x[rows], *maps, gain, ITERS, EPS, NORM_EPS)
        pre, *_ = cpu.hyper_maps(x[rows], *maps, ITERS, EPS, NORM_EPS)
        return [
            out, post, comb, pre, cpu.hyper_write(x[rows], y[rows], post, comb),
            cpu.head_collapse(x[rows], *head, EPS, NORM_EPS), cpu.sinkhorn(comb, ITERS, EPS),
        ]  # fmt: skip

    whole = results(slice(0, n))
    for threads in (2, 1):
        torch.set_num_threads(threads)
        for size in (1, 2, 5, 6, 24, 131):
            for i in {0, 17, n - size}:
                if i + size <= n:
                    part = results(slice(i, i + size))
                    assert all(torch.equal(a, b[i : i + size]) for a, b in zip(part, whole, strict=True))


def test_the_read_is_rounded_before_the_norm():
    """In BF16 a norm of the unrounded sum would differ in many numbers."""
    x, maps, gain = streams(200, 4, 64, BF16), parameters(4, 64), torch.rand(64) + 0.5
    pre, _, _ = reference.hyper_maps(x, *maps, ITERS, EPS, NORM_EPS)
    unrounded = reference.rms_norm(torch.einsum("nj,njm->nm", pre, x.float()), gain, NORM_EPS).to(BF16)
    got = cpu.hyper_enter(x, *maps, gain, ITERS, EPS, NORM_EPS)[0]
    want = reference.hyper_enter(x, *maps, gain, ITERS, EPS, NORM_EPS)[0]
    assert (got != want).float().mean() < 0.01 < (unrounded != want).float().mean()


def test_numbers_that_are_not_finite_stay_with_their_token():
    x, maps, gain = streams(9, 4, 40, FP32), parameters(4, 40), torch.rand(40)
    clean = cpu.hyper_enter(x, *maps, gain, ITERS, EPS, NORM_EPS)
    x[3, 1, 7] = float("nan")
    x[5, 0, 0] = float("inf")
    got = cpu.hyper_enter(x, *maps, gain, ITERS, EPS, NORM_EPS)
    for a, b in zip(got, clean, strict=True):
        assert a[[3, 5]].isnan().all() and torch.equal(a[[0, 1, 2, 4, 6, 7, 8]], b[[0, 1, 2, 4, 6, 7, 8]])


def test_other_layouts_are_read_rightly():
    x, maps, gain = (
        streams(6, 4, 40, FP32).transpose(0, 1).contiguous().transpose(0, 1),
        parameters(4, 40),
        torch.rand(40),
    )
    got = cpu.hyper_enter(x, *maps, gain, ITERS, EPS, NORM_EPS)
    want = reference.hyper_enter(x, *maps, gain, ITERS, EPS, NORM_EPS)
    assert all(close(a, b) for a, b in zip(got, want, strict=True))
    comb = want[2].transpose(1, 2)
    args = x, want[0].T.contiguous().T, want[1].T.contiguous().T, comb
    assert close(cpu.hyper_write(*args), reference.hyper_write(*args))
    assert close(cpu.sinkhorn(comb, 3, EPS), reference.sinkhorn(comb, 3, EPS))


def test_no_tokens():
    x, maps = streams(0, 4, 40, BF16), parameters(4, 40)
    out, post, comb = cpu.hyper_enter(x, *maps, torch.rand(40), ITERS, EPS, NORM_EPS)
    assert (out.shape, post.shape, comb.shape) == ((0, 40), (0, 4), (0, 4, 4))
    assert cpu.hyper_write(x, out, post, comb).shape == x.shape


# --- gate ------------------------------------------------------------------------------------------------------------


def experts(num: int, width: int, dtype: torch.dtype = FP32) -> Tensor:
    return guarded((torch.randn(num, width) * 2 * width**-0.5).to(dtype))


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("num, width, k", [(4, 3, 2), (16, 512, 4), (37, 65, 8), (256, 48, 6), (3, 700, 3), (1, 5, 1)])
def test_gate(num, width, k, dtype):
    for n in (1, 2, 7, 26, 300):
        x, weight, bias = guarded(torch.randn(n, width).to(dtype)), experts(num, width), guarded(torch.randn(num) * 0.1)
        scores, chosen, weights = cpu.gate(x, weight, bias, None, k, 2.5)
        want = reference.gate(x, weight, None, chosen, k, 2.5)
        assert close(scores, want[0]) and close(weights, want[2])
        # the choice is the rule's, by these scores
        assert torch.equal(chosen, reference.topk_lowest(scores + bias, k))
        given = torch.randint(0, num, (n, k))
        again, picked, weights = cpu.gate(x, weight, None, given, k, 2.5)
        assert torch.equal(again, scores) and picked is given
        assert close(weights, reference.gate(x, weight, None, given, k, 2.5)[2])


@pytest.mark.parametrize("num, k", [(64, 6), (20, 20), (300, 8)])
def test_the_choice_is_the_reference_s_where_scores_are_few(num, k):
    """Many equal experts: products of small integers are exact, so every tie is one."""
    x = torch.randint(-1, 2, (60, 4)).float()
    weight, bias = torch.randint(-1, 2, (num, 4)).float(), torch.randint(0, 2, (num,)) * 0.0
    got, want = cpu.gate(x, weight, bias, None, k, 1.0), reference.gate(x, weight, bias, None, k, 1.0)
    assert torch.equal(got[1], want[1]) and close(got[2], want[2])


def test_scores_of_every_size():
    """One expert, one channel: the score is a function of a number."""
    x = torch.cat([torch.linspace(-130, 130, 4001), torch.tensor([19.999, 20.0, 20.001, 1e4, -1e4, 0.0, 3e38, -3e38])])
    weight = torch.ones(1, 1)
    got = cpu.gate(x[:, None], weight, torch.zeros(1), None, 1, 1.0)[0][:, 0]
    want = torch.nn.functional.softplus(x.double(), threshold=50).clamp_min(torch.finfo(FP32).tiny).sqrt()
    normal = x > -80  # below, exp has a coarser last place
    assert ((got / want - 1).abs() <= 5e-7)[normal].all() and ((got / want - 1).abs() <= 1e-2)[~normal].all()
    assert close(got[:, None], reference.gate(x[:, None], weight, torch.zeros(1), None, 1, 1.0)[0])


def test_negative_zero_ties_with_zero_and_nan_comes_first():
    x, weight = torch.zeros(1, 2), torch.ones(5, 2)
    score = cpu.gate(x, weight, torch.zeros(5), None, 1, 1.0)[0][0, 0].item()
    bias = torch.tensor([-score, 0.0, -score, -score, 0.0])
    assert cpu.gate(x, weight, bias, None, 5, 1.0)[1].tolist() == [[1, 4, 0, 2, 3]]
    weight[3] = float("nan")
    args = x, weight, torch.zeros(5), None, 3, 1.0
    got, want = cpu.gate(*args), reference.gate(*args)
    assert got[1].tolist() == want[1].tolist() == [[3, 0, 1]]
    assert torch.equal(got[0].isnan(), want[0].isnan()) and got[2].isnan().all() and want[2].isnan().all()


def test_a_bf16_gate_is_multiplied_in_fp32():
    x, weight, bias = torch.randn(40, 200), experts(24, 200, BF16), torch.zeros(24)
    assert close(cpu.gate(x, weight, bias, None, 3, 1.0)[0], reference.gate(x, weight, bias, None, 3, 1.0)[0])


def test_experts_that_are_not_there_are_not_read():
    given = torch.tensor([[0, 5], [1, -1], [2, 3]])
    weights = cpu.gate(torch.randn(3, 8), experts(5, 8), None, given, 2, 1.0)[2]
    assert weights[:2].isnan().all() and weights[2].isfinite().all()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_token_routed_alone_has_the_same_bits(dtype):
    torch.set_num_threads(2)
    n = 290
    x, weight, bias = torch.randn(n, 333).to(dtype), experts(50, 333), torch.randn(50)
    whole = cpu.gate(x, weight, bias, None, 6, 1.5)
    for threads in (2, 1):
        torch.set_num_threads(threads)
        for size in (1, 3, 24, 25, n):
            i = n - size
            part = cpu.gate(x[i:], weight, bias, None, 6, 1.5)
            assert all(torch.equal(a, b[i:]) for a, b in zip(part, whole, strict=True))


# --- what is refused -------------------------------------------------------------------------------------------------


def refusal(name: str, *args) -> str:
    return cpu.LIMITS[name].refuses(*args)


def test_what_is_served_and_refused():
    x, maps, gain = streams(2, 4, 8, BF16), parameters(4, 8), torch.rand(8)
    rest = (ITERS, EPS, NORM_EPS)
    assert refusal("hyper_maps", x, *maps, *rest) == refusal("hyper_enter", x, *maps, gain, *rest) == ""
    assert "float16" in refusal("hyper_enter", x.half(), *maps, gain, *rest)
    assert "fp32" in refusal("hyper_enter", x, maps[0].bfloat16(), *maps[1:], gain, *rest)
    assert "fp32" in refusal("hyper_enter", x, *maps, gain.bfloat16(), *rest)
    assert "contiguous" in refusal("hyper_enter", x, maps[0].T.contiguous().T, *maps[1:], gain, *rest)
    assert refusal("hyper_enter", x, *maps, gain.requires_grad_(), *rest) == ""  # test_cpu_hyper_gradients.py
    assert "gradient" in refusal("hyper_maps", x, *(p.clone().requires_grad_() for p in maps), *rest)
    assert "fit" in refusal("hyper_enter", x[:, :, 1:], *maps, gain.detach(), *rest)
    assert "fit" in refusal("hyper_enter", x, *maps, gain.detach()[1:], *rest)
    assert "fit" in refusal("head_collapse", x, *maps, EPS, NORM_EPS)
    assert "fit" in refusal("hyper_write", x, x[:, 0], torch.rand(2, 3), torch.rand(2, 4, 4))
    many = streams(2, 9, 8, FP32)
    assert "streams" in refusal("hyper_maps", many, *parameters(9, 8), *rest)
    assert "streams" in refusal("hyper_write", many, many[:, 0], torch.rand(2, 9), torch.rand(2, 9, 9))
    assert "streams" in refusal("head_collapse", many, *parameters(9, 8, 9), EPS, NORM_EPS)
    assert "streams" in refusal("sinkhorn", torch.rand(2, 9, 9), ITERS, EPS)
    assert "fp32" in refusal("sinkhorn", torch.rand(2, 4, 4).bfloat16(), ITERS, EPS)
    assert refusal("hyper_write", x, x[:, 0], torch.rand(2, 4), torch.rand(2, 4, 4)) == ""
    assert "dtype" in refusal("hyper_write", x, x[:, 0].float(), torch.rand(2, 4), torch.rand(2, 4, 4))
    assert "fp32" in refusal("hyper_write", x, x[:, 0], torch.rand(2, 4).bfloat16(), torch.rand(2, 4, 4))
    tokens, weight, bias = torch.randn(2, 8), experts(5, 8), torch.zeros(5)
    given = torch.zeros(2, 3, dtype=torch.int64)
    assert (
        refusal("gate", tokens, weight, bias, None, 3, 1.0)
        == refusal("gate", tokens, weight, None, given, 3, 1.0)
        == ""
    )
    assert "fit" in refusal("gate", tokens[:, 1:], weight, bias, None, 3, 1.0)
    assert "bias" in refusal("gate", tokens, weight, None, None, 3, 1.0)
    assert "more choices" in refusal("gate", tokens, weight, bias, None, 6, 1.0)
    assert "given" in refusal("gate", tokens, weight, None, given, 2, 1.0)
    assert "contiguous" in refusal("gate", tokens, weight.T.contiguous().T, bias, None, 3, 1.0)


def test_refused_calls_are_served_by_others():
    x, maps = streams(2, 9, 8, FP32), parameters(9, 8)
    got = ops.hyper_maps(x, *maps, ITERS, EPS, NORM_EPS)
    assert all(close(a, b) for a, b in zip(got, reference.hyper_maps(x, *maps, ITERS, EPS, NORM_EPS), strict=True))
    assert ops.active("hyper_enter") == ops.active("gate", dtype=BF16) == "cpu"
