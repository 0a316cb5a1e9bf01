"""The models that V4 is compared with: DeepSeek-V3.2 (MLA, DSA, MoE) and a dense Llama.

Both: embed -> blocks with a plain residual -> norm -> logits, over a flat run of segments as V4's. Parameters carry the
names of the official V3.2 inference code. Every product of a single new token is one that the architecture needs, done
as a plain matmul on the parameter itself, so that work can be counted as it runs. Nothing of V4 needs this room.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsv4.config import LlamaConfig, V32Config
from dsv4.controls.dense import MLP, GroupedQueryAttention
from dsv4.controls.memory import Config, ControlBatch, ControlMemory, ControlPool
from dsv4.controls.run import Part, Run
from dsv4.controls.v32 import GroupedMoE, LatentAttention
from dsv4.errors import UserError
from dsv4.model.head import Head
from dsv4.model.indexer import Indexed
from dsv4.model.language import LanguageModel
from dsv4.model.layers import Embedding, RMSNorm
from dsv4.model.moe import Routing
from dsv4.model.rope import pair_frequencies, turns
from dsv4.model.segments import IndexPhase, Segment, check_segments


@dataclass(frozen=True)
class ControlTrunk:
    """Normed hidden [T, M], each segment's last row int64 [segments], routing by layer (None: a dense one)."""

    hidden: Tensor
    last: Tensor
    routing: list[Routing | None]

    @property
    def indexed(self) -> dict[int, Indexed]:
        """Empty: no indexer of these learns."""
        return {}


class PlainBlock(nn.Module):
    """x += attn(attn_norm(x)); x += ffn(ffn_norm(x))."""

    def __init__(self, config: Config, attn: nn.Module, ffn: nn.Module):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = attn
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn = ffn

    def forward(self, x: Tensor, turn: Tensor, parts: Sequence[Part]) -> tuple[Tensor, Routing | None]:
        """x [T, M], turn complex64 [T, pairs] -> x, and the gate's decision where there is one."""
        x = x + self.attn(self.attn_norm(x), turn, parts)
        y = self.ffn(self.ffn_norm(x))
        y, routing = y if isinstance(y, tuple) else (y, None)
        return x + y, routing


