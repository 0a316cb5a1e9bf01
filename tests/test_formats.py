"""Failures caught here: a byte of a packed row that is not where the formats say; a number rounded to another one, or
a rounding left out; a scale that is off by a power of two; a chunk of a packed memory that reads other numbers than a
later one will; a pool that is unpacked whole.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv4 import Transformer, UserError, ops
from dsv4.cache import Pool
from dsv4.cost import kv_bytes
from dsv4.measure.subjects import fill, randomise, small_config, small_model, stream, tokens
from dsv4.ops.formats import Packed, PagedRows, hadamard, v4_rows, v32_rows

ROW, KEY = v4_rows(512, 64, 128, "packed", torch.float32)
LATENT, KEY8 = v32_rows(512, 64, 128, "packed")
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
# every finite e4m3 number that is not negative, by its code
E4M3 = [(c & 7) / 8 * 2.0**-6 if c < 8 else (1 + (c & 7) / 8) * 2.0 ** ((c >> 3) - 7) for c in range(127)]


def nearest_even(value: float, grid: list[float]) -> float:
    """The nearest of a grid, ties to the even code; derived here by search."""
    size = min(abs(value), grid[-1])
    code = min(range(len(grid)), key=lambda c: (abs(grid[c] - size), c % 2))
    return grid[code] if value >= 0 else -grid[code]


def by_hand(row: list[float], block: int, grid: list[float], floor: float) -> list[float]:
    """What a row becomes: the least power of two that brings a block's largest number into the grid, then rounding."""
    out = []
    for i in range(0, len(row), block):
        part = row[i : i + block]
        largest = max(max(abs(v) for v in part), floor)
        exponent = next(e for e in range(-126, 128) if largest <= grid[-1] * 2.0**e)
        out += [nearest_even(v / 2.0**exponent, grid) * 2.0**exponent for v in part]
    return out


def test_row_sizes() -> None:
    assert [f.row_bytes for f in (ROW, KEY, LATENT, KEY8)] == [584, 68, 656, 132]
    for width, rope, index in ((48, 16, 32), (64, 32, 64), (128, 32, 64), (512, 64, 128)):
        config = small_config(head_dim=width, qk_rope_head_dim=rope, index_head_dim=index)
        row, key = v4_rows(width, rope, index, "packed", torch.float32)
        assert (row.row_bytes, key.row_bytes) == kv_bytes.row_bytes(config, "published")


def test_known_bytes() -> None:
    """Even column in the low nibble; sign in bit 3; a scale byte is the exponent plus 127; the tail is BF16."""
    fp4 = Packed(4, "fp4", 32)
    assert fp4.pack(torch.tensor([[0.5, -6.0, 3.0, 1.0]])).tolist() == [[0xF1, 0x25, 127]]
    assert fp4.pack(torch.tensor([[1.0, -12.0, 6.0, 2.0]])).tolist() == [[0xF1, 0x25, 128]]
    assert fp4.pack(torch.tensor([[1.0, -12.5, 6.0, 2.0]])).tolist()[0][2] == 129, "12.5 needs the next power of two"
    fp8 = Packed(3, "fp8", 64, tail=1, align=8)
    assert fp8.pack(torch.tensor([[448.0, -1.0, 1.0]])).tolist() == [[0x7E, 0xB8, 0x80, 0x3F, 127, 0, 0, 0]]
    assert fp8.pack(torch.tensor([[449.0, -1.0, 1.0]])).tolist()[0][4] == 128
    exact = Packed(2, "fp8", 128, fp32_scales=True).pack(torch.tensor([[896.0, -448.0]]))
    assert exact[0, 2:].clone().view(torch.float32).item() == 2.0 and exact[0, :2].tolist() == [0x7E, 0xF6]


CODES = {"fp8": (64, E4M3, 1e-4), "fp4": (32, E2M1, 6 * 2.0**-126)}  # block, grid, floor of the largest number


@pytest.mark.parametrize("code", CODES)
def test_rounding_is_that_of_a_search_over_the_grid(code: str) -> None:
    """Ties included: midpoints of neighbours, in blocks whose largest number fixes the scale at 1."""
    block, grid, floor = CODES[code]
    ties = [(a + b) / 2 for a, b in itertools.pairwise(grid)]
    signed = [s * v for v in ties + grid for s in (1, -1)]
    rows = [[grid[-1], *signed[i : i + block - 1]] for i in range(0, len(signed), block - 1)]
    generator = torch.Generator().manual_seed(0)
    rows += (torch.randn(40, block, generator=generator) * 10 ** torch.linspace(-6, 6, 40)[:, None]).tolist()
    for row in rows:
        row = torch.tensor(row).tolist()  # as fp32
        read = Packed(len(row), code, block).as_read(torch.tensor([row]))
        assert read.tolist()[0] == by_hand(row, block, grid, floor)


