"""Whether what dsv4/cost counts is what runs: FLOPs executed and bytes allocated by real layers, beside the counts.

Memories are filled, not computed, so a context costs its memory only. Models too large for the machine run one layer of
each kind at their real width.
"""

import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dsv4.config import CONTROLS, AnyConfig, LlamaConfig, ModelConfig, RopeScaling, V32Config
from dsv4.cost import kv_bytes
from dsv4.cost.flops import Work, decode, weighted
from dsv4.measure.executed import ENDS, Counts, new_memory, run_one_token
from dsv4.measure.slices import Slice, build, slices

# Formats of live memories and what dsv4/cost calls them.
FORMATS = {"packed": "published", "bfloat16": "bfloat16", "float32": "float32"}


@dataclass(frozen=True)
class Pair:
    """One component of a model at a context, counted and executed."""

    model: str
    context: int
    component: str
    kind: str
    counted: int
    executed: int

    @property
    def off(self) -> float:
        """Executed over counted, less one."""
        return self.executed / self.counted - 1 if self.counted else float("inf") if self.executed else 0.0


@dataclass(frozen=True)
class Size:
    """A cache of a model in a format at a context: bytes counted and allocated."""

    model: str
    format: str
    context: int
    counted: int
    allocated: int


def measure_model(
    name: str,
    config: AnyConfig,
    contexts: list[int],
    *,
    whole: bool,
    dtype: torch.dtype,
    progress: Callable[[str], None],
) -> tuple[list[Pair], list[Size]]:
    """FLOPs by component and cache bytes by format at every context; `whole`: all layers, else one of each kind."""
    parts = [Slice("", 1, config)] if whole else slices(config)
    formats = [f for f in FORMATS if not (f == "packed" and isinstance(config, LlamaConfig))]
    flops: dict[int, Counts] = {c: Counter() for c in contexts}
    sizes: Counter[tuple[int, str]] = Counter()
    for number, part in enumerate(parts):
        progress(f"{name}: {part.place or 'all'} layers")
        model = build(part.config, dtype)
        for context in contexts:
            counts, size = run_one_token(model, part.config, context, formats[0])
            sizes[context, formats[0]] += part.times * size
            for format in formats[1:]:
                sizes[context, format] += part.times * new_memory(model, context, format).bytes()
            for (place, component, kind), executed in counts.items():
                if place != ENDS or number == 0:
                    flops[context][place, component, kind] += executed * (1 if place == ENDS else part.times)
    pairs = [p for c in contexts for p in _pairs(name, c, decode(config, c), flops[c])]
    held = [Size(name, f, c, _counted(config, c, f), sizes[c, f]) for c in contexts for f in formats]
    return pairs, held


def _counted(config: AnyConfig, context: int, format: str) -> int:
    """Bytes of a memory with room for `context` tokens: V4's in whole pages, which every compression rate divides."""
    page = 1
    if isinstance(config, ModelConfig):
        page = math.lcm(128, config.compress_rate_csa, config.compress_rate_hca)
    return sum(kv_bytes.held(config, context, FORMATS[format], allocated=True, page_tokens=page).values())


def _pairs(name: str, context: int, work: list[Work], flops: Counts) -> list[Pair]:
    counted: Counter[tuple[str, str]] = Counter()
    for w in work:
        counted[w.component, w.kind] += w.flops
    executed: Counter[tuple[str, str]] = Counter()
    for (_, component, kind), count in flops.items():
        executed[component, kind] += count
    return [Pair(name, context, *key, counted[key], executed[key]) for key in sorted(set(counted) | set(executed))]


SMALL: dict[str, AnyConfig] = {
    "small V4": ModelConfig.preset("small", index_topk=64),
    "small V3.2": V32Config(
        vocab_size=2048, hidden_size=256, num_hidden_layers=3, num_attention_heads=8, q_lora_rank=128, kv_lora_rank=128,
        qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32, index_n_heads=4, index_head_dim=64, index_topk=128,
        intermediate_size=512, moe_intermediate_size=160, first_k_dense_replace=1, n_routed_experts=8,
        num_experts_per_tok=2, n_group=2, topk_group=1, rope_scaling=RopeScaling("default"),
        max_position_embeddings=65536,
    ),
}  # fmt: skip
SMALL_CONTEXTS = [300, 1021, 2048, 8190, 32768]  # beyond the top-k: below it nothing has to be chosen or scored
REAL: dict[str, AnyConfig] = {
    "v3.2": replace(V32Config(), max_position_embeddings=1 << 20),  # the comparison goes beyond its own 163,840
    "pro": ModelConfig.preset("pro"), "flash": ModelConfig.preset("flash"),
}  # fmt: skip
FITTED = [n * 1024 for n in (16, 32, 64, 128, 256)]  # beyond every top-k, where costs are straight lines
MILLION = 1 << 20


