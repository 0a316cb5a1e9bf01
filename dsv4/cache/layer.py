"""One layer's memory: the window ring, the compressed entries, and the rows of the group that is still open.

Nothing here knows how long the sequence is: positions come in as arguments, so the only counter of a memory is its
length (cache/sequence.py), and setting that back is all there is to a rewind.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.ops.formats import Packed, PackedRows, Plain, RowFormat

ENTRY_BLOCK = 64  # entries are allocated in multiples of this many rows


class Ring:
    """The newest `rows` rows, row of position p in slot p mod rows."""

    def __init__(self, rows: int, format: RowFormat, device: torch.device):
        self.format = format
        self.data = torch.zeros(rows, *format.shape, dtype=format.dtype, device=device)

    def last(self, count: int, end: int) -> Tensor:
        """Copies of the rows of positions end-count .. end-1, in order [count, ...]."""
        assert count <= len(self.data)
        slots = torch.arange(end - count, end, device=self.data.device) % len(self.data)
        return self.format.unpack(self.data[slots])

    def write(self, rows: Tensor, position: int) -> None:
        """Store rows [n, ...] of positions position .. position+n-1; older ones give way."""
        skip = max(0, len(rows) - len(self.data))
        end = position + len(rows)
        slots = torch.arange(position + skip, end, device=self.data.device) % len(self.data)
        self.data[slots] = self.format.pack(rows[skip:])


class Entries:
    """Rows that only ever grow, in one contiguous block so that attention reads them as a view."""

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
            grown = max(need, len(self.data) * 3 // 2)
            grown = -(-grown // ENTRY_BLOCK) * ENTRY_BLOCK
            data = self.data.new_zeros(grown, self.data.shape[1])
            data[:at] = self.data[:at]
            self.data = data
        self.data[at:need] = rows

    def view(self, count: int) -> Tensor | PackedRows:
        """The first `count` rows [count, width], not copied; packed ones are unpacked where they are read."""
        data = self.data[:count]
        return PackedRows(data, self.format) if isinstance(self.format, Packed) else data


class Compressed:
    """What one compressor remembers: its entries, and the raw rows (value, score) of the open and previous group."""

    def __init__(self, ratio: int, width: int, capacity: int, max_rewind: int, format: RowFormat, device: torch.device):
        overlap = ratio == 4
        self.entries = Entries(capacity // ratio, format, device)  # an entry exists once its group has closed
        # fp32: pooling is fp32 up to the norm. With overlap the group before the open one is still needed.
        rows = ratio * (2 if overlap else 1) + max_rewind
        self.rows = Ring(rows, Plain((2, width * (2 if overlap else 1)), torch.float32), device)


class LayerMemory:
    """Memory of one attention layer.

    window: rotated key = value rows [128 + max_rewind, head_dim]. attention (ratio 4, 128): compressed entries and open
    rows. index (ratio 4): the same for the indexer's keys. formats: of window rows and entries, and of index keys.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        capacity: int,
        max_rewind: int,
        formats: tuple[RowFormat, RowFormat],
        device: torch.device,
    ):
        ratio = config.compress_ratios[layer]
        row, key = formats
        self.window = Ring(config.sliding_window + max_rewind, row, device)
        self.attention: Compressed | None = None
        self.index: Compressed | None = None
        if ratio:
            self.attention = Compressed(ratio, config.head_dim, capacity, max_rewind, row, device)
        if ratio == 4:
            self.index = Compressed(ratio, config.index_head_dim, capacity, max_rewind, key, device)
        self.ratio = ratio

    def stores(self) -> Iterator[tuple[str, "Ring | Entries"]]:
        """Every store with a name that is unique in the layer."""
        yield "window", self.window
        for name, part in (("attention", self.attention), ("index", self.index)):
            if part is not None:
                yield f"{name}.entries", part.entries
                yield f"{name}.rows", part.rows
