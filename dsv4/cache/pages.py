"""One pool of memory for many sequences: pages for what grows with a text, slots for what does not.

A page holds the entries and index keys of `page_tokens` consecutive tokens in all layers; every compression ratio
divides page_tokens, so groups close on its edge. A slot holds a sequence's window rings and open groups. Pages may be
shared: a page with more than one holder is copied before it is written (copy on write), so a fork costs a slot.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

import torch

from dsv4.cache.layer import Entries, Formats, LayerMemory, Ring
from dsv4.config import ModelConfig
from dsv4.errors import UserError, nearest
from dsv4.ops.formats import NAMES, v4_rows

Store = TypeVar("Store", Ring, Entries)

PAGE_TOKENS = 128  # at least; a multiple of it where the ratios ask for one
FEW_PAGES = 64  # below so many a pool grows by half


class Holder(Protocol):
    """Who holds pages: a sequence of `length` tokens, whose tokens page_tokens * i .. lie in page pages[i]."""

    length: int
    pages: list[int]

    def hold(self, pages: list[int]) -> None:
        """From now on these are the pages; their holders are already counted."""
        ...


class OutOfPages(UserError):
    """The pool cannot hold what a call would write; nothing has been written."""


class Pages:
    """The stores of all layers, and who holds which pages and slots.

    format: how rows are kept, float32, bfloat16, float16 or packed (FP8 rows with a BF16 tail, FP4 index keys); open
    rows of compressors are fp32 whatever it is. numbers: the dtype in which packed rows are read. max_rewind: rings
    hold so many rows more than the model reads, which is how far a memory can go back. mtp: with a window for the MTP
    block, or for each stage of a DSpark drafter. pages: how many there are, allocated at once; None: as many as are
    needed, growing by half at a time, a large pool by an eighth.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        format: torch.dtype | str = "float32",
        device: torch.device | str = "cpu",
        max_rewind: int = 128,
        numbers: torch.dtype = torch.float32,
        mtp: bool = False,
        pages: int | None = None,
        slots: int = 0,
    ):
        self.format = format_name(format)
        index_width = config.index_head_dim
        indexed = any(kind.indexed for kind in config.compressed_kinds)
        if self.format == "packed" and indexed and index_width & (index_width - 1):
            raise UserError(
                f"index_head_dim={index_width} is not a power of two, so index keys cannot be rotated and packed: "
                "use format bfloat16 or float32"
            )
        for name, value in (("max_rewind", max_rewind), ("pages", pages or 0)):
            if value < 0:
                raise UserError(f"{name}={value} must not be negative")
        if mtp and not config.num_draft_blocks:
            raise UserError("mtp=True, but the model has no MTP block: leave it out (num_nextn_predict_layers is 0)")
        self.config, self.max_rewind, self.device = config, max_rewind, torch.device(device)
        self.page_tokens = math.lcm(PAGE_TOKENS, *(kind.ratio for kind in config.compressed_kinds))
        self.paged = any(kind.ratio for kind in config.trunk_kinds)  # else nothing grows, and no page is ever asked for
        rope, rank = config.qk_rope_head_dim, config.attention_rank
        low, _ = v4_rows(rank + rope, rope, index_width, self.format, numbers)
        formats = Formats(*v4_rows(config.head_dim, rope, index_width, self.format, numbers), low)
        made = [
            LayerMemory(config, i, self.page_tokens, max_rewind, formats, self.device)
            for i in range(config.num_hidden_layers + config.num_draft_blocks * mtp)
        ]
        self.layers = made[: config.num_hidden_layers]
        self.mtp = made[config.num_hidden_layers :]  # empty unless asked for
        self.grows = pages is None
        self._holders: list[int] = []  # of each page
        self._free_pages: list[int] = []  # a heap: the lowest first, so that a text lies in one piece where it can
        self._slots = 0
        self._free_slots: list[int] = []
        self._add_pages(pages or 0)
        self._add_slots(slots)

    # --- who holds what ----------------------------------------------------------------------------------------------

    def pages_for(self, tokens: int) -> int:
        """Pages that a memory of so many tokens holds."""
        return -(-tokens // self.page_tokens) if self.paged else 0

    @property
    def num_pages(self) -> int:
        return len(self._holders)

    @property
    def free_pages(self) -> int:
        """Pages that nobody holds, of those that are allocated."""
        return len(self._free_pages)

    @property
    def num_slots(self) -> int:
        return self._slots

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    def holders(self, page: int) -> int:
        """How many memories hold a page."""
        return self._holders[page]

    @property
    def most_tokens(self) -> int | None:
        """Tokens that one memory can hold when there is no other; None: as many as come."""
        return None if self.grows or not self.paged else self.num_pages * self.page_tokens

    def fits(self, tokens: int) -> bool:
        """Whether a new memory of so many tokens has room now."""
        return self.grows or self.pages_for(tokens) <= self.free_pages

    def shortage(self, wanted: Sequence[tuple[Holder, int]]) -> int:
        """Pages that are missing if these memories took so many more tokens each; 0 if all fit."""
        return 0 if self.grows else max(0, self._needed(wanted) - self.free_pages)

    def _needed(self, wanted: Sequence[tuple[Holder, int]]) -> int:
        """Free pages that these memories would take: for new tokens, and instead of shared pages that they write."""
        needed, leaving = 0, dict[int, int]()
        for memory, count in wanted:
            first, last = memory.length // self.page_tokens, self.pages_for(memory.length + count)
            needed += max(0, last - len(memory.pages))
            for page in memory.pages[first:last]:
                # the last of its holders that writes need not copy it
                if self._holders[page] - leaving.get(page, 0) > 1:
                    leaving[page] = leaving.get(page, 0) + 1
                    needed += 1
        return needed

    def reserve(self, wanted: Sequence[tuple[Holder, int]]) -> None:
        """Give each memory, alone, the pages into which `count` more tokens go. OutOfPages, and no change, if there are
        too few."""
        if not self.paged:
            return
        self.provide(self._needed(wanted))
        for memory, count in wanted:
            first, last = memory.length // self.page_tokens, self.pages_for(memory.length + count)
            kept = memory.pages[first:last]
            if len(kept) == last - first and all(self._holders[page] == 1 for page in kept):
                continue
            pages = [self._alone(page, copy=i == 0) for i, page in enumerate(kept)]
            pages += [self.take_page() for _ in range(last - first - len(kept))]
            memory.hold([*memory.pages[:first], *pages, *memory.pages[last:]])

    def _alone(self, page: int, *, copy: bool) -> int:
        """The page itself if it has a single holder, else another in its place; only the first has rows to keep."""
        if self._holders[page] == 1:
            return page
        fresh = self.take_page()
        if copy:
            for store in self._of(Entries):
                store.page(fresh).copy_(store.page(page))
        self.drop([page])
        return fresh

    def share(self, pages: Sequence[int]) -> None:
        """One more holder for each of these pages."""
        for page in pages:
            self._holders[page] += 1

    def drop(self, pages: Sequence[int]) -> None:
        """One holder less for each of these pages; those without one are free."""
        for page in pages:
            self._holders[page] -= 1
            assert self._holders[page] >= 0, f"page {page} is dropped more often than it was held"
            if not self._holders[page]:
                heapq.heappush(self._free_pages, page)

    def drop_slot(self, slot: int) -> None:
        """A slot is free again."""
        assert slot not in self._free_slots, f"slot {slot} is dropped twice"
        heapq.heappush(self._free_slots, slot)

    def copy_slot(self, slot: int) -> int:
        """A new slot with the rows of another."""
        fresh = self.take_slot()
        for ring in self._of(Ring):
            ring.slot(fresh).copy_(ring.slot(slot))
        return fresh

    def take_page(self) -> int:
        """A free page, which has a holder now."""
        page = heapq.heappop(self._free_pages)
        assert self._holders[page] == 0, f"page {page} was free and held"
        self._holders[page] = 1
        return page

    def take_slot(self) -> int:
        """A slot without rows."""
        if not self._free_slots:
            self._add_slots(max(1, self._slots // 2))
        slot = heapq.heappop(self._free_slots)
        for ring in self._of(Ring):
            ring.slot(slot).zero_()  # nothing of who had it before
        return slot

    def provide(self, count: int) -> None:
        """See to it that `count` pages are free; OutOfPages if the pool may not grow."""
        missing = count - self.free_pages
        if missing <= 0:
            return
        if not self.grows:
            raise OutOfPages(
                f"the cache has {self.free_pages} of its {self.num_pages} pages of {self.page_tokens} tokens free, and "
                f"{count} are needed: release a memory, or make the pool with more pages"
            )
        # Growing copies every store. Of a large pool that is little beside computing an eighth more, and room is dear
        self._add_pages(max(missing, self.num_pages // (2 if self.num_pages < FEW_PAGES else 8)))

    # --- stores ------------------------------------------------------------------------------------------------------

    def stores(self) -> Iterator[tuple[str, LayerMemory, Ring | Entries]]:
        """(unique name, its layer, store) of every store."""
        layers = [(f"layers.{i}", layer) for i, layer in enumerate(self.layers)]
        layers += [(f"mtp.{i}", layer) for i, layer in enumerate(self.mtp)]
        for place, layer in layers:
            for name, store in layer.stores():
                yield f"{place}.{name}", layer, store

    def _of(self, kind: type[Store]) -> Iterator[Store]:
        return (store for _, _, store in self.stores() if isinstance(store, kind))

    def bytes(self) -> int:
        """Bytes allocated by all stores, free pages and slots too."""
        return sum(store.data.untyped_storage().nbytes() for _, _, store in self.stores())

    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        return sum(s.per_page * s.data[:0].element_size() * math.prod(s.format.shape) for s in self._of(Entries))

    def slot_bytes(self) -> int:
        """Bytes of one slot in all layers."""
        return sum(s.rows * s.data[:0].element_size() * math.prod(s.format.shape) for s in self._of(Ring))

    def _add_pages(self, count: int) -> None:
        if not count or not self.paged:
            return
        for store in self._of(Entries):
            store.grow(self.num_pages + count)
        for page in range(self.num_pages, self.num_pages + count):
            heapq.heappush(self._free_pages, page)
        self._holders += [0] * count

    def _add_slots(self, count: int) -> None:
        if not count:
            return
        for ring in self._of(Ring):
            ring.grow(self._slots + count)
        for slot in range(self._slots, self._slots + count):
            heapq.heappush(self._free_slots, slot)
        self._slots += count


def format_name(format: torch.dtype | str) -> str:
    """The name of a memory's format, given by it or as a dtype; UserError for an unknown one."""
    name = format if isinstance(format, str) else str(format).removeprefix("torch.")
    if name not in NAMES:
        raise UserError(f"cache format {name!r} is unknown: use one of {', '.join(NAMES)}{nearest(name, NAMES)}")
    return name
