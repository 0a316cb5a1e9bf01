"""DeepSeek-V3.2's sublayers: latent attention (MLA), the indexer that chooses its rows (DSA), and its experts.

Legend: T tokens, M model width, H heads, C latent width (kv_lora_rank), R rotary width, K rows read, X experts.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4 import ops
from dsv4.config import V32Config
from dsv4.model.control_memory import Stores, remember
from dsv4.model.dense import MLP, NO_LIMIT, attend, attend_all, in_blocks, rotate_halves
from dsv4.model.layers import Linear, RMSNorm
from dsv4.model.moe import Experts
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
    def forward(self, x: Tensor, qr: Tensor, turn: Tensor, start: int, stores: Stores | None) -> Tensor:
        """Rows int64 [n, topk] that the last n queries read: those that see more than topk tokens, so may be none.

        x [T, M] is the sublayer's input, qr [T, q_lora] the normed query latent, turn [T, pairs].
        """
        end = start + len(x)
        choosing = min(len(x), max(0, end - self.topk))  # the token at position p sees p + 1
        if not choosing and stores is None:
            return torch.empty(0, self.topk, dtype=torch.int64, device=x.device)
        keys = remember(stores[1] if stores else None, rotate_halves(self.k_norm(self.wk(x)), turn), start)
        x, qr, turn = (t[len(t) - choosing :] for t in (x, qr, turn))
        q = rotate_halves(self.wq_b(qr).view(choosing, self.heads, self.width), turn)
        if stores is not None:
            q = stores[1].format.as_query(q)  # packed keys are rotated
        weights = self.weights_proj(x) * (self.width * self.heads) ** -0.5  # positive, so it may stand outside of relu
        seen = torch.arange(end - choosing, end, device="cpu") + 1
        return ops.index_scores_topk(q, weights, keys, ops.Spans(torch.zeros_like(seen), seen), self.topk)


class LatentAttention(nn.Module):
    """MLA in its absorbed form, over the rows that the indexer chose: wq_a, q_norm, wq_b, wkv_a, kv_norm, wkv_b, wo.

    One row per token serves all heads: [normed latent (C) | rotated key (R)]. The key half of wkv_b moves into the
    query and the value half behind the softmax, so a query meets C + R numbers of a row and takes C of them.
    """

    def __init__(self, config: V32Config, dtype: torch.dtype):
        super().__init__()
        c = config
        self.heads, self.latent, self.nope, self.value = (
            c.num_attention_heads, c.kv_lora_rank, c.qk_nope_head_dim, c.v_head_dim,
        )  # fmt: skip
        self.wq_a = Linear(c.hidden_size, c.q_lora_rank, dtype)
        self.q_norm = RMSNorm(c.q_lora_rank, c.rms_norm_eps)
        self.wq_b = Linear(c.q_lora_rank, self.heads * (self.nope + c.qk_rope_head_dim), dtype)
        self.wkv_a = Linear(c.hidden_size, self.latent + c.qk_rope_head_dim, dtype)
        self.kv_norm = RMSNorm(self.latent, c.rms_norm_eps)
        self.wkv_b = Linear(self.latent, self.heads * (self.nope + self.value), dtype)
        self.wo = Linear(self.heads * self.value, c.hidden_size, dtype)
        self.indexer = TokenIndexer(c, dtype)
        self.scale = (self.nope + c.qk_rope_head_dim) ** -0.5
        if c.rope_scaling.type == "yarn":  # mscale = mscale_all_dim = 1: all of it here, nothing on the rotations
            self.scale *= (0.1 * math.log(c.rope_scaling.factor) + 1) ** 2

    def forward(self, x: Tensor, turn: Tensor, start: int, stores: Stores | None) -> Tensor:
        """x [T, M] at positions start.. -> [T, M]."""
        qr = self.q_norm(self.wq_a(x))
        q = rotate(self.wq_b(qr).view(len(x), self.heads, -1), turn)
        by_head = self.wkv_b.weight.view(self.heads, self.nope + self.value, self.latent)
        key_half, value_half = by_head[:, : self.nope], by_head[:, self.nope :]
        absorbed = torch.bmm(q[..., : self.nope].transpose(0, 1), key_half).transpose(0, 1)
        q = torch.cat([absorbed, q[..., self.nope :]], dim=-1)  # [T, H, C + R]
        latent, key = self.wkv_a(x).tensor_split([self.latent], dim=-1)
        row = rotate(torch.cat([self.kv_norm(latent), key], dim=-1), turn)
        rows = remember(stores[0] if stores else None, row, start)
        chosen = self.indexer(x, qr, turn, start, stores)
        mixed = self.mix(q, rows, start, chosen).to(x.dtype)
        return self.wo(torch.bmm(mixed.transpose(0, 1), value_half.transpose(1, 2)).transpose(0, 1).flatten(1))

    def mix(self, q: Tensor, rows: ops.Pool, start: int, chosen: Tensor) -> Tensor:
        """Attention of q [T, H, C + R] over latent rows -> fp32 [T, H, C]: all rows, or chosen ones for the last."""
        early = len(q) - len(chosen)

        def all_rows(i: int, j: int) -> Tensor:
            seen = rows[: start + j][:, None]
            return attend_all(q[i:j, None], seen, seen[..., : self.latent], start + i, self.scale)

        def chosen_rows(i: int, j: int) -> Tensor:
            read = rows[chosen[i:j]]
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

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, M] -> chosen experts int64 [T, k] and their weights fp32 [T, k], which sum to `scale`."""
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        by_group = (scores + self.bias).detach().unflatten(1, (self.groups, -1))
        best_two = by_group.topk(min(2, by_group.shape[2]), dim=2).values.sum(dim=2)
        kept = torch.zeros_like(best_two, dtype=torch.bool)
        kept.scatter_(1, ops.topk_lowest(best_two, self.topk_group), True)
        chosen = ops.topk_lowest(by_group.masked_fill(~kept[..., None], float("-inf")).flatten(1), self.topk)
        weights = scores.gather(1, chosen)
        return chosen, weights / weights.sum(dim=1, keepdim=True) * self.scale


class GroupedMoE(nn.Module):
    """Routed experts and the shared one."""

    def __init__(self, config: V32Config, dtype: torch.dtype):
        super().__init__()
        self.gate = GroupedGate(config)
        self.experts = Experts(config, dtype, NO_LIMIT)
        inner = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = MLP(config.hidden_size, inner, dtype)

    def forward(self, x: Tensor) -> Tensor:
        chosen, weights = self.gate(x)
        routed = self.experts(x, chosen, weights)
        return (routed + self.shared_experts(x).float()).to(x.dtype)
