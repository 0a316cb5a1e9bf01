"""Failures caught here: a block in one call that is not, to the bit, the block op by op, in what it gives or in what it
leaves in the memory; a step that is planned in another way than a run's parts; one that goes on with weights or stores
that have moved, or passes by whoever watches.
"""

import ctypes
import gc
import math
import random
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from dsv4 import ops
from dsv4.measure.subjects import randomise, small_config, small_model, tokens
from dsv4.model import Transformer, step
from dsv4.model.packed import pack_weights
from dsv4.model.parts import Part
from dsv4.model.segments import Segment, plan

block = pytest.importorskip("dsv4.ops.cpu.block", reason="the C++ ops are not built", exc_type=ImportError)
library = pytest.importorskip("dsv4.ops.cpu.library", reason="the C++ ops are not built", exc_type=ImportError)
DTYPES = (torch.float32, torch.bfloat16)


@contextmanager
def op_by_op() -> Iterator[None]:
    few, step.FEW = step.FEW, 0
    try:
        yield
    finally:
        step.FEW = few


def model_of(dtype: torch.dtype, mtp: int = 0, **changes: int) -> Transformer:
    """A hash layer, all kinds of layers, entries that are chosen from 32 tokens on."""
    return randomise(Transformer(small_config((0, 4, 128, 4), mtp=mtp, **changes), dtype)).eval()


@torch.inference_mode()
def steps(model: Transformer, format: str, counts: list[list[int]]) -> tuple[list[Tensor], list[Tensor], int]:
    """Logits of every call and what the memories are in the end; `counts` has the tokens of each sequence, call by call
    (0: it waits). And how many blocks ran in one call."""
    memories = model.new_cache(batch=len(counts[0]), format=format)
    logits, ids = [], tokens(model, 4096)
    with library.watched() as called:
        for now in counts:
            given = [(n, m) for n, m in zip(now, memories, strict=True) if n]
            part = torch.cat([ids[i * 500 + m.length :][:n] for i, (n, m) in enumerate(given)])
            logits.append(model(part, segments=given))
    left = [t for m in memories for _, t in sorted(m.snapshot().items())]
    return logits, left, called.count("blocks")


def check(model: Transformer, format: str, counts: list[list[int]], fused: int) -> None:
    """Equal bits, and `fused` calls of all blocks at once."""
    got, kept, blocks = steps(model, format, counts)
    assert blocks == fused
    with op_by_op():
        want, wanted, blocks = steps(model, format, counts)
    assert blocks == 0
    for a, b in zip(got + kept, want + wanted, strict=True):
        assert torch.equal(a, b)


# one sequence whose calls end at every residue mod 4, across the edges of windows, HCA groups and pages
ALONE = [[n] for n in (1, 1, 1, 1, 2, 3, 5, 60, 54, 1, 1, 64, 63, 1, 1, 200, *[1] * 9)]
# three whose groups close at different calls, and which do not all take part
SIDE_BY_SIDE = [
    [3, 20, 40],
    [1, 1, 1],
    [0, 1, 1],
    [2, 0, 7],
    [1, 1, 1],
    [1, 1, 1],
    [30, 1, 30],
    [1, 1, 1],
    [20, 20, 20],
]


