"""What the parity of single ops is tried on: for every op a few calls with fixed random arguments, made on the CPU.

The sizes are awkward on purpose: several documents, blocks that end inside one, more than one block, experts without
tokens. What is compared, and how closely, belongs to parity.py. Legend: see ops/reference.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4 import ops
from dsv4.ops import Spans
from dsv4.ops.formats import Packed, v4_rows
from dsv4.ops.weights import pack_matrix


@dataclass(frozen=True)
class Case:
    """One call of op `op`. `grads` and `low` are places in `args`: what gets a gradient, what may be in bf16.

    exact: integers, or fp32 sums of small integers, so every device must give the same bits. through: how many of the
    outputs carry a gradient (None = all). fp32_only: an iteration that bf16 inputs would only blur.
    """

    op: str
    label: str
    args: tuple[Any, ...]
    grads: tuple[int, ...] = ()
    low: tuple[int, ...] = ()
    exact: bool = False
    through: int | None = None
    fp32_only: bool = False
    tolerance: float | None = None  # in fp32, where the op's arithmetic asks for another one than the rest

    @property
    def name(self) -> str:
        return f"{self.op} ({self.label})" if self.label else self.op


# Ops with a single form: the same lines everywhere, held to the CPU all the same.
SINGLE: dict[str, Callable] = {
    "hyper_read": ops.hyper_read, "newton_schulz": ops.newton_schulz,
}  # fmt: skip


def cases() -> list[Case]:
    """All of them; every op of `ops.TABLE` is there at least once."""
    return [
        *_attention(),
        *_index_loss(),
        *_choices(),
        *_hyper(),
        *_experts(),
        *_compression(),
        *_linear(),
        *_rows(),
        *_rest(),
    ]


def _normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _integers(low: int, high: int, *shape: int, seed: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def _entry_spans(lengths: list[int], ratio: int) -> tuple[Spans, int]:
    """What each token of packed documents sees of their entries, and how many entries there are."""
    start, stop, base = [], [], 0
    for length in lengths:
        start += [base] * length
        stop += [base + (t + 1) // ratio for t in range(length)]
        base += length // ratio
    return Spans(torch.tensor(start), torch.tensor(stop)), base


def _window_spans(lengths: list[int], window: int = 128) -> Spans:
    start, stop, base = [], [], 0
    for length in lengths:
        start += [base + max(0, t + 1 - window) for t in range(length)]
        stop += [base + t + 1 for t in range(length)]
        base += length
    return Spans(torch.tensor(start), torch.tensor(stop))


def _chosen(visible: Spans, k: int, seed: int) -> Tensor:
    """k random visible rows of every query in ascending order, -1 first where there are fewer."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.full((len(visible), k), -1)
    for i, (lo, hi) in enumerate(zip(visible.start.tolist(), visible.stop.tolist(), strict=True)):
        picked = lo + torch.randperm(hi - lo, generator=generator)[:k].sort().values
        rows[i, k - len(picked) :] = picked
    return rows


def _attention() -> list[Case]:
    """`dense` and `gather` are the two ways in which chosen entries are read: few of them, many of them."""
    heads, width = 4, 48
    found = []
    for label, lengths, ratio, k in (
        ("window", [130, 71], 0, 0),
        ("interval", [257, 150], 128, 0),
        ("dense", [130, 71], 4, 16),
        ("gather", [300, 40], 4, 8),
    ):
        n = sum(lengths)
        visible, count = _entry_spans(lengths, ratio) if ratio else (None, 0)
        entries = _normal(count, width, seed=2) if count else None
        chosen = _chosen(visible, k, seed=3) if visible is not None and k else None
        args = (
            _normal(n, heads, width, seed=0), _normal(n, width, seed=1), _window_spans(lengths), entries, visible,
            chosen, _normal(heads, seed=4), width**-0.5,
        )  # fmt: skip
        places = (0, 1, 3) if count else (0, 1)
        found.append(Case("sparse_attention", label, args, (*places, 6), places, through=1))
    return found


