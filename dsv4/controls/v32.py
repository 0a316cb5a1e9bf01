"""DeepSeek-V3.2's sublayers: latent attention (MLA), the indexer that chooses its rows (DSA), and its experts.

Legend: T tokens, M model width, H heads, C latent width (kv_lora_rank), R rotary width, K rows read, X experts.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4 import ops
from dsv4.config import V32Config
from dsv4.controls.dense import MLP, NO_LIMIT, attend, attend_all, in_blocks, rotate_halves
from dsv4.controls.memory import remember
from dsv4.controls.run import Part
from dsv4.model.layers import Linear, RMSNorm, with_unused
from dsv4.model.moe import Experts, Routing
from dsv4.ops import rotate


class KeyNorm(nn.LayerNorm):
    """LayerNorm in fp32, cast back: weight and bias [dim] fp32, eps 1e-6 whatever the other norms have."""

    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-6, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class TokenIndexer(nn.Module):
    """DSA: which tokens a query reads. wq_b [heads*width, q_lora], wk [width, M], k_norm, weights_proj [heads, M]."""

    def __init__(self, config: V32Config, dtype: torch.dtype):
        super().__init__()
        c = config
        self.heads, self.width, self.topk = c.index_n_heads, c.index_head_dim, c.index_topk
        self.wq_b = Linear(c.q_lora_rank, self.heads * self.width, dtype)
        self.wk = Linear(c.hidden_size, self.width, dtype)
        self.k_norm = KeyNorm(self.width)
        self.weights_proj = Linear(c.hidden_size, self.heads, dtype, fp32=True)

    @torch.no_grad()
    def forward(self, x: Tensor, qr: Tensor, turn: Tensor, parts: Sequence[Part]) -> list[Tensor]:
        """For each part int64 [n, topk]: the rows that its last n queries read, those that see more than topk tokens.

        x [T, M] is the sublayer's input, qr [T, q_lora] the normed query latent, turn [T, pairs]. n may be 0, and where
        no part chooses or has a memory, nothing is computed.
        """
        choosing = [p.beyond(self.topk) for p in parts]
        last = [p.tokens.stop for p in parts]
        late = torch.cat([torch.arange(j - n, j, device="cpu") for j, n in zip(last, choosing, strict=True)])
        if not len(late) and all(p.stores is None for p in parts):
            return [torch.empty(0, self.topk, dtype=torch.int64, device=x.device) for _ in parts]
        keys = rotate_halves(self.k_norm(self.wk(x)), turn)
        late = late.to(x.device)
        q = rotate_halves(self.wq_b(qr[late]).view(len(late), self.heads, self.width), turn[late])
        weights = self.weights_proj(x[late]) * (self.width * self.heads) ** -0.5  # positive: may stand outside of relu
        each = zip(parts, q.split(choosing), weights.split(choosing), strict=True)
        return [self.choose(own, weight, keys[part.tokens], part) for part, own, weight in each]

    def choose(self, q: Tensor, weights: Tensor, keys: Tensor, part: Part) -> Tensor:
        """The rows int64 [n, topk] that a part's last queries q [n, heads, width] read, of all its keys so far."""
        store = part.stores[1] if part.stores else None
        rows = remember(store, keys, part.start)
        if store is not None:
            q = store.format.as_query(q)  # packed keys are rotated
        seen = torch.arange(part.end - len(q), part.end, device="cpu") + 1
        return ops.index_scores_topk(q, weights, rows, ops.Spans(torch.zeros_like(seen), seen), self.topk)


class Absorbed(nn.Module):
    """weight [H * (nope + value), C]: each head's key half and value half of what expands a latent.

    Neither is ever expanded: the key half moves into the query, the value half behind the softmax.
    """

    def __init__(self, heads: int, nope: int, value: int, latent: int, dtype: torch.dtype):
        super().__init__()
        self.heads, self.nope = heads, nope
        self.weight = nn.Parameter(torch.empty(heads * (nope + value), latent, dtype=dtype))

    def forward(self, x: Tensor, half: Literal["key", "value"]) -> Tensor:
        """key: query parts x [T, H, nope] -> [T, H, C]; value: mixed latents x [T, H, C] -> [T, H, value]."""
        by_head = self.weight.to(x.dtype).unflatten(0, (self.heads, -1))
        # the weight never stands transposed, and x lies in order: else bmm copies all of it for a single token
        if half == "key":
            return torch.bmm(x.transpose(0, 1).contiguous(), by_head[:, : self.nope]).transpose(0, 1)
        return torch.bmm(by_head[:, self.nope :], x.permute(1, 2, 0)).permute(2, 0, 1)


