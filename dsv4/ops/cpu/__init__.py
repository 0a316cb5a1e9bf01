"""The ops in C++ (src/), for machines with AVX2 or more: values, and gradients of attention, streams, experts,
projections and the loss; what they do not serve runs in `blocked`.

Importing raises ImportError with the reason where the library was not built or cannot run (library.py).
"""

from dsv4.ops.cpu import attention as _attention
from dsv4.ops.cpu import experts as _experts
from dsv4.ops.cpu import gate as _gate
from dsv4.ops.cpu import hyper as _hyper
from dsv4.ops.cpu import index as _index
from dsv4.ops.cpu import linear as _linear
from dsv4.ops.cpu import loss as _loss
from dsv4.ops.cpu import project as _project
from dsv4.ops.cpu import rows as _rows
from dsv4.ops.cpu.attention import sparse_attention
from dsv4.ops.cpu.experts import experts, mlp
from dsv4.ops.cpu.gate import gate
from dsv4.ops.cpu.hyper import head_collapse, hyper_enter, hyper_maps, hyper_write, sinkhorn
from dsv4.ops.cpu.index import best_rows, index_scores_topk, topk_lowest
from dsv4.ops.cpu.linear import linear
from dsv4.ops.cpu.loss import cross_entropy
from dsv4.ops.cpu.project import compressor_rows, project_in, project_out
from dsv4.ops.cpu.rows import compress, pack_rows, rotate, unpack_rows
from dsv4.ops.limits import Limits

__all__ = [
    "LIMITS", "best_rows", "compress", "compressor_rows", "cross_entropy", "experts", "gate", "head_collapse",
    "hyper_enter", "hyper_maps", "hyper_write", "index_scores_topk", "linear", "mlp", "pack_rows", "project_in",
    "project_out", "rotate", "sinkhorn", "sparse_attention", "topk_lowest", "unpack_rows",
]  # fmt: skip

_FILES = (_attention, _experts, _gate, _hyper, _index, _linear, _loss, _project, _rows)
LIMITS: dict[str, Limits] = {name: limits for file in _FILES for name, limits in file.LIMITS.items()}
