"""Orthogonalisation for Muon: replace every singular value of a matrix by one, keep its singular vectors.

`newton_schulz` is V4's hybrid of ten polynomial steps (matmuls only, so it is fast everywhere), or another sequence of
steps, in C++ where that serves; `plain_newton_schulz` is what it means, in torch. `polar` is the exact answer by SVD,
for tests and ablations. Which matrices are orthogonalised, and how the result is scaled into an update, belongs to
`train/optim.py`.

a, b the two sides of a matrix, ... any leading dims (each matrix is handled by itself).
"""

import torch
from torch import Tensor

from dsv4.ops import table

Coefficients = tuple[float, float, float]  # (a, b, c) of s -> a s + b s^3 + c s^5, s a singular value

_FAST: Coefficients = (3.4445, -4.7750, 2.0315)  # lifts small values steeply, then hovers in [0.68, 1.21]
_EXACT: Coefficients = (2.0, -1.5, 0.5)  # value 1 and slope 0 at 1: settles what the fast steps brought near

HYBRID: tuple[Coefficients, ...] = (_FAST,) * 8 + (_EXACT,) * 2  # paper section 2.4: V4's ten steps
JORDAN: tuple[Coefficients, ...] = (_FAST,) * 5  # the usual Muon (Jordan et al. 2024): no step settles at 1
# Polar Express (Amsel, Persson, Musco, Gower 2025, arXiv 2505.16932): each step is the quintic that is nearest to 1
# over what the steps before have left of [1e-3, 1]. Solved anew, without the paper's cushion for bf16: seven steps
# leave every value above 1e-3 within 1e-6 of 1, in bf16 within 0.02.
POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.4703288038, -25.1080747067, 18.6292755991),
    (4.1828341833, -3.1087011099, 0.5806066814),
    (3.9618572790, -2.9540637464, 0.5629761180),
    (3.2865862170, -2.4647201345, 0.5073576939),
    (2.2737499944, -1.6446603679, 0.4161909275),
    (1.8887161974, -1.2651572253, 0.3765189256),
    (1.8750008859, -1.2500009843, 0.3750000984),
)


def newton_schulz(m: Tensor, steps: tuple[Coefficients, ...] = HYBRID, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The orthogonal factor of every matrix in `m`, approximately; `m` itself is never written to.

    A singular value s becomes p(s / ||m||_F), p being the composition of the step polynomials. With `HYBRID`
    in fp32 that is within [0.999, 1.001] for every s above 1.16e-4 ||m||_F. Smaller ones end elsewhere (1e-5
    gives 0.69, exact zeros stay zero), which is the algorithm and not rounding: a square Gaussian matrix of
    side 256 has a smallest value that low in almost half of all draws.

    m: [..., a, b], any floating dtype and magnitude, down to subnormal numbers. A zero matrix gives zeros;
    infinities and NaN give NaN in their own matrix only.
    dtype: the dtype of the arithmetic and of the result; bf16 ends within [0.98, 1.02] on the same matrices.
    Returns [..., a, b]. Source: paper section 2.4, hybrid Newton-Schulz.
    """
    fast = table.whole_updates(m.device)
    if fast is not None and fast.serves(m, *m.shape[-2:], dtype):
        return fast.newton_schulz(m, steps, dtype)
    return plain_newton_schulz(m, steps, dtype=dtype)


def plain_newton_schulz(
    m: Tensor, steps: tuple[Coefficients, ...] = HYBRID, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """As `newton_schulz`, on any device: three products in each step, all matrices at once."""
    wide = m.mT if m.shape[-2] > m.shape[-1] else m  # the Gram matrix below is of the shorter side
    x = _unit_norm(wide).to(dtype).flatten(0, -3) if m.ndim > 2 else _unit_norm(wide).to(dtype)[None]
    for a, b, c in steps:
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b G + c G^2
        x = torch.baddbmm(x, poly, x, beta=a)  # a x + (b G + c G^2) x
    x = x.reshape(wide.shape)
    return x.mT if wide is not m else x


def polar(m: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The orthogonal factor U V^T of every matrix, by SVD. What `newton_schulz` approximates.

    Directions whose singular value is zero to working precision have no orientation and stay zero, as they do
    there.

    m: [..., a, b]. dtype: dtype of the result; the SVD runs in fp32, or fp64 if that is asked for.
    Returns [..., a, b].
    """
    work = torch.promote_types(dtype, torch.float32)
    u, s, vh = torch.linalg.svd(_unit_norm(m).to(work), full_matrices=False)
    floor = torch.finfo(work).eps * max(m.shape[-2:]) * s[..., :1]
    return ((u * (s > floor).unsqueeze(-2)) @ vh).to(dtype)


def _unit_norm(m: Tensor) -> Tensor:
    """`m` over its Frobenius norm, in at least fp32, as a new contiguous tensor; zero matrices stay zero.

    The largest entry is divided out first, because the squares of entries below 1e-23 vanish in fp32.
    """
    m = m.to(torch.promote_types(m.dtype, torch.float32))
    largest = m.abs().amax(dim=(-2, -1), keepdim=True)
    m = m / torch.where(largest == 0, 1, largest)
    norm = torch.linalg.vector_norm(m, dim=(-2, -1), keepdim=True)
    return (m / torch.where(norm == 0, 1, norm)).contiguous()
