"""Norms of gradients of which every process has a part: one exchange for all that are cut alike, not one for each."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def sharded_norms(tensors: Sequence[DTensor], order: float) -> Tensor:
    """The norm of each whole tensor, of order 2 or infinity: fp32 or wider [n]. A process may hold none of a tensor."""
    assert order in (2, math.inf)
    out = torch.stack([_power(t.to_local(), order) for t in tensors])
    alike: dict[int, list[int]] = {}
    for i, t in enumerate(tensors):
        assert not any(place.is_replicate() or place.is_partial() for place in t.placements)
        alike.setdefault(id(t.device_mesh), []).append(i)
    for places in alike.values():
        mesh, part = tensors[places[0]].device_mesh, out[places]
        for axis in range(mesh.ndim):
            dist.all_reduce(part, dist.ReduceOp.SUM if order == 2 else dist.ReduceOp.MAX, group=mesh.get_group(axis))
        out[places] = part
    return out.sqrt() if order == 2 else out


def _power(own: Tensor, order: float) -> Tensor:
    """What is summed, or the largest of which is taken, over the parts."""
    own = own.to(torch.promote_types(own.dtype, torch.float32))
    if order == 2:
        return torch.linalg.vector_norm(own).square()
    return own.abs().max() if own.numel() else own.new_zeros(())