class ControlTransformer(LanguageModel):
    """What both models share. Norms, router, the indexer's head weights and the head are computed in fp32."""

    config: Config

    def __init__(
        self,
        config: Config,
        block: Callable[[int, torch.dtype], PlainBlock],
        dtype: torch.dtype | str,
        compute_dtype: torch.dtype | str | None,
        recompute: bool,
    ):
        super().__init__(config, dtype, compute_dtype=compute_dtype, recompute=recompute)
        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype=self.dtype)
        self.layers = nn.ModuleList(block(i, self.dtype) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Head(config.hidden_size, config.vocab_size, self.dtype)
        self.mtp = nn.ModuleList()
        _initialise(self, config.initializer_range)

    def frequencies(self) -> Tensor:
        """Radians per position of each rotated channel pair, fp32."""
        raise NotImplementedError

    def new_cache(
        self,
        batch: int = 1,
        format: torch.dtype | str | None = None,
        *,
        capacity: int = 0,
        max_rewind: int = 128,
        mtp: bool = False,
    ) -> ControlBatch:
        """Empty memories for `batch` rows; `capacity` tokens are preallocated.

        format: float32, bfloat16 or float16 (or that dtype), packed for V3.2; default: compute_dtype. max_rewind is
        that of V4's memories: these keep all rows, and can always go back.
        """
        if batch < 1:
            raise UserError(f"batch={batch} must be at least 1")
        pool = self.new_pool(format, max_rewind=max_rewind, mtp=mtp)
        return ControlBatch([pool.new(capacity) for _ in range(batch)])

    def new_pool(
        self,
        format: torch.dtype | str | None = None,
        *,
        pages: int | None = None,
        slots: int = 0,
        max_rewind: int = 128,
        mtp: bool = False,
    ) -> ControlPool:
        """What makes memories one by one; there is always room, as each grows by itself. Arguments as in `new_cache`;
        slots, like max_rewind, is for V4's memories."""
        if mtp:
            raise UserError("mtp=True, but the model has no MTP block: leave it out")
        return ControlPool(
            self.config, format=format or self.compute_dtype, device=self.device, max_rewind=max_rewind, pages=pages
        )

    def trunk(
        self,
        ids: Tensor,
        segments: Sequence[Segment],
        phase: IndexPhase = "off",
        *,
        embedded: Tensor | None = None,
    ) -> ControlTrunk:
        """Run the blocks on flat ids [T]; memories are written and advanced. Gradients flow only without memories."""
        assert phase == "off", "the indexer of a control does not learn"
        check_segments(self.config, segments)
        run = Run.of(segments, self.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not run.memories):
            turn = turns(self.frequencies(), run.positions().to(self.device))
            x = self.embedded(ids.to(self.device), embedded)
            routing = []
            for i, block in enumerate(self.layers):
                if self.recompute and torch.is_grad_enabled():
                    x, decided = checkpoint(block, x, turn, run.parts(i), use_reentrant=False)  # type: ignore[misc]
                else:
                    x, decided = block(x, turn, run.parts(i))
                routing.append(decided)
            hidden = self.norm(x)
        for segment in segments:
            if isinstance(segment.memory, ControlMemory):
                segment.memory.length += segment.length
        return ControlTrunk(hidden, run.last, routing)


class V32Transformer(ControlTransformer):
    """DeepSeek-V3.2 (report, section 2): every layer has MLA with DSA; the first have a dense MLP, the others MoE."""

    config: V32Config

    def __init__(
        self,
        config: V32Config,
        dtype: torch.dtype | str = torch.float32,
        *,
        compute_dtype: torch.dtype | str | None = None,
        recompute: bool = False,
    ):
        def block(layer: int, dtype: torch.dtype) -> PlainBlock:
            dense = layer < config.first_k_dense_replace
            ffn = MLP(config.hidden_size, config.intermediate_size, dtype) if dense else GroupedMoE(config, dtype)
            return PlainBlock(config, LatentAttention(config, dtype), ffn)

        super().__init__(config, block, dtype, compute_dtype, recompute)

    def frequencies(self) -> Tensor:
        return pair_frequencies(self.config.qk_rope_head_dim, self.config.rope_theta, self.config.rope_scaling)


class DenseTransformer(ControlTransformer):
    """Llama 3 without its context extension: grouped queries over every row, rotary without scaling, dense MLPs."""

    config: LlamaConfig

    def __init__(
        self,
        config: LlamaConfig,
        dtype: torch.dtype | str = torch.float32,
        *,
        compute_dtype: torch.dtype | str | None = None,
        recompute: bool = False,
    ):
        if config.rope_type != "default":
            raise UserError(f"rope_type {config.rope_type!r} can be counted, not computed: use 'default'")

        def block(layer: int, dtype: torch.dtype) -> PlainBlock:
            ffn = MLP(config.hidden_size, config.intermediate_size, dtype)
            return PlainBlock(config, GroupedQueryAttention(config, dtype), ffn)

        super().__init__(config, block, dtype, compute_dtype, recompute)

    def frequencies(self) -> Tensor:
        return pair_frequencies(self.config.head_dim, self.config.rope_theta)


@torch.no_grad()
def _initialise(model: nn.Module, std: float) -> None:
    """Matrices normal, norms 1, biases 0; on the meta device nothing happens."""
    for name, p in model.named_parameters():
        if p.is_meta:
            continue
        if name.endswith("norm.weight"):
            p.fill_(1.0)
        elif name.endswith("norm.bias"):
            p.zero_()
        else:
            p.normal_(0.0, std)
