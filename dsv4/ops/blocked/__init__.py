"""The ops that need care with memory, computed in blocks with analytic backward passes; same values as reference.py.

Runs on any device torch runs on and serves every call. Nothing here grows faster than linearly with the sequence:
scores and masks exist for one block of queries at a time and are computed again in the backward pass. What an op means,
and the legend: see ops/__init__.py.
"""

from dsv4.ops.blocked.attention import sparse_attention
from dsv4.ops.blocked.choose import best_rows, index_scores_topk, topk_lowest
from dsv4.ops.blocked.experts import experts, gate
from dsv4.ops.blocked.hyper import hyper_enter, hyper_maps, hyper_write, sinkhorn
from dsv4.ops.blocked.index_loss import index_kl
from dsv4.ops.blocked.loss import cross_entropy
from dsv4.ops.limits import Limits

__all__ = [
    "LIMITS", "best_rows", "cross_entropy", "experts", "gate", "hyper_enter", "hyper_maps", "hyper_write", "index_kl",
    "index_scores_topk", "sinkhorn", "sparse_attention", "topk_lowest",
]  # fmt: skip

LIMITS = {"experts": Limits()}
