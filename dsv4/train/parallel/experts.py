"""Expert parallelism: every process has some of the experts, and tokens travel to those that were chosen for them.

A token goes once for each expert that it chose, in the numbers of the computation, with its weight; the expert's
weighted output comes back, and is added up at home in fp32, in the order of the choices, as in one process.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dsv4 import ops
from dsv4.model.layers import with_unused
from dsv4.model.moe import Experts
from dsv4.train.parallel.exchange import exchange


class ExpertGroup:
    """`ops.experts` for weights that are this process's share: a DTensor cut over the group, expert by expert."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.size = group, group.size()

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, limit: float) -> Tensor:
        w13, w2 = w13.to_local(), w2.to_local()  # type: ignore[attr-defined]
        own, k = len(w13), chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=self.size * own).view(self.size, own)
        coming = torch.empty_like(counts)  # from each process, the rows for each of the experts here
        dist.all_to_all_single(coming, counts, group=self.group)
        sent, received = counts.sum(dim=1).tolist(), coming.sum(dim=1).tolist()
        rows = exchange(x[order // k], sent, received, self.group)
        shares = exchange(weights.flatten()[order], sent, received, self.group)
        expert = torch.arange(own, device=x.device).repeat(self.size).repeat_interleave(coming.flatten())
        if len(rows):
            y = ops.experts(rows, expert[:, None], shares[:, None], w13, w2, limit).to(x.dtype)
        else:  # nobody chose an expert here: the graph is that of the others, or they would wait
            y = with_unused((rows * shares[:, None]).to(x.dtype), (w13, w2))
        back = exchange(y, received, sent, self.group)
        home = torch.empty_like(order)
        home[order] = torch.arange(len(order), device=order.device)
        return back[home].view(len(x), k, x.shape[1]).float().sum(dim=1)


def share_experts(model: nn.Module, mesh: DeviceMesh) -> list[Experts]:
    """Cut the experts of every layer over the processes of a mesh; returns what holds them."""
    from torch.distributed.tensor import Shard, distribute_tensor

    found = [module for module in model.modules() if isinstance(module, Experts)]
    for experts in found:
        for name, whole in list(experts.named_parameters(recurse=False)):
            own = distribute_tensor(whole.detach(), mesh, [Shard(0)], src_data_rank=None)
            experts.register_parameter(name, nn.Parameter(own, requires_grad=whole.requires_grad))
        experts.dispatch = ExpertGroup(mesh.get_group())
    return found
