"""Failures caught here: an entry pooled from other rows than its group's, or from rows that are not there; a packed
byte that is not the reference's, at ties, subnormals, block maxima and short blocks; a turn the wrong way round; a
result that depends on what is computed beside it or on the number of threads; a kernel that reads past its rows; a call
that is served though it should be refused.

Every test runs with every set of instructions that the machine has.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from differences import differ
from guards import guarded
from torch import Tensor

from dsv4 import ops
from dsv4.ops import reference
from dsv4.ops.formats import Packed, RowFormat, v4_rows, v32_rows
from dsv4.ops.reference import pool_groups

cpu = pytest.importorskip("dsv4.ops.cpu", exc_type=ImportError)

pytestmark = pytest.mark.usefixtures("isa")
FP32, BF16 = torch.float32, torch.bfloat16


def steps_apart(a: Tensor, b: Tensor) -> float:
    """The largest difference in units of the larger number's last place (BF16: 2^-8 of it; FP32: of the largest)."""
    assert a.dtype == b.dtype and a.shape == b.shape
    if a.dtype == FP32:
        return differ(a, b) / (1e-5 * b.abs().max().clamp_min(1e-30).item())
    ordered = [torch.where(v < 0, -32768 - v, v) for v in (a.view(torch.int16).int(), b.view(torch.int16).int())]
    near_zero = (a.float() - b.float()).abs() < 1e-5 * b.float().abs().max()
    return (ordered[0] - ordered[1]).abs().masked_fill(near_zero, 0).max().item()


def turns(n: int, pairs: int) -> Tensor:
    angle = torch.rand(n, pairs) * 6.3
    return torch.polar(torch.ones_like(angle), angle)


# --- rotation --------------------------------------------------------------------------------------------------------

ROTATED = [((1, 8), 4), ((1, 8, 128), 16), ((5, 3, 48), 8), ((7, 30), 15), ((4, 2, 34), 17), ((3, 2, 2, 6), 1)]


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape, pairs", ROTATED)
@pytest.mark.parametrize("conjugate", [False, True])
def test_rotate(shape, pairs, conjugate, dtype):
    x, turn = guarded(torch.randn(shape).to(dtype)), turns(shape[0], pairs)
    if conjugate:
        turn = turn.conj()
    want = reference.rotate(x, turn)
    assert steps_apart(cpu.rotate(x, turn), want) <= 1
    assert torch.equal(cpu.rotate(x, turn)[..., : shape[-1] - 2 * pairs], x[..., : shape[-1] - 2 * pairs])


def test_rotating_back():
    x, turn = torch.randn(40, 8, 128), turns(40, 16)
    assert differ(cpu.rotate(cpu.rotate(x, turn), turn.conj()), x) < 1e-5


def test_rotate_reads_other_layouts():
    x, turn = torch.randn(6, 5, 32).transpose(0, 1), turns(16, 10)[:, ::2][3:8]
    assert steps_apart(cpu.rotate(x, turn), reference.rotate(x, turn)) <= 1
    assert steps_apart(cpu.rotate(x, turn.conj()), reference.rotate(x, turn.conj())) <= 1


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_row_rotated_alone_has_the_same_bits(dtype):
    torch.set_num_threads(2)
    x, turn = torch.randn(400, 8, 72).to(dtype), turns(400, 11)
    whole = cpu.rotate(x, turn)
    torch.set_num_threads(1)
    assert torch.equal(cpu.rotate(x, turn), whole)
    assert all(torch.equal(cpu.rotate(x[i : i + 1], turn[i : i + 1])[0], whole[i]) for i in (0, 7, 399))


# --- compression -----------------------------------------------------------------------------------------------------


def groups(sizes: list[int], r: int, overlap: bool, d: int, pairs: int, dtype: torch.dtype = FP32) -> list:
    """The arguments of `compress` for documents of so many whole groups, with rows of no group between them."""
    first, before, row = [], [], 0
    for size in sizes:
        for i in range(size):
            first.append(row + i * r)
            before.append(i > 0)
        row += size * r + 3
    c = 2 if overlap else 1
    pooled = torch.randn(2, max(row, 1), c * d)
    rows, previous = torch.tensor(first, dtype=torch.int64), torch.tensor(before, dtype=torch.bool)
    gain, turn = torch.rand(d) + 0.5, turns(len(first), pairs)
    return [pooled[0], 2 * pooled[1], rows, previous, r, overlap, gain, 1e-6, turn, dtype]


