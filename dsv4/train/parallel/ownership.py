"""Muon where processes share a model: each matrix is made whole in one process, which orthogonalises it for all.

Newton-Schulz wants whole matrices, and fully_shard leaves rows of them everywhere. So every matrix of the paper
(optim.logical_matrices) has an owner; the others send it their rows, and get the rows of the update back: every number
travels twice, and no process does another's work again. Owners are chosen so that the arithmetic comes out even, the
most expensive matrix first, each to whoever has least (the paper packs them by a knapsack heuristic). Experts stay
with the processes that hold the same ones.
"""

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

Stack = tuple[int, int, int]  # count, a, b, as in optim.py


class Held(NamedTuple):
    """A parameter [...] that this process has rows of, its momentum, its gradient, and the matrices that it is."""

    parameter: DTensor
    momentum: DTensor
    grad: DTensor
    stacks: list[Stack]


@dataclass(frozen=True)
class Matrix:
    """A matrix [a, b] that lies in the numbers `start` to `start + a * b` of the whole parameter number `held`."""

    held: int
    start: int
    a: int
    b: int

    @property
    def numel(self) -> int:
        return self.a * self.b

    @property
    def cost(self) -> int:
        """What its products cost, up to a factor that all share."""
        return self.numel * min(self.a, self.b)


@torch.no_grad()
def step(
    held: Sequence[Held], ahead: float, orthogonalise: Callable[[Tensor], Tensor], alpha: float, room: int
) -> None:
    """parameter += alpha * sqrt(max(a, b)) * orthogonalise(gradient + ahead * momentum), matrix by matrix.

    All processes call it with the same parameters in the same order. room: numbers that an owner holds at a time (one
    matrix at least), and as many again for the update.
    """
    alike: dict[int, list[int]] = {}  # those that are cut alike
    for i, h in enumerate(held):
        alike.setdefault(id(h.parameter.device_mesh), []).append(i)
    for places in alike.values():
        _step_alike([held[i] for i in places], ahead, orthogonalise, alpha, room)


