"""One process of a sharded model, beside the same model unsharded: what test_sharding.py starts one or more of.

`python sharded.py step RANK PROCESSES MEETING_FILE` prints as JSON how far loss, gradients, gradient norm and the
parameters after an optimiser's step are from those of a model that is not sharded (relative to each tensor's largest
number). `start` in place of `step` prints what a model made on the meta device, sharded and then initialised has in
common with one that was made whole, and how much memory that took. `uneven` prints how far the gradients are where one
process has a batch to which most parameters contribute nothing, in every phase of the indexers.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv4.measure.subjects import small_config, small_model, tokens
from dsv4.model import Transformer, init
from dsv4.train.indexer import thaw
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


def shard(model: Transformer, mesh: DeviceMesh) -> None:
    for part in (*model.layers, *model.mtp):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)


def stepped(mesh: DeviceMesh) -> dict[str, float]:
    one, sharded = small_model(mtp=1), small_model(mtp=1)
    before = {n: p.detach().clone() for n, p in one.named_parameters()}
    shard(sharded, mesh)
    assert all(is_sharded(p) for p in sharded.parameters())
    ids = tokens(one, 300)
    loss, norm, gradients = step(one, ids)
    loss_, norm_, gradients_ = step(sharded, ids)
    after = {n: p.detach() for n, p in one.named_parameters()}
    after_ = {n: whole(p.detach()) for n, p in sharded.named_parameters()}
    return {
        "loss": abs(loss_ / loss - 1),
        "norm": abs(norm_ / norm - 1),
        "gradients": apart(gradients_, gradients),
        "parameters": apart(after_, after),
        "moved": apart(after, before),
        "share": sum(p.to_local().numel() for p in sharded.parameters()) / sum(p.numel() for p in one.parameters()),  # type: ignore[attr-defined]
    }


def uneven(mesh: DeviceMesh) -> dict[str, float]:
    """Documents of single tokens beside long ones: no group closes, nothing follows, no entry is seen. One model, its
    phases one after the other, as in training."""
    one, sharded = small_model(mtp=1), small_model(mtp=1)
    shard(sharded, mesh)
    batches = [[1] * 5, [200, 100]]
    out: dict[str, float] = {}
    for phase in ("off", "dense", "warmup", "sparse"):
        expected: dict[str, Tensor] = {}
        for model, mine in ((one, batches[: mesh.size()]), (sharded, [batches[mesh.get_local_rank()]])):
            thaw(model.named_parameters(), phase)
            model.zero_grad(set_to_none=True)
            for lengths in mine:
                ids = tokens(model, sum(lengths))
                loss = training_loss(
                    model, ids, ids.roll(-1), lengths, mtp_weight=0.3, balance_weight=0.1, phase=phase
                )  # fmt: skip
                (loss.total / len(mine)).backward()  # of processes the mean is taken
            learns = {n for n, p in model.named_parameters() if p.requires_grad}
            assert learns == {n for n, p in model.named_parameters() if p.grad is not None}
            found = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
            expected = expected or found
        out[phase] = apart(found, expected)
        assert any(".indexer." in n for n in found) == (phase in ("warmup", "sparse"))
        assert ("embed.weight" in found) == (phase != "warmup")
    return out


class Scratch(TorchDispatchMode):
    """The bytes of the largest memory that any operation touches and that is not the model's own by the end."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model
        self.sizes: dict[int, int] = {}
        self.counts = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.counts = False
        yield
        self.counts = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves((args, kwargs, out)) if self.counts else ():
            if isinstance(t, Tensor) and not is_sharded(t) and not t.is_meta:
                storage = t.untyped_storage()
                self.sizes[storage.data_ptr()] = max(self.sizes.get(storage.data_ptr(), 0), storage.nbytes())
        return out

    def largest(self) -> int:
        held = [p.to_local() for p in self.model.parameters()] + list(self.model.buffers())  # type: ignore[attr-defined]
        own = {t.untyped_storage().data_ptr() for t in held}
        return max(size for place, size in self.sizes.items() if place not in own)


def started(mesh: DeviceMesh) -> dict[str, object]:
    """A model of awkward sizes: parameters of 3 numbers, and of no multiple of 16; several blocks each. In fp32, as
    weights that are trained are, and as `fully_shard` wants them: of one dtype.
    """
    init.BLOCK = 512
    config = small_config(mtp=1, hidden_size=45, q_lora_rank=21, vocab_size=101, moe_intermediate_size=23)
    torch.manual_seed(11)
    one = Transformer(config)
    next_one = torch.rand(4)
    with torch.device("meta"):
        sharded = Transformer(config)
    shard(sharded, mesh)
    empty = sharded.to_empty

    def poisoned(**where: torch.device | str) -> None:
        """What `fully_shard` itself does for room is not counted, and what lies there is no number."""
        with scratch.paused(), torch.no_grad():
            empty(**where)  # type: ignore[arg-type]
            for t in [p.to_local() for p in sharded.parameters()] + list(sharded.buffers()):  # type: ignore[attr-defined]
                t.fill_(torch.nan if t.is_floating_point() else -1)

    sharded.to_empty = poisoned  # type: ignore[method-assign, assignment]
    torch.manual_seed(11)
    with Scratch(sharded) as scratch:
        init.materialise(sharded, config)
    next_sharded, most = torch.rand(4), scratch.largest()
    expected = {n: shares(p.detach(), mesh) for n, p in one.named_parameters()}
    found = {n: p.to_local() for n, p in sharded.named_parameters()}  # type: ignore[attr-defined]
    assert expected.keys() == found.keys()
    buffers, buffers_ = dict(one.named_buffers()), dict(sharded.named_buffers())
    assert buffers.keys() == buffers_.keys()
    ids = tokens(one, 40)
    with torch.no_grad():
        logits, logits_ = one(ids), sharded(ids)
    return {
        "other_parameters": [n for n in expected if not torch.equal(expected[n], found[n])],
        "other_buffers": [n for n in buffers if not torch.equal(buffers[n], buffers_[n])],
        "same_generator": torch.equal(next_one, next_sharded),
        "same_logits": torch.equal(logits, logits_),
        "scratch": most,
        "block": (init.BLOCK + init.GROUP - 1) * 4,
        "largest": max(p.numel() * p.element_size() for p in one.parameters()),
    }


def shares(p: Tensor, mesh: DeviceMesh) -> Tensor:
    """The rows of a whole parameter that belong to this process: as many to each as `chunk` gives."""
    parts = p.chunk(mesh.size(), dim=0)
    return parts[mesh.get_local_rank()] if mesh.get_local_rank() < len(parts) else p[:0]


def main() -> None:
    what, rank, processes, meeting = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
    mesh = init_device_mesh("cpu", (processes,))
    print(json.dumps({"step": stepped, "start": started, "uneven": uneven}[what](mesh)), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    # Not by way of the interpreter's end: a thread of gloo that still lets go of a Python object then aborts the
    # process ("terminate called without an active exception"): seen once in a great many runs.
    os._exit(0)


if __name__ == "__main__":
    main()