def read_rows(args: list) -> Tensor:
    """Which numbers of the rows the groups read, bool [R, c * d]."""
    values, _, first_row, has_previous, r, overlap = args[:6]
    read = torch.zeros(values.shape, dtype=torch.bool)
    half = values.shape[1] // 2 if overlap else 0
    for row, before in zip(first_row.tolist(), has_previous.tolist(), strict=True):
        read[row : row + r, half:] = True
        if overlap and before:
            read[row - r : row, :half] = True
    return read


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("r, overlap", [(4, True), (4, False), (128, False), (3, True), (1, False), (1, True)])
@pytest.mark.parametrize("d, pairs", [(128, 16), (64, 32), (130, 5), (20, 10), (6, 2), (2, 1)])
def test_compress(r, overlap, d, pairs, dtype):
    args = groups([3, 1, 0, 2], r, overlap, d, pairs, dtype)
    for i in (0, 1):  # rows that no group reads are poisoned
        args[i] = guarded(args[i].masked_fill(~read_rows(args), float("nan")))
    got, want = cpu.compress(*args), reference.compress(*args)
    assert got.dtype == dtype and got.isfinite().all()
    assert steps_apart(got, want) <= 2  # rounded three times: a different last bit of the sum may be seen twice


def test_an_entry_is_the_softmax_mean_of_its_rows():
    """By hand, one channel at a time."""
    r, d = 2, 2
    values, scores = torch.randn(6, 2 * d), torch.randn(6, 2 * d)
    first, before = torch.tensor([0, 2, 4]), torch.tensor([False, True, True])
    args = (values, scores, first, before, r, True, torch.ones(d), 0.0, turns(3, 0), FP32)
    for g, got in enumerate(cpu.compress(*args)):
        pooled = []
        for channel in range(d):
            own = [(scores[2 * g + i, d + channel], values[2 * g + i, d + channel]) for i in range(r)]
            old = [(scores[2 * g - r + i, channel], values[2 * g - r + i, channel]) for i in range(r)] if g else []
            total = sum(s.exp() for s, _ in own + old)
            pooled.append(sum(s.exp() * v for s, v in own + old) / total)
        assert differ(got, torch.stack(pooled) / torch.stack(pooled).square().mean().sqrt()) < 1e-5


@pytest.mark.parametrize("fill", ["huge", "low", "equal"])
def test_scores_of_every_size(fill):
    args = groups([3], 4, True, 48, 8)
    args[1] = {"huge": args[1] * 1e4, "low": args[1] - 1e6, "equal": torch.zeros_like(args[1])}[fill]
    assert steps_apart(cpu.compress(*args), reference.compress(*args)) <= 1


def test_numbers_that_are_not_finite_stay_in_their_entry():
    args = groups([4], 4, True, 32, 4)
    clean = cpu.compress(*args)
    args[0][9, 32] = float("nan")  # the third group's own half
    args[1][1, 40] = float("nan")  # the first group's own half
    got = cpu.compress(*args)
    assert got[0].isnan().all() and got[2].isnan().all() and torch.equal(got[1::2], clean[1::2])
    assert torch.equal(got.isnan(), reference.compress(*args).isnan())


def test_rows_in_a_store_are_read_where_they_lie():
    args = groups([3, 2], 4, True, 32, 4, BF16)
    want = cpu.compress(*args)
    rows = torch.stack(args[:2], dim=1)
    args[:2] = rows[:, 0], rows[:, 1]
    assert torch.equal(cpu.compress(*args), want)


def test_a_group_without_its_rows_reads_none():
    args = groups([3], 4, True, 32, 4)
    args[2] = torch.tensor([0, -4, args[0].shape[0] - 3])
    got = cpu.compress(*args)
    assert got[0].isfinite().all() and got[1:].isnan().all()


def test_no_group_closes():
    assert cpu.compress(*groups([0], 4, True, 32, 4)).shape == (0, 32)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("r, overlap", [(4, True), (128, False)])
def test_an_entry_made_alone_has_the_same_bits(r, overlap, dtype):
    torch.set_num_threads(2)
    args = groups([9, 5], r, overlap, 136, 16, dtype)
    whole = cpu.compress(*args)
    torch.set_num_threads(1)
    assert torch.equal(cpu.compress(*args), whole)
    first, before = args[2:4]
    for i in range(len(first)):
        begin = int(first[i]) - (r if before[i] else 0)
        rows = slice(begin, int(first[i]) + r)
        alone = list(args)
        alone[:4] = args[0][rows], args[1][rows], first[i : i + 1] - begin, before[i : i + 1]
        alone[8] = args[8][i : i + 1]
        assert torch.equal(cpu.compress(*alone)[0], whole[i])


def test_pooling_is_rounded_before_the_norm():
    """In BF16 a norm of the unrounded mean would differ in many numbers."""
    args = groups([200], 4, False, 64, 1, BF16)
    args[8] = torch.ones_like(args[8])
    pooled = pool_groups(*args[:6])
    unrounded = reference.rms_norm(pooled, args[6], 1e-6).to(BF16)
    got, want = cpu.compress(*args), reference.compress(*args)
    assert (got != want).float().mean() < 0.01 < (unrounded != want).float().mean()


