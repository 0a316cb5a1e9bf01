"""DeepSeek-V4, from token ids to logits. Open this file first.

embed -> N identical streams -> blocks -> collapse -> norm -> logits. The same lines train (no memory) and serve (with
one): the input is a flat run of T tokens cut into segments, each starting a document or continuing a memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsv4 import ops
from dsv4.cache import BatchMemory, LayerMemory, Pool, SequenceMemory
from dsv4.config import ModelConfig
from dsv4.errors import UserError
from dsv4.model import hyper
from dsv4.model.block import Block
from dsv4.model.dspark import Blocks, Drafting, DSpark
from dsv4.model.head import Head
from dsv4.model.indexer import Indexed
from dsv4.model.init import initialise
from dsv4.model.language import LanguageModel
from dsv4.model.large_pages import lay_on_large_pages
from dsv4.model.layers import Embedding, RMSNorm
from dsv4.model.moe import Routing
from dsv4.model.mtp import MTP
from dsv4.model.segments import IndexPhase, Run, Segment, check_segments, plan
from dsv4.model.shards import Shard, ShardRun, plan_shard
from dsv4.model.step import run_blocks


@dataclass(frozen=True)
class Trunk:
    """What the trunk made of a run: streams [T, N, M] before the collapse, normed hidden [T, M], routing by layer, and
    what those indexers came to that learn, by number of the layer."""

    run: Run
    streams: Tensor
    hidden: Tensor
    routing: Sequence[Routing]
    indexed: dict[int, Indexed]

    @property
    def last(self) -> Tensor:
        """int64 [segments]: the row of each segment's last token."""
        return self.run.last


