"""The models that V4 is compared with, small enough to read: DeepSeek-V3.2 (MLA, DSA, MoE) and a dense Llama.

Both: embed -> blocks with a plain residual -> norm -> logits, for one sequence. Parameters carry the names of the
official V3.2 inference code. Every product of a single new token is one that the architecture needs, done as a plain
matmul on the parameter itself, so that work can be counted as it runs. Nothing of V4 needs this file.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from dsv4.config import LlamaConfig, V32Config
from dsv4.errors import UserError
from dsv4.model.control_memory import Config, ControlMemory, Stores, check_room
from dsv4.model.dense import MLP, GroupedQueryAttention
from dsv4.model.layers import Embedding, Linear, RMSNorm
from dsv4.model.rope import pair_frequencies, turns
from dsv4.model.transformer import as_dtype
from dsv4.model.v32 import GroupedMoE, LatentAttention


class PlainBlock(nn.Module):
    """x += attn(attn_norm(x)); x += ffn(ffn_norm(x))."""

    def __init__(self, config: Config, attn: nn.Module, ffn: nn.Module):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = attn
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn = ffn

    def forward(self, x: Tensor, turn: Tensor, start: int, stores: Stores | None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), turn, start, stores)
        return x + self.ffn(self.ffn_norm(x))


class ControlTransformer(nn.Module):
    """What both models share. `dtype` is that of the matrices and activations; norms, router and head are fp32."""

    def __init__(self, config: Config, dtype: torch.dtype | str, block: Callable[[int, torch.dtype], PlainBlock]):
        super().__init__()
        self.config, self.dtype = config, as_dtype(dtype)
        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype=self.dtype)
        self.layers = nn.ModuleList(block(i, self.dtype) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # fp32 logits from the parameter itself: a bf16 head would be copied for every call
        self.head = Linear(config.hidden_size, config.vocab_size, self.dtype, fp32=True)
        _initialise(self)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def num_parameters(self) -> int:
        """Parameters; routing biases are buffers and not counted."""
        return sum(p.numel() for p in self.parameters())

    def frequencies(self) -> Tensor:
        """Radians per position of each rotated channel pair, fp32."""
        raise NotImplementedError

    def new_cache(self, format: str | None = None, capacity: int = 0) -> ControlMemory:
        """An empty memory in a format of control_memory.py (default: the model's dtype), with room for `capacity`."""
        if format is None:
            format = "bfloat16" if self.dtype == torch.bfloat16 else "float32"
        return ControlMemory(self.config, format, capacity, self.device)

    def forward(
        self, ids: Tensor, memory: ControlMemory | None = None, *, rows: Literal["last"] | None = None
    ) -> Tensor:
        """Logits fp32 [T, vocab] of one sequence's ids int64 [T]; with a memory the ids continue it, without gradient.

        rows="last": those of the last token only, [1, vocab]. Raises UserError, before anything is written, for ids
        that are not flat or outside the vocabulary, a memory of another model, and more positions than there are.
        """
        self._check(ids, memory)
        start = 0 if memory is None else memory.length
        with torch.set_grad_enabled(torch.is_grad_enabled() and memory is None):
            ids = ids.to(self.device)
            turn = turns(self.frequencies(), torch.arange(start, start + len(ids), device=self.device))
            x = self.embed(ids)
            for i, layer in enumerate(self.layers):
                x = layer(x, turn, start, None if memory is None else memory.layers[i])
            logits = self.head(self.norm(x[-1:] if rows else x))
        if memory is not None:
            memory.length += len(ids)
        return logits

    def _check(self, ids: Tensor, memory: ControlMemory | None) -> None:
        if ids.dtype not in (torch.int64, torch.int32) or ids.ndim != 1 or not len(ids):
            raise UserError(f"ids must be a non-empty integer tensor [T], not {tuple(ids.shape)} {ids.dtype}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.config.vocab_size:
            bad = low if low < 0 else high
            raise UserError(f"token id {bad} is outside the vocabulary of {self.config.vocab_size}: wrong tokenizer?")
        if memory is not None and memory.config != self.config:
            raise UserError("a memory was made for another configuration: make it with this model's new_cache")
        check_room(self.config, len(ids) + (0 if memory is None else memory.length))


class V32Transformer(ControlTransformer):
    """DeepSeek-V3.2 (report, section 2): every layer has MLA with DSA; the first have a dense MLP, the others MoE."""

    config: V32Config

    def __init__(self, config: V32Config, dtype: torch.dtype | str = torch.float32):
        def block(layer: int, dtype: torch.dtype) -> PlainBlock:
            dense = layer < config.first_k_dense_replace
            ffn = MLP(config.hidden_size, config.intermediate_size, dtype) if dense else GroupedMoE(config, dtype)
            return PlainBlock(config, LatentAttention(config, dtype), ffn)

        super().__init__(config, dtype, block)

    def frequencies(self) -> Tensor:
        return pair_frequencies(self.config.qk_rope_head_dim, self.config.rope_theta, self.config.rope_scaling)


class DenseTransformer(ControlTransformer):
    """Llama 3 without its context extension: grouped queries over every row, rotary without scaling, dense MLPs."""

    config: LlamaConfig

    def __init__(self, config: LlamaConfig, dtype: torch.dtype | str = torch.float32):
        if config.rope_type != "default":
            raise UserError(f"rope_type {config.rope_type!r} can be counted, not computed: use 'default'")

        def block(layer: int, dtype: torch.dtype) -> PlainBlock:
            ffn = MLP(config.hidden_size, config.intermediate_size, dtype)
            return PlainBlock(config, GroupedQueryAttention(config, dtype), ffn)

        super().__init__(config, dtype, block)

    def frequencies(self) -> Tensor:
        return pair_frequencies(self.config.head_dim, self.config.rope_theta)


@torch.no_grad()
def _initialise(model: nn.Module) -> None:
    """Matrices normal of 0.02, norms 1, biases 0; on the meta device nothing happens."""
    for name, p in model.named_parameters():
        if p.is_meta:
            continue
        if name.endswith("norm.weight"):
            p.fill_(1.0)
        elif name.endswith("norm.bias"):
            p.zero_()
        else:
            p.normal_(0.0, 0.02)