@dataclass(frozen=True)
class Ratio:
    """V4 over V3.2 at a million tokens in percent: counted, extrapolated from measurements, measured directly."""

    model: str
    what: str
    counted: float
    extrapolated: float
    direct: float | None


def ratios(pairs: list[Pair], sizes: list[Size], fitted: list[int]) -> list[Ratio]:
    """The claims from what was measured at `fitted`, along the fitted slope; and directly, where a million was run."""
    measured: dict[str, dict[str, dict[int, float]]] = {}
    for p in pairs:
        for what, scheme in (("FLOPs, FP8 equivalents", "C"), ("FLOPs, raw", "A")):
            at = measured.setdefault(what, {}).setdefault(p.model, {})
            at[p.context] = at.get(p.context, 0.0) + weighted([Work(p.component, p.kind, p.executed)], scheme)
    for s in sizes:
        measured.setdefault(f"cache, {s.format}", {}).setdefault(s.model, {})[s.context] = float(s.allocated)
    counted: dict[str, Callable[[AnyConfig], float]] = {
        "FLOPs, FP8 equivalents": lambda c: weighted(decode(c, MILLION), "C"),
        "FLOPs, raw": lambda c: weighted(decode(c, MILLION), "A"),
    }
    for format, name in FORMATS.items():
        counted[f"cache, {format}"] = lambda c, name=name: sum(kv_bytes.held(c, MILLION, name).values())
    out = []
    for what, of in counted.items():
        line = {model: _extrapolate(values, fitted) for model, values in measured[what].items()}
        for model in line.keys() - {"v3.2"}:
            both = [measured[what][m].get(MILLION) for m in (model, "v3.2")]
            direct = 100 * both[0] / both[1] if both[0] and both[1] else None
            count = 100 * of(REAL[model]) / of(REAL["v3.2"])
            out.append(Ratio(model, what, count, 100 * line[model] / line["v3.2"], direct))
    return sorted(out, key=lambda r: (r.model != "pro", r.what))


def _extrapolate(values: dict[int, float], fitted: list[int]) -> float:
    """The least-squares line through the values at `fitted`, at a million."""
    x, y = list(fitted), [values[c] for c in fitted]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)
    return my + slope * (MILLION - mx)


def largest_context(limit: int = MILLION) -> int:
    """The largest power of two up to `limit` at which a V3.2 layer, its fp32 memory the largest, fits what is free."""
    row, key = kv_bytes.row_bytes(CONTROLS["v3.2"], "float32")
    free = 0.5 * available_bytes() - 8e9  # the layer with its embedding and head
    context = limit
    while context > FITTED[-1] and context * (row + key) > free:
        context //= 2
    return context


def available_bytes() -> int:
    """Memory that could be allocated now; on Linux with what is only kept of files."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def measure_all(progress: Callable[[str], None]) -> dict[str, Any]:
    """Small models whole at five contexts; V3.2 and V4 by real-width layers up to what fits, with their ratios."""
    largest = largest_context()
    contexts = [*FITTED, *([largest] if largest > FITTED[-1] else [])]
    pairs: list[Pair] = []
    sizes: list[Size] = []
    for name, config in SMALL.items():
        more, held = measure_model(name, config, SMALL_CONTEXTS, whole=True, dtype=torch.float32, progress=progress)
        pairs, sizes = pairs + more, sizes + held
    real_pairs: list[Pair] = []
    real_sizes: list[Size] = []
    for name, config in REAL.items():
        more, held = measure_model(name, config, contexts, whole=False, dtype=torch.bfloat16, progress=progress)
        real_pairs, real_sizes = real_pairs + more, real_sizes + held
    return {
        "flops": [{**asdict(p), "off": p.off} for p in pairs + real_pairs],
        "caches": [asdict(s) for s in sizes + real_sizes],
        "ratios": [asdict(r) for r in ratios(real_pairs, real_sizes, FITTED)],
        "fitted": FITTED,
        "largest": largest,
    }
