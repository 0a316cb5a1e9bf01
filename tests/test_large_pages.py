"""Failures caught here: weights that are said to lie on large pages and do not; a number or an address that changes on
the way; memory that grows by more than a seventh; an error where Linux does not do it; a model that serves without.
"""

import mmap
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4 import Engine
from dsv4.measure.resident import resident_bytes
from dsv4.measure.subjects import small_model
from dsv4.model import large_pages, transformer
from dsv4.model.large_pages import lay_on_large_pages
from dsv4.text import ByteTokenizer

MIB = 1 << 20
SIZE = large_pages.block_size()


def on_large_pages() -> int:
    """Bytes of this process that lie on large pages."""
    found = re.search(r"AnonHugePages: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    assert found
    return 1024 * int(found[1])


def region(count: int) -> tuple[mmap.mmap, int]:
    """`count` blocks of fresh memory in which nothing else lies, one to spare; and where the first begins in it."""
    held = mmap.mmap(-1, (count + 1) * SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return held, -torch.frombuffer(held, dtype=torch.uint8).data_ptr() % SIZE


def pieces(held: mmap.mmap, places: Iterable[tuple[int, int]]) -> list[Tensor]:
    """Tensors at (offset, bytes) of it, each a storage of its own, all numbers written."""
    out = [torch.frombuffer(held, dtype=torch.int64, offset=at, count=size // 8) for at, size in places]
    for i, t in enumerate(out):
        torch.arange(i, i + len(t), out=t)
    return out


@pytest.fixture
def linux() -> None:
    if not SIZE:
        pytest.skip("this system has no large pages, or forbids them")
    held, start = region(1)
    (probe,) = pieces(held, [(start, SIZE)])
    if not large_pages._advise(probe.data_ptr(), SIZE, large_pages._COLLAPSE):
        pytest.skip("this Linux does not move pages when it is asked to (before 6.1)")


def test_weights_are_moved_and_nothing_else_changes(linux: None) -> None:
    """Tensors side by side that are smaller than a block, as most weights are; a second time nothing is left to do."""
    held, start = region(24)
    size = SIZE // 2 + 4096
    tensors = pieces(held, ((start + i * size, size) for i in range(40)))
    places, before, resident = [t.data_ptr() for t in tensors], on_large_pages(), resident_bytes()
    moved = lay_on_large_pages(tensors)
    now = resident_bytes()
    assert resident is not None and now is not None and now - resident <= 40 * size / 7
    assert moved >= 20 * SIZE - SIZE and on_large_pages() - before >= moved
    assert [t.data_ptr() for t in tensors] == places
    assert all(torch.equal(t, torch.arange(i, i + len(t))) for i, t in enumerate(tensors))
    assert lay_on_large_pages(tensors) == moved


def test_what_is_no_weight_for_the_most_part_stays_as_it_is(linux: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three quarters of every block are tensors, the rest has never been written and would cost memory."""
    held, start = region(24)
    tensors = pieces(held, ((start + i * SIZE, SIZE * 3 // 4) for i in range(24)))
    before, resident = on_large_pages(), resident_bytes()
    assert lay_on_large_pages(tensors) == 0 and on_large_pages() == before
    now = resident_bytes()
    assert resident is not None and now is not None and now - resident < MIB
    monkeypatch.setattr(large_pages, "COVERED", 0.5)  # the same, had it been asked for
    assert lay_on_large_pages(tensors) == 24 * SIZE
    after = resident_bytes()
    assert after is not None and after - resident > 24 * SIZE // 4 - MIB
    assert all(torch.equal(t, torch.arange(i, i + len(t))) for i, t in enumerate(tensors))


def test_few_weights_and_those_elsewhere_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(large_pages, "_advise", lambda start, size, advice: asked.append(start) or True)
    monkeypatch.setattr(large_pages, "block_size", lambda: 2 * MIB)
    assert lay_on_large_pages([torch.zeros(large_pages.LEAST // 4 - 1)]) == 0 and not asked
    assert lay_on_large_pages([torch.empty(large_pages.LEAST, device="meta")]) == 0 and not asked
    assert lay_on_large_pages([torch.zeros(large_pages.LEAST)]) >= 4 * large_pages.LEAST - 4 * MIB and asked
    asked.clear()
    monkeypatch.setattr(large_pages, "block_size", lambda: 0)
    assert lay_on_large_pages([torch.zeros(large_pages.LEAST)]) == 0 and not asked


def test_a_refusal_is_no_error(tmp_path: Path) -> None:
    """Pages of a file that several may map; addresses that are nobody's."""
    count = large_pages.LEAST // 4
    mapped = torch.from_file(str(tmp_path / "weights"), shared=True, size=count, dtype=torch.float32)
    mapped.fill_(1)
    lay_on_large_pages([mapped])
    assert (mapped == 1).all()
    if SIZE:
        assert not large_pages._advise(0, SIZE, large_pages._COLLAPSE)
        assert not large_pages._advise(mapped.data_ptr() // 4096 * 4096, SIZE, 12345)


def test_who_begins_to_serve_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """All parameters and buffers, once an engine or a memory is made; not those that are read from disk as they run."""
    seen: list[set[int]] = []
    monkeypatch.setattr(transformer, "lay_on_large_pages", lambda given: seen.append({id(t) for t in given}))
    model = small_model((0, 4, 128), vocab_size=300)
    every = {id(t) for t in (*model.parameters(), *model.buffers())}
    Engine(model, ByteTokenizer())
    model.new_cache()
    assert seen == [every, every]
    model.stream = object()
    model.new_cache()
    assert len(seen) == 2
