"""The ops in C++ (src/): values only, for machines with AVX2 or more; what they do not serve runs in `blocked`.

Importing raises ImportError with the reason where the library was not built or cannot run (library.py).
"""

from dsv4.ops.cpu import attention as _attention
from dsv4.ops.cpu import index as _index
from dsv4.ops.cpu import linear as _linear
from dsv4.ops.cpu.attention import sparse_attention
from dsv4.ops.cpu.index import best_rows, index_scores_topk, topk_lowest
from dsv4.ops.cpu.linear import linear
from dsv4.ops.limits import Limits

__all__ = ["LIMITS", "best_rows", "index_scores_topk", "linear", "sparse_attention", "topk_lowest"]

LIMITS: dict[str, Limits] = {**_linear.LIMITS, **_attention.LIMITS, **_index.LIMITS}
