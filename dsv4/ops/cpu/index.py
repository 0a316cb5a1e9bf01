"""Choosing rows: by the indexer's scores of keys, which are read from their pool in place, and by given scores."""

import torch
from torch import Tensor

from dsv4.ops.cpu.library import PLAIN, Kernel
from dsv4.ops.cpu.pools import described, refused
from dsv4.ops.formats import PackedRows
from dsv4.ops.limits import Limits
from dsv4.ops.spans import Spans

_choose = Kernel("index_scores_topk", "pilllpppplp")
_best = Kernel("best_rows", "plpppllp")
_topk = Kernel("topk_lowest", "pilllp")


def index_scores_topk(q: Tensor, weights: Tensor, keys: Tensor | PackedRows, visible: Spans, k: int) -> Tensor:
    q, weights = q.contiguous(), weights.float().contiguous()
    start, stop = visible.start.contiguous(), visible.stop.contiguous()
    n, heads, width = q.shape
    out = torch.empty(n, k, dtype=torch.int64)
    _choose(
        q.data_ptr(), q.dtype == torch.bfloat16, n, heads, width, weights.data_ptr(), described(keys),
        start.data_ptr(), stop.data_ptr(), k, out.data_ptr(),
    )  # fmt: skip
    return out


def best_rows(scores: Tensor, visible: Spans, counts: Tensor, k: int) -> Tensor:
    scores, counts = scores.float().contiguous(), counts.contiguous()
    start, stop = visible.start.contiguous(), visible.stop.contiguous()
    n = len(counts)
    out = torch.empty(n, k, dtype=torch.int64)
    _best(
        scores.data_ptr(), len(scores), start.data_ptr(), stop.data_ptr(), counts.data_ptr(), n, k, out.data_ptr()
    )  # fmt: skip
    return out


def topk_lowest(scores: Tensor, k: int) -> Tensor:
    scores = scores.contiguous()
    n = scores.shape[-1]
    k = min(k, n)
    out = torch.empty(*scores.shape[:-1], k, dtype=torch.int64)
    rows = scores.numel() // n if n else 0
    _topk(scores.data_ptr(), scores.dtype == torch.bfloat16, rows, n, k, out.data_ptr())
    return out


def _keys(q: Tensor, weights: Tensor, keys: Tensor | PackedRows, visible: Spans, k: int) -> str:
    return refused(keys, q.shape[2])


def _scores(scores: Tensor, *rest: object) -> str:
    return "" if scores.is_floating_point() else "scores that are whole numbers"


_KIND = {"devices": ("cpu",), "dtypes": PLAIN}  # a choice has no gradient, so none is missing
LIMITS = {
    "index_scores_topk": Limits(**_KIND, also=_keys),
    "best_rows": Limits(**_KIND, also=_scores),
    "topk_lowest": Limits(**_KIND, also=_scores),
}
