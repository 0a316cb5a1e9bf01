"""What one block of queries reads of a pool: rows shared by the block, or rows of each query's own."""

import torch
from torch import Tensor

from dsv4.ops.formats import PackedRows
from dsv4.ops.spans import Spans

NEG_INF = float("-inf")
BLOCK_NUMBERS = 1 << 23  # numbers that one block of scores may hold: 32 MiB in fp32
FEW = 512  # rows that a block of queries may read as one, whether or not each of them needs most of these


def dot(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with an fp32 result: low-precision operands are multiplied as they are and summed in fp32."""
    if a.is_cuda and a.dtype == b.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32) if a.ndim == 3 else torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class Piece:
    """What one block of queries reads of one pool: keys [K, D] shared by the block, or [b, K, D] per query."""

    def __init__(self, keys: Tensor, hidden: Tensor, rows: slice | Tensor):
        self.keys, self.hidden, self.rows = keys, hidden, rows

    def scores(self, q: Tensor, scale: float) -> Tensor:
        """fp32 [b, H, K] from q [b, H, D], -inf where hidden."""
        b, heads, _ = q.shape
        if self.keys.ndim == 2:
            s = dot(q.flatten(0, 1), self.keys.T).view(b, heads, -1)
        else:
            s = dot(q, self.keys.transpose(1, 2))
        return s.mul_(scale).masked_fill_(self.hidden[:, None], NEG_INF)

    def mix(self, p: Tensor) -> Tensor:
        """sum_k p[b, H, k] keys[k] -> fp32 [b, H, D]."""
        p = p.to(self.keys.dtype)
        if self.keys.ndim == 2:
            return dot(p.flatten(0, 1), self.keys).view(*p.shape[:2], -1)
        return dot(p, self.keys)

    def add_grad(self, grad: Tensor, ds: Tensor, q: Tensor, p: Tensor, do: Tensor) -> None:
        """grad[rows] += ds^T q + p^T do: a row is a key and a value at once."""
        if isinstance(self.rows, slice):
            left = torch.cat([ds.flatten(0, 1), p.flatten(0, 1)])
            grad[self.rows].addmm_(left.T, torch.cat([q.flatten(0, 1), do.flatten(0, 1)]))
        else:
            g = torch.bmm(torch.cat([ds, p], dim=1).transpose(1, 2), torch.cat([q, do], dim=1))
            # a hidden row's gradient is exactly zero: adding it somewhere spares a device the wait for a count
            grad.index_add_(0, self.rows.clamp_min(0).flatten(), g.flatten(0, 1))


def entry_piece(
    i: int, j: int, visible: Spans | None, chosen: Tensor | None, pool: Tensor | PackedRows, dtype: torch.dtype
) -> Piece | None:
    """What queries i..j-1 read of the compressed entries, or of another pool with a row for each; None: nothing."""
    lo, hi = (0, len(pool)) if visible is None else visible.union(i, j)
    if hi == lo:
        return None
    if chosen is None:
        assert visible is not None, "entries are read by interval or as chosen rows"
        return interval_piece(i, j, visible, pool, dtype)
    rows = chosen[i:j]
    # few entries and several queries: one dense product is cheaper than gathering for each
    if j - i > 1 and hi - lo <= 4 * rows.shape[1]:
        hidden = torch.ones(j - i, hi - lo + 1, dtype=torch.bool, device=pool.device)
        hidden.scatter_(1, torch.where(rows < 0, 0, rows - lo + 1), False)
        return Piece(pool[lo:hi].to(dtype), hidden[:, 1:], slice(lo, hi))
    return Piece(pool[rows.clamp_min(0)].to(dtype), rows < 0, rows)


def interval_piece(i: int, j: int, spans: Spans, pool: Tensor | PackedRows, dtype: torch.dtype) -> Piece:
    """What queries i..j-1 read of a pool in which each has its interval."""
    lo, hi = spans.union(i, j)
    if not apart(spans, i, j):
        return Piece(pool[lo:hi].to(dtype), spans.hidden(i, j, lo, hi, pool.device), slice(lo, hi))
    rows, hidden = rows_of(spans, i, j, 0, spans.longest_of(i, j), pool.device)
    return Piece(pool[rows].to(dtype), hidden, rows)


def apart(spans: Spans, i: int, j: int) -> bool:
    """Whether the intervals of queries i..j-1, those of different sequences, are better gathered than read as one."""
    lo, hi = spans.union(i, j)
    return j - i > 1 and hi - lo > max(FEW, 4 * spans.longest_of(i, j))


def rows_of(spans: Spans, i: int, j: int, a: int, b: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows a..b-1 of each interval of queries i..j-1, int64 [j-i, b-a], and where the interval has no such row."""
    start, stop = spans.on(device)
    rows = start[i:j, None] + torch.arange(a, b, device=device)
    hidden = rows >= stop[i:j, None]
    return rows.masked_fill_(hidden, 0), hidden
