"""One layer's stores in a pool: window rings, compressed entries, and the rows of groups that are still open.

Nothing here knows sequences: whose a slot or a page is stands in pages.py and sequence.py, and which rows of a store a
call reads and writes is planned once for all layers (model/parts.py). A ring has `rows` rows in each slot, the row
of position p in place p mod rows; entries lie in pages.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsv4.config import LayerKind, ModelConfig
from dsv4.ops.formats import PagedRows, Plain, RowFormat


@dataclass(frozen=True)
class Formats:
    """How a pool keeps rows: of the window and of entries, of the indexer's keys, and of low-rank rows."""

    row: RowFormat
    key: RowFormat
    low: RowFormat


class Ring:
    """The newest `rows` rows of each slot: data [slots * rows, ...]."""

    def __init__(self, rows: int, format: RowFormat, device: torch.device):
        self.rows, self.format = rows, format
        self.data = torch.zeros(0, *format.shape, dtype=format.dtype, device=device)

    def slot(self, slot: int) -> Tensor:
        """A slot's rows [rows, ...] as they are kept; a view."""
        return self.data[slot * self.rows : (slot + 1) * self.rows]

    def grow(self, slots: int) -> None:
        self.data = _grown(self.data, slots * self.rows)


class Entries:
    """Rows that only ever grow: data [pages * per_page, width], `per_page` of them in a page."""

    def __init__(self, per_page: int, format: RowFormat, device: torch.device):
        self.per_page, self.format = per_page, format
        self.data = torch.zeros(0, *format.shape, dtype=format.dtype, device=device)

    def page(self, page: int) -> Tensor:
        """A page's rows [per_page, width] as they are kept; a view."""
        return self.data[page * self.per_page : (page + 1) * self.per_page]

    def view(self, table: Tensor, pages: np.ndarray) -> PagedRows:
        """The rows of these pages one after the other, not copied; `table` is `pages` (int64) on the device."""
        return PagedRows(self.data, self.format, table, pages, self.per_page)

    def grow(self, pages: int) -> None:
        self.data = _grown(self.data, pages * self.per_page)


def _grown(data: Tensor, rows: int) -> Tensor:
    out = data.new_zeros(rows, *data.shape[1:])
    out[: len(data)] = data
    return out


class Compressed:
    """What one compressor remembers: its entries, and the raw rows (value, score) of the open and previous group."""

    def __init__(
        self, kind: LayerKind, width: int, page_tokens: int, max_rewind: int, format: RowFormat, device: torch.device
    ):
        self.entries = Entries(page_tokens // kind.ratio, format, device)  # an entry exists once its group has closed
        # fp32: pooling is fp32 up to the norm. With overlap the group before the open one is still needed.
        banks = 2 if kind.overlap else 1
        self.rows = Ring(kind.ratio * banks + max_rewind, Plain((2, width * banks), torch.float32), device)


class LayerMemory:
    """The stores of one attention layer.

    window: rotated key = value rows, sliding_window + max_rewind in a slot (None in a dense layer). attention
    (compressed layers): entries and open rows. index (indexed layers): the same for the indexer's keys. rows: one for
    every token, in the layers that V4 is compared with: rotated (dense), scaled by its score (anchors), or its low-rank
    part; scores [1] fp32: the anchors'.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        page_tokens: int,
        max_rewind: int,
        formats: Formats,
        device: torch.device,
    ):
        self.kind = config.layer_kind(layer)
        name, f = self.kind.name, formats
        self.window: Ring | None = None
        self.attention: Compressed | None = None
        self.index: Compressed | None = None
        self.rows: Entries | None = None
        self.scores: Entries | None = None
        if name != "dense":
            self.window = Ring(config.sliding_window + max_rewind, f.row, device)
        if self.kind.ratio > 1:
            self.attention = Compressed(self.kind, config.head_dim, page_tokens, max_rewind, f.row, device)
        if self.kind.indexed:
            self.index = Compressed(self.kind, config.index_head_dim, page_tokens, max_rewind, f.key, device)
        if self.kind.ratio == 1:
            self.rows = Entries(page_tokens, f.low if name == "lowrank" else f.row, device)
        if name == "anchors":
            self.scores = Entries(page_tokens, Plain((1,), torch.float32), device)

    def stores(self) -> Iterator[tuple[str, Ring | Entries]]:
        """Every store with a name that is unique in the layer."""
        alone = (("window", self.window), ("rows", self.rows), ("scores", self.scores))
        yield from ((name, store) for name, store in alone if store is not None)
        for name, part in (("attention", self.attention), ("index", self.index)):
            if part is not None:
                yield f"{name}.entries", part.entries
                yield f"{name}.rows", part.rows
