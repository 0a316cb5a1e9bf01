"""What the device can do at best, measured in the same run: matrix products and copies. Speeds are read against it."""

from collections.abc import Iterator

import torch

from dsv4.bench.clock import Budget, measure
from dsv4.bench.report import Row
from dsv4.bench.sizes import Sizes

INNER = 8  # calls timed together, so that launching one does not count


def ceiling_rows(device: torch.device, sizes: Sizes, budget: Budget) -> Iterator[Row]:
    """TFLOP/s of square matrix products in bf16 and fp32 (without TF32), GB/s of copies (read + written)."""
    n = sizes.matmul
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)

        def multiply(a=a, b=b, out=out) -> None:
            for _ in range(INNER):
                torch.mm(a, b, out=out)

        name = str(dtype).removeprefix("torch.")
        seconds = measure(multiply, device, budget).median / INNER
        yield {"name": f"matmul {name}, {n} x {n}", "value": 2 * n**3 / seconds / 1e12, "unit": "TFLOP/s"}
    source = torch.zeros(sizes.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(INNER):
            target.copy_(source)

    seconds = measure(copy, device, budget).median / INNER
    yield {"name": f"copy, {source.nbytes / 2**20:.0f} MiB", "value": 2 * source.nbytes / seconds / 1e9, "unit": "GB/s"}


def ceiling(rows: list[Row], kind: str) -> float | None:
    """The measured ceiling whose name starts with `kind`, in FLOP/s or bytes/s; None if it was not measured."""
    factor = {"TFLOP/s": 1e12, "GB/s": 1e9}
    return next((row["value"] * factor[row["unit"]] for row in rows if row["name"].startswith(kind)), None)
