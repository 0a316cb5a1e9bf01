"""One layer's stores in a pool: window rings, compressed entries, and the rows of groups that are still open.

Nothing here knows sequences: whose a slot or a page is stands in pages.py and sequence.py, and which rows of a store a
call reads and writes is planned once for all layers (model/segments.py). A ring has `rows` rows in each slot, the row
of position p in place p mod rows; entries lie in pages.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dsv4.config import LayerKind, ModelConfig
from dsv4.ops.formats import PagedRows, Plain, RowFormat


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

    window: rotated key = value rows, sliding_window + max_rewind in a slot. attention (compressed layers): entries and
    open rows. index (indexed layers): the same for the indexer's keys. formats: of window rows and entries, and of
    index keys.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        page_tokens: int,
        max_rewind: int,
        formats: tuple[RowFormat, RowFormat],
        device: torch.device,
    ):
        self.kind = config.layer_kind(layer)
        row, key = formats
        self.window = Ring(config.sliding_window + max_rewind, row, device)
        self.attention: Compressed | None = None
        self.index: Compressed | None = None
        if self.kind.ratio:
            self.attention = Compressed(self.kind, config.head_dim, page_tokens, max_rewind, row, device)
        if self.kind.indexed:
            self.index = Compressed(self.kind, config.index_head_dim, page_tokens, max_rewind, key, device)

    def stores(self) -> Iterator[tuple[str, Ring | Entries]]:
        """Every store with a name that is unique in the layer."""
        yield "window", self.window
        for name, part in (("attention", self.attention), ("index", self.index)):
            if part is not None:
                yield f"{name}.entries", part.entries
                yield f"{name}.rows", part.rows
