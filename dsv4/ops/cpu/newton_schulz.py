"""Muon's orthogonalisation and whole updates in C++: a matrix in each thread, symmetric products done by half.

Not among the ops of the table: `ops.newton_schulz` and the optimiser ask table.whole_updates for this module.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.ops.cpu.library import AVAILABLE, Kernel, needs_gradient

_newton_schulz = Kernel("newton_schulz", "plllplip")
_muon_update = Kernel("muon_update", "plfffpli")

LONGEST = 1024  # the shorter side of a matrix that one thread takes: of larger ones torch's threads share a product
# With its own instructions a machine multiplies BF16 faster than this does, which widens it and rounds what it gives.
DTYPES = (torch.float32,) if AVAILABLE[-1] == "avx512bf16" else (torch.float32, torch.bfloat16)

Matrices = tuple[Tensor, Tensor, Tensor, Sequence[tuple[int, int, int]]]  # parameter, momentum, gradient, its stacks


def serves(m: Tensor, rows: int, columns: int, dtype: torch.dtype) -> bool:
    """Whether matrices [rows, columns] as `m` holds them are orthogonalised here in the arithmetic of `dtype`."""
    plain = m.is_cpu and m.dtype in (torch.float32, torch.bfloat16) and not needs_gradient(m)
    return plain and dtype in DTYPES and 0 < min(rows, columns) <= LONGEST


def newton_schulz(m: Tensor, steps: Sequence[tuple[float, float, float]], dtype: torch.dtype) -> Tensor:
    """As ops.newton_schulz, of what is served."""
    rows, columns = m.shape[-2:]
    m = m.to(torch.float32).contiguous()
    out = torch.empty_like(m)
    numbers = _numbers(steps)
    _newton_schulz(
        m.data_ptr(), m.numel() // (rows * columns), rows, columns, ctypes.addressof(numbers), len(steps),
        dtype == torch.bfloat16, out.data_ptr(),
    )  # fmt: skip
    return out.to(dtype)


def update_served(parameter: Tensor, grad: Tensor, stacks: Sequence[tuple[int, int, int]], dtype: torch.dtype) -> bool:
    """Whether `muon_update` takes a parameter."""
    kinds = parameter.dtype == grad.dtype == torch.float32 and parameter.is_contiguous()
    return kinds and all(serves(parameter, a, b, dtype) for _, a, b in stacks)


@torch.no_grad()
def muon_update(
    held: Sequence[Matrices],
    mu: float,
    keep: float,
    scale: float,
    steps: Sequence[tuple[float, float, float]],
    dtype: torch.dtype,
) -> None:
    """M <- mu M + G; W <- keep W + scale sqrt(max(a, b)) newton_schulz(mu M + G), for every matrix [a, b] of `held`.

    All are fp32 (`update_served`) and change in place; the dearest come first, so that no thread is left with one.
    """
    held = [(p, m, grad.contiguous(), stacks) for p, m, grad, stacks in held]
    jobs: list[tuple[int, ...]] = []
    for parameter, momentum, grad, stacks in held:
        assert parameter.is_contiguous() and momentum.is_contiguous(), "they are written in place"
        places, at = (parameter.data_ptr(), momentum.data_ptr(), grad.data_ptr()), 0
        for count, a, b in stacks:
            for _ in range(count):
                jobs.append((*(place + at for place in places), a, b))
                at += 4 * a * b
    jobs.sort(key=lambda job: -min(job[3:]) * job[3] * job[4])
    laid, numbers = torch.tensor(jobs, dtype=torch.int64), _numbers(steps)
    _muon_update(
        laid.data_ptr(), len(jobs), mu, keep, scale, ctypes.addressof(numbers), len(steps), dtype == torch.bfloat16
    )  # fmt: skip


def _numbers(steps: Sequence[tuple[float, float, float]]) -> ctypes.Array:
    return (ctypes.c_float * (3 * len(steps)))(*(number for step in steps for number in step))
