"""Choosing with a fixed tie rule: by score, then by lowest index."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dsv4.ops.blocked import blocks
from dsv4.ops.blocked.blocks import apart, rows_of
from dsv4.ops.exact import whole_numbers
from dsv4.ops.formats import PackedRows
from dsv4.ops.spans import Spans

_INT64_MIN = torch.iinfo(torch.int64).min
_LOW32 = 0xFFFFFFFF
_Score = Callable[[slice | Tensor], Tensor]  # of rows that a block of queries shares [K], or that are each one's own


def order_keys(scores: Tensor, index: Tensor) -> Tensor:
    """Distinct int64 keys that sort like (score, then lowest index): 32 bits of ordered float over 32 of index."""
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0: -0.0 becomes 0.0, so that the two tie
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(torch.int64) << 32) | (_LOW32 - index)


def topk_lowest(scores: Tensor, k: int) -> Tensor:
    """Indices [..., k] of the k largest, by score, then by lowest index."""
    keys = order_keys(scores, torch.arange(scores.shape[-1], device=scores.device))
    return _LOW32 - (torch.topk(keys, k, dim=-1).values & _LOW32)


@torch.no_grad()
def index_scores_topk(q: Tensor, weights: Tensor, keys: Tensor | PackedRows, visible: Spans, k: int) -> Tensor:
    """Streaming form: blocks of queries x blocks of keys, merging the best k so far.

    Equal keys have equal scores wherever they lie: products are exact (ops/exact.py), heads are added one by one.
    """
    n, heads, _ = q.shape
    chosen = torch.full((n, k), -1, dtype=torch.int64, device=q.device)
    queries = max(1, min(128, blocks.BLOCK_NUMBERS // (heads * 512)))

    def scorer(i: int, j: int) -> _Score:
        own, unit = whole_numbers(q[i:j])
        w = weights[i:j, :, None].double() * unit

        def score(rows: slice | Tensor) -> Tensor:
            block, unit = whole_numbers(keys[rows])
            if block.ndim == 3:
                dots = torch.bmm(own, block.transpose(1, 2))
            else:
                dots = (own.flatten(0, 1) @ block.T).view(j - i, heads, len(block))
            return _folded(dots.relu_().mul_(w)) * unit[..., 0]

        return score

    def numbers(gathered: bool) -> int:
        return 2 * (heads + (keys.shape[1] if gathered else 0))  # 2: in fp64

    for i, j, best in _best(visible, k, queries, numbers, scorer, q.device):
        chosen[i:j, k - best.shape[1] :] = _ascending(best)
    return chosen


def _folded(x: Tensor) -> Tensor:
    """The sum [n, K] over the middle of x [n, heads, K], which is used up: halves upon halves, so that each column is
    added up in the same order (a reduction adds its last columns otherwise)."""
    heads = x.shape[1]
    while heads > 1:
        half = (heads + 1) // 2
        x[:, : heads - half] += x[:, half:heads]
        heads = half
    return x[:, 0]


@torch.no_grad()
def best_rows(scores: Tensor, visible: Spans, counts: Tensor, k: int) -> Tensor:
    """Blocks of intervals x blocks of rows, merging the best k so far."""
    chosen = torch.full((len(visible), k), -1, dtype=torch.int64, device=scores.device)
    for i, j, best in _best(visible, k, 64, lambda _: 4, lambda i, j: lambda rows: scores[rows], scores.device):
        beyond = torch.arange(best.shape[1], device=scores.device) >= counts[i:j, None]
        chosen[i:j, k - best.shape[1] :] = _ascending(best.masked_fill_(beyond, _INT64_MIN))
    return chosen


def _best(
    visible: Spans,
    k: int,
    queries: int,
    numbers: Callable[[bool], int],
    scorer: Callable[[int, int], _Score],
    device: torch.device,
) -> Iterator[tuple[int, int, Tensor]]:
    """(i, j, keys [j-i, at most k]) for every block of at most `queries` queries that sees anything: the order keys of
    the best rows, best first, the smallest integer where a query sees no more.

    numbers: how many one query and row take while they are scored, by whether each query's rows are gathered.
    """
    for i, j in visible.blocks(queries):
        lo, hi = visible.union(i, j)
        if hi == lo:
            continue
        gathered = apart(visible, i, j)
        if gathered:  # every query has rows of its own
            lo, hi = 0, visible.longest_of(i, j)
        score = scorer(i, j)
        width = max(k, blocks.BLOCK_NUMBERS // (numbers(gathered) * (j - i)))
        best: Tensor | None = None
        for a in range(lo, hi, width):
            b = min(a + width, hi)
            if gathered:
                index, hidden = rows_of(visible, i, j, a, b, device)
                order = order_keys(score(index), index)
            else:
                index, hidden = torch.arange(a, b, device=device), visible.hidden(i, j, a, b, device)
                order = order_keys(score(slice(a, b)), index).expand(j - i, b - a)
            order = order.masked_fill(hidden, _INT64_MIN)
            order = order if best is None else torch.cat([best, order], dim=1)
            best = torch.topk(order, min(k, order.shape[1]), dim=1).values
        assert best is not None
        yield i, j, best


def _ascending(best: Tensor) -> Tensor:
    """The rows of these order keys, -1 first where there is none."""
    return (_LOW32 - (best & _LOW32)).masked_fill_(best == _INT64_MIN, -1).sort(dim=1).values
