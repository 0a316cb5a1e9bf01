"""One layer of a kind alone, at any width: random weights in the released formats, a memory as after a long text, and
the step that decodes the token after it. What is timed of it, and reported, belongs to bench/layer.py.

Weights are drawn as the bytes that are multiplied, so that a layer of 300 billion parameters' model takes no more
memory than its codes and scales.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dsv4 import controls
from dsv4.cache import Pool, SequenceMemory
from dsv4.config import AnyConfig, ModelConfig, V32Config
from dsv4.controls import ControlMemory
from dsv4.controls.memory import ControlPool
from dsv4.controls.run import Run
from dsv4.cost import kv_bytes
from dsv4.measure.subjects import fill, randomise
from dsv4.model.packed import put, released_code
from dsv4.model.rope import pair_frequencies, turns
from dsv4.model.segments import Segment, plan
from dsv4.ops.formats import e2m1_numbers
from dsv4.ops.weights import BLOCKS, PackedMatrix

Memory = SequenceMemory | ControlMemory

_CPU = torch.device("cpu")
_DRAWN = 1 << 23  # eight bytes each, drawn at a time
_REWIND = 1  # rows that a step takes back


def random_block(config: AnyConfig, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """The only layer of a model of one layer, weights random and of such a size that each keeps that of what it
    multiplies: large matrices in the released formats, the others in `dtype` or fp32 as the model holds them."""
    block = meta_block(config, dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, p in list(block.named_parameters()):
        if code := released_code(name, experts_code(config)):
            put(block, name, random_matrix(p.numel() // p.shape[-1], p.shape[-1], code, generator))
    for module in block.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=False))
        for name, b in list(module.named_buffers(recurse=False)):
            if b.is_meta:
                module.register_buffer(name, torch.zeros(b.shape, dtype=b.dtype))
    return randomise(block, seed, None)


def meta_block(config: AnyConfig, dtype: torch.dtype) -> nn.Module:
    """The same without any memory or number."""
    with torch.device("meta"):
        (block,) = controls.build(config, dtype).layers  # type: ignore[misc]
    return block


def experts_code(config: AnyConfig) -> str:
    """How the routed experts of a model are released."""
    return "fp4" if isinstance(config, ModelConfig) else "fp8"


def random_matrix(rows: int, columns: int, code: str, generator: torch.Generator) -> PackedMatrix:
    """Every finite code equally often; two neighbouring scales, such that the numbers are about columns^-0.5 large."""
    high, wide = BLOCKS[code]
    codes = _random_bytes(rows, columns if code == "fp8" else columns // 2, generator)
    every = torch.arange(256, dtype=torch.uint8)
    if code == "fp8":
        for part in codes.view(-1).split(8 * _DRAWN):
            part[(part & 127) == 127] -= 1  # the two codes that are no numbers
        numbers = every.view(torch.float8_e4m3fn).float()
    else:
        numbers = e2m1_numbers(every)
    size = numbers[numbers.isfinite()].square().mean().sqrt().item()
    exponent = round(math.log2(columns**-0.5 / size))
    shape = (-(-rows // high), -(-columns // wide))
    scales = torch.randint(126 + exponent, 128 + exponent, shape, generator=generator, dtype=torch.uint8)
    return PackedMatrix(code, codes, scales)


def _random_bytes(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    count = rows * columns
    words = torch.empty(-(-count // 8), dtype=torch.int64)
    for part in words.split(_DRAWN):
        part.random_(-(2**63), None, generator=generator)
    return words.view(torch.uint8)[:count].view(rows, columns)


def weight_bytes(block: nn.Module, config: AnyConfig, *, read: bool) -> int:
    """Bytes of a block's weights and scales as they lie in memory, also on the meta device; read: of the routed experts
    only those that one token is sent to."""
    total = 0
    code_of_experts = experts_code(config)
    for name, t in [*block.named_parameters(), *block.named_buffers()]:
        size = t.numel() * t.itemsize
        if t.is_meta and (code := released_code(name, code_of_experts)):
            high, wide = BLOCKS[code]
            rows, columns = t.numel() // t.shape[-1], t.shape[-1]
            size = rows * columns // (2 if code == "fp4" else 1) + -(-rows // high) * -(-columns // wide)
        if read and "ffn.experts." in name:
            assert isinstance(config, ModelConfig | V32Config)
            size = size * config.num_experts_per_tok // config.n_routed_experts
        total += size
    return total


def memory_bytes(config: AnyConfig, context: int, format: str) -> int:
    """Bytes that `filled_memory` allocates, as dsv4/cost counts them."""
    page = Pool(config, format=format).page_tokens if isinstance(config, ModelConfig) else 1
    name = "published" if format == "packed" else format
    held = kv_bytes.held(config, context, name, allocated=True, page_tokens=page, max_rewind=_REWIND)
    return sum(held.values())


def filled_memory(config: AnyConfig, context: int, format: str, dtype: torch.dtype, seed: int = 0) -> Memory:
    """A memory of `context` - 1 random tokens with room for one more. dtype: of packed rows when V4 reads them."""
    if isinstance(config, ModelConfig):
        pool: Pool | ControlPool = Pool(config, format=format, max_rewind=_REWIND, numbers=dtype, slots=1)
    else:
        pool = ControlPool(config, format=format, device=_CPU, max_rewind=_REWIND, pages=None)
    memory = pool.new(context)
    fill(memory, context - 1, torch.Generator().manual_seed(seed))
    return memory


@torch.inference_mode()
def decode_step(block: nn.Module, config: AnyConfig, memory: Memory, x: Tensor) -> Tensor:
    """The layer's output for one token after what is remembered, which is as before afterwards.

    x: its streams [1, N, M] (V4), or [1, M]. A plan serves all layers of a model, so the block's own call is what a
    layer takes; the rest is done beside it.
    """
    segment = Segment(1, memory)  # type: ignore[arg-type]
    if isinstance(memory, SequenceMemory):
        assert isinstance(config, ModelConfig)
        run = plan(config, [segment], _CPU)
        memory.begin()
        out, _ = block(x, torch.zeros(1, dtype=torch.int64), run, [memory.layers[0]])
        memory.advance(1)
    else:
        assert isinstance(config, V32Config)
        run = Run.of([segment], _CPU)
        frequencies = pair_frequencies(config.qk_rope_head_dim, config.rope_theta, config.rope_scaling)
        out, _ = block(x, turns(frequencies, run.positions()), run.parts(0))
        memory.length += 1
    memory.rewind(1)
    return out


def random_inputs(config: AnyConfig, dtype: torch.dtype, count: int, seed: int = 0) -> list[Tensor]:
    """Inputs of `decode_step`, each sent to experts of its own."""
    assert isinstance(config, ModelConfig | V32Config)
    streams = (config.num_streams,) if isinstance(config, ModelConfig) else ()
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, *streams, config.hidden_size, generator=generator).to(dtype) for _ in range(count)]


def other_memory(size: int = 1 << 28) -> Callable[[], None]:
    """A function that reads so many bytes of something else, as the other layers of a model are between two tokens: the
    caches then hold nothing of this one."""
    source = torch.ones(size // 4)  # zeros that nobody wrote would all be one page

    def read() -> None:
        source.sum()

    return read


@contextmanager
def stopwatch(modules: dict[str, nn.Module]) -> Iterator[dict[str, float]]:
    """Seconds that have been spent in each module's forward inside the block, by the names given."""
    spent: dict[str, float] = defaultdict(float)
    began: dict[str, float] = {}
    handles = []
    for name, module in modules.items():
        start = module.register_forward_pre_hook(lambda *_, n=name: began.__setitem__(n, time.perf_counter()))
        stop = module.register_forward_hook(
            lambda *_, n=name: spent.__setitem__(n, spent[n] + time.perf_counter() - began[n])
        )
        handles += [start, stop]
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()
