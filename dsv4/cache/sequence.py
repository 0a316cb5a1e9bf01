"""A sequence's memory: a handle on pages and a slot of a pool, and how far it has come.

A memory's state is its rows plus one number, `length` (with the MTP block's window a second, `drafted`). The model
calls `begin`, writes the stores and calls `advance`; a call that was stopped half way leaves the memory torn, and a
torn memory refuses all but `restore` and `release`. A fork shares the pages and copies the slot, at every offset: a
fork that is kept is a shared prefix.
"""

import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dsv4.cache.layer import Entries, LayerMemory, Ring
from dsv4.cache.pages import Pages
from dsv4.config import ModelConfig
from dsv4.errors import UserError
from dsv4.ops.formats import PagedRows

Snapshot = dict[str, Tensor]


class SequenceMemory:
    """What the model remembers of one sequence of `length` tokens; made by `Pool.new`.

    Raw rows live in rings that hold `max_rewind` rows more than the model reads, which is how far `rewind` can go back.
    Pages and slot go back to the pool with `release`, or when the handle is no longer held by anyone.
    """

    def __init__(self, pool: Pages, slot: int):
        self.pool, self.slot = pool, slot
        self.pages: list[int] = []  # page of tokens page_tokens * i ..; those beyond `length` are spare
        self.table = np.zeros(0, dtype=np.int64)  # the same, for planning
        self.drafted = 0  # the MTP window holds the rows of positions up to here
        self.length = 0
        self.newest = 0  # the rings hold rows of positions up to here, also after a rewind
        self._torn = False
        self._release = weakref.finalize(self, _give_back, pool, self.pages, slot)
        self._release.atexit = False

    @property
    def config(self) -> ModelConfig:
        return self.pool.config

    @property
    def format(self) -> str:
        return self.pool.format

    @property
    def max_rewind(self) -> int:
        return self.pool.max_rewind

    @property
    def layers(self) -> list[LayerMemory]:
        """The stores in which this memory has its rows, among those of others."""
        return self.pool.layers

    @property
    def mtp(self) -> list[LayerMemory]:
        """The stores of the MTP block or of a drafter's stages; empty: none."""
        return self.pool.mtp

    def hold(self, pages: list[int]) -> None:
        """From now on these are the pages; their holders are already counted."""
        self.pages[:] = pages  # in place: what is given back at the end are the pages of then
        self.table = np.array(pages, dtype=np.int64)

    def release(self) -> None:
        """Give pages and slot back; the memory is of no use afterwards. Once more is no error."""
        self._release()
        self.table = np.zeros(0, dtype=np.int64)

    def begin(self) -> None:
        """Rows are about to be written; until `advance` the stores of different layers disagree."""
        self.refuse_torn()
        self._torn = True

    def advance(self, count: int) -> None:
        """`count` more tokens have been written to every store."""
        self._torn = False
        self.length += count
        self.newest = max(self.newest, self.length)

    def advance_drafts(self) -> None:
        """The MTP block's rows of all tokens up to `length` have been written."""
        self._torn = False
        self.drafted = self.length

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens; exact at every offset, also inside an open group.

        Raises UserError when the rows that this needs have left the rings; nothing is changed then.
        """
        if not 0 <= count <= self.length:
            raise UserError(f"cannot rewind {count} tokens: this memory holds {self.length}; give at most that")
        self.refuse_torn()
        back = self.newest - (self.length - count)
        if back > self.max_rewind:
            raise UserError(
                f"cannot rewind to {back} tokens before the newest: this memory keeps rows for {self.max_rewind}; "
                f"make it with max_rewind={back} or restore a snapshot"
            )
        self.length -= count
        self.drafted = min(self.drafted, self.length)

    def fork(self) -> "SequenceMemory":
        """An independent copy; the two then go their own ways, and share the pages that neither of them writes."""
        self.refuse_torn()
        other = SequenceMemory(self.pool, self.pool.copy_slot(self.slot))
        used = self.pages[: self.pool.pages_for(self.length)]
        self.pool.share(used)
        other.hold(used)
        other.length, other.newest, other.drafted = self.length, self.newest, self.drafted
        return other

    def snapshot(self) -> Snapshot:
        """The whole state as named tensors (copies; entries without their spare room), ready for safetensors."""
        self.refuse_torn()
        state = {"length": torch.tensor([self.length, self.newest, *([self.drafted] if self.mtp else [])])}
        for name, layer, store in self.pool.stores():
            if isinstance(store, Ring):
                state[name] = store.slot(self.slot).clone()
            else:
                state[name] = self.entries(store, self.length // layer.kind.ratio).kept()
        return state

    def restore(self, snapshot: Snapshot) -> None:
        """Take over a snapshot of a memory of the same configuration; UserError (and no change) if it does not fit."""
        length, newest, drafted = self._check(snapshot)
        before = self.length
        try:
            self.length = 0  # every page is written anew, so a shared one is left to the others
            self.pool.reserve([(self, length)])
        except UserError:
            self.length = before
            raise
        self.length, self.newest, self.drafted = length, newest, drafted
        self._torn = False
        for name, _, store in self.pool.stores():
            rows = snapshot[name]
            if isinstance(store, Ring):
                store.slot(self.slot).copy_(rows)
                continue
            for page, part in zip(self.pages, rows.split(store.per_page), strict=False):
                store.page(page)[: len(part)] = part

    def bytes(self) -> int:
        """Bytes of the pages and the slot that it holds; a shared page counts for each of its holders."""
        return len(self.pages) * self.pool.page_bytes() + self.pool.slot_bytes()

    def last(self, ring: Ring, count: int) -> Tensor:
        """Copies of the rows of the last `count` positions in a ring, in order [count, ...], as they are read."""
        assert count <= min(ring.rows, self.length)
        places = torch.arange(self.length - count, self.length, device=ring.data.device) % ring.rows
        return ring.format.unpack(ring.slot(self.slot)[places])

    def entries(self, store: Entries, count: int) -> PagedRows:
        """The first `count` rows of a store, not copied."""
        table = torch.from_numpy(self.table[: -(-count // store.per_page)])
        return PagedRows(store.data, store.format, table.to(store.data.device), table.numpy(), store.per_page, count)

    def refuse_torn(self) -> None:
        """UserError if the last call on this memory did not come to its end, or if it was released."""
        if not self._release.alive:
            raise UserError("this memory was released: make a new one")
        if self._torn:
            raise UserError("a call on this memory was stopped half way: restore a snapshot or start a new memory")

    def _check(self, snapshot: Snapshot) -> tuple[int, int, int]:
        """A snapshot comes from outside: names, shapes and numbers are checked before anything is written."""
        if not self._release.alive:
            self.refuse_torn()
        remedy = "restore a snapshot of a memory made with the same configuration, dtype, max_rewind and mtp"
        if "length" not in snapshot or snapshot["length"].shape != (3 if self.mtp else 2,):
            raise UserError(f"the snapshot has no length: {remedy}")
        length, newest, drafted = [*snapshot["length"].tolist(), 0][:3]
        if not 0 <= drafted <= length <= newest or newest - length > self.max_rewind:
            raise UserError(f"the snapshot has length {length} of {newest}: {remedy}")
        expected = {"length"}
        for name, layer, store in self.pool.stores():
            rows = store.rows if isinstance(store, Ring) else length // layer.kind.ratio
            shape = (rows, *store.format.shape)
            expected.add(name)
            got = snapshot.get(name)
            if got is None or got.shape != shape or got.dtype != store.data.dtype:
                what = "missing" if got is None else f"{tuple(got.shape)} {got.dtype}"
                raise UserError(f"snapshot tensor {name} is {what}, expected {shape} {store.data.dtype}: {remedy}")
        if set(snapshot) != expected:
            raise UserError(f"snapshot tensor {min(set(snapshot) - expected)} is unknown: {remedy}")
        return length, newest, drafted


def _give_back(pool: Pages, pages: list[int], slot: int) -> None:
    pool.drop(pages)
    pages.clear()
    pool.drop_slot(slot)


class BatchMemory(Sequence[SequenceMemory]):
    """One memory per row of a batch; rows may have different lengths. Every operation applies to all rows."""

    def __init__(self, rows: list[SequenceMemory]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    @property
    def lengths(self) -> list[int]:
        return [row.length for row in self.rows]

    def fork(self) -> "BatchMemory":
        return BatchMemory([row.fork() for row in self.rows])

    def release(self) -> None:
        for row in self.rows:
            row.release()

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens of every row; if one row cannot, none is changed."""
        before = [(row.length, row.drafted) for row in self.rows]
        try:
            for row in self.rows:
                row.rewind(count)
        except UserError:
            for row, (length, drafted) in zip(self.rows, before, strict=True):
                row.length, row.drafted = length, drafted
            raise

    def snapshot(self) -> list[Snapshot]:
        return [row.snapshot() for row in self.rows]

    def restore(self, snapshots: list[Snapshot]) -> None:
        if len(snapshots) != len(self.rows):
            raise UserError(f"{len(snapshots)} snapshots for {len(self.rows)} rows: give one snapshot per row")
        for row, snapshot in zip(self.rows, snapshots, strict=True):
            row._check(snapshot)
        for row, snapshot in zip(self.rows, snapshots, strict=True):
            row.restore(snapshot)

    def pools(self) -> Iterator[Pages]:
        """The pools of the rows, each once."""
        yield from {id(row.pool): row.pool for row in self.rows}.values()

    def bytes(self) -> int:
        """Bytes that the pools of the rows have allocated."""
        return sum(pool.bytes() for pool in self.pools())