def _index_loss() -> list[Case]:
    """Over all visible entries, and over chosen ones read in both ways."""
    found = []
    for label, lengths, k in (("visible", [130, 71], 0), ("dense", [130, 71], 16), ("gather", [300, 40], 8)):
        n = sum(lengths)
        visible, count = _entry_spans(lengths, 4)
        attn_q, entries = _normal(n, 4, 48, seed=15), _normal(count, 48, seed=16)
        args = (
            _normal(n, 8, 16, seed=17), _normal(n, 8, seed=18), _normal(count, 16, seed=19), attn_q, entries,
            3 + _normal(n, 4, seed=28), visible, _chosen(visible, k, seed=3) if k else None, 48**-0.5,
        )  # fmt: skip
        found.append(Case("index_kl", label, args, (0, 1, 2), (0, 2, 3, 4)))
    return found


def _choices() -> list[Case]:
    """Small integers make every score exact on every device, and ties plenty: the tie rule decides many a choice."""
    visible, count = _entry_spans([300, 40], 4)
    q = _integers(-2, 3, sum((300, 40)), 8, 16, seed=10).float()
    weights = _integers(-2, 3, len(q), 8, seed=11).float()
    keys = _integers(-2, 3, count, 16, seed=12).float()
    scores = _integers(-3, 4, 200, 24, seed=13).float()
    seen, one = _entry_spans([300, 40], 1)[0], _integers(-3, 4, 340, seed=14).float()
    roots = torch.cat([torch.arange(1, n + 1) for n in (300, 40)]).sqrt().ceil().long()
    return [
        Case("index_scores_topk", "many ties", (q, weights, keys, visible, 8), low=(0, 1, 2), exact=True),
        Case("index_scores_topk", "fewer than k", (q, weights, keys, visible, 100), low=(0, 1, 2), exact=True),
        Case("best_rows", "many ties", (one, seen, roots, 18), low=(0,), exact=True),
        Case("topk_lowest", "many ties", (scores, 4), low=(0,), exact=True),
    ]


def _hyper() -> list[Case]:
    n, streams, width = 130, 4, 64
    x, rows = _normal(n, streams, width, seed=20), (2 + streams) * streams
    logits = _normal(n, streams, streams, seed=21, scale=3.0)
    fn, base = _normal(rows, streams * width, seed=22, scale=0.1), _normal(rows, seed=23)
    y, post = _normal(n, width, seed=24), _normal(n, streams, seed=25).sigmoid()
    comb = _normal(n, streams, streams, seed=26).softmax(dim=-1)
    scale, gain = torch.tensor([0.5, -0.7, 1.1]), 1 + _normal(width, seed=27, scale=0.1)
    return [
        Case("sinkhorn", "", (logits, 20, 1e-6), (0,)),
        Case("hyper_maps", "", (x, fn, base, scale, 20, 1e-6, 1e-6), (0, 1, 2, 3), (0,)),
        Case("hyper_write", "", (x, y, post, comb), (0, 1, 2, 3), (0, 1)),
        Case("hyper_read", "", (x, post), (0, 1), (0,)),
        Case("hyper_enter", "", (x, fn, base, scale, gain, 20, 1e-6, 1e-6), (0, 1, 2, 3, 4), (0,)),
        Case("head_collapse", "", (x, fn[:streams], base[:streams], scale[:1], 1e-6, 1e-6), (0, 1, 2, 3), (0,)),
    ]


def _experts() -> list[Case]:
    """Expert 3 of 6 gets no token; pre-activations reach the limit, so that the clamps act."""
    n, width, inner, limit = 200, 64, 48, 10.0
    order = _normal(n, 6, seed=30)
    order[:, 3] = float("-inf")
    chosen = order.argsort(dim=1, descending=True)[:, :2].contiguous()
    w13, w2 = _normal(6, 2, inner, width, seed=31, scale=0.4), _normal(6, width, inner, seed=32, scale=0.4)
    args = (_normal(n, width, seed=33), chosen, _normal(n, 2, seed=34).sigmoid(), w13, w2, limit)
    x, gate, bias = args[0], _normal(6, width, seed=35, scale=0.1), _normal(6, seed=36, scale=0.1)
    return [
        Case("experts", "", args, (0, 2, 3, 4), (0, 3, 4)),
        Case("mlp", "", (x, w13[0, 0], w13[0, 1], w2[0], limit), (0, 1, 2, 3), (0, 1, 2, 3)),
        Case("gate", "scored", (x, gate, bias, None, 2, 1.5), (0, 1)),  # x stays fp32: a rounding must not choose
        Case("gate", "given", (x, gate, None, chosen, 2, 1.5), (0, 1), (0,)),
    ]