# --- packed rows -----------------------------------------------------------------------------------------------------


def packed(formats: tuple[RowFormat, RowFormat]) -> list[Packed]:
    return [format for format in formats if isinstance(format, Packed)]


WIDE, KEY = packed(v4_rows(512, 64, 128, "packed", FP32))
SMALL, SMALL_KEY = packed(v4_rows(128, 32, 64, "packed", BF16))
LATENT, KEY8 = packed(v32_rows(512, 64, 128, "packed"))
FORMATS = [
    WIDE, KEY, SMALL, SMALL_KEY, LATENT, KEY8,
    Packed(100, "fp8", 64, tail=6, align=8), Packed(37, "fp8", 16), Packed(5, "fp8", 3, tail=2),
    Packed(33, "fp8", 32, fp32_scales=True), Packed(75, "fp4", 32, tail=2), Packed(37, "fp4", 7), Packed(1, "fp4", 32),
    Packed(66, "fp4", 33, fp32_scales=True, align=16), Packed(4, "fp8", 4, tail=4), Packed(4, "fp4", 32, rotated=True),
    Packed(16, "fp8", 64, rotated=True), Packed(256, "fp4", 32, tail=8, rotated=True),
]  # fmt: skip


def names(format: Packed) -> str:
    return f"{format.code}-{format.width}-{format.block}-{format.tail}"


def awkward(width: int, dtype: torch.dtype) -> Tensor:
    """Finite rows of every size: normals of all powers, ties, powers of two, subnormals, zeros of both signs."""
    rows = [torch.randn(60, width) * 2.0 ** torch.linspace(-149, 120, 60)[:, None]]
    rows.append(torch.randn(60, width) * 2.0 ** torch.randint(-20, 20, (60, width)))
    rows.append(torch.randint(-64, 65, (80, width)) * 2.0 ** torch.randint(-12, 6, (80, 1)))  # ties of both codes
    rows.append(2.0 ** torch.randint(-140, 120, (40, 1)) * torch.randint(-1, 2, (40, width)))
    rows.append(torch.randint(0, 2, (4, width)) * -0.0)
    top = torch.finfo(dtype).max
    extremes = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 2.0**-126, 1e-4, -1e-4, 448.0, 449.0, 6.0, -6.0, 6.5, 2.0**-133])
    rows.append(extremes[torch.randint(0, len(extremes), (40, width))])
    rows.append(torch.tensor([top, -top, 0.0, 1.0])[torch.randint(0, 4, (8, width))])
    return torch.cat(rows).to(dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("format", FORMATS, ids=names)
def test_bytes_are_those_of_the_reference(format, dtype):
    rows = awkward(format.width, dtype)
    if format.rotated:
        rows = rows[rows.abs().amax(dim=1) < 1e36]  # sums of others overflow: the rotated row is not finite
    rows = guarded(rows)
    got, want = cpu.pack_rows(rows, format), reference.pack_rows(rows, format)
    assert got.dtype == torch.uint8 and torch.equal(got, want)


def neighbours(grid: list[float]) -> Tensor:
    """Every midpoint of a grid and every number of it, with the next FP32 numbers above and below."""
    points = torch.tensor(grid + [(a + b) / 2 for a, b in itertools.pairwise(grid)])
    around = [points, torch.nextafter(points, torch.tensor(1e9)), torch.nextafter(points, torch.tensor(-1e9))]
    return torch.cat([torch.cat(around), -torch.cat(around)])


@pytest.mark.parametrize("code, top", [("fp8", 448.0), ("fp4", 6.0)])
@pytest.mark.parametrize("power", [-13, 0, 9])
def test_every_rounding_border(code, top, power):
    """In blocks whose largest number is the code's largest, so that the scale is this power of two."""
    codes = torch.arange(127, dtype=torch.uint8) if code == "fp8" else torch.arange(8, dtype=torch.uint8)
    fp4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    points = neighbours(codes.view(torch.float8_e4m3fn).tolist() if code == "fp8" else fp4)
    points = points[points.abs() <= top]
    rows = torch.cat([torch.full((len(points), 1), top), points[:, None]], dim=1) * 2.0**power
    format = Packed(2, code, 2)
    assert torch.equal(cpu.pack_rows(rows, format), reference.pack_rows(rows, format))


@pytest.mark.parametrize("numbers", [FP32, BF16])
@pytest.mark.parametrize("format", FORMATS, ids=names)
def test_unpacked_numbers_are_those_of_the_reference(format, numbers):
    """Of packed rows, and of any bytes at all (codes that no packing makes, every scale)."""
    format = replace(format, numbers=numbers)
    rows = reference.pack_rows(torch.randn(20, format.width) * 3, format)
    anything = torch.randint(0, 256, (300, format.row_bytes), dtype=torch.uint8)
    for data in (rows, anything):
        got, want = cpu.unpack_rows(guarded(data), format), reference.unpack_rows(data, format)
        assert got.dtype == want.dtype == numbers
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
        assert torch.equal(got.signbit() & ~got.isnan(), want.signbit() & ~want.isnan())


def test_every_code_under_every_scale():
    for code in ("fp8", "fp4"):
        format = Packed(256 if code == "fp8" else 512, code, 512)
        data = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
        data = torch.cat([data, torch.arange(256, dtype=torch.uint8)[:, None]], dim=1)
        got, want = cpu.unpack_rows(data, format), reference.unpack_rows(data, format)
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)) and torch.equal(got.isnan(), want.isnan())


