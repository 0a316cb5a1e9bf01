"""DSpark: the drafter that V4-Flash-0731 and V4-Pro-0813 have in place of the MTP block (the released code; the paper
"DSpark", 2607.05147). One pass drafts a block of tokens, then a small head corrects them one after the other.

A stage is a whole block of V4 that sees two sources: what it remembers of the text, made from the streams after a few
layers of the trunk, and all slots of the block at once, later ones too. The first slot holds the token that is known
already (the anchor), the others a noise token; slot k drafts the token that comes after its own place.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from dsv4 import ops
from dsv4.cache import SequenceMemory
from dsv4.config import ModelConfig
from dsv4.model import hyper
from dsv4.model.block import Block
from dsv4.model.layers import Linear, RMSNorm, Weight
from dsv4.model.parts import Part, ring_rows, rows_before, spans
from dsv4.model.segments import Run, Segment


@dataclass(frozen=True)
class Drafting:
    """What a pass over n blocks of k slots gave: states [n, k, M] before the norm, and their logits fp32 [n, k, V],
    which `DSpark.corrected` completes."""

    states: Tensor
    logits: Tensor


class Blocks(Run):
    """A block of `size` slots at the end of each memory (of one pool). Every slot sees the same: the memory's newest
    tokens, as many as the window is wide, and all slots of its block, none of which is remembered."""

    is_causal = False

    def __init__(self, config: ModelConfig, memories: Sequence[SequenceMemory], size: int, device: torch.device):
        super().__init__(config, [Segment(size, memory) for memory in memories], device)

    @cached_property
    def parts(self) -> list[Part]:
        memories, start, count = self.memories(), np.array(self.starts), np.array(self.lengths)
        pool, window = memories[0].pool, self.config.sliding_window
        seen = np.minimum(start, window)
        base = rows_before(seen + count)
        visible = spans(np.repeat(base, count), np.repeat(base + seen + count, count))
        slot, nothing = np.array([memory.slot for memory in memories]), np.zeros(0, dtype=np.int64)
        ring = ring_rows(window + pool.max_rewind, slot, start, count, seen, self._to_device)
        none = self._to_device(nothing)
        ring = replace(ring, write=none, kept=none)
        return [Part(pool, None, memories, visible, ring, none, nothing, {}, None)]


class MarkovHead(nn.Module):
    """Two factors [V, r] of what the token before adds to the logits of a token."""

    def __init__(self, vocab_size: int, rank: int, dtype: torch.dtype):
        super().__init__()
        self.markov_w1 = Weight(vocab_size, rank, dtype=dtype)
        self.markov_w2 = Weight(vocab_size, rank, dtype=dtype)

    def forward(self, before: Tensor) -> Tensor:
        """Tokens int64 [n] -> what they add to the logits, fp32 [n, V]."""
        return ops.linear(self.features(before), self.markov_w2.weight)

    def features(self, before: Tensor) -> Tensor:
        """Tokens int64 [n] -> fp32 [n, r]."""
        return self.markov_w1.weight[before].float()


class ConfidenceHead(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.proj = Linear(width, 1, torch.float32, fp32=True)

    def forward(self, x: Tensor) -> Tensor:
        """[n, width] -> logits fp32 [n]."""
        return self.proj(x)[:, 0]


class Stage(nn.Module):
    """A window-only block (layer number n_layers + stage). The first one has besides what makes the trunk's streams its
    input; the last one what makes drafts of its output. Embedding and output head are the trunk's."""

    main_proj: Linear
    main_norm: RMSNorm
    norm: RMSNorm
    markov_head: MarkovHead
    confidence_head: ConfidenceHead

    def __init__(self, config: ModelConfig, stage: int, dtype: torch.dtype):
        super().__init__()
        m, eps, rank = config.hidden_size, config.rms_norm_eps, config.dspark_markov_rank
        self.eps, self.number = eps, stage
        self.block = Block(config, config.num_hidden_layers + stage, dtype)
        if stage == 0:
            self.main_proj = Linear(len(config.dspark_target_layer_ids) * m, m, dtype)
            self.main_norm = RMSNorm(m, eps)
        if stage == config.dspark_stages - 1:
            self.norm = RMSNorm(m, eps)
            hyper.add_parameters(self, "hc_head", config, head=True)
            self.markov_head = MarkovHead(config.vocab_size, rank, dtype)
            self.confidence_head = ConfidenceHead(m + rank)

    def forward(self, x: Tensor, ids: Tensor, run: Blocks) -> Tensor:
        """Streams [T, N, M] of blocks -> streams; the run is of them."""
        return self.block(x, ids, run, [pool.mtp[self.number] for pool in run.pools if pool is not None])[0]

    def remember(self, main: Tensor, run: Run) -> None:
        """Write the key = value row of each token of the trunk's run that has a memory: from `main` [T, M] as it is,
        through neither the block's norm nor its hyper-connections."""
        attn = self.block.attn
        row = ops.rms_norm(ops.linear(main, attn.wkv.weight), attn.kv_norm.weight, self.eps)
        row = ops.rotate(row, run.turn["window"])
        for part in run.parts:
            if part.pool is not None and part.pool.mtp:
                store = part.pool.mtp[self.number].window
                assert store is not None and part.ring is not None
                part.ring.store(store, store.format.pack(part.of(row)))


class DSpark(nn.ModuleList):
    """The stages, which carry the published names: `mtp.0`, `mtp.1`, ..."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        super().__init__(Stage(config, stage, dtype) for stage in range(config.dspark_stages))
        self.config = config

    @property
    def first(self) -> Stage:
        stage = self[0]
        assert isinstance(stage, Stage)
        return stage

    @property
    def last(self) -> Stage:
        stage = self[-1]
        assert isinstance(stage, Stage)
        return stage

    def remember(self, features: Tensor, run: Run) -> None:
        """Every stage remembers the tokens of the trunk's run, in the memories that have windows for it.

        features [T, L*M]: the mean of the streams after each of the L target layers, in ascending order. A row depends
        on its own token alone, so what is rewound is simply written over.
        """
        main = self.first.main_norm(self.first.main_proj(features))
        for stage in self:
            assert isinstance(stage, Stage)
            stage.remember(main, run)

    def forward(self, embedded: Tensor, ids: Tensor, run: Blocks) -> Tensor:
        """Embedded slots [T, M] of blocks, and their ids [T] -> states [T, M]."""
        x = embedded[:, None].expand(-1, self.config.num_streams, -1).contiguous()
        for stage in self:
            x = stage(x, ids, run)
        return hyper.collapse(x, hyper.parameters_of(self.last, "hc_head"), self.config)

    def normed(self, states: Tensor) -> Tensor:
        """States [T, M] as the trunk's head takes them."""
        return self.last.norm(states)

    def corrected(self, logits: Tensor, before: Tensor) -> Tensor:
        """Logits fp32 [n, V] of a slot of each of n blocks, completed by the token before the one that is drafted,
        int64 [n]: the anchor for the first slot, then the last draft. A draft is drawn from these."""
        return logits + self.last.markov_head(before)

    def confidence(self, states: Tensor, before: Tensor) -> Tensor:
        """Logit fp32 [n] of the probability that a draft is accepted if those before it are, from states [n, M] of a
        slot; `before` as in `corrected`."""
        features = self.last.markov_head.features(before)
        return self.last.confidence_head(torch.cat([states.float(), features], dim=1))
