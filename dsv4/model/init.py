"""How a new model starts. The paper gives no initialisation; the choices that are ours are marked.

A seed gives the same model however many processes share it. A model that is too large for one is made on the meta
device, cut, and only then filled:

    with torch.device("meta"):
        model = Transformer(config)
    for block in (*model.layers, *model.mtp):
        fully_shard(block)
    fully_shard(model)
    torch.manual_seed(seed)  # the same in every process
    materialise(model, config)

Every process then draws all numbers of the model, in blocks, and keeps those of its own rows: torch's generator cannot
leap ahead. That costs every process the time of drawing a whole model (a core draws roughly 1e8 numbers a second, so
V4-Flash takes the better part of an hour), and no more memory than a block.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dsv4.config import ModelConfig
from dsv4.model.moe import Gate

BLOCK = 1 << 24  # numbers drawn at a time for a sharded parameter: 64 MiB in fp32
GROUP = 16  # numbers that torch makes together on the CPU, from as many uniform ones


@torch.no_grad()
def materialise(model: nn.Module, config: ModelConfig, device: torch.device | str = "cpu") -> None:
    """Give a model that was made on the meta device its memory, on `device`, and the numbers of one that was made on
    the CPU at once with the same seed, bit for bit; torch's generator is left where that leaves it.

    Of a sharded parameter (a DTensor cut along its first dimension, as `fully_shard` does, into equal parts or not, and
    before that perhaps by another cut) a process gets its own rows, wherever they lie. Buffers are whole in every
    process: `fully_shard` does not cut them, any token id may come to any process, and a hash table of the published
    size is 6 MB. A model that is not sharded has these numbers on the CPU; on another device its parameters come from
    that device's generator.
    """
    model.to_empty(device=device)
    embedding = model.get_parameter("embed.weight")
    for _ in normal_blocks(embedding.numel(), 1.0, embedding.dtype):
        pass  # torch's own start of an embedding, which a model made at once draws before all others
    initialise(model, config)


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig) -> None:
    """Fill every parameter and buffer in place, the random ones from torch's global generator; on the meta device
    nothing happens. This is the end of making a model; one that was made without memory needs `materialise`."""
    for name, p in sorted(model.named_parameters(), key=lambda item: draw_order(item[0])):
        if p.is_meta:
            continue
        leaf = name.rsplit(".", 1)[-1]
        if name.endswith("norm.weight"):
            p.fill_(1.0)
        elif leaf.startswith("hc_"):
            _hyper(leaf, p, config)
        elif leaf in ("attn_sink", "ape"):
            p.zero_()
        else:
            _normal(p, config.initializer_range)
    for module in model.modules():
        if isinstance(module, Gate):
            module.fill_buffers()


def draw_order(name: str) -> int:
    """Numbers are drawn in the order of the published names, which in the MTP block is not that of the modules: a seed
    goes on giving the model that it gave."""
    if not name.startswith("mtp."):
        return 0
    return 1 if ".block.hc_" in name else 2 if ".hc_head_" in name else 3


def _hyper(leaf: str, p: Tensor, config: ModelConfig) -> None:
    """Start near a plain residual connection (ours): read the mean of the streams, write 1, mix almost nothing."""
    num = config.hc_mult
    if leaf.endswith("_fn"):
        _normal(p, config.initializer_range)
    elif leaf.endswith("_scale"):
        p.fill_(0.01)  # the dynamic part starts small [paper: "small at start"]
    else:
        base = torch.zeros(p.shape, dtype=p.dtype, device="cpu")  # hc: mixing starts as the identity
        base[:num] = -math.log(num - 1) if num > 1 else 0.0  # sigmoid -> 1 / num
        if len(p) > num and config.residual == "mhc":
            base[2 * num :] = -4.0 * (1 - torch.eye(num, device="cpu")).flatten()
        own, first = own_rows(p)
        own.copy_(base[first : first + len(own)])


def _normal(p: Tensor, std: float) -> None:
    """Fill with normal numbers: a plain tensor at once, of a sharded one its rows out of blocks that are let go."""
    own, first = own_rows(p)
    if own is p:
        p.normal_(0.0, std)
        return
    own, first = own.view(-1), first * math.prod(p.shape[1:])
    for start, values in normal_blocks(p.numel(), std, p.dtype):
        low, high = max(start, first), min(start + len(values), first + len(own))
        if low < high:
            own[low - first : high - first] = values[low - start : high - start]


def normal_blocks(numel: int, std: float, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(start, values) of `numel` numbers that are those of `torch.empty(numel, dtype=dtype).normal_(0, std)` on the CPU
    and leave the generator where that does. The values are gone with the next block.

    torch makes them in groups of 16, and the last 16 anew where groups do not come out even: a block is whole groups,
    and the last one has what is left over with it.
    """
    room = torch.empty(min(numel, BLOCK + GROUP - 1), dtype=dtype, device="cpu")
    start = 0
    while start < numel:
        left = numel - start
        count = left if left < BLOCK + GROUP else BLOCK
        yield start, room[:count].normal_(0.0, std)
        start += count


def own_rows(p: Tensor) -> tuple[Tensor, int]:
    """The rows of a parameter that this process holds and the index of the first; a plain tensor has all of them."""
    if not hasattr(p, "placements"):  # a DTensor, by its looks: the import takes long
        return p, 0
    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    cut = [axis for axis, placement in enumerate(placements) if not placement.is_replicate()]
    first, rows = 0, len(p)
    for axis in reversed(cut):  # of two cuts the inner one is made first: experts over processes, then their shares
        assert getattr(placements[axis], "dim", None) == 0, f"a parameter cut as {placements}: cut it along its rows"
        size = -(-rows // mesh.size(axis))
        start = min(rows, mesh.get_local_rank(axis) * size)
        first, rows = first + start, min(rows - start, size)
    own = p.to_local()  # type: ignore[attr-defined]
    assert len(own) == rows, f"{len(own)} rows of a parameter cut as {placements}, not {rows}"
    return own, first


@torch.no_grad()
def fill(p: Tensor, whole: Tensor) -> None:
    """Give a tensor, of which this process may have some rows only, the numbers of a whole one."""
    own, first = own_rows(p)
    own.copy_(whole if own is p else whole[first : first + len(own)])