@pytest.mark.parametrize("width", [*range(1, 9), 31, 32, 33, 63, 64, 65, 127, 130])
@pytest.mark.parametrize("code", CODES)
def test_short_last_blocks(code: str, width: int) -> None:
    """Every number has a scale of its own block, also where the last block is short."""
    block, grid, floor = CODES[code]
    rows = torch.randn(3, width) * 2.0 ** (torch.arange(width) // block * 5)
    packed = Packed(width, code, block)
    assert packed.as_read(rows).tolist() == [by_hand(row, block, grid, floor) for row in rows.tolist()]


@given(st.sampled_from([ROW, KEY, LATENT, KEY8]), st.integers(0, 10**6), st.integers(-20, 20))
def test_a_row_that_was_read_is_read_the_same_again(format: Packed, seed: int, power: int) -> None:
    """Packing is a projection (FP32 scales: up to a last bit). Errors stay within half a step of the grid."""
    rows = torch.randn(2, format.width, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    plain = Packed(format.width, format.code, format.block, format.tail, format.fp32_scales, format.align)
    read = plain.as_read(rows)
    assert torch.allclose(plain.as_read(read), read, rtol=1e-6 if format.fp32_scales else 0, atol=0)
    coded = format.coded
    largest = rows[:, :coded].unflatten(1, (-1, format.block)).abs().amax(2).repeat_interleave(format.block, 1)
    # e4m3: half a step is 2^-4 of the number; e2m1: at most 1 of 6 at the top, where the largest is at least 3
    step = rows[:, :coded].abs() / 16 if format.code == "fp8" else largest / 3
    smallest = largest * 2.0**-16 + (1e-4 if format.code == "fp8" else 0)
    assert ((read - rows)[:, :coded].abs() <= step + smallest).all()
    assert torch.equal(read[:, coded:], rows[:, coded:].bfloat16().float())


@pytest.mark.parametrize("format", [ROW, KEY, LATENT, KEY8])
def test_zero_tiny_and_huge_rows(format: Packed) -> None:
    rows = torch.zeros(4, format.width)
    rows[1] = 1e-30
    rows[2] = 1e30
    rows[3, ::2] = -3e4
    read = format.as_read(rows)
    assert read.isfinite().all() and (read[0] == 0).all()
    back = hadamard(read) if format.rotated else read
    for got, want in zip(back[2:], rows[2:], strict=True):
        assert torch.allclose(got, want, rtol=0.2, atol=0.02 * want.abs().max().item())
    assert format.pack(rows[:0]).shape == (0, format.row_bytes) and format.unpack(format.pack(rows[:0])).shape[0] == 0


def test_bf16_holds_what_was_packed() -> None:
    """Rows with power-of-two scales lose nothing in BF16, so that a BF16 model may read them as such."""
    for wide, narrow in zip(
        v4_rows(512, 64, 128, "packed", torch.float32), v4_rows(512, 64, 128, "packed", torch.bfloat16), strict=True
    ):
        data = wide.pack(torch.randn(20, wide.width))
        assert narrow.unpack(data).dtype == torch.bfloat16
        assert torch.equal(narrow.unpack(data).float(), wide.unpack(data))


def test_hadamard() -> None:
    """Sylvester's recursion, orthogonal, its own inverse; products of rotated vectors are those of the vectors."""
    matrix = torch.ones(1, 1)
    for n in (2, 4, 8, 128):
        while len(matrix) < n:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        x, y = torch.randn(5, 3, n), torch.randn(5, 3, n)
        assert torch.allclose(hadamard(x), x @ matrix * n**-0.5, atol=1e-5)
        assert torch.allclose(hadamard(hadamard(x)), x, atol=1e-5)
        assert torch.allclose((hadamard(x) * hadamard(y)).sum(-1), (x * y).sum(-1), atol=1e-4)


@pytest.mark.parametrize("format", [KEY, KEY8], ids=["fp4", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rotated_rows_are_rounded_to_their_own_dtype_first(format: Packed, dtype: torch.dtype) -> None:
    """The released code's rule, in its order: Hadamard in fp32, round to the model's dtype, then FP4 (or FP8).

    Of bf16 rows every other one changes by the rounding in between; of fp32 rows not a bit does.
    """
    rows = torch.randn(200, format.width).to(dtype)
    rotated = hadamard(rows.float())
    plain = replace(format, rotated=False)
    want, unrounded = plain.pack(rotated.to(dtype).float()), plain.pack(rotated)
    assert torch.equal(format.pack(rows), want)
    queries = rows.view(50, 4, format.width)
    assert torch.equal(format.as_query(queries), plain.unpack(want).view(queries.shape))
    changed = (want != unrounded).any(dim=1).float().mean()
    assert changed == 0 if dtype == torch.float32 else changed > 0.05
    if format is KEY:
        hand = [by_hand(row, 32, E2M1, CODES["fp4"][2]) for row in rotated.to(dtype).tolist()]
        assert format.as_read(rows).tolist() == hand


def test_what_a_bf16_model_keeps_is_rounded_once_more() -> None:
    """End to end: a bf16 model's keys in a packed memory are FP4 of rotated bf16 numbers."""
    model = randomise(Transformer(small_config((4,)), torch.bfloat16))
    ids = tokens(model, 300)
    memory, plain = model.new_cache(format="packed")[0], model.new_cache(format="bfloat16")[0]
    for each in (memory, plain):
        stream(model, ids, 300, [each])
    store, keys = memory.layers[0].index.entries, plain.entries(plain.layers[0].index.entries, 75)[:]
    fp4, rotated = replace(store.format, rotated=False), hadamard(keys.float())
    kept = memory.entries(store, 75).kept()
    assert torch.equal(kept, fp4.pack(rotated.bfloat16().float()))
    assert not torch.equal(kept, fp4.pack(rotated))


# --- memories --------------------------------------------------------------------------------------------------------

FORMATS = ["float32", "bfloat16", "float16", "packed"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("length", [1, 3, 4, 127, 128, 129, 515])
def test_bytes_of_a_preallocated_memory(format: str, length: int) -> None:
    """To the byte what dsv4/cost counts, also with rows to spare for a rewind, empty and filled."""
    config = small_config((0, 4, 128, 4))
    known = {"packed": "published", "float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}[format]
    for spare in (0, 20):
        memory = Pool(config, format=format, max_rewind=spare).new(capacity=length)
        counted = kv_bytes.held(config, length, known, allocated=True, max_rewind=spare, page_tokens=128)
        want = sum(counted.values())
        assert memory.bytes() == memory.pool.bytes() == want
        fill(memory, length)
        assert memory.bytes() == memory.pool.bytes() == want and memory.length == length


CHUNKS = [3, 4, 5, 127, 128, 129, 130]


@pytest.mark.parametrize("ratios", [(0,), (4,), (128,), (0, 4, 128)])
def test_packed_chunks_agree(ratios: tuple[int, ...]) -> None:
    """Any chunking reads the same rounded rows. Sums differ in their last bits between chunks; where that moves a
    number over the border of two roundings, it changes by a step of the grid, so means are compared.
    """
    model = small_model(ratios)
    ids = tokens(model, 300)
    one = stream(model, ids, 1, model.new_cache(format="packed"))
    assert one.std() > 0.3
    for chunk in [*CHUNKS, 300]:
        other = stream(model, ids, chunk, model.new_cache(format="packed"))
        assert (one - other).abs().mean() < 2e-3, chunk


@pytest.mark.parametrize("ratios", [(0,), (4,), (128,), (0, 4, 128)])
def test_packed_is_near_fp32_and_not_equal(ratios: tuple[int, ...]) -> None:
    """A step of e4m3 is at most 1/8 of a number, so the logits move by some percent of their spread."""
    model = small_model(ratios, index_topk=512)  # all entries are read: a choice that falls otherwise would hide this
    ids = tokens(model, 300)
    exact, packed = (stream(model, ids, 100, model.new_cache(format=f)) for f in ("float32", "packed"))
    assert 0 < (exact - packed).abs().mean() < 0.1 * exact.std()


def test_packed_choices_are_those_of_rounded_keys() -> None:
    """Queries and keys are rotated and rounded on both sides, so scores stay near the unrounded ones."""
    model = small_model((4,), index_topk=16)
    memory, exact = model.new_cache(format="packed")[0], model.new_cache()[0]
    ids = tokens(model, 401)
    stream(model, ids[:400], 400, [memory]), stream(model, ids[:400], 400, [exact])
    indexer = model.layers[0].attn.indexer
    q = torch.randn(50, indexer.heads, indexer.width)
    keys = exact.entries(exact.layers[0].index.entries, 100)[:]
    packed = memory.layers[0].index.entries
    rows = memory.entries(packed, 100)[:]
    rounded = ops.index_scores(packed.format.as_query(q), torch.ones(50, indexer.heads), rows)
    want = ops.index_scores(q, torch.ones(50, indexer.heads), keys)
    assert torch.corrcoef(torch.stack([rounded.flatten(), want.flatten()]))[0, 1] > 0.95
    one_sided = ops.index_scores(q, torch.ones(50, indexer.heads), rows)
    assert torch.corrcoef(torch.stack([one_sided.flatten(), want.flatten()]))[0, 1] < 0.7, "a rotation on one side only"


@pytest.mark.parametrize("ratios", [(4,), (128,), (0, 4, 128)])
def test_packed_fork_rewind_snapshot_restore(ratios: tuple[int, ...]) -> None:
    """The same bits again, at every residue mod 4 and around 128."""
    model = small_model(ratios)
    ids = tokens(model, 300)
    for at in (1, 2, 3, 4, 5, 126, 127, 128, 129, 131, 250):
        memory = model.new_cache(format="packed", max_rewind=40)[0]
        stream(model, ids[:at], at, [memory])
        fork, saved = memory.fork(), memory.snapshot()
        want = stream(model, ids[at : at + 30], 30, [memory])
        memory.rewind(30)
        assert torch.equal(stream(model, ids[at : at + 30], 30, [memory]), want)
        assert torch.equal(stream(model, ids[at : at + 30], 30, [fork]), want)
        fresh = model.new_cache(format="packed", max_rewind=40)[0]
        fresh.restore(saved)
        assert torch.equal(stream(model, ids[at : at + 30], 30, [fresh]), want)
        assert saved["layers.0.window"].dtype == torch.uint8
    with pytest.raises(UserError, match="uint8"):
        model.new_cache(max_rewind=40)[0].restore(saved)


def test_backends_agree_on_packed_rows() -> None:
    model = small_model((0, 4, 128))
    ids = tokens(model, 290)
    got = stream(model, ids, 290, model.new_cache(format="packed"))
    with ops.using("reference"):
        want = stream(model, ids, 290, model.new_cache(format="packed"))
    assert (got - want).abs().mean() < 1e-3


def test_only_what_is_read_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token after a long text unpacks its choice and the keys in blocks, never a pool of entries at once."""
    model = small_model((4,))
    memory = model.new_cache(format="packed", capacity=8000)[0]
    fill(memory, 7999)
    seen: list[tuple[int, int]] = []
    read = PagedRows.__getitem__

    def spy(self, rows):
        out = read(self, rows)
        seen.append((self.format.width, out.numel() // self.format.width))
        return out

    monkeypatch.setattr(PagedRows, "__getitem__", spy)
    with ops.using("blocked"):  # in C++ rows are read where they lie
        model(tokens(model, 1), memory)
    k = model.config
    assert sum(n for width, n in seen if width == k.head_dim) == k.index_topk
    assert sum(n for width, n in seen if width == k.index_head_dim) == 2000


def test_a_filled_memory_goes_on() -> None:
    model = small_model((0, 4, 128))
    for format in FORMATS:
        memory = model.new_cache(format=format)[0]
        fill(memory, 1000, torch.Generator().manual_seed(1))
        assert model(tokens(model, 5), memory).isfinite().all() and memory.length == 1005
    with pytest.raises(UserError, match="cannot fill 9000"):
        fill(memory, 9000)


def test_wrong_formats() -> None:
    model = small_model((0, 4))
    with pytest.raises(UserError, match="cache format 'pakced' is unknown.*did you mean 'packed'"):
        model.new_cache(format="pakced")
    with pytest.raises(UserError, match="int32"):
        model.new_cache(format=torch.int32)
    odd = small_model((4,), index_head_dim=24)
    with pytest.raises(UserError, match="index_head_dim=24 is not a power of two"):
        odd.new_cache(format="packed")
    small_model((0,), index_head_dim=24).new_cache(format="packed")
