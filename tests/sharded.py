"""One process of a sharded step, beside the same step unsharded: what test_sharding.py starts one or two of.

`python sharded.py RANK PROCESSES MEETING_FILE` prints as JSON how far loss, gradients, gradient norm and the parameters
after an optimiser's step are from those of a model that is not sharded (relative to each tensor's largest number).
"""

import json
import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dsv4.measure.subjects import small_model, tokens
from dsv4.model import Transformer
from dsv4.train.loss import training_loss
from dsv4.train.optim import HybridOptimizer, clip_gradients, is_sharded, parameter_groups, whole


def step(model: Transformer, ids: Tensor) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, gradient norm, and the whole gradients of one update, which is then made."""
    loss = training_loss(model, ids, ids.roll(-1), [200, 100], mtp_weight=0.3, balance_weight=0.1)
    loss.total.backward()
    gradients = {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
    norm = clip_gradients(model.parameters(), 1.0)
    HybridOptimizer(parameter_groups(model.named_parameters(), model.config), lr=1e-2).step()
    return loss.total.item(), norm, gradients


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(((a[n] - b[n]).abs().max() / b[n].abs().max().clamp_min(1e-12)).item() for n in a)


def main() -> None:
    rank, processes, meeting = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
    mesh = init_device_mesh("cpu", (processes,))
    one, sharded = small_model(mtp=1), small_model(mtp=1)
    before = {n: p.detach().clone() for n, p in one.named_parameters()}
    for part in (*sharded.layers, *sharded.mtp):
        fully_shard(part, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert all(is_sharded(p) for p in sharded.parameters())
    ids = tokens(one, 300)
    loss, norm, gradients = step(one, ids)
    loss_, norm_, gradients_ = step(sharded, ids)
    after = {n: p.detach() for n, p in one.named_parameters()}
    after_ = {n: whole(p.detach()) for n, p in sharded.named_parameters()}
    figures = {
        "loss": abs(loss_ / loss - 1),
        "norm": abs(norm_ / norm - 1),
        "gradients": apart(gradients_, gradients),
        "parameters": apart(after_, after),
        "moved": apart(after, before),
        "share": sum(p.to_local().numel() for p in sharded.parameters()) / sum(p.numel() for p in one.parameters()),  # type: ignore[attr-defined]
    }
    print(json.dumps(figures))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