def owners(costs: Sequence[int], count: int) -> list[int]:
    """Which of `count` processes each matrix goes to: the most expensive first, each to the one with the least."""
    chosen = [0] * len(costs)
    loads = [(0, owner) for owner in range(count)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, chosen[i] = heapq.heappop(loads)
        heapq.heappush(loads, (load + costs[i], chosen[i]))
    return chosen


def _step_alike(
    held: list[Held], ahead: float, orthogonalise: Callable[[Tensor], Tensor], alpha: float, room: int
) -> None:
    mesh = held[0].parameter.device_mesh
    group, size, rank = mesh.get_group(0), mesh.size(0), mesh.get_local_rank(0)
    cuts = [_cuts(h.parameter) for h in held]
    matrices = [m for i, h in enumerate(held) for m in _matrices(i, h, cuts[i][0], cuts[i][-1])]
    own = [tuple(t.to_local().reshape(-1) for t in h[:3]) for h in held]

    def part(m: Matrix, member: int) -> tuple[int, int]:
        """Which numbers of a matrix a process has: an interval of the whole parameter, maybe an empty one."""
        low, high = cuts[m.held][member], cuts[m.held][member + 1]
        start = max(m.start, low)
        return start, max(start, min(m.start + m.numel, high))

    for turn in _turns(matrices, owners([m.cost for m in matrices], size), size, room):
        mine = turn[rank]
        sent = [[part(m, rank) for m in theirs] for theirs in turn]
        received = [[part(m, member) for m in mine] for member in range(size)]
        slices = [
            torch.add(g[a - low : b - low], v[a - low : b - low], alpha=ahead)
            for theirs, parts in zip(turn, sent, strict=True)
            for m, (a, b) in zip(theirs, parts, strict=True)
            for _, v, g in [own[m.held]]
            for low in [cuts[m.held][rank]]
        ]
        out, back = [_count(parts) for parts in sent], [_count(parts) for parts in received]
        rows = _travel(torch.cat(slices), out, back, group)
        updates = _updates(rows, mine, received, orthogonalise)
        share = _travel(updates, back, out, group)
        at = 0
        for theirs, parts in zip(turn, sent, strict=True):
            for m, (a, b) in zip(theirs, parts, strict=True):
                low, weight = cuts[m.held][rank], own[m.held][0]
                weight[a - low : b - low].add_(share[at : at + b - a], alpha=alpha)
                at += b - a


def _updates(
    rows: Tensor, mine: list[Matrix], received: list[list[tuple[int, int]]], orthogonalise: Callable[[Tensor], Tensor]
) -> Tensor:
    """The parts of my matrices as they came, process by process -> the parts of their updates, in the same order."""
    by_member = [part.split([b - a for a, b in parts]) for part, parts in _split(rows, received)]
    alike: dict[tuple[int, int], list[int]] = {}
    for i, m in enumerate(mine):
        alike.setdefault((m.a, m.b), []).append(i)
    done: dict[int, Tensor] = {}
    for (a, b), some in alike.items():
        whole = torch.stack([torch.cat([parts[i] for parts in by_member]).view(a, b) for i in some])
        for i, update in zip(some, orthogonalise(whole) * math.sqrt(max(a, b)), strict=True):
            done[i] = update.reshape(-1)
    slices = [
        done[i][a - m.start : b - m.start]
        for parts in received
        for (i, m), (a, b) in zip(enumerate(mine), parts, strict=True)
    ]
    return torch.cat(slices) if slices else rows


def _split(rows: Tensor, received: list[list[tuple[int, int]]]) -> Iterator[tuple[Tensor, list[tuple[int, int]]]]:
    yield from zip(rows.split([_count(parts) for parts in received]), received, strict=True)


def _travel(numbers: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = numbers.new_empty(sum(received))
    dist.all_to_all_single(out, numbers, received, sent, group=group)
    return out


def _count(parts: list[tuple[int, int]]) -> int:
    return sum(b - a for a, b in parts)


def _turns(matrices: list[Matrix], owner: list[int], count: int, room: int) -> Iterator[list[list[Matrix]]]:
    """For each turn the matrices of each owner: as many as have room, and at least one while there are any."""
    queues: list[list[Matrix]] = [[] for _ in range(count)]
    for m, process in zip(matrices, owner, strict=True):
        queues[process].append(m)
    while any(queues):
        turn: list[list[Matrix]] = []
        for queue in queues:
            taken, numbers = 0, 0
            while taken < len(queue) and (not taken or numbers + queue[taken].numel <= room):
                numbers += queue[taken].numel
                taken += 1
            turn.append(queue[:taken])
            del queue[:taken]
        yield turn


def _cuts(p: DTensor) -> list[int]:
    """Where in the whole parameter the numbers of each process of the mesh's first dimension begin, and the last ends.

    A second dimension of the mesh has cut the rows before: experts over processes. The cuts are of this one's share.
    """
    assert all(getattr(place, "dim", None) == 0 for place in p.placements), f"a parameter cut as {p.placements}"
    mesh, first, rows, width = p.device_mesh, 0, len(p), math.prod(p.shape[1:])
    for axis in range(mesh.ndim - 1, 0, -1):
        size = -(-rows // mesh.size(axis))
        start = min(rows, mesh.get_local_rank(axis) * size)
        first, rows = first + start, min(rows - start, size)
    size = -(-rows // mesh.size(0))
    return [(first + min(rows, member * size)) * width for member in range(mesh.size(0) + 1)]


def _matrices(number: int, h: Held, low: int, high: int) -> Iterator[Matrix]:
    """The matrices of a parameter that lie in its numbers `low` to `high`."""
    start = 0
    for count, a, b in h.stacks:
        for _ in range(count):
            if low <= start < high:
                assert start + a * b <= high, "an expert's matrix is cut"
                yield Matrix(number, start, a, b)
            start += a * b
