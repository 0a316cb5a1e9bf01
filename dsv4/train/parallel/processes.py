"""A training process among others: who it is, what it holds of the model, what it reads of a batch, what all know.

    torchrun --nproc-per-node 4 -m dsv4 train --out runs/mine parallel.ep=2

Without torchrun there is one process, whose methods do nothing. Of several, the first one prepares the data, writes
what is written and prints. Numbers: process = (dp * CP + cp) * EP + ep, so that the processes that share experts are
neighbours, then those that share a row. Every process sees the same numbers where something is decided (`agree`), so
all of them take the same steps, or stop after the same one.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dsv4.config import AnyConfig, ModelConfig
from dsv4.errors import UserError
from dsv4.model import LanguageModel
from dsv4.model.init import materialise
from dsv4.train.balance import learned_gates
from dsv4.train.batches import Batch, split
from dsv4.train.loss import Loss
from dsv4.train.parallel.config import ParallelConfig
from dsv4.train.parallel.shares import Share, share_of

Model = TypeVar("Model", bound=nn.Module)


class Processes:
    """The only process."""

    rank, world = 0, 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints for all."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.world > 1

    def share(self, batch: Batch) -> Share:
        """What this process computes of a batch."""
        return Share(batch.ids, batch.targets, batch.lengths, range(len(batch.ids)))

    def shares(self, batch: Batch, count: int) -> list[Share]:
        """What this process computes of each of the at most `count` parts of a batch, with rows of the whole batch."""
        found, first = [], 0
        for part in split(batch, count):
            share = self.share(part)
            found.append(share._replace(rows=range(first + share.rows.start, first + share.rows.stop)))
            first += len(part.ids)
        return found

    @contextmanager
    def unmade(self, config: AnyConfig) -> Iterator[None]:
        """In this block a model that will be cut is made without memory, if it can be."""
        yield

    def shard(self, model: Model) -> Model:
        """Keep this process's share of a model that every process has made alike, or without memory: then it is filled,
        with the numbers that it would have had. All processes make its calls together from then on."""
        return model

    def summed(self, model: LanguageModel, parts: list[Loss]) -> list[Loss]:
        """Losses whose sums are those of the whole update, in every process."""
        return parts

    def total(self, value: float) -> float:
        """The sum over all processes."""
        return value

    def joined(self, rows: Tensor, places: Tensor, count: int) -> Tensor:
        """All `count` rows of a tensor on the CPU, of which this process has `rows` [n, ...], which stand at `places`
        int64 [n]. Every row is of one process."""
        return rows

    def agree(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return flag

    def wait(self) -> None:
        """Until all are here."""

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process does this before the others do; where it fails, they wait until they are ended."""
        yield


