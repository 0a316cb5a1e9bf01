"""A model larger than the memory: its blocks are read from disk before they run and make room for others after.

A block's tensors stay where they are and lose their bytes (an empty storage), so everything that holds them still does;
nothing but time tells a streamed model from another one. Blocks run in turn, again and again: what makes room is the
block whose turn is farthest away, so that all but the last few stay from pass to pass.
"""

import re
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from dsv4.errors import UserError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def as_bytes(given: int | str) -> int:
    """A number of bytes, also as "16GiB" or "500 MB"; UserError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(given).upper())
    if match is None or match[2] == "I":
        raise UserError(f"{given!r} is not a number of bytes: write it as 16GiB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module, by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def size_of(module: nn.Module) -> int:
    """Bytes of its tensors when they are there, which they need not be."""
    return sum(t.numel() * t.element_size() for t in tensors_of(module).values())


class Stream:
    """Reads blocks when they are about to run. blocks: by number, in the order of their turns, their tensors allocated
    on the device; read: fills one of them; room: bytes that all blocks together may hold."""

    def __init__(self, blocks: Mapping[int, nn.Module], read: Callable[[int], None], room: int):
        self.blocks, self.read, self.room = dict(blocks), read, room
        self.sizes = {i: size_of(block) for i, block in blocks.items()}
        self.resident: set[int] = set()
        self.reads = 0  # blocks read from disk so far
        self._order = {i: turn for turn, i in enumerate(blocks)}
        for i, block in blocks.items():
            self._drop(i)
            block.register_forward_pre_hook(self._hook(i))

    def need(self, i: int) -> None:
        """Have block i there; others go if there is no room for all."""
        if i in self.resident:
            return
        turns = len(self.blocks)
        while self.resident and self.held + self.sizes[i] > self.room:
            self._drop(max(self.resident, key=lambda j: (self._order[j] - self._order[i]) % turns))
        for tensor in tensors_of(self.blocks[i]).values():
            tensor.untyped_storage().resize_(tensor.numel() * tensor.element_size())
        try:
            self.read(i)
        except BaseException:  # half of it is there
            self._drop(i)
            raise
        self.resident.add(i)
        self.reads += 1

    def _hook(self, i: int) -> Callable[[nn.Module, object], None]:
        return lambda module, args: self.need(i)

    @property
    def held(self) -> int:
        """Bytes of the blocks that are there."""
        return sum(self.sizes[i] for i in self.resident)

    def _drop(self, i: int) -> None:
        self.resident.discard(i)
        for tensor in tensors_of(self.blocks[i]).values():
            tensor.untyped_storage().resize_(0)
