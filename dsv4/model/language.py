"""What every model of this house is to those who train and run it, whatever its layers: V4's and those it is compared
with (controls/) differ in `trunk`, in their memories and in nothing that is written here.

A model takes a flat run of T tokens cut into segments, each starting a document or continuing a memory, and gives
logits, or the loss without ever holding them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, overload

import torch
from torch import Tensor, nn

from dsv4 import ops
from dsv4.config import AnyConfig
from dsv4.errors import UserError
from dsv4.model.head import IGNORE, Head
from dsv4.model.indexer import Indexed
from dsv4.model.moe import Routing
from dsv4.model.segments import IndexPhase, Segment
from dsv4.model.shards import Shard


class Memory(Protocol):
    """What a model remembers of one sequence of `length` tokens. A snapshot is named tensors, ready for safetensors."""

    length: int

    @property
    def config(self) -> Any: ...

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens, exactly; UserError, and nothing changed, if it cannot."""

    def fork(self) -> Self:
        """An independent copy."""
        ...

    def snapshot(self) -> dict[str, Tensor]:
        """The whole state; its "length" begins with the length."""
        ...

    def restore(self, snapshot: dict[str, Tensor]) -> None:
        """Take over a snapshot; UserError, and nothing changed, if it is of another memory."""

    def bytes(self) -> int:
        """Bytes allocated."""
        ...

    def refuse_torn(self) -> None:
        """UserError if a call that was stopped half way has left it unusable, or if it was released."""

    def release(self) -> None:
        """Give back what it holds; it is of no use after that."""


class Pool(Protocol):
    """Where the memories of many sequences are made, and what tells whether there is room for more tokens."""

    @property
    def most_tokens(self) -> int | None:
        """Tokens that one memory can hold when there is no other; None: as many as come."""
        ...

    def fits(self, tokens: int) -> bool:
        """Whether a new memory of so many tokens has room now."""
        ...

    def new(self, capacity: int = 0) -> Memory:
        """An empty memory, with room for `capacity` tokens."""
        ...

    def shortage(self, wanted: Sequence[tuple[Any, int]]) -> int:
        """How many pages are missing if each of these memories took that many more tokens; 0: all have room."""
        ...


Segments = Sequence[Segment | int | tuple[int, Any]]  # Any: a Memory, a batch of one, or None


class TrunkResult(Protocol):
    """What a trunk made of a run: normed hidden [T, M], the row of each segment's last token int64 [segments], what the
    gates decided, by layer (None: a layer without a gate), and what indexers that learn came to, by their layer."""

    @property
    def hidden(self) -> Tensor: ...

    @property
    def last(self) -> Tensor: ...

    @property
    def routing(self) -> Sequence[Routing | None]: ...

    @property
    def indexed(self) -> dict[int, Indexed]: ...


@dataclass(frozen=True)
class Losses:
    """What a run with targets comes to, with a graph: sums of -log p(target) in nats, and what the gates decided.

    mtp_nll is None without an MTP block. routing: of every layer that has a gate, by its number, with the lengths of
    the sequences that it saw; the MTP block's is that after the last, absent where no segment has a next token.
    indexed: of every layer whose indexer learns, by its number.
    """

    nll: Tensor
    mtp_nll: Tensor | None
    routing: dict[int, tuple[Routing, list[int]]]
    indexed: dict[int, Indexed]