def test_rows_of_any_shape_and_layout():
    data = cpu.pack_rows(torch.randn(6, 512), WIDE)
    want = reference.unpack_rows(data, WIDE)
    assert torch.equal(cpu.unpack_rows(data.view(2, 3, -1), WIDE), want.view(2, 3, -1))
    assert torch.equal(cpu.unpack_rows(data[0], WIDE), want[0])
    assert torch.equal(cpu.unpack_rows(data[::2], WIDE), want[::2])
    assert cpu.unpack_rows(data[:0], WIDE).shape == (0, 512) and cpu.pack_rows(want[:0], WIDE).shape == (0, 584)
    assert torch.equal(cpu.pack_rows(want[::2], WIDE), reference.pack_rows(want[::2], WIDE))
    assert torch.equal(cpu.pack_rows(want.T.contiguous().T, WIDE), reference.pack_rows(want, WIDE))


def test_two_threads_pack_the_same_bytes():
    torch.set_num_threads(2)
    rows = torch.randn(400, 512)
    data = cpu.pack_rows(rows, WIDE)
    numbers = cpu.unpack_rows(data, WIDE)
    torch.set_num_threads(1)
    assert torch.equal(cpu.pack_rows(rows, WIDE), data) and torch.equal(cpu.unpack_rows(data, WIDE), numbers)
    assert torch.equal(cpu.pack_rows(rows[7:8], WIDE), data[7:8])


# --- what is refused -------------------------------------------------------------------------------------------------


def refusal(name: str, *args) -> str:
    return cpu.LIMITS[name].refuses(*args)


def test_what_is_served_and_refused():
    x, turn = torch.randn(3, 8), turns(3, 2)
    assert refusal("rotate", x, turn) == refusal("rotate", x.bfloat16(), turn.conj()) == ""
    assert "gradient" in refusal("rotate", x.clone().requires_grad_(), turn)
    assert "float16" in refusal("rotate", x.half(), turn)
    assert "complex64" in refusal("rotate", x, turn.to(torch.complex128))
    assert "nothing" in refusal("rotate", x[:0], turn[:0])
    assert "fit" in refusal("rotate", x, turn[:2]) and "fit" in refusal("rotate", x[:, :2], turn)
    args = groups([2], 4, True, 32, 4)
    assert refusal("compress", *args) == refusal("compress", *args[:9], BF16) == ""
    assert "float16" in refusal("compress", *args[:9], torch.float16)
    assert "fp32" in refusal("compress", args[0].bfloat16(), *args[1:])
    assert "fit" in refusal("compress", args[0][:, :-1], *args[1:]) and "fit" in refusal(
        "compress", *args[:5], False, *args[6:]
    )
    assert "contiguous" in refusal("compress", args[0].T.contiguous().T, *args[1:])
    assert "gradient" in refusal("compress", args[0].requires_grad_(), *args[1:])
    assert refusal("pack_rows", torch.randn(2, 512), WIDE) == ""
    assert "float16" in refusal("pack_rows", torch.randn(2, 512).half(), WIDE)
    assert "fit" in refusal("pack_rows", torch.randn(2, 511), WIDE)
    data = torch.zeros(2, WIDE.row_bytes, dtype=torch.uint8)
    assert "fit" in refusal("unpack_rows", data[:, 1:], WIDE)
    assert refusal("unpack_rows", data, WIDE) == ""
    assert refusal("unpack_rows", data, Packed(512, "fp8", 64, tail=64, align=8, numbers=torch.float16))


def test_refused_calls_are_served_by_others():
    x, turn = torch.randn(3, 8), turns(3, 2)
    assert torch.equal(ops.rotate(x.half(), turn), reference.rotate(x.half(), turn))
    assert ops.rotate(x[:0], turn[:0]).shape == (0, 8)
    assert ops.active("rotate") == ops.active("compress", dtype=BF16) == ops.active("pack_rows") == "cpu"