class LatentAttention(nn.Module):
    """MLA in its absorbed form, over the rows that the indexer chose: wq_a, q_norm, wq_b, wkv_a, kv_norm, wkv_b, wo.

    One row per token serves all heads: [normed latent (C) | rotated key (R)]. The key half of wkv_b moves into the
    query and the value half behind the softmax, so a query meets C + R numbers of a row and takes C of them.
    """

    def __init__(self, config: V32Config, dtype: torch.dtype):
        super().__init__()
        c = config
        self.heads, self.latent, self.nope = c.num_attention_heads, c.kv_lora_rank, c.qk_nope_head_dim
        self.wq_a = Linear(c.hidden_size, c.q_lora_rank, dtype)
        self.q_norm = RMSNorm(c.q_lora_rank, c.rms_norm_eps)
        self.wq_b = Linear(c.q_lora_rank, self.heads * (self.nope + c.qk_rope_head_dim), dtype)
        self.wkv_a = Linear(c.hidden_size, self.latent + c.qk_rope_head_dim, dtype)
        self.kv_norm = RMSNorm(self.latent, c.rms_norm_eps)
        self.wkv_b = Absorbed(self.heads, self.nope, c.v_head_dim, self.latent, dtype)
        self.wo = Linear(self.heads * c.v_head_dim, c.hidden_size, dtype)
        self.indexer = TokenIndexer(c, dtype)
        self.scale = (self.nope + c.qk_rope_head_dim) ** -0.5
        if c.rope_scaling.type == "yarn":  # mscale = mscale_all_dim = 1: all of it here, nothing on the rotations
            self.scale *= (0.1 * math.log(c.rope_scaling.factor) + 1) ** 2

    def forward(self, x: Tensor, turn: Tensor, parts: Sequence[Part]) -> Tensor:
        """x [T, M] -> [T, M]; each part of the run reads its own rows."""
        qr = self.q_norm(self.wq_a(x))
        q = rotate(self.wq_b(qr).view(len(x), self.heads, -1), turn)
        q = torch.cat([self.wkv_b(q[..., : self.nope], "key"), q[..., self.nope :]], dim=-1)  # [T, H, C + R]
        latent, key = self.wkv_a(x).tensor_split([self.latent], dim=-1)
        row = rotate(torch.cat([self.kv_norm(latent), key], dim=-1), turn)
        chosen = self.indexer(x, qr, turn, parts)
        mixed = [self.mix(q[p.tokens], row[p.tokens], rows, p) for p, rows in zip(parts, chosen, strict=True)]
        y = self.wo(self.wkv_b(torch.cat(mixed).to(x.dtype), "value").flatten(1))
        return with_unused(y, self.indexer.parameters())  # a control's indexer does not learn

    def mix(self, q: Tensor, new: Tensor, chosen: Tensor, part: Part) -> Tensor:
        """A part's queries q [n, H, C + R] over its latent rows, of which `new` [n, C + R] come now -> fp32 [n, H, C].

        The last queries read the rows that were chosen for them, those before them all.
        """
        rows, start = remember(part.stores[0] if part.stores else None, new, part.start), part.start
        early = len(q) - len(chosen)

        def all_rows(i: int, j: int) -> Tensor:
            seen = rows[: start + j][:, None]
            return attend_all(q[i:j, None], seen, seen[..., : self.latent], start + i, self.scale)

        def chosen_rows(i: int, j: int) -> Tensor:
            read = rows[chosen[i:j]].float()  # once, for keys and values
            return attend(q[early + i : early + j], read, read[..., : self.latent], self.scale)

        out = list(in_blocks(all_rows, early, self.heads * (start + early)))
        width = chosen.shape[1] * (self.heads + q.shape[-1])
        return torch.cat([*out, *in_blocks(chosen_rows, len(chosen), width)])


class GroupedGate(nn.Module):
    """weight [X, M] fp32 and a selection bias [X] (buffer): sigmoid scores, best groups first, then best experts."""

    bias: Tensor

    def __init__(self, config: V32Config):
        super().__init__()
        c = config
        self.topk, self.scale, self.groups, self.topk_group = (
            c.num_experts_per_tok, c.routed_scaling_factor, c.n_group, c.topk_group,
        )  # fmt: skip
        self.weight = nn.Parameter(torch.empty(c.n_routed_experts, c.hidden_size, dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(c.n_routed_experts, dtype=torch.float32))

    def forward(self, x: Tensor) -> Routing:
        """x [T, M] -> which experts a token is sent to, with weights that sum to `scale`."""
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        by_group = (scores + self.bias).detach().unflatten(1, (self.groups, -1))
        best_two = by_group.topk(min(2, by_group.shape[2]), dim=2).values.sum(dim=2)
        kept = torch.zeros_like(best_two, dtype=torch.bool)
        kept.scatter_(1, ops.topk_lowest(best_two, self.topk_group), True)
        chosen = ops.topk_lowest(by_group.masked_fill(~kept[..., None], float("-inf")).flatten(1), self.topk)
        weights = scores.gather(1, chosen)
        return Routing(scores, chosen, weights / weights.sum(dim=1, keepdim=True) * self.scale)


class GroupedMoE(nn.Module):
    """Routed experts and the shared one."""

    def __init__(self, config: V32Config, dtype: torch.dtype):
        super().__init__()
        self.gate = GroupedGate(config)
        self.experts = Experts(config, dtype, NO_LIMIT)
        inner = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = MLP(config.hidden_size, inner, dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """x [T, M] -> [T, M] and what the gate decided."""
        routing = self.gate(x)
        routed = self.experts(x, routing.chosen, routing.weights)
        return (routed + self.shared_experts(x).float()).to(x.dtype), routing
