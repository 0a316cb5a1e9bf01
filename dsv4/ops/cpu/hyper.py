"""Hyper-connections: their maps, and reading, writing and collapsing up to 8 streams."""

import torch
from torch import Tensor

from dsv4.ops.cpu.hyper_gradients import Collapse, Enter, Write, collapsed, entered, written
from dsv4.ops.cpu.library import PLAIN, Kernel, needs_gradient, values_only
from dsv4.ops.limits import Limits

STREAMS = 8
MISFIT = "shapes that do not fit"  # another form says what is wrong
_sinkhorn = Kernel("sinkhorn", "pliifp")
_maps = Kernel("hyper_maps", "pililpppiffppp")


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    logits = logits.contiguous()
    out = torch.empty_like(logits)
    _sinkhorn(logits.data_ptr(), len(logits), logits.shape[1], iters, eps, out.data_ptr())
    return out


def hyper_maps(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    n, num, width = x.shape
    pre, post, comb = base.new_empty(n, num), base.new_empty(n, num), base.new_empty(n, num, num)
    _maps(
        x.data_ptr(), x.dtype == torch.bfloat16, n, num, width, fn.data_ptr(), base.data_ptr(), scale.data_ptr(), iters,
        eps, norm_eps, pre.data_ptr(), post.data_ptr(), comb.data_ptr(),
    )  # fmt: skip
    return pre, post, comb


def hyper_enter(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, gain: Tensor, iters: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    form = Enter.apply if needs_gradient(x, fn, base, scale, gain) else entered
    return form(x.contiguous(), fn, base, scale, gain, iters, eps, norm_eps)  # type: ignore[return-value]


def head_collapse(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float) -> Tensor:
    form = Collapse.apply if needs_gradient(x, fn, base, scale) else collapsed
    return form(x.contiguous(), fn, base, scale, eps, norm_eps)  # type: ignore[return-value]


def hyper_write(x: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    form = Write.apply if needs_gradient(x, y, post, comb) else written
    return form(x.contiguous(), y.contiguous(), post.contiguous(), comb.contiguous())  # type: ignore[return-value]


def _parameters(num: int, *sized: tuple[Tensor, int]) -> str:
    """For `num` streams and parameters of so many numbers."""
    if num > STREAMS:
        return f"more than {STREAMS} streams"
    for parameter, size in sized:
        if parameter.dtype != torch.float32:
            return "maps or gains that are not fp32"
        if not parameter.is_contiguous():
            return "maps or gains that are not contiguous"
        if parameter.numel() != size:
            return MISFIT
    return ""


def _logits(logits: Tensor, iters: int, eps: float) -> str:
    return _parameters(logits.shape[1]) or ("" if logits.dtype == torch.float32 else "logits that are not fp32")


def _maps_of(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *rest: float) -> str:
    _, num, width = x.shape
    outputs = (2 + num) * num
    return _parameters(num, (fn, outputs * num * width), (base, outputs), (scale, 3))


def _enters(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, gain: Tensor, *rest: float) -> str:
    _, num, width = x.shape
    outputs = (2 + num) * num
    return _parameters(num, (fn, outputs * num * width), (base, outputs), (scale, 3), (gain, width))


def _collapses(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float) -> str:
    _, num, width = x.shape
    return _parameters(num, (fn, num * num * width), (base, num), (scale, 1))


def _writes(x: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> str:
    n, num, width = x.shape
    if num > STREAMS:
        return f"more than {STREAMS} streams"
    if y.dtype != x.dtype:
        return "an output in another dtype than the streams"
    if not post.dtype == comb.dtype == torch.float32:
        return "maps that are not fp32"
    return "" if (y.numel(), post.numel(), comb.numel()) == (n * width, n * num, n * num * num) else MISFIT


LIMITS = {
    "sinkhorn": values_only(_logits),
    "hyper_maps": values_only(_maps_of),
    "hyper_enter": Limits(devices=("cpu",), dtypes=PLAIN, also=_enters),
    "head_collapse": Limits(devices=("cpu",), dtypes=PLAIN, also=_collapses),
    "hyper_write": Limits(devices=("cpu",), dtypes=PLAIN, also=_writes),
}
