"""DeepSeek-V4, from token ids to logits. Open this file first.

embed -> N identical streams -> blocks -> collapse -> norm -> logits. The same lines train (no memory) and serve (with
one): the input is a flat run of T tokens cut into segments, each starting a document or continuing a memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsv4 import ops
from dsv4.cache import BatchMemory, LayerMemory, SequenceMemory
from dsv4.config import ModelConfig
from dsv4.errors import UserError
from dsv4.model import hyper
from dsv4.model.block import Block
from dsv4.model.head import Head
from dsv4.model.init import initialise
from dsv4.model.layers import Embedding, RMSNorm
from dsv4.model.moe import Routing
from dsv4.model.mtp import MTP
from dsv4.model.segments import Run, Segment, plan

Segments = Sequence["Segment | int | tuple[int, SequenceMemory | None]"]


@dataclass(frozen=True)
class Trunk:
    """What the trunk made of a run: streams [T, N, M] before the collapse, normed hidden [T, M], routing by layer."""

    run: Run
    streams: Tensor
    hidden: Tensor
    routing: list[Routing]


@dataclass(frozen=True)
class Losses:
    """What a run with targets comes to, with a graph: sums of -log p(target) in nats, and what the gates decided.

    mtp_nll is None without an MTP block or where no segment has a next token. routing: of every layer, the MTP block's
    last, with the lengths of the sequences that it saw.
    """

    nll: Tensor
    mtp_nll: Tensor | None
    routing: list[tuple[Routing, list[int]]]


class Transformer(nn.Module):
    """The whole model. Parameters carry the published names (experts are stacked: see checkpoint/names.py).

    `dtype` is that of the large matrices, `compute_dtype` that of the activations (default: the same; fp32 master
    weights are trained in bfloat16 so); norms, router, compressors, hyper-connections and sinks are held and computed
    in fp32 whatever they are. `recompute` saves memory in training: a block's activations are computed again in the
    backward pass. `stop_ids` are the tokens that end a text, as the configuration says.

    Every parameter is used inside the `forward` of the module that owns it, so that modules can be sharded or compiled
    one by one; training and serving both go through this module's own `forward`.
    """

    stop_ids: tuple[int, ...]

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype | str = torch.float32,
        *,
        compute_dtype: torch.dtype | str | None = None,
        recompute: bool = False,
    ):
        super().__init__()
        dtype = as_dtype(dtype)
        self.config, self.dtype, self.recompute = config, dtype, recompute
        self.compute_dtype = dtype if compute_dtype is None else as_dtype(compute_dtype)
        self.stop_ids = config.stop_ids
        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(Block(config, i, dtype) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Head(config.hidden_size, config.vocab_size, dtype)
        hyper.add_parameters(self, "hc_head", config, head=True)
        self.mtp = nn.ModuleList(MTP(config, dtype) for _ in range(config.num_nextn_predict_layers))
        initialise(self, config)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """torch.compile every block in place (the arguments are its own); the ops stay outside the graphs.

        A block alone: `ops.keep_out_of_graphs()`, then `torch.compile(block, dynamic=True)`.
        """
        ops.keep_out_of_graphs()
        for block in (*self.layers, *self.mtp):
            block.compile(*args, **kwargs)

    def num_parameters(self, *, mtp: bool = False) -> int:
        """Parameters, without the MTP block unless asked; router biases and hash tables are buffers, not counted."""
        return sum(p.numel() for name, p in self.named_parameters() if mtp or not name.startswith("mtp."))

    @overload
    def forward(
        self, ids: Tensor, cache: BatchMemory | SequenceMemory | None = ..., segments: Segments | None = ..., *,
        rows: Tensor | Literal["last"] | None = ...,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def forward(
        self, ids: Tensor, cache: None = ..., segments: Segments | None = ..., *, targets: Tensor, mtp: bool = ...
    ) -> Losses: ...

    def forward(
        self,
        ids: Tensor,
        cache: BatchMemory | SequenceMemory | None = None,
        segments: Segments | None = None,
        *,
        rows: Tensor | Literal["last"] | None = None,
        targets: Tensor | None = None,
        mtp: bool = True,
    ) -> Tensor | Losses:
        """Logits fp32 [..., T, vocab] for ids int64 [T] or [B, T] (B segments of T tokens).

        cache: one memory per row, which the call continues. segments (ids must be flat): the general form, a length, a
        (length, memory or None) or a Segment each. rows: logits of these rows of the flat run only, int64 [n] -> [n,
        vocab], or "last", each segment's last token, [segments, vocab]. Raises UserError, before anything is written,
        for ids outside the vocabulary, lengths that do not add up, and positions beyond max_position_embeddings.

        With targets (of ids' shape, -100 where there is none; no memories) it returns Losses, whose logits exist block
        by block only; mtp=False leaves those of the MTP block out.
        """
        flat, cut = self._cut(ids, cache, segments)
        if targets is not None:
            return self._losses(flat, cut, targets, mtp)
        if isinstance(rows, Tensor) and (rows.ndim != 1 or bool((rows < 0).any()) or bool((rows >= len(flat)).any())):
            raise UserError(f"rows must be int64 [n] from 0 to {len(flat) - 1}, or 'last': they are rows of the run")
        trunk = self.trunk(flat, cut)
        if rows is None:
            return self.head(trunk.hidden).view(*ids.shape, -1)
        return self.head(trunk.hidden[trunk.run.last if isinstance(rows, str) else rows.to(self.device)])

    def _losses(self, ids: Tensor, segments: list[Segment], targets: Tensor, mtp: bool) -> Losses:
        targets = targets.flatten().to(self.device)
        assert len(targets) == len(ids) and all(s.memory is None for s in segments)
        lengths = [s.length for s in segments]
        trunk = self.trunk(ids, segments)
        routing = [(decided, lengths) for decided in trunk.routing]
        drafted = None
        if mtp and self.mtp and max(lengths) > 1:
            # the MTP target of row t is the target of row t+1, so nothing is predicted across a document's end
            hidden, rows, decided = self.predict_next(trunk, ids)
            drafted = self.head(hidden, targets[rows + 1])
            routing.append((decided, [n - 1 for n in lengths if n > 1]))
        return Losses(self.head(trunk.hidden, targets), drafted, routing)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, M] -> logits fp32 [n, vocab]."""
        return self.head(hidden)

    def new_cache(
        self,
        batch: int = 1,
        format: torch.dtype | str | None = None,
        *,
        capacity: int = 0,
        max_rewind: int = 128,
        mtp: bool = False,
    ) -> BatchMemory:
        """Empty memories for `batch` rows; `capacity` tokens are preallocated.

        format: packed, float32, bfloat16 or float16 (or that dtype); default: compute_dtype. mtp: with a window
        for the MTP block, which `draft` needs.
        """
        if batch < 1:
            raise UserError(f"batch={batch} must be at least 1")
        return BatchMemory([
            SequenceMemory(
                self.config, format=format or self.compute_dtype, device=self.device, capacity=capacity,
                max_rewind=max_rewind, numbers=self.compute_dtype, mtp=mtp,
            )
            for _ in range(batch)
        ])  # fmt: skip

    def trunk(self, ids: Tensor, segments: Sequence[Segment]) -> Trunk:
        """Run the blocks on flat ids [T]; memories are written and advanced. Gradients flow only without memories."""
        run = plan(self.config, segments, self.device)
        memories = run.memories()
        for memory in memories:
            memory.refuse_torn()
        for memory in memories:
            memory.begin()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not memories):
            ids = ids.to(self.device)
            x = self.embed(ids).to(self.compute_dtype)[:, None].expand(-1, self.config.num_streams, -1).contiguous()
            routing = []
            for i, block in enumerate(self.layers):
                views = [None if p.memory is None else p.memory.layers[i] for p in run.pieces]
                if self.recompute and torch.is_grad_enabled():
                    x, decided = checkpoint(block, x, ids, run, views, use_reentrant=False)  # type: ignore[misc]
                else:
                    x, decided = block(x, ids, run, views)
                routing.append(decided)
            hidden = self.norm(hyper.collapse(x, hyper.parameters_of(self, "hc_head"), self.config))
        for segment in segments:
            if segment.memory is not None:
                segment.memory.advance(segment.length)
        return Trunk(run, x, hidden, routing)

    def predict_next(self, trunk: Trunk, ids: Tensor) -> tuple[Tensor, Tensor, Routing]:
        """The MTP block over a run without memories: hidden [n, M], its rows int64 [n] in the run, routing.

        Row t sees the trunk's streams at t and the token at t+1 and predicts t+2; the last token of a segment has no
        next one and drops out.
        """
        assert self.mtp and not trunk.run.memories()
        lengths = [s.length - 1 for s in trunk.run.segments if s.length > 1]
        assert lengths, "no segment has a next token"
        keep = torch.ones(len(ids), dtype=torch.bool, device=self.device)
        keep[trunk.run.last] = False
        rows = keep.nonzero()[:, 0]
        following = ids.to(self.device)[rows + 1]
        run = plan(self.config, [Segment(n) for n in lengths], self.device)
        hidden, routing = self._mtp(trunk.streams[rows], following, run, [None] * len(run.pieces))
        return hidden, rows, routing

    @torch.no_grad()
    def draft(self, trunk: Trunk, following: Tensor) -> tuple[Tensor, Routing]:
        """The MTP block over every row of a run with memories (made with mtp=True): hidden [T, M], routing.

        following: int64 [T], the token after each row; row t sees the trunk's streams at t and that token and predicts
        the one after it. Reads and writes the block's window in the memories, so it follows every call of `trunk` once,
        before any rewind. A row keeps the token it was given: to go on from length n with another token than row n - 1
        was given, rewind to n - 1 and run that row again. Raises UserError before anything is written.
        """
        if following.shape != trunk.hidden.shape[:1] or following.dtype not in (torch.int64, torch.int32):
            raise UserError(
                f"following must be the token after each of the {len(trunk.hidden)} rows, not "
                f"{tuple(following.shape)} {following.dtype}"
            )
        self._check_ids(following)
        memories = [(p.memory, p.start, p.tokens.stop - p.tokens.start) for p in trunk.run.pieces if p.memory]
        for memory, start, count in memories:
            memory.refuse_torn()
            if memory.mtp is None:
                raise UserError("a memory has no window for the MTP block: make it with new_cache(mtp=True)")
            if (memory.drafted, memory.length) != (start, start + count):
                raise UserError(
                    f"a memory of {memory.length} tokens, {memory.drafted} of them drafted, cannot draft rows "
                    f"{start} to {start + count - 1}: call draft once after each call of trunk, before any rewind"
                )
        for memory, _, _ in memories:
            memory.begin()
        views = [None if p.memory is None else p.memory.mtp for p in trunk.run.pieces]
        out = self._mtp(trunk.streams, following.to(self.device), trunk.run, views)
        for memory, _, _ in memories:
            memory.advance_drafts()
        return out

    def _mtp(
        self, streams: Tensor, following: Tensor, run: Run, views: list[LayerMemory | None]
    ) -> tuple[Tensor, Routing]:
        assert self.mtp, "the model has no MTP block"
        block = self.mtp[0]
        hidden, _, routing = block(streams, self.embed(following).to(self.compute_dtype), following, run, views)
        return hidden, routing

    def _check_ids(self, ids: Tensor) -> None:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.config.vocab_size:
            bad = low if low < 0 else high
            raise UserError(f"token id {bad} is outside the vocabulary of {self.config.vocab_size}: wrong tokenizer?")

    def _cut(
        self, ids: Tensor, cache: BatchMemory | SequenceMemory | None, segments: Segments | None
    ) -> tuple[Tensor, list[Segment]]:
        """Bring the three input forms to flat ids and segments, and check them."""
        if ids.dtype not in (torch.int64, torch.int32) or ids.ndim not in (1, 2) or not ids.numel():
            raise UserError(f"ids must be a non-empty integer tensor [T] or [B, T], not {tuple(ids.shape)} {ids.dtype}")
        self._check_ids(ids)
        if segments is not None:
            if ids.ndim != 1 or cache is not None:
                raise UserError("segments go with flat ids [T] and carry their own memories: leave out cache")
            cut = [_segment(s) for s in segments]
            if sum(s.length for s in cut) != len(ids):
                raise UserError(f"segments of {sum(s.length for s in cut)} tokens for {len(ids)} ids: they must add up")
            return ids, cut
        batch = ids if ids.ndim == 2 else ids[None]
        cache = BatchMemory([cache]) if isinstance(cache, SequenceMemory) else cache
        if cache is not None and len(cache) != len(batch):
            raise UserError(f"{len(batch)} rows of ids for a cache of {len(cache)}: make it with batch={len(batch)}")
        rows = [None] * len(batch) if cache is None else list(cache)
        return batch.flatten(), [Segment(batch.shape[1], memory) for memory in rows]


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating-point dtype, also by its name ("bfloat16")."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"dtype {dtype!r} is not a floating-point type: use float32, bfloat16 or float16")
    return found


def _segment(given: Segment | int | tuple[int, SequenceMemory | None]) -> Segment:
    if isinstance(given, Segment):
        return given
    length, memory = (given, None) if isinstance(given, int) else given
    if isinstance(memory, BatchMemory):
        if len(memory) != 1:
            raise UserError(f"a segment continues one memory, not a batch of {len(memory)}: pass one of its rows")
        memory = memory[0]
    return Segment(length, memory)
