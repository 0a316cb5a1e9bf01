"""What accelerators can do at best, and what follows: time per token, what fits, the smallest machine for a load.

Ceilings, not promises: a step takes at least as long as reading its bytes and as doing its FLOPs; GPUs of a machine are
taken as one with so many times the memory, bandwidth and rate. Not modelled: communication, launches, activations,
norms, speculation.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from dsv4.config import AnyConfig
from dsv4.cost import kv_bytes
from dsv4.cost.flops import Work, decode, prefill, weighted
from dsv4.cost.params import active_bytes, weight_bytes
from dsv4.errors import UserError, nearest

USABLE = 0.9  # of a machine's memory, for weights and caches
MOST_DEVICES = 100_000  # in a machine; more than were ever put to one model
MOST_SEQUENCES = 1_000_000  # decoded together


@dataclass(frozen=True)
class Accelerator:
    """One device. memory in GB, bandwidth in TB/s (decimal), dense rates in TFLOP/s; None: no such mode.

    fp32 is what FP32 products run at: None for half of BF16 (as TF32 does on tensor cores).
    """

    key: str
    name: str
    memory: float
    bandwidth: float
    bf16: float
    fp8: float | None
    fp4: float | None
    source: str
    fp32: float | None = None

    def flops(self, format: str) -> float:
        """FLOP/s for products in fp4, fp8, bf16 or fp32: in a wider mode where that is faster or the only one."""
        rates = {"fp4": self.fp4, "fp8": self.fp8, "bf16": self.bf16, "fp32": self.fp32 or self.bf16 / 2}
        formats = list(rates)
        return 1e12 * max(rates[f] or 0.0 for f in formats[formats.index(format) :])


@dataclass(frozen=True)
class Machine:
    """`count` accelerators of one sort, as if they were one."""

    device: Accelerator
    count: int = 1

    @property
    def name(self) -> str:
        return f"{self.device.key.removesuffix('x')}x{self.count}"

    @property
    def usable_bytes(self) -> int:
        return int(self.count * self.device.memory * 1e9 * USABLE)


@dataclass(frozen=True)
class Step:
    """One decoding step of `batch` sequences at a context: bytes moved, FLOPs done, and the least time for either."""

    machine: str
    batch: int
    context: int
    weight_bytes: int
    cache_bytes: int
    flops: int
    memory_seconds: float
    compute_seconds: float

    @property
    def seconds(self) -> float:
        return max(self.memory_seconds, self.compute_seconds)

    @property
    def bound(self) -> str:
        return "memory" if self.memory_seconds >= self.compute_seconds else "compute"

    @property
    def tokens_per_second(self) -> float:
        """Per sequence; times `batch` for the machine."""
        return 1 / self.seconds


def machine(text: str, measured: Accelerator | None = None) -> Machine:
    """A machine by its name, h200 or h200x8; cpu needs `measured`. UserError for an unknown name."""
    devices = {**ACCELERATORS, **({"cpu": measured} if measured else {})}
    text = text.strip().lower()
    found = re.fullmatch(r"(.+)x([0-9]+)", text)
    key, digits = (found[1], found[2]) if found else (text, "1")
    if key not in devices and f"{key}x" in devices:  # mi355x8 is eight of mi355x
        key = f"{key}x"
    if key not in devices:
        known = ", ".join(sorted(devices))
        raise UserError(f"accelerator {key!r} is unknown: use one of {known}, as in h200x8{nearest(key, devices)}")
    if not digits.strip("0"):
        raise UserError(f"{text!r} is a machine without accelerators: give at least one, as in {key}x8")
    if len(digits.lstrip("0")) > len(str(MOST_DEVICES)) or int(digits) > MOST_DEVICES:
        raise UserError(f"{text[:40]!r} has too many accelerators: give from 1 to {MOST_DEVICES:,}, as in {key}x8")
    return Machine(devices[key], int(digits))


# The number format in which a kind of work runs, as published; `--dtype` widens it.
_RUNS_IN = {
    "fp8": "fp8", "expert": "fp8", "wo_a": "fp8", "absorb": "bf16", "aux": "bf16", "head": "bf16", "mhc": "bf16",
    "core": "bf16", "idx4": "fp4", "idx8": "fp8", "llm": "bf16", "sum": "bf16",
}  # fmt: skip


def runs_in(kind: str, dtype: str) -> str:
    """The format a kind of work runs in under `--dtype` (FP4 weights times FP8 activations run at the FP8 rate)."""
    if dtype == "bfloat16":
        return "bf16"
    if dtype == "float32":
        return "fp32"
    if dtype == "fp8" and kind in ("idx4", "llm"):
        return "fp8"
    return _RUNS_IN[kind]


def step(config: AnyConfig, on: Machine, context: int, batch: int = 1, dtype: str = "published") -> Step:
    """The roofline of one decoding step: every active weight once, the cache rows read, the FLOPs, `batch` times."""
    check_batch(batch)
    work = decode(config, context)
    weights = active_bytes(config, dtype, batch)
    cache = batch * sum(kv_bytes.read(config, context, dtype).values())
    return Step(
        on.name, batch, context, weights, cache, batch * int(weighted(work)),
        (weights + cache) / (on.count * on.device.bandwidth * 1e12), batch * compute_seconds(work, on, dtype),
    )  # fmt: skip


def check_batch(batch: int) -> None:
    """UserError for a number of sequences that nobody decodes together."""
    if not 1 <= batch <= MOST_SEQUENCES:
        raise UserError(f"batch={str(batch)[:20]} must be from 1 to {MOST_SEQUENCES:,} sequences")


def compute_seconds(work: Iterable[Work], on: Machine, dtype: str = "published") -> float:
    """The least time for the FLOPs of some work, each kind at the rate of its format."""
    done = (w for w in work if w.kind != "sum")
    return sum(w.flops / on.device.flops(runs_in(w.kind, dtype)) for w in done) / on.count


def prefill_seconds(config: AnyConfig, on: Machine, tokens: int, dtype: str = "published") -> float:
    """The least time to read a prompt: its FLOPs, or every weight once where the prompt is short."""
    weights = active_bytes(config, dtype, tokens) / (on.count * on.device.bandwidth * 1e12)
    return max(compute_seconds(prefill(config, tokens), on, dtype), weights)


def sequences(config: AnyConfig, on: Machine, context: int, dtype: str = "published") -> int:
    """How many sequences of `context` tokens fit beside the weights; -1 if not even the weights do."""
    room = on.usable_bytes - weight_bytes(config, dtype)
    return -1 if room < 0 else room // sum(kv_bytes.held(config, context, dtype).values())


COUNTS = (1, 2, 4, 8, 16, 32, 64, 72, 128, 256)


def smallest(
    config: AnyConfig, context: int, batch: int = 1, tokens_per_second: float = 0.0, dtype: str = "published"
) -> list[Machine]:
    """For each accelerator the least count that holds `batch` sequences and can reach a rate for each of them.

    Smallest memory first; accelerators that would need more than the largest count are left out.
    """
    found = []
    for device in ACCELERATORS.values():
        for count in COUNTS:
            on = Machine(device, count)
            if sequences(config, on, context, dtype) < batch:
                continue
            if step(config, on, context, batch, dtype).tokens_per_second >= tokens_per_second:
                found.append(on)
                break
    return sorted(found, key=lambda m: (m.usable_bytes, m.count))


def critical_batch(config: AnyConfig, context: int, dtype: str = "published") -> float:
    """The batch at which cache reads equal the active weights read by one token."""
    return active_bytes(config, dtype) / sum(kv_bytes.read(config, context, dtype).values())


# Dense rates. Vendors' headline figures with 2:4 sparsity are halved (Blackwell Ultra's FP4 is 4:3). Where a document
# leaves room, the lower figure stands and `source` says so.
ACCELERATORS: dict[str, Accelerator] = {
    d.key: d
    for d in (
        Accelerator("a100", "NVIDIA A100 SXM 80GB", 80, 2.039, 312, None, None, "NVIDIA A100 datasheet"),
        Accelerator("h100", "NVIDIA H100 SXM", 80, 3.35, 989.5, 1979, None, "NVIDIA H100 datasheet"),
        Accelerator("h200", "NVIDIA H200 SXM", 141, 4.8, 989.5, 1979, None, "NVIDIA H200 datasheet"),
        Accelerator("h20", "NVIDIA H20", 96, 4.0, 148, 296, None, "no public datasheet; as widely reported"),
        Accelerator("gh200", "NVIDIA GH200 144GB", 144, 4.9, 989.5, 1979, None, "NVIDIA GH200 datasheet, HBM only"),
        Accelerator("b200", "NVIDIA B200 (HGX)", 180, 7.7, 2250, 4500, 9000,
                    "NVIDIA HGX page; Blackwell datasheet (7.7 TB/s; DGX B200 says 8)"),
        Accelerator("b300", "NVIDIA B300 (HGX)", 270, 7.7, 2250, 4500, 13500,
                    "NVIDIA HGX page, per GPU of eight (2.1 TB, 108 PFLOP/s dense FP4); 288 GB raw"),
        Accelerator("gb200", "NVIDIA GB200 (NVL72), per GPU", 186, 8.0, 2500, 5000, 10000,
                    "NVIDIA GB200 NVL72 page / 72"),
        Accelerator("gb300", "NVIDIA GB300 (NVL72), per GPU", 279, 8.0, 2500, 5000, 15000,
                    "NVIDIA GB300 NVL72 page / 72; Inside Blackwell Ultra (developer blog)"),
        Accelerator("l40s", "NVIDIA L40S", 48, 0.864, 362, 733, None, "NVIDIA L40S datasheet"),
        Accelerator("rtx4090", "GeForce RTX 4090", 24, 1.008, 165.2, 330.3, None,
                    "NVIDIA Ada whitepaper, FP32 accumulation"),
        Accelerator("rtx5090", "GeForce RTX 5090", 32, 1.792, 209.5, 419, 1676,
                    "NVIDIA RTX Blackwell whitepaper, FP32 accumulation (FP8 838 with FP16 accumulation)"),
        Accelerator("rtxpro6000", "RTX PRO 6000 Blackwell", 96, 1.792, 503.8, 1007.6, 2015,
                    "NVIDIA RTX Blackwell PRO whitepaper, workstation edition"),
        Accelerator("spark", "DGX Spark GB10", 128, 0.273, 125, 250, 500,
                    "NVIDIA DGX Spark page (FP4); FP8 and BF16 derived as 1/2 and 1/4 of it; shared with the CPU"),
        Accelerator("mi300x", "AMD MI300X", 192, 5.3, 1307.4, 2614.9, None, "AMD MI300X data sheet"),
        Accelerator("mi325x", "AMD MI325X", 256, 6.0, 1307.4, 2614.9, None, "AMD MI325X data sheet"),
        Accelerator("mi350x", "AMD MI350X", 288, 8.0, 2306.9, 4613.7, 9227.5, "AMD CDNA 4 whitepaper"),
        Accelerator("mi355x", "AMD MI355X", 288, 8.0, 2516.6, 5033.2, 10066.3, "AMD CDNA 4 whitepaper"),
        Accelerator("gaudi3", "Intel Gaudi 3", 128, 3.7, 1835, 1835, None, "Intel Gaudi 3 whitepaper"),
        Accelerator("tpu7x", "Google TPU7x Ironwood", 192, 7.38, 2307, 4614, None, "Google Cloud TPU7x page"),
        Accelerator("ascend910c", "Huawei Ascend 910C", 128, 3.2, 752, None, None,
                    "CloudMatrix384 report, arXiv 2506.12708"),
    )
}  # fmt: skip
