"""What the controls remember of one sequence: two rows per token and layer, all of them kept.

V3.2: a latent row (kv_lora_rank numbers, then the rotated qk_rope_head_dim) and an index key. Llama: a row of keys and
a row of values, heads side by side. Rows are rounded when they are written, and a query reads the newest ones back as
it reads old ones, so any chunking gives the same numbers.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from dsv4.cache import format_name
from dsv4.config import LlamaConfig, V32Config
from dsv4.errors import UserError
from dsv4.ops import Pool
from dsv4.ops.formats import PLAIN, Packed, PackedRows, Plain, RowFormat, v32_rows

Config: TypeAlias = V32Config | LlamaConfig
Snapshot: TypeAlias = dict[str, Tensor]
FORMATS: dict[type, tuple[str, ...]] = {V32Config: (*PLAIN, "packed"), LlamaConfig: tuple(PLAIN)}
_NAMES: dict[type, tuple[str, str]] = {V32Config: ("latent", "index"), LlamaConfig: ("keys", "values")}
_BLOCK = 64  # rows are allocated in multiples of this many, once the first room is used up


class Rows:
    """Rows in one block that grows, so that attention reads them as a view."""

    def __init__(self, capacity: int, format: RowFormat, device: torch.device):
        self.format = format
        self.data = torch.zeros(capacity, *format.shape, dtype=format.dtype, device=device)

    def write(self, rows: Tensor, at: int) -> None:
        """Store rows [n, width] at row `at`."""
        self.write_kept(self.format.pack(rows), at)

    def write_kept(self, rows: Tensor, at: int) -> None:
        """Store rows that are in the store's format; grows by half when full: O(1) per row on average."""
        need = at + len(rows)
        if need > len(self.data):
            grown = -(-max(need, len(self.data) * 3 // 2) // _BLOCK) * _BLOCK
            data = self.data.new_zeros(grown, *self.data.shape[1:])
            data[:at] = self.data[:at]
            self.data = data
        self.data[at:need] = rows

    def view(self, count: int) -> Tensor | PackedRows:
        """The first `count` rows [count, width], not copied; packed ones are unpacked where they are read."""
        data = self.data[:count]
        return PackedRows(data, self.format) if isinstance(self.format, Packed) else data


Stores: TypeAlias = tuple[Rows, Rows]


class ControlMemory:
    """Memory of `length` tokens; `capacity` of them are allocated from the start, more as they come.

    format: as V4's memories have them; a dense model has no packed one. Every row is kept, so `rewind` can go back to
    the beginning. A call that stops half way leaves the memory as it was: rows beyond `length` are not read, and are
    written over.
    """

    def __init__(self, config: Config, *, format: torch.dtype | str, capacity: int = 0, device: torch.device):
        self.format = format_name(format)
        known = FORMATS[type(config)]
        if self.format not in known:
            raise UserError(f"cache format {self.format!r} is unknown here: use one of {', '.join(known)}")
        if capacity < 0:
            raise UserError(f"capacity={capacity} must not be negative")
        self.config, self.length, self._released = config, 0, False
        first, second = _row_formats(config, self.format)
        self.layers: list[Stores] = [
            (Rows(capacity, first, device), Rows(capacity, second, device)) for _ in range(config.num_hidden_layers)
        ]

    def stores(self) -> Iterator[tuple[str, Rows]]:
        """Every store with its name."""
        for i, layer in enumerate(self.layers):
            for name, store in zip(_NAMES[type(self.config)], layer, strict=True):
                yield f"layers.{i}.{name}", store

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens."""
        if not 0 <= count <= self.length:
            raise UserError(f"cannot rewind {count} tokens: this memory holds {self.length}; give at most that")
        self.refuse_torn()
        self.length -= count

    def fork(self) -> "ControlMemory":
        """An independent copy; the two then go their own ways."""
        self.refuse_torn()
        return copy.deepcopy(self)

    def snapshot(self) -> Snapshot:
        """The whole state as named tensors (copies, without spare room), ready for safetensors."""
        self.refuse_torn()
        state = {name: store.data[: self.length].clone() for name, store in self.stores()}
        return {"length": torch.tensor([self.length]), **state}

    def restore(self, snapshot: Snapshot) -> None:
        """Take over a snapshot of a memory of the same configuration; UserError (and no change) if it does not fit."""
        length = self.check(snapshot)
        for name, store in self.stores():
            store.write_kept(snapshot[name], 0)
        self.length = length

    def check(self, snapshot: Snapshot) -> int:
        """The length that a snapshot is of; UserError unless it is whole and fits: it comes from outside."""
        self.refuse_torn()
        remedy = "restore a snapshot of a memory made with the same configuration and format"
        if "length" not in snapshot or snapshot["length"].shape != (1,):
            raise UserError(f"the snapshot has no length: {remedy}")
        length = int(snapshot["length"])
        if not 0 <= length <= self.config.max_position_embeddings:
            raise UserError(f"the snapshot has length {length}: {remedy}")
        stores = dict(self.stores())
        for name, store in stores.items():
            shape, got = (length, *store.data.shape[1:]), snapshot.get(name)
            if got is None or got.shape != shape or got.dtype != store.data.dtype:
                what = "missing" if got is None else f"{tuple(got.shape)} {got.dtype}"
                raise UserError(f"snapshot tensor {name} is {what}, expected {shape} {store.data.dtype}: {remedy}")
        unknown = snapshot.keys() - stores.keys() - {"length"}
        if unknown:
            raise UserError(f"snapshot tensor {min(unknown)} is unknown: {remedy}")
        return length

    def bytes(self) -> int:
        """Bytes allocated by all stores."""
        return sum(store.data.untyped_storage().nbytes() for _, store in self.stores())

    def refuse_torn(self) -> None:
        """UserError if it was released; no call leaves such a memory torn."""
        if self._released:
            raise UserError("this memory was released: make a new one")

    def release(self) -> None:
        """Give all rows back; the memory is of no use afterwards. Once more is no error."""
        self._released = True
        for _, store in self.stores():
            store.data = store.data.new_zeros(0, *store.data.shape[1:])


def _row_formats(config: Config, format: str) -> tuple[RowFormat, RowFormat]:
    """How the two rows of a token lie in memory."""
    if isinstance(config, LlamaConfig):
        row = Plain((config.num_key_value_heads * config.head_dim,), PLAIN[format])
        return row, row
    if format == "packed" and config.index_head_dim & (config.index_head_dim - 1):
        raise UserError(
            f"index_head_dim={config.index_head_dim} is not a power of two, so index keys cannot be rotated and "
            "packed: use format bfloat16 or float32"
        )
    return v32_rows(config.kv_lora_rank, config.qk_rope_head_dim, config.index_head_dim, format)


class ControlBatch(Sequence[ControlMemory]):
    """One memory per row of a batch; rows may have different lengths. Every operation applies to all rows, or none."""

    def __init__(self, rows: list[ControlMemory]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    @property
    def lengths(self) -> list[int]:
        return [row.length for row in self.rows]

    def fork(self) -> "ControlBatch":
        return ControlBatch([row.fork() for row in self.rows])

    def rewind(self, count: int) -> None:
        for row in sorted(self.rows, key=lambda row: row.length):  # the shortest refuses first, or none does
            row.rewind(count)

    def snapshot(self) -> list[Snapshot]:
        return [row.snapshot() for row in self.rows]

    def restore(self, snapshots: list[Snapshot]) -> None:
        if len(snapshots) != len(self.rows):
            raise UserError(f"{len(snapshots)} snapshots for {len(self.rows)} rows: give one snapshot per row")
        for row, snapshot in zip(self.rows, snapshots, strict=True):
            row.check(snapshot)
        for row, snapshot in zip(self.rows, snapshots, strict=True):
            row.restore(snapshot)

    def bytes(self) -> int:
        return sum(row.bytes() for row in self.rows)

    def release(self) -> None:
        for row in self.rows:
            row.release()


class ControlPool:
    """Makes memories that are each a block of their own and grow as long as the machine has memory.

    Nothing here is counted in pages: a number of them, which would be a bound, is refused.
    """

    def __init__(
        self, config: Config, *, format: torch.dtype | str, device: torch.device, max_rewind: int, pages: int | None
    ):
        if pages is not None:
            raise UserError(f"pages={pages}, but the memories of this kind of model have none: leave it out")
        if max_rewind < 0:
            raise UserError(f"max_rewind={max_rewind} must not be negative")
        self.config, self.format, self.device = config, format, device
        self.most_tokens = None
        self.new()  # a format that is none is refused now

    def fits(self, tokens: int) -> bool:
        """Whether a new memory of so many tokens has room: always."""
        return True

    def new(self, capacity: int = 0) -> ControlMemory:
        """An empty memory, with room for `capacity` tokens."""
        return ControlMemory(self.config, format=self.format, capacity=capacity, device=self.device)

    def shortage(self, wanted: Sequence[tuple[ControlMemory, int]]) -> int:
        """How many pages are missing if each memory took that many more tokens: none, as there are no pages."""
        return 0


def remember(store: Rows | None, rows: Tensor, start: int) -> Pool:
    """Store rows [n, width] of positions start .. start+n-1; all rows so far [start + n, width], as a query reads them.

    Without a store the rows are all there are.
    """
    if store is None:
        return rows
    store.write(rows, start)
    return store.view(start + len(rows))
