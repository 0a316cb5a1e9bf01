"""What the device can do at best, measured in the same run: matrix products and copies. Speeds are read against it."""

import os
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from dsv4 import ops
from dsv4.cost.hardware import ACCELERATORS, Accelerator
from dsv4.measure.clock import Budget, timed
from dsv4.measure.rows import Row
from dsv4.measure.sizes import Sizes

INNER = 8  # calls timed together, so that launching one does not count
Way = Callable[[Tensor, Tensor, Tensor], None]  # a product a b (or a b^T) into the third


def ceiling_rows(device: torch.device, sizes: Sizes, budget: Budget) -> Iterator[Row]:
    """TFLOP/s of square matrix products in bf16 and fp32 (without TF32), GB/s of copies (read + written)."""
    n = sizes.matmul
    for dtype in (torch.bfloat16, torch.float32):
        rate = _multiply_rate(device, dtype, n, budget, _WAYS if device.type == "cpu" else _WAYS[:1])
        name = str(dtype).removeprefix("torch.")
        yield {"name": f"matmul {name}, {n} x {n}", "value": rate / 1e12, "unit": "TFLOP/s"}
    rate = _copy_rate(device, sizes.copy_bytes, budget)
    yield {"name": f"copy, {sizes.copy_bytes / 2**20:.0f} MiB", "value": rate / 1e9, "unit": "GB/s"}


def ceiling(rows: list[Row], kind: str) -> float | None:
    """The measured ceiling whose name starts with `kind`, in FLOP/s or bytes/s; None if it was not measured."""
    factor = {"TFLOP/s": 1e12, "GB/s": 1e9}
    return next((row["value"] * factor[row["unit"]] for row in rows if row["name"].startswith(kind)), None)


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of this processor in square matrix products, the fastest of some sizes and ways, measured now."""
    cpu, budget, rates = torch.device("cpu"), Budget(1), dict.fromkeys(_WAYS, 0.0)
    for n in (256, 512, 1024, 2048):  # small ones first: without bf16 units torch's large products take minutes
        for way, best in rates.items():
            if best == 0.0 or 2 * INNER * n**3 / best < 0.5:
                rates[way] = max(best, _multiply_rate(cpu, dtype, n, budget, (way,)))
    return max(rates.values())


def measured_cpu() -> Accelerator:
    """This machine's processor as an accelerator: matrix products and copies, measured now, in a few seconds."""
    cpu, budget = torch.device("cpu"), Budget(1)
    bf16, fp32 = map(product_rate, (torch.bfloat16, torch.float32))
    copied = _copy_rate(cpu, 1 << 28, budget)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return Accelerator(
        "cpu", f"this CPU, {torch.get_num_threads()} threads", memory, copied / 1e12, bf16 / 1e12,
        None, None, "measured: square matrix products, copies", fp32 / 1e12,
    )  # fmt: skip


def multiply_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that a device is read against: of a known accelerator its dense rate, of others the fastest of some square
    matrix products, tried now; on a processor small ones, since without bf16 units torch's crawl."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).lower().replace(" ", "")
        known = [a for a in ACCELERATORS.values() if a.key in name]
        if known:  # the longest name: gh200 is no h200
            return max(known, key=lambda a: len(a.key)).flops("fp32" if dtype == torch.float32 else "bf16")
    on_cpu = device.type == "cpu"
    return _multiply_rate(device, dtype, 512 if on_cpu else 8192, Budget(1), _WAYS if on_cpu else _WAYS[:1])


@torch.no_grad()
def read_rate(device: torch.device, size: int = 1 << 29) -> float:
    """Bytes per second that are read, the faster of two ways: a sum over `size` bytes of fp32, and the product of one
    row with them as rows of 2,048, which asks for several places at once."""
    source = torch.ones(size // 4, device=device)  # zeros that nobody wrote would all be one page
    row, rows = source[:2048].clone()[None], source.view(-1, 2048)
    return size / min(timed(way, device, Budget(1)).median for way in (source.sum, lambda: ops.linear(row, rows)))


def _torch_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.mm(a, b, out=out)


@torch.no_grad()
def _our_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    ops.linear(a, b)


_WAYS: tuple[Way, ...] = (_torch_product, _our_product)  # on some processors the one is faster, on some the other


def _multiply_rate(device: torch.device, dtype: torch.dtype, n: int, budget: Budget, ways: Iterable[Way]) -> float:
    """FLOP/s of n x n products by the fastest of these ways."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def rate(way: Way) -> float:
        def multiply() -> None:
            for _ in range(INNER):
                way(a, b, out)

        return 2 * INNER * n**3 / timed(multiply, device, budget).median

    return max(map(rate, ways))


def _copy_rate(device: torch.device, size: int, budget: Budget) -> float:
    """Bytes per second, read and written, of copies of `size` bytes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(INNER):
            target.copy_(source)

    return 2 * INNER * size / timed(copy, device, budget).median
