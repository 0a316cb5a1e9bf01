"""All layers of one sequence: how far it has come, and the operations on it (fork, rewind, snapshot, restore, bytes).

A memory's state is its stores plus one number, `length` (with the MTP block's window a second, `drafted`). The model
calls `begin`, writes the stores and calls `advance`; a call that was stopped half way leaves the memory torn, and a
torn memory refuses all but `restore`.
"""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dsv4.cache.layer import Entries, LayerMemory, Ring
from dsv4.config import ModelConfig
from dsv4.errors import UserError, nearest
from dsv4.ops.formats import NAMES, v4_rows

Snapshot = dict[str, Tensor]


class SequenceMemory:
    """What the model remembers of one sequence of `length` tokens.

    Raw rows live in rings that hold `max_rewind` rows more than the model reads, which is how far `rewind` can go back.
    format: how rows are kept, float32, bfloat16, float16 or packed (FP8 rows with a BF16 tail, FP4 index keys); the
    open rows of compressors are fp32 whatever it is. numbers: the dtype in which packed rows are read. mtp: with a
    window for the MTP block too, whose row of position t also depends on the token after t (Transformer.draft).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        format: torch.dtype | str = "float32",
        device: torch.device | str = "cpu",
        capacity: int = 0,
        max_rewind: int = 128,
        numbers: torch.dtype = torch.float32,
        mtp: bool = False,
    ):
        self.format = format_name(format)
        index_width = config.index_head_dim
        if self.format == "packed" and 4 in config.trunk_ratios and index_width & (index_width - 1):
            raise UserError(
                f"index_head_dim={index_width} is not a power of two, so index keys cannot be rotated and packed: "
                "use format bfloat16 or float32"
            )
        if max_rewind < 0 or capacity < 0:
            raise UserError(f"capacity={capacity} and max_rewind={max_rewind} must not be negative")
        if mtp and not config.num_nextn_predict_layers:
            raise UserError("mtp=True, but the model has no MTP block: leave it out (num_nextn_predict_layers is 0)")
        self.config, self.max_rewind = config, max_rewind
        formats = v4_rows(config.head_dim, config.qk_rope_head_dim, index_width, self.format, numbers)
        made = [
            LayerMemory(config, i, capacity, max_rewind, formats, torch.device(device))
            for i in range(config.num_hidden_layers + mtp)
        ]
        self.layers = made[: config.num_hidden_layers]
        self.mtp = made[-1] if mtp else None
        self.drafted = 0  # the MTP window holds the rows of positions up to here
        self.length = 0
        self.newest = 0  # the rings hold rows of positions up to here, also after a rewind
        self._torn = False

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
        """An independent copy; the two then go their own ways."""
        self.refuse_torn()
        return copy.deepcopy(self)

    def snapshot(self) -> Snapshot:
        """The whole state as named tensors (copies; entries without their spare room), ready for safetensors."""
        self.refuse_torn()
        state = {"length": torch.tensor([self.length, self.newest, *([] if self.mtp is None else [self.drafted])])}
        for name, store, used in self._stores():
            state[name] = store.data[:used].clone()
        return state

    def restore(self, snapshot: Snapshot) -> None:
        """Take over a snapshot of a memory of the same configuration; UserError (and no change) if it does not fit."""
        self.length, self.newest, self.drafted = self._check(snapshot)
        self._torn = False
        for name, store, _ in self._stores():
            if isinstance(store, Entries):
                store.write_kept(snapshot[name], 0)
            else:
                store.data.copy_(snapshot[name])

    def bytes(self) -> int:
        """Bytes allocated by all stores."""
        return sum(store.data.untyped_storage().nbytes() for _, store, _ in self._stores())

    def refuse_torn(self) -> None:
        """UserError if the last call on this memory did not come to its end."""
        if self._torn:
            raise UserError("a call on this memory was stopped half way: restore a snapshot or start a new memory")

    def _stores(self, length: int | None = None) -> Iterator[tuple[str, "Ring | Entries", int]]:
        """(name, store, rows in use after `length` tokens, by default as many as there are) of every store."""
        length = self.length if length is None else length
        layers = [(f"layers.{i}", layer) for i, layer in enumerate(self.layers)]
        for place, layer in [*layers, *([] if self.mtp is None else [("mtp", self.mtp)])]:
            for name, store in layer.stores():
                used = length // layer.ratio if isinstance(store, Entries) else len(store.data)
                yield f"{place}.{name}", store, used

    def _check(self, snapshot: Snapshot) -> tuple[int, int, int]:
        """A snapshot comes from outside: names, shapes and numbers are checked before anything is written."""
        remedy = "restore a snapshot of a memory made with the same configuration, dtype, max_rewind and mtp"
        if "length" not in snapshot or snapshot["length"].shape != (2 if self.mtp is None else 3,):
            raise UserError(f"the snapshot has no length: {remedy}")
        length, newest, drafted = [*snapshot["length"].tolist(), 0][:3]
        if not 0 <= drafted <= length <= newest or newest - length > self.max_rewind:
            raise UserError(f"the snapshot has length {length} of {newest}: {remedy}")
        expected = {"length"}
        for name, store, rows in self._stores(length):
            shape = (rows, *store.data.shape[1:])
            expected.add(name)
            got = snapshot.get(name)
            if got is None or got.shape != shape or got.dtype != store.data.dtype:
                what = "missing" if got is None else f"{tuple(got.shape)} {got.dtype}"
                raise UserError(f"snapshot tensor {name} is {what}, expected {shape} {store.data.dtype}: {remedy}")
        if set(snapshot) != expected:
            raise UserError(f"snapshot tensor {min(set(snapshot) - expected)} is unknown: {remedy}")
        return length, newest, drafted


def format_name(format: torch.dtype | str) -> str:
    """The name of a memory's format, given by it or as a dtype; UserError for an unknown one."""
    name = format if isinstance(format, str) else str(format).removeprefix("torch.")
    if name not in NAMES:
        raise UserError(f"cache format {name!r} is unknown: use one of {', '.join(NAMES)}{nearest(name, NAMES)}")
    return name


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

    def bytes(self) -> int:
        return sum(row.bytes() for row in self.rows)