def _compression() -> list[Case]:
    found = []
    for r, overlap in ((4, True), (128, False)):
        values, scores = _normal(5 * r, 48, seed=43), _normal(5 * r, 48, seed=44)
        first, has_previous = torch.tensor([0, r, 3 * r]), torch.tensor([False, True, False])
        gain = 1 + _normal(24 if overlap else 48, seed=46, scale=0.1)
        args = (values, scores, first, has_previous, r, overlap, gain, 1e-6, _turns(3, 8), torch.float32)
        found.append(Case("compress", "overlap" if overlap else "no overlap", args, (0, 1, 6)))
    x = _normal(130, 4, 48, seed=47)
    tokens, wkv, wgate, ape = (
        _normal(*shape, seed=54 + i) for i, shape in enumerate([(30, 64), (48, 64), (48, 64), (4, 48)])
    )
    rows = (tokens, wkv, wgate, ape, torch.arange(70, 100))
    return [
        *found,
        Case("compressor_rows", "", rows, (0, 1, 2, 3), (0,)),
        Case("rotate", "", (x, _turns(130, 8)), (0,), (0,)),
    ]


def _turns(n: int, pairs: int) -> Tensor:
    return torch.polar(torch.ones(n, pairs), _normal(n, pairs, seed=48, scale=3.0))


def _linear() -> list[Case]:
    x, weight = _normal(130, 192, seed=50), _normal(160, 192, seed=51, scale=0.1)
    packed = [Case("linear", code, (x, pack_matrix(weight, code)), (0,), (0,)) for code in ("fp8", "fp4")]
    return [Case("linear", "plain", (x, weight), (0, 1), (0, 1)), *packed, *_projections()]


def _projections() -> list[Case]:
    """Six heads of 24 with 16 rotated channels, in two groups."""
    n, m, low, heads, width, rank = 70, 64, 40, 6, 24, 20

    def matrix(rows: int, columns: int, seed: int) -> Tensor:
        return _normal(rows, columns, seed=seed, scale=columns**-0.5)

    wq_a, wq_b, wkv = matrix(low, m, 60), matrix(heads * width, low, 61), matrix(width, m, 62)
    wo_a, wo_b = matrix(2 * rank, heads * width // 2, 63), matrix(m, 2 * rank, 64)
    gains = 1 + _normal(low, seed=65, scale=0.1), 1 + _normal(width, seed=66, scale=0.1)
    into = (_normal(n, m, seed=67), wq_a, gains[0], wq_b, wkv, gains[1], heads, 1e-6, _turns(n, 8))
    out = (_normal(n, heads, width, seed=68), _turns(n, 8), wo_a, 2, wo_b)
    return [
        Case("project_in", "", into, (0, 1, 2, 3, 4, 5), (0, 1, 3, 4)),
        Case("project_out", "", out, (0, 2, 4), (0, 2, 4)),
    ]


def _rows() -> list[Case]:
    """Bytes must be equal: a rounding has one right answer. The rotation's sums are those of small integers."""
    row, key = v4_rows(512, 64, 128, "packed", torch.float32)
    rows, keys = _normal(40, 512, seed=52), _integers(-8, 9, 40, 128, seed=53).float()
    return [
        case
        for label, data, format in (("fp8", rows, row), ("fp4, rotated", keys, key))
        if isinstance(format, Packed)
        for case in (
            Case("pack_rows", label, (data, format), exact=True),
            Case("unpack_rows", label, (format.pack(data), format), exact=True),
        )
    ]


def _rest() -> list[Case]:
    hidden, head = _normal(200, 64, seed=40), _normal(500, 64, seed=41, scale=0.3)
    targets = _integers(0, 500, 200, seed=42)
    targets[::7] = -100
    matrices = _normal(3, 32, 64, seed=45)
    return [
        Case("cross_entropy", "", (hidden, head, targets), (0, 1), (0, 1)),
        Case("newton_schulz", "", (matrices,), low=(0,), fp32_only=True, tolerance=1e-4),
    ]