class Joined(Processes):
    """One of several processes, whose group is there."""

    def __init__(self, parallel: ParallelConfig, device: torch.device):
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        self.rank, self.world, self.device = dist.get_rank(), dist.get_world_size(), device
        dp, cp, ep = parallel.sizes(self.world)
        self.everyone = init_device_mesh(device.type, (self.world,), mesh_dim_names=("all",))
        # Experts: cut over ep, and every share once more over those that have the same experts.
        self.experts = init_device_mesh(device.type, (dp * cp, ep), mesh_dim_names=("data", "ep")) if ep > 1 else None
        self.rows = init_device_mesh(device.type, (dp, cp, ep), mesh_dim_names=("dp", "cp", "ep")) if cp > 1 else None
        at, place, of_experts = self.rank // (cp * ep), self.rank // ep % cp, self.rank % ep
        self.row, self.num_rows, self.place, self.parts = at * ep + of_experts, dp * ep, place, cp

    def share(self, batch: Batch) -> Share:
        return share_of(batch, self.row, self.num_rows, self.place, self.parts, self._neighbours)

    def _neighbours(self, borders: list[int]) -> Any:
        from dsv4.train.parallel.context import RowGroup

        return None if self.rows is None else RowGroup(self.rows.get_group("cp"), borders)

    @contextmanager
    def unmade(self, config: AnyConfig) -> Iterator[None]:
        with torch.device("meta") if isinstance(config, ModelConfig) else nullcontext():
            yield

    def shard(self, model: Model) -> Model:
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

        unmade = any(p.is_meta for p in model.parameters())
        if not unmade:
            model = model.to(self.device)
        blocks = [*model.layers, *model.mtp]  # type: ignore[union-attr]
        if self.experts is not None:
            from dsv4.train.parallel.experts import share_experts

            for experts in share_experts(model, self.experts["ep"]):
                fully_shard(experts, mesh=self.experts["data"])
        for part in (*blocks, model):
            fully_shard(part, mesh=self.everyone)
        for module in model.modules():
            if isinstance(module, FSDPModule):  # losses are shares of the whole update's: gradients are their sums
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        register_fsdp_forward_method(model, "route")  # type: ignore[arg-type]
        if unmade:
            materialise(model, model.config, self.device)  # type: ignore[arg-type]
        return model

    def summed(self, model: LanguageModel, parts: list[Loss]) -> list[Loss]:
        """One loss, the sum of all."""
        gates = {layer: gate.bias for layer, gate in learned_gates(model).items()}
        kl = sorted(parts[0].index_kl)
        figures = [
            torch.tensor(
                [part.next_token, part.mtp, part.balance, *(part.index_kl[n] for n in kl)], dtype=torch.float64
            )
            for part in parts
        ]
        loads = [
            torch.stack([part.loads.get(n, torch.zeros(len(bias))).double().cpu() for part in parts]).sum(dim=0)
            for n, bias in gates.items()
        ]
        found = [torch.stack([part.index_found[n].double() for part in parts]).sum(dim=0) for n in kl]
        pieces = [torch.stack(figures).sum(dim=0), *loads, *found]
        both = torch.cat(pieces).to(self.device)
        self._add(both)
        (next_token, mtp, balance, *kls), *rest = (p.cpu() for p in both.split([len(p) for p in pieces]))
        sums = {n: load.float().to(self.device) for n, load in zip(gates, rest, strict=False) if load.sum() > 0}
        return [
            replace(
                parts[0], next_token=next_token.item(), mtp=mtp.item(), balance=balance.item(), loads=sums,
                index_kl={n: value.item() for n, value in zip(kl, kls, strict=True)},
                index_found=dict(zip(kl, rest[len(gates) :], strict=True)),
            )
        ]  # fmt: skip

    def total(self, value: float) -> float:
        number = torch.tensor([value], dtype=torch.float64, device=self.device)
        self._add(number)
        return number.item()

    def joined(self, rows: Tensor, places: Tensor, count: int) -> Tensor:
        every = torch.zeros(count, *rows.shape[1:], dtype=rows.dtype)
        every[places] = rows
        every = every.to(self.device)
        self._add(every)
        return every.cpu()

    def agree(self, flag: bool) -> bool:
        return self.total(float(flag)) > 0

    def wait(self) -> None:
        self.agree(False)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def _add(self, numbers: Tensor) -> None:
        import torch.distributed as dist

        dist.all_reduce(numbers)


@contextmanager
def processes(parallel: ParallelConfig, device: str, minutes: int = 30) -> Iterator[Processes]:
    """This process and the others that torchrun has started with it; within the block they can talk.

    device: cpu, or cuda: then each process of a machine has the GPU of its local number. UserError, before they have
    met, if `parallel` does not come out with their number. minutes: how long one waits for another before it gives up;
    the first one prepares the data meanwhile.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    parallel.sizes(world)
    if world == 1:
        yield Processes()
        return
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    if not dist.is_available():
        raise UserError(f"{world} processes were started, but this torch has no torch.distributed: install another")
    backend = "nccl" if place.type == "cuda" else "gloo"
    limit = timedelta(minutes=minutes)
    store, rank, _ = next(rendezvous("env://", timeout=limit))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun gives the processes that it starts again the same store, where gloo finds the addresses of those that
        # have died. On several machines the count is each one's own: launch/torchrun.sh asks for a new store instead.
        store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    try:
        yield Joined(parallel, place)
    finally:
        dist.destroy_process_group()