class LanguageModel(nn.Module):
    """A model over token ids. A subclass has `embed`, `layers`, `norm`, `head` and `mtp` (an MTP block, the stages of a
    DSpark drafter, or empty), and says what `trunk`, `new_cache` and `new_pool` are.

    `dtype` is that of the large matrices, `compute_dtype` that of the activations (default: the same; fp32 master
    weights are trained in bfloat16 so). `recompute` saves memory in training: a block's activations are computed again
    in the backward pass. `stop_ids` are the tokens that end a text, as the configuration says.
    """

    config: AnyConfig
    embed: nn.Embedding
    layers: nn.ModuleList
    head: Head
    mtp: nn.ModuleList
    stop_ids: tuple[int, ...]
    absent = ""  # why not all of its weights are there
    stream: Any = None  # what reads its blocks from disk as they run (checkpoint/stream.py)
    numbers: str  # "plain", or "published": rounded where the released code rounds (packed.choose_numbers)

    def __init__(
        self,
        config: AnyConfig,
        dtype: torch.dtype | str = torch.float32,
        *,
        compute_dtype: torch.dtype | str | None = None,
        recompute: bool = False,
    ):
        super().__init__()
        self.config, self.dtype, self.recompute = config, as_dtype(dtype), recompute
        self.compute_dtype = self.dtype if compute_dtype is None else as_dtype(compute_dtype)
        self.stop_ids, self.numbers = config.stop_ids, "plain"

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def predicts_next(self) -> bool:
        """Whether there is an MTP block, which `predict_next` runs and training trains."""
        return False

    def num_parameters(self, *, mtp: bool = False) -> int:
        """Parameters, without the MTP block or drafter unless asked; router biases and hash tables are buffers, and not
        counted."""
        return sum(p.numel() for name, p in self.named_parameters() if mtp or not name.startswith("mtp."))

    def trunk(
        self,
        ids: Tensor,
        segments: Sequence[Segment],
        phase: IndexPhase = "off",
        *,
        embedded: Tensor | None = None,
    ) -> TrunkResult:
        """Run the blocks on flat ids [T]; memories are written and advanced. Gradients flow only without memories.

        phase: of the training of V4's indexers, which other models do not have. embedded: [T, M] in place of the
        embeddings of ids, for whoever asks about these; hash layers still route by the ids.
        """
        raise NotImplementedError

    def predict_next(self, trunk: Any, ids: Tensor) -> tuple[Tensor, Tensor, Routing]:
        """The MTP block over a run without memories: hidden [n, M], its rows int64 [n] in the run, routing."""
        raise NotImplementedError

    def new_cache(
        self,
        batch: int = 1,
        format: torch.dtype | str | None = None,
        *,
        capacity: int = 0,
        max_rewind: int = 128,
        mtp: bool = False,
    ) -> Sequence[Memory]:
        """Empty memories for `batch` rows; `capacity` tokens are preallocated."""
        raise NotImplementedError

    def new_pool(
        self,
        format: torch.dtype | str | None = None,
        *,
        pages: int | None = None,
        slots: int = 0,
        max_rewind: int = 128,
        mtp: bool = False,
    ) -> Pool:
        """What makes memories that come and go, and knows whether more tokens find room; pages: how many there are."""
        raise NotImplementedError

    @overload
    def forward(
        self, ids: Tensor, cache: Any = ..., segments: Segments | None = ..., *,
        rows: Tensor | Literal["last"] | None = ...,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def forward(
        self, ids: Tensor, cache: None = ..., segments: Segments | None = ..., *, targets: Tensor, mtp: bool = ...,
        phase: IndexPhase = ...,
    ) -> Losses: ...  # fmt: skip

    def forward(
        self,
        ids: Tensor,
        cache: Any = None,
        segments: Segments | None = None,
        *,
        rows: Tensor | Literal["last"] | None = None,
        targets: Tensor | None = None,
        mtp: bool = True,
        phase: IndexPhase = "off",
    ) -> Tensor | Losses:
        """Logits fp32 [..., T, vocab] for ids int64 [T] or [B, T] (B segments of T tokens).

        cache: one memory per row, which the call continues. segments (ids must be flat): the general form, a length, a
        (length, memory or None) or a Segment each; or a Shard, one process's part of a row (shards.py). rows: logits of
        these rows of the flat run only, int64 [n] -> [n, vocab], or "last", each segment's last token, [segments,
        vocab]. Raises UserError, before anything is written,
        for ids outside the vocabulary, lengths that do not add up, and positions beyond max_position_embeddings.

        With targets (of ids' shape, -100 where there is none; no memories) it returns Losses, whose logits exist block
        by block only; mtp=False leaves those of the MTP block out. phase: how CSA reads then and whether its indexer
        has a loss (segments.py).
        """
        flat, cut = self._cut(ids, cache, segments)
        if targets is not None:
            return self._losses(flat, cut, targets, mtp, phase)
        assert phase == "off", "phases are for training, with targets"
        if isinstance(rows, Tensor) and (rows.ndim != 1 or bool((rows < 0).any()) or bool((rows >= len(flat)).any())):
            raise UserError(f"rows must be int64 [n] from 0 to {len(flat) - 1}, or 'last': they are rows of the run")
        trunk = self.trunk(flat, cut)
        if rows is None:
            return self.head(trunk.hidden).view(*ids.shape, -1)
        if isinstance(rows, str) and len(cut) == len(flat):  # a token each: all of them are last
            return self.head(trunk.hidden)
        return self.head(trunk.hidden[trunk.last if isinstance(rows, str) else rows.to(self.device)])

    def _losses(self, ids: Tensor, segments: list[Segment], targets: Tensor, mtp: bool, phase: IndexPhase) -> Losses:
        targets = targets.flatten().to(self.device)
        assert len(targets) == len(ids) and all(s.memory is None for s in segments)
        lengths = [s.length for s in segments]
        trunk = self.trunk(ids, segments, phase)
        routing = {layer: (decided, lengths) for layer, decided in enumerate(trunk.routing) if decided is not None}
        drafted = None
        if mtp and self.predicts_next:
            # the MTP target of row t is the target of row t+1, so nothing is predicted across a document's end
            hidden, rows, decided = self.predict_next(trunk, ids)
            shared = isinstance(segments, Shard) and not segments.is_whole
            longer = shared or max(lengths) > 1  # else there is nothing to predict: a loss of zero, with a graph
            if isinstance(segments, Shard) and shared:
                after = segments.targets_after.to(self.device)
            else:
                after = targets[rows + 1] if longer else torch.full_like(rows, IGNORE)
            drafted = self.head(hidden, after)
            if longer:
                routing[len(self.layers)] = decided, [n - 1 for n in lengths if n > 1]
        return Losses(self.head(trunk.hidden, targets), drafted, routing, trunk.indexed)

    @torch.no_grad()
    def route(self, ids: Tensor, segments: Sequence[Segment], phase: IndexPhase = "off") -> dict[int, Routing]:
        """What the gates decide for a run without memories, ids int64 [T], by number of their layer. The MTP block's,
        after the last, has a row for each token that is followed by another of its segment.

        Like `forward` it is a way into the whole model, which those who shard one know.
        """
        trunk = self.trunk(ids, segments, phase)
        found = {layer: decided for layer, decided in enumerate(trunk.routing) if decided is not None}
        if self.predicts_next:
            # in each process that shares the model, or they wait for each other; without such a token it has a row
            # all the same, which is for nothing
            decided = self.predict_next(trunk, ids)[2]
            if isinstance(segments, Shard) and not segments.is_whole or any(s.length > 1 for s in segments):
                found[len(self.layers)] = decided
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, M] -> logits fp32 [n, vocab]."""
        return self.head(hidden)

    def _check_ids(self, ids: Tensor) -> None:
        few = ids.tolist() if ids.ndim == 1 and len(ids) <= 64 else None
        low, high = (min(few), max(few)) if few else (int(ids.min()), int(ids.max()))
        if low < 0 or high >= self.config.vocab_size:
            bad = low if low < 0 else high
            raise UserError(f"token id {bad} is outside the vocabulary of {self.config.vocab_size}: wrong tokenizer?")

    def embedded(self, ids: Tensor, given: Tensor | None) -> Tensor:
        """What the blocks begin with, [T, M]: the embeddings of ids, or what was given in their place."""
        if given is None:
            return ops.cast(self.embed(ids), self.compute_dtype)
        assert given.shape == (len(ids), self.config.hidden_size), "a row for each id, which hash layers route by"
        return given.to(self.compute_dtype)

    def _cut(self, ids: Tensor, cache: Any, segments: Segments | None) -> tuple[Tensor, list[Segment]]:
        """Bring the three input forms to flat ids and segments, and check them."""
        if ids.dtype not in (torch.int64, torch.int32) or ids.ndim not in (1, 2) or not ids.numel():
            raise UserError(f"ids must be a non-empty integer tensor [T] or [B, T], not {tuple(ids.shape)} {ids.dtype}")
        self._check_ids(ids)
        if segments is not None:
            if ids.ndim != 1 or cache is not None:
                raise UserError("segments go with flat ids [T] and carry their own memories: leave out cache")
            cut = segments if isinstance(segments, Shard) else [_segment(s) for s in segments]
            if sum(s.length for s in cut) != len(ids):
                raise UserError(f"segments of {sum(s.length for s in cut)} tokens for {len(ids)} ids: they must add up")
            return ids, cut
        batch = ids if ids.ndim == 2 else ids[None]
        rows = [None] * len(batch) if cache is None else list(cache) if isinstance(cache, Sequence) else [cache]
        if len(rows) != len(batch):
            raise UserError(f"{len(batch)} rows of ids for a cache of {len(rows)}: make it with batch={len(batch)}")
        return batch.flatten(), [Segment(batch.shape[1], memory) for memory in rows]


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating-point dtype, also by its name ("bfloat16")."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"dtype {dtype!r} is not a floating-point type: use float32, bfloat16 or float16")
    return found


def _segment(given: Segment | int | tuple[int, Any]) -> Segment:
    if isinstance(given, Segment):
        return given
    length, memory = (given, None) if isinstance(given, int) else given
    if isinstance(memory, Sequence):
        if len(memory) != 1:
            raise UserError(f"a segment continues one memory, not a batch of {len(memory)}: pass one of its rows")
        memory = memory[0]
    return Segment(length, memory)
