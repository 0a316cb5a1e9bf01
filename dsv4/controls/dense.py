"""What a dense transformer is made of: attention over every row so far, and a gated MLP. V3.2 shares some of it.

Queries are attended in blocks, so memory is linear in the tokens, backward too. Products of activations are fp32.
Legend: T tokens, M model width, H query heads, D head width, K rows read, G query heads per key-value head.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsv4 import ops
from dsv4.config import LlamaConfig
from dsv4.controls.memory import remember
from dsv4.controls.run import Part
from dsv4.model.layers import Linear

NO_LIMIT = float("inf")  # none of these models clamps its SwiGLU
BLOCK_NUMBERS = 1 << 23  # numbers that one block of scores or gathered rows may hold: 32 MiB in fp32


def attend(q: Tensor, keys: Tensor, values: Tensor, scale: float, hidden: Tensor | None = None) -> Tensor:
    """softmax(q keys^T scale) values, all fp32: q [B, n, D], keys [B, K, D], values [B, K, Dv] -> [B, n, Dv].

    hidden bool [n, K]: True where a query must not read a row.
    """
    scores = torch.bmm(q.float(), keys.float().transpose(1, 2)) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.bmm(scores.softmax(dim=-1), values.float())


def attend_all(q: Tensor, keys: Tensor, values: Tensor, start: int, scale: float) -> Tensor:
    """Queries q [n, heads, G, D] at positions start.. read every row up to their own -> fp32 [n, heads * G, Dv].

    keys [start + n, heads, D], values [start + n, heads, Dv].
    """
    n, heads, group, _ = q.shape
    position = torch.arange(start, start + n, device=q.device).repeat_interleave(group)
    hidden = None if n == 1 else torch.arange(start + n, device=q.device) > position[:, None]
    out = attend(q.transpose(0, 1).flatten(1, 2), keys.transpose(0, 1), values.transpose(0, 1), scale, hidden)
    return out.view(heads, n, group, -1).transpose(0, 1).flatten(1, 2)


def in_blocks(of: Callable[[int, int], Tensor], count: int, numbers: int) -> Iterator[Tensor]:
    """of(i, j) for blocks of queries i .. j-1, `numbers` being what one query needs; backward computes them again."""
    size = max(1, BLOCK_NUMBERS // numbers)
    for i in range(0, count, size):
        j = min(i + size, count)
        if torch.is_grad_enabled():  # what a block holds must not be kept for all blocks at once
            yield checkpoint(of, i, j, use_reentrant=False, preserve_rng_state=False)  # type: ignore[misc]
        else:
            yield of(i, j)


def rotate_halves(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate the FIRST channels of x [n, ..., D] by turn [n, pairs], pairing channel i with i + pairs, in fp32."""
    pairs = turn.shape[-1]
    a, b, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], dim=-1)
    turned = torch.complex(a.float(), b.float()) * turn.view(len(turn), *[1] * (x.ndim - 2), pairs)
    return torch.cat([turned.real.to(x.dtype), turned.imag.to(x.dtype), rest], dim=-1)


class MLP(nn.Module):
    """w2 (silu(w1 x) * w3 x)."""

    def __init__(self, hidden: int, inner: int, dtype: torch.dtype):
        super().__init__()
        self.w1, self.w3 = Linear(hidden, inner, dtype), Linear(hidden, inner, dtype)
        self.w2 = Linear(inner, hidden, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(ops.swiglu(self.w1(x), self.w3(x), NO_LIMIT).to(x.dtype))


class GroupedQueryAttention(nn.Module):
    """wq [H*D, M], wk and wv [heads*D, M], wo: G = H / heads query heads share a key-value head and read every row."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype):
        super().__init__()
        c = config
        self.width, self.kv_heads, self.group = (
            c.head_dim, c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads,
        )  # fmt: skip
        self.wq = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, dtype)
        self.wk = Linear(c.hidden_size, self.kv_heads * c.head_dim, dtype)
        self.wv = Linear(c.hidden_size, self.kv_heads * c.head_dim, dtype)
        self.wo = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, dtype)

    def forward(self, x: Tensor, turn: Tensor, parts: Sequence[Part]) -> Tensor:
        """x [T, M] -> [T, M]; each part of the run reads its own rows."""
        q = rotate_halves(self.wq(x).view(len(x), -1, self.width), turn).unflatten(1, (self.kv_heads, self.group))
        key = rotate_halves(self.wk(x).view(len(x), -1, self.width), turn).flatten(1)
        value = self.wv(x)
        mixed = [self.mix(q[p.tokens], key[p.tokens], value[p.tokens], p) for p in parts]
        return self.wo(torch.cat(mixed).to(x.dtype).flatten(1))

    def mix(self, q: Tensor, key: Tensor, value: Tensor, part: Part) -> Tensor:
        """Attention of a part's queries [n, heads, G, D] over all its rows so far -> fp32 [n, H, D]."""
        keys, values = (
            remember(store, rows, part.start)[:].unflatten(1, (self.kv_heads, self.width))
            for store, rows in zip(part.stores or (None, None), (key, value), strict=True)
        )

        def block(i: int, j: int) -> Tensor:
            end = part.start + j
            return attend_all(q[i:j], keys[:end], values[:end], part.start + i, self.width**-0.5)

        return torch.cat(list(in_blocks(block, len(q), self.kv_heads * self.group * len(keys))))