class Transformer(LanguageModel):
    """The whole model. Parameters carry the published names (experts are stacked: see checkpoint/names.py).

    The arguments are those of every model (language.py); norms, router, compressors, hyper-connections and sinks are
    held and computed in fp32 whatever `dtype` and `compute_dtype` are.

    Every parameter is used inside the `forward` of the module that owns it, so that modules can be sharded or compiled
    one by one; training and serving both go through this module's own `forward`.
    """

    config: ModelConfig

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype | str = torch.float32,
        *,
        compute_dtype: torch.dtype | str | None = None,
        recompute: bool = False,
    ):
        super().__init__(config, dtype, compute_dtype=compute_dtype, recompute=recompute)
        dtype = self.dtype
        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(Block(config, i, dtype) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Head(config.hidden_size, config.vocab_size, dtype)
        hyper.add_parameters(self, "hc_head", config, head=True)
        self.mtp = nn.ModuleList(MTP(config, dtype) for _ in range(config.num_nextn_predict_layers))
        if config.dspark_stages:  # in its place: one or the other
            self.mtp = DSpark(config, dtype)
        initialise(self, config)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """torch.compile every block in place (the arguments are its own); the ops stay outside the graphs.

        A block alone: `ops.keep_out_of_graphs()`, then `torch.compile(block, dynamic=True)`.
        """
        ops.keep_out_of_graphs()
        for block in (*self.layers, *self.mtp):
            block.compile(*args, **kwargs)

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

        format: packed, float32, bfloat16 or float16 (or that dtype); default: compute_dtype, or packed where `numbers`
        is "published". mtp: with a window for the MTP block, which `draft` needs, or for each stage of a DSpark
        drafter, which `draft_block` needs.
        """
        if batch < 1:
            raise UserError(f"batch={batch} must be at least 1")
        pool = self.new_pool(format, max_rewind=max_rewind, mtp=mtp, slots=batch)
        return BatchMemory([pool.new(capacity) for _ in range(batch)])

    def new_pool(
        self,
        format: torch.dtype | str | None = None,
        *,
        pages: int | None = None,
        slots: int = 0,
        max_rewind: int = 128,
        mtp: bool = False,
    ) -> Pool:
        """A pool for the memories of many sequences; `pool.new()` is one. Arguments: see `cache.Pool`.

        Who makes one is going to serve: weights on a CPU are laid on large pages (large_pages.py).
        """
        if self.stream is None:
            lay_on_large_pages(chain(self.parameters(), self.buffers()))
        format = format or ("packed" if self.numbers == "published" else self.compute_dtype)
        return Pool(
            self.config, format=format, device=self.device, max_rewind=max_rewind,
            numbers=self.compute_dtype, mtp=mtp, pages=pages, slots=slots,
        )  # fmt: skip

    @property
    def predicts_next(self) -> bool:
        return self.config.num_nextn_predict_layers > 0

    def trunk(
        self,
        ids: Tensor,
        segments: Sequence[Segment],
        phase: IndexPhase = "off",
        *,
        embedded: Tensor | None = None,
    ) -> Trunk:
        """Run the blocks on flat ids [T]; memories are written and advanced. Gradients flow only without memories.

        A DSpark drafter's stages remember the run as the trunk's layers do, in memories made with mtp=True. Where
        `numbers` is "published", a segment without a memory is given one for this call: the released code rounds the
        rows that attention reads, a prompt's own too.

        phase: how CSA reads and whether its indexer has a loss (segments.py); for runs without memories. embedded: see
        LanguageModel.
        """
        if self.numbers == "published":
            mtp = bool(self.mtp)
            segments = [s if s.memory else replace(s, memory=self.new_cache(mtp=mtp)[0]) for s in segments]
        if isinstance(segments, Shard) and not segments.is_whole:
            run = plan_shard(self.config, segments, self.device, phase)
        else:
            run = plan(self.config, segments, self.device, phase)
        memories = run.memories()
        for memory in memories:
            memory.begin()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not memories):
            ids = ids if ids.device == self.device else ids.to(self.device)
            x, hidden, routing, features, indexed = self._layers(self.embedded(ids, embedded), ids, run)
            if features:
                self.drafter.remember(torch.cat(features, dim=1), run)
            if hidden is None:
                hidden = hyper.collapse(x, hyper.parameters_of(self, "hc_head"), self.config)
            hidden = self.norm(hidden)
        for segment in segments:
            if segment.memory is not None:
                segment.memory.advance(segment.length)
        return Trunk(run, x, hidden, routing, indexed)

    def _layers(
        self, x: Tensor, ids: Tensor, run: Run
    ) -> tuple[Tensor, Tensor | None, Sequence[Routing], list[Tensor], dict[int, Indexed]]:
        """Embedded tokens [T, M], which all streams begin with, through all blocks -> streams, and these collapsed
        where the blocks have done that as well; what the gates decided, what a drafter remembers of the run (the mean
        of the streams [T, M] after each of its target layers, if a memory has windows for it), and the indexers that
        learn."""
        pools, features, indexed = run.pools, list[Tensor](), dict[int, Indexed]()
        reads = any(pool is not None and pool.mtp for pool in pools)
        targets = [i + 1 for i in self.config.dspark_target_layer_ids] if reads else []
        count, decided = len(self.layers), list[Sequence[Routing]]()
        hidden = None
        for start, stop in pairwise(sorted({0, *targets, count})):
            blocks = list(self.layers)[start:stop]
            done = None
            if len(pools) == 1 and pools[0] is not None:
                end = hyper.parameters_of(self, "hc_head") if stop == count else None
                done = run_blocks(self.layers, blocks, x, ids, run, pools[0].layers[start:stop], end)
            if done is not None:
                x, hidden = done.streams, done.hidden
                decided.append(done.routing)
            elif start == 0:
                x = x[:, None].expand(-1, self.config.num_streams, -1).contiguous()
            for i, block in enumerate(blocks if done is None else (), start):
                views = [None if pool is None else pool.layers[i] for pool in pools]
                if self.recompute and torch.is_grad_enabled():
                    x, routing, *learned = checkpoint(block, x, ids, run, views, use_reentrant=False)  # type: ignore[misc]
                else:
                    x, routing, *learned = block(x, ids, run, views)
                decided.append([routing])
                indexed.update((i, found) for found in learned)
            if stop in targets:
                features.append(x.mean(dim=1))
        routings = decided[0] if len(decided) == 1 else [routing for part in decided for routing in part]
        return x, hidden, routings, features, indexed

    def predict_next(self, trunk: Trunk, ids: Tensor) -> tuple[Tensor, Tensor, Routing]:
        """The MTP block over a run without memories: hidden [n, M], its rows int64 [n] in the run, routing.

        Row t sees the trunk's streams at t and the token at t+1 and predicts t+2; the last token of a segment has no
        next one and drops out. If all do, the first row stays, with its own token for the next one: it predicts
        nothing, but the block has run and its parameters have a gradient, as in every other process. Where a row is
        shared with other processes every row stays, since each of them needs its neighbours' in the same order; what is
        then predicted after the end of a document is for nothing, and is left out of the routing.
        """
        if isinstance(trunk.run, ShardRun):
            shard = trunk.run.shard
            following, inside = shard.following.to(self.device), (~shard.ends).nonzero()[:, 0].to(self.device)
            hidden, _, all_of = self._mtp(trunk.streams, following, trunk.run, [None])
            kept = Routing(all_of.scores[inside], all_of.chosen[inside], all_of.weights[inside])
            return hidden, torch.arange(len(ids), device=self.device), kept
        published = self.numbers == "published"  # then every run has memories, this one's are its own
        assert self.predicts_next and (published or not trunk.run.memories())
        lengths = [s.length - 1 for s in trunk.run.segments if s.length > 1]
        keep = torch.ones(len(ids), dtype=torch.bool, device=self.device)
        keep[trunk.run.last] = False
        rows = keep.nonzero()[:, 0] if lengths else trunk.run.last[:1]
        following = ids.to(self.device)[rows + 1 if lengths else rows]
        lengths = lengths or [1]
        if published:
            every = ids.to(self.device).index_copy(0, rows, following)  # the last ones' are of no consequence
            hidden, _, routing = self.draft(trunk, every)
            kept = Routing(routing.scores[rows], routing.chosen[rows], routing.weights[rows])
            return hidden[rows], rows, kept
        run = plan(self.config, [Segment(n) for n in lengths], self.device)
        hidden, _, routing = self._mtp(trunk.streams[rows], following, run, [None] * len(run.pools))
        return hidden, rows, routing

    @torch.no_grad()
    def draft(self, trunk: Trunk, following: Tensor) -> tuple[Tensor, Tensor, Routing]:
        """The MTP block over every row of a run with memories (made with mtp=True): hidden [T, M], the block's streams
        [T, N, M], routing.

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
        run = trunk.run
        memories = [(s.memory, a, s.length) for s, a in zip(run.segments, run.starts, strict=True) if s.memory]
        for memory, start, count in memories:
            memory.refuse_torn()
            if not memory.mtp:
                raise UserError("a memory has no window for the MTP block: make it with new_cache(mtp=True)")
            if (memory.drafted, memory.length) != (start, start + count):
                raise UserError(
                    f"a memory of {memory.length} tokens, {memory.drafted} of them drafted, cannot draft rows "
                    f"{start} to {start + count - 1}: call draft once after each call of trunk, before any rewind"
                )
        for memory, _, _ in memories:
            memory.begin()
        views = [None if pool is None else pool.mtp[0] for pool in run.pools]
        out = self._mtp(trunk.streams, following.to(self.device), run, views)
        for memory, _, _ in memories:
            memory.advance_drafts()
        return out

    @torch.no_grad()
    def draft_deeper(
        self, streams: Tensor, following: Tensor, memories: Sequence[SequenceMemory]
    ) -> tuple[Tensor, Tensor, Routing]:
        """The MTP block on its own streams [n, N, M], a row at the end of each of n memories: one more draft for each.

        Returns what `draft` does. Row i takes the place of the trunk's at position memories[i].length; following: int64
        [n], the token drafted last, which comes after it. Each memory is one token longer then, of which only the
        block's window has a row: rewind it by as many as there were calls before anything else, and the next `draft`
        writes those rows anew. Raises UserError, OutOfPages among them, before anything is written.
        """
        self._check_ids(following)
        for memory in memories:
            if not memory.mtp:
                raise UserError("a memory has no window for the MTP block: make it with new_cache(mtp=True)")
        run = plan(self.config, [Segment(1, memory) for memory in memories], self.device)
        for memory in memories:
            memory.begin()
        views = [None if pool is None else pool.mtp[0] for pool in run.pools]
        out = self._mtp(streams, following.to(self.device), run, views)
        for memory in memories:
            memory.advance(1)
        return out

    @property
    def drafter(self) -> DSpark:
        """The DSpark drafter; UserError for a model without one."""
        if not isinstance(self.mtp, DSpark):
            raise UserError("the model has no DSpark drafter: its configuration has no dspark_stages")
        return self.mtp

    @torch.no_grad()
    def draft_block(self, anchors: Tensor, memories: Sequence[SequenceMemory], size: int | None = None) -> Drafting:
        """The DSpark drafter on a block at the end of each of n memories, of one pool that was made with mtp=True.

        anchors: int64 [n], the token after those that each memory has seen; slot k of its block stands k positions
        after it and drafts the token after that. size: slots (default: as trained). Writes nothing, so it may follow
        any call of `trunk`, and any rewind. Raises UserError for a memory that is empty or has no window for it.
        """
        drafter, size = self.drafter, self.config.dspark_block_size if size is None else size
        if anchors.shape != (len(memories),) or anchors.dtype not in (torch.int64, torch.int32) or not memories:
            raise UserError(
                f"anchors must be the token after each of {len(memories)} memories, not {tuple(anchors.shape)} "
                f"{anchors.dtype}"
            )
        if size < 1:
            raise UserError(f"size={size} must be at least 1 token to draft")
        self._check_ids(anchors)
        check_segments(self.config, [Segment(1, memory) for memory in memories])
        for memory in memories:
            if not memory.mtp:
                raise UserError("a memory has no windows for the drafter: make it with new_cache(mtp=True)")
            if not memory.length:
                raise UserError("a memory is empty, so there is nothing to draft from: run the first token before")
            if memory.pool is not memories[0].pool:
                raise UserError("the memories lie in several pools: call draft_block once for each")
        run = Blocks(self.config, memories, size, self.device)
        ids = torch.full((len(memories), size), self.config.dspark_noise_token_id or 0, device=self.device)
        ids[:, 0] = anchors
        ids = ids.flatten()
        states = drafter(self.embed(ids).to(self.compute_dtype), ids, run)
        logits = self.head(drafter.normed(states))
        return Drafting(states.view(len(memories), size, -1), logits.view(len(memories), size, -1))

    def _mtp(
        self, streams: Tensor, following: Tensor, run: Run, views: list[LayerMemory | None]
    ) -> tuple[Tensor, Tensor, Routing]:
        assert self.predicts_next, "the model has no MTP block"
        embedded = self.embed(following).to(self.compute_dtype)
        return self.mtp[0](streams, embedded, following, run, views)
