"""The largest singular value of a map of which only products are known, with a bound on its error.

Golub and Kahan's bidiagonalisation (1965): each step costs one product with the map and one with its transpose, as a
step of power iteration on J^T J does, but the estimate is the best of the whole space that these span, so it is never
below that of power iteration and mostly far better. It also knows its error: a singular value of the map lies within
`residual` of `value`. The bases are kept orthogonal by hand.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Largest:
    """value: the largest singular value. residual: |J^T u - value v| / value for the vectors found; steps: products."""

    value: float
    residual: float
    steps: int
    right: Tensor


def largest_singular(
    apply: Callable[[Tensor], Tensor],
    transpose: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    tolerance: float = 1e-3,
    most: int = 50,
) -> Largest:
    """Of a linear map between fp32 tensors; `start` has its input's shape. Ends when the residual and the last change
    are both below the tolerance (relative), at the latest after `most` steps, or when the map's whole space is found.
    """
    rights, lefts, alphas, betas = [start.flatten() / start.norm()], list[Tensor](), list[float](), list[float]()
    value, residual, right, step = 0.0, 0.0, rights[0], 0
    while step < most:
        step += 1
        image = apply(rights[-1].view(start.shape))
        alpha, u = _orthogonal(image.flatten(), lefts)
        alphas.append(alpha)
        lefts.append(u)
        beta, w = 0.0, u  # where nothing of the direction comes through, there is nothing to go on with
        if alpha:
            beta, w = _orthogonal(transpose(u.view(image.shape)).flatten(), rights)
        matrix = torch.diag(torch.tensor(alphas, dtype=torch.float64))
        if betas:
            matrix += torch.diag(torch.tensor(betas, dtype=torch.float64), 1)
        left, values, turned = torch.linalg.svd(matrix)
        before, value = value, float(values[0])
        right = torch.stack(rights).T @ turned[0].to(start.dtype)
        residual = beta * abs(float(left[-1, 0])) / value if value else 0.0
        if beta == 0 or (residual < tolerance and abs(value - before) < tolerance * value):
            break
        betas.append(beta)
        rights.append(w)
    return Largest(value, residual, step, right.view(start.shape))


def _orthogonal(x: Tensor, basis: list[Tensor]) -> tuple[float, Tensor]:
    """x without its parts along the basis, taken out twice: its length, and it as a unit vector. Length 0 where what is
    left is rounding."""
    whole = float(x.double().norm())
    for _ in range(2):
        for b in basis:
            x = x - (x @ b) * b
    length = float(x.double().norm())
    if length <= 1e-6 * whole or length == 0:
        return 0.0, x
    return length, x / length