@pytest.mark.parametrize("format", ["float32", "bfloat16", "packed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_in_one_call_is_the_block_op_by_op(dtype: torch.dtype, format: str, isa: str) -> None:
    """Also with memories in another dtype than that of the activations."""
    model = model_of(dtype)
    check(model, format, ALONE, len(ALONE) - 1)  # the call of 200 tokens is too long
    check(model, format, SIDE_BY_SIDE, len([c for c in SIDE_BY_SIDE if sum(c) <= step.FEW]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_in_fp8_and_fp4(dtype: torch.dtype) -> None:
    model = model_of(dtype, hidden_size=128, moe_intermediate_size=128, o_lora_rank=128)
    pack_weights(model)
    check(model, "packed", ALONE, len(ALONE) - 1)


@torch.inference_mode()
def test_the_mtp_block_and_what_gates_decide() -> None:
    model = model_of(torch.float32, mtp=1)
    ids = tokens(model, 60)

    def drafted() -> list[Tensor]:
        memory = model.new_cache(mtp=True)[0]
        out = []
        for at in range(0, 50, 10):
            trunk = model.trunk(ids[at : at + 10], model._cut(ids[at : at + 10], None, [(10, memory)])[1])
            hidden, _, routing = model.draft(trunk, ids[at + 1 : at + 11])
            out += [hidden, *(t for r in (*trunk.routing, routing) for t in (r.scores, r.chosen, r.weights))]
        return out

    got = drafted()
    with op_by_op():
        want = drafted()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.fixture
def model() -> Transformer:
    return model_of(torch.float32)


@torch.inference_mode()
def test_what_has_moved_is_noticed(model: Transformer) -> None:
    """A parameter's numbers, a part of the block, what collapses the streams, and stores that grow with the pool."""
    ids, memory = tokens(model, 400), model.new_cache()[0]

    def both(at: int) -> Tensor:
        """The next token's logits, which are those op by op."""
        with op_by_op():
            want = model(ids[at : at + 1], segments=[(1, memory)])
        memory.rewind(1)
        with library.watched() as called:
            got = model(ids[at : at + 1], segments=[(1, memory)])
        assert torch.equal(got, want) and called.count("blocks") == 1
        return got

    both(0)
    layer = model.layers[1]
    layer.attn.wkv.weight.data = layer.attn.wkv.weight.data * 2
    both(1)
    layer.ffn = model_of(torch.float32).layers[3].ffn
    both(2)
    layer.attn.indexer.wq_b.weight = nn.Parameter(layer.attn.indexer.wq_b.weight * -1)
    both(3)
    model.hc_head_fn.data = model.hc_head_fn.data * 2
    both(4)
    model.hc_head_scale = nn.Parameter(model.hc_head_scale * 3)
    both(5)
    for at in range(6, 140):  # pages are added, and those before them move
        both(at)
    held = [memory.pool.new() for _ in range(3)]  # slots, too
    both(140)
    assert len(held) == 3


@pytest.mark.parametrize("first", ["model", "memory"])
@torch.inference_mode()
def test_a_model_and_its_memories_are_free_to_go(first: str) -> None:
    """What is laid out once for all steps holds neither blocks nor stores, whichever of the two lives longer."""
    model = model_of(torch.float32)
    held: dict[str, object] = {"model": model, "memory": (memory := model.new_cache()[0])}
    with library.watched() as called:
        model(tokens(model, 5), segments=[(5, memory)])
    assert called.count("blocks") == 1
    of_model = [weakref.ref(x) for x in (*model.layers, model.layers[1].attn.wkv.weight)]
    of_memory = [weakref.ref(x) for x in (memory.pool, *memory.layers, memory.layers[1].window)]
    del model, memory
    gone, left = (of_model, of_memory) if first == "model" else (of_memory, of_model)
    del held[first]
    gc.collect()
    assert all(r() is None for r in gone) and not any(r() is None for r in left)
    held.clear()
    gc.collect()
    assert all(r() is None for r in left)


@torch.inference_mode()
def test_nobody_who_watches_is_passed_by(model: Transformer) -> None:
    """A hook on a part of a block, ops that are wrapped, another backend that was asked for."""
    ids, memory = tokens(model, 40), model.new_cache()[0]
    model(ids[:20], segments=[(20, memory)])
    seen: list[str] = []
    hook = model.layers[2].attn.register_forward_hook(lambda *_: seen.append("attn"))
    with library.watched() as called:
        model(ids[20:21], segments=[(1, memory)])
    assert seen == ["attn"] and called.count("blocks") == 3
    hook.remove()
    around = model.layers[2].register_forward_hook(lambda *_: seen.append("block"))
    with library.watched() as called:
        model(ids[21:22], segments=[(1, memory)])
    assert seen == ["attn", "block"] and called.count("blocks") == 4
    around.remove()
    everywhere = register_module_forward_hook(lambda *_: seen.append("any"))
    with library.watched() as called:
        model(ids[22:23], segments=[(1, memory)])
    everywhere.remove()
    assert "blocks" not in called and seen.count("any") > 20
    memory.rewind(1)
    model.layers[2].ffn.forward = lambda *args, run=model.layers[2].ffn.forward: (seen.append("ffn"), run(*args))[1]
    with library.watched() as called:
        model(ids[22:23], segments=[(1, memory)])
    assert seen.pop() == "ffn" and called.count("blocks") == 3
    del model.layers[2].ffn.forward

    def wrap(name, op):
        return lambda *args: (seen.append(name), op(*args))[1]

    with ops.wrapped(("project_in",), wrap), library.watched() as called:
        model(ids[23:24], segments=[(1, memory)])
    assert seen.count("project_in") == 4 and "blocks" not in called
    for backend in ("reference", "blocked"):
        with ops.using(backend), library.watched() as called:
            model(ids[24:25], segments=[(1, memory)])
        assert not called


@torch.inference_mode()
def test_what_the_library_does_not_serve_runs_op_by_op(model: Transformer) -> None:
    """Another residual or attention, a memory in FP16, maps that were cast with the whole model."""
    changed = [{"residual": "hc"}, {"residual": "plain"}, {"attention": "dense"}]
    others = [(small_model((0, 4), **c), "float32") for c in changed]
    for other, format in [*others, (model, "float16"), (model_of(torch.float32).bfloat16(), "float32")]:
        memory = other.new_cache(format=format)[0]
        with library.watched() as called:
            other(tokens(other, 5), segments=[(5, memory)])
        assert called.count("blocks") == (other.config.attention == "dense")  # its first layer is V4's


def test_a_model_with_gradients_on_still_serves_a_memory(model: Transformer) -> None:
    """A memory's call has no gradients, whoever asks for them; the blocks notice that themselves."""
    with library.watched() as called:
        model(tokens(model, 5), segments=[(5, model.new_cache()[0])])
        model(tokens(model, 5))
    assert called.count("blocks") == 1


def arrays(step: Any, groups: Any, part: Part) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """What the library planned beside what was planned op by op."""

    def numbers(place: int | None, count: int, dtype: type = np.int64) -> np.ndarray | None:
        if place is None or not count:
            return None if place is None else np.zeros(0, dtype)
        held = (ctypes.c_char * (count * np.dtype(dtype).itemsize)).from_address(place)
        return np.frombuffer(held, dtype=dtype)

    def host(x: Tensor | None) -> Any:
        return None if x is None else x.numpy()

    def ring(got: Any, want: Any, own: int) -> Iterator[Any]:
        yield numbers(got.read, got.before), host(want.read)
        yield numbers(got.order, got.joined), host(want.order)
        yield numbers(got.write, got.stored), host(want.write)
        yield (numbers(got.kept, got.stored) if got.kept else None), host(want.kept)
        yield np.array(got.joined), np.array(len(want.read) + own if want.order is None else len(want.order))

    yield numbers(step.start, step.n), host(part.window.start)
    yield numbers(step.stop, step.n), host(part.window.stop)
    yield numbers(step.table, step.pages), part.pages
    yield from ring(step.ring, part.ring, step.n)
    for got, want in zip(step.groups, groups, strict=True):
        yield np.array([got.closing, got.longest]), np.array([want.closing, want.visible.longest])
        yield numbers(got.start, step.n), host(want.visible.start)
        yield numbers(got.stop, step.n), host(want.visible.stop)
        yield numbers(got.first_row, got.closing), host(want.first_row)
        yield numbers(got.entry, got.closing), host(want.entry)
        yield numbers(got.has_previous, got.closing, np.bool_), host(want.has_previous)
        if want.closing:  # else nothing is joined
            yield from ring(got.rows, want.rows, step.n)


def numbers(place: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What lies somewhere."""
    held = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(place)
    return torch.frombuffer(bytearray(held), dtype=dtype).view(shape)


@pytest.mark.parametrize("max_rewind", [0, 7])
def test_a_step_is_planned_as_parts_are(max_rewind: int) -> None:
    """Random sequences, at every place of rings, groups and pages; calls that are longer than a ring is."""
    model = small_model((0, 4, 128), sliding_window=16)
    draw, compared, kept = random.Random(3), 0, 0
    for _ in range(150):
        pool = model.new_pool(max_rewind=max_rewind)
        count = draw.choice((1, 1, 2, 5))
        memories = [pool.new() for _ in range(count)]
        pool.reserve([(m, draw.randrange(1, 700)) for m in memories])
        for m in memories:
            m.advance(draw.randrange(0, len(m.pages) * pool.page_tokens + 1))
        lengths = [draw.choice((1, 1, 2, 3, draw.randrange(1, 12), 64 // count)) for _ in memories]
        segments = [Segment(n, m) for n, m in zip(lengths, memories, strict=True)]
        run = plan(model.config, segments, torch.device("cpu"))
        laid, _ = step._step(run, block)
        assert torch.equal(numbers(laid.positions, (laid.n,), torch.int64), run.positions)
        groups = [run.parts[0].groups[kind.name] for kind in model.config.compressed_kinds]
        for got, want in arrays(laid, groups, run.parts[0]):
            assert (got is None) == (want is None) and (got is None or np.array_equal(got, want))
            compared += 1
        kept += bool(laid.ring.kept)
        rotations = torch.cat([run.turn["compressed"], *(g.turn for g in groups)])
        assert torch.equal(numbers(laid.turn, rotations.shape, torch.complex64), rotations)
        window = run.turn["window"]
        assert torch.equal(numbers(laid.window_turn, window.shape, torch.complex64), window)
    assert compared > 150 * 20 and (max_rewind > 0 or kept > 5)
