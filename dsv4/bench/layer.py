"""`dsv4 bench layer`: one layer of each kind at its real width decodes a token at the end of a million, in the formats
in which the models are released: what that takes in time, bytes and FLOPs, V4 beside V3.2.

Measured: milliseconds, and bytes of weights and memories (of what is allocated). Counted by dsv4/cost: FLOPs, and which
rows of a memory a token reads. Each kind times the number of its layers adds up to the model's trunk, and so to the
report's ratios; FLOPs that are executed are in `dsv4 bench cost`. V3.2 runs over two memories: its published FP8 rows,
multiplied in FP32 because of their FP32 scales, and BF16 rows, multiplied as such; times are compared with the faster.
Weights and memories are random, so which experts and entries are chosen says nothing. The step is one in which a group
of every ratio closes, and before it other memory is read, so that nothing of the layer is in a cache. As its parts are
timed, V4's layer runs op by op and not in one call as it serves (model/step.py): `--ops` says what lies between ops.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from dsv4.bench.cost import MILLION, REAL, available_bytes
from dsv4.bench.ops import machine_rates
from dsv4.config import AnyConfig, ModelConfig
from dsv4.cost import kv_bytes
from dsv4.cost.compare import claims
from dsv4.cost.flops import Work, decode, weighted
from dsv4.cost.params import STORAGE_BYTES, Family, families
from dsv4.errors import UserError, nearest
from dsv4.measure import roofline
from dsv4.measure.layer import (
    decode_step,
    filled_memory,
    memory_bytes,
    meta_block,
    other_memory,
    random_block,
    random_inputs,
    stopwatch,
    weight_bytes,
)
from dsv4.measure.roofline import Rates, profile
from dsv4.measure.rows import Row
from dsv4.measure.slices import Slice, slices

PEER = "v3.2"
DTYPE = torch.bfloat16
WARM = 2  # steps before those that are timed
_ROOM = 1_500_000_000  # bytes for the program itself and what a step works in

Say = Callable[[str], None]


@dataclass(frozen=True)
class Chosen:
    """A layer that runs: of a model with so many kinds of them, over memories of these formats."""

    model: str
    part: Slice
    kinds: int
    formats: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.model}:{self.part.place}"

    def bytes(self, context: int) -> int:
        """What it takes in memory while it runs."""
        weights = weight_bytes(meta_block(self.part.config, DTYPE), self.part.config, read=False)
        return weights + max(memory_bytes(self.part.config, context, f) for f in self.formats)


def choose(text: str, models: dict[str, AnyConfig] | None = None) -> list[Chosen]:
    """ "flash:csa,pro" -> these layers, each once; "": all of all models. UserError for one that is none."""
    models = REAL if models is None else models
    every = [
        Chosen(name, part, len(parts), ("packed",) if isinstance(config, ModelConfig) else ("packed", "bfloat16"))
        for name, config in models.items()
        for parts in (slices(config),)
        for part in parts
    ]
    if not text.strip():
        return every
    chosen: dict[str, Chosen] = {}
    known = [*models, *(one.name for one in every)]
    for wanted in (w.strip() for w in text.split(",")):
        if wanted not in known:
            raise UserError(
                f"layer {wanted[:40]!r} is unknown: use a model or one of its kinds, such as "
                f"{', '.join(known)}{nearest(wanted[:40], known)}"
            )
        chosen |= {one.name: one for one in every if wanted in (one.name, one.model)}
    return list(chosen.values())


def check(chosen: Sequence[Chosen], context: int, available: int) -> None:
    """UserError where a layer has no such position, or would not fit what memory there is."""
    for one in chosen:
        most = one.part.config.max_position_embeddings
        if context > most:
            raise UserError(f"--context {context} is beyond {one.name}: its models go to {most}; give at most that")
        need = one.bytes(context) + _ROOM
        if need > available:
            raise UserError(
                f"{one.name} at {context:,} tokens takes {need / 1e9:.1f} GB and {available / 1e9:.1f} GB of memory "
                "are free: leave it out of --layers, or give a smaller --context"
            )


def measure(
    chosen: Sequence[Chosen], context: int, repeats: int, say: Say, *, each_op: bool = False
) -> dict[str, list[Row]]:
    """Rows of layers, one for each format of its memory, and of models of which every kind ran, beside V3.2.

    each_op: a layer's row has under `ops` those of measure/roofline.py. UserError before any work as `check` says.
    """
    check(chosen, context, available_bytes())
    say("what this machine can do at best is measured")
    rates = machine_rates(DTYPE)
    say(f"{rates.bytes / 1e9:.3g} GB/s read, {rates.flops / 1e12:.3g} TFLOP/s, {torch.get_num_threads()} threads")
    layers = [row for one in chosen for row in _measured(one, context, repeats, rates, each_op, say)]
    return {"layers": layers, "models": list(_models(chosen, layers, context))}


def _measured(one: Chosen, context: int, repeats: int, rates: Rates, each_op: bool, say: Say) -> Iterator[Row]:
    config = one.part.config
    say(f"{one.name}: {weight_bytes(meta_block(config, DTYPE), config, read=False) / 1e9:.2f} GB of weights are drawn")
    block = random_block(config, DTYPE)
    watched = {"ms": block, "attention_ms": block.get_submodule("attn"), "experts_ms": block.get_submodule("ffn")}
    if getattr(watched["attention_ms"], "indexer", None) is not None:
        watched["indexer_ms"] = block.get_submodule("attn.indexer")
    forget = other_memory()
    inputs = random_inputs(config, DTYPE, WARM + repeats)
    for format in one.formats:
        say(f"{one.name}: a {format} memory of {context:,} tokens is filled")
        memory = filled_memory(config, context, format, DTYPE)
        held = memory.bytes()
        times: list[dict[str, float]] = []
        for x in inputs:
            forget()
            with stopwatch(watched) as seconds:
                decode_step(block, config, memory, x)
            seconds["rest_ms"] = seconds["ms"] - seconds["attention_ms"] - seconds["experts_ms"]
            times.append(seconds)
        assert memory.bytes() == held, "a step takes no more memory"
        median = {name: 1e3 * statistics.median(t[name] for t in times[WARM:]) for name in times[0]}
        each: list[Row] = []
        if each_op:
            again = itertools.cycle(inputs)
            each = profile(
                lambda m=memory, x=again: decode_step(block, config, m, next(x)), repeats, rates, before=forget
            )
        weights = weight_bytes(block, config, read=True)
        name = "published" if format == "packed" else format
        rows = sum(kv_bytes.read(config, context, name).values())
        yield {
            "model": one.model, "kind": one.part.place, "layers": one.part.times, "context": context, "cache": format,
            "indexer_ms": 0.0, **median,
            "weight_bytes": weight_bytes(block, config, read=False), "weight_bytes_read": weights,
            "weight_bytes_read_counted": int(sum(f.active * STORAGE_BYTES[f.storage] for f in _of_layer(config))),
            "cache_bytes": held, "cache_bytes_counted": memory_bytes(config, context, format),
            "cache_bytes_per_token": held / context, "cache_bytes_read_counted": rows,
            "flops_counted": layer_flops(config, context, "A"),
            "fp8_flops_counted": layer_flops(config, context, "C"),
            "share_of_read": (weights + rows) / (median["ms"] / 1e3) / rates.bytes, "read_gb_s": rates.bytes / 1e9,
            "matmul_tflops": rates.flops / 1e12, "threads": torch.get_num_threads(), "ops": each,
        }  # fmt: skip
        del memory
        say(f"{one.name}: {median['ms']:.1f} ms")


# --- what is counted of a layer --------------------------------------------------------------------------------------


def _is_end(family: Family) -> bool:
    """Whether tensors lie outside of all layers."""
    return family.name.startswith(("^", "hc_head"))


def _of_layer(config: AnyConfig) -> list[Family]:
    return [f for f in families(config) if not _is_end(f)]


def end_flops(config: AnyConfig, scheme: str) -> float:
    """FLOPs of a decoded token outside of all layers, under a scheme of counting."""
    return weighted(
        [Work(f.component, f.kind, 2 * f.active) for f in families(config) if f.kind and _is_end(f)], scheme
    )


def layer_flops(config: AnyConfig, context: int, scheme: str) -> float:
    """FLOPs of a decoded token in all layers of a model; of the only one of a slice."""
    return weighted(decode(config, context), scheme) - end_flops(config, scheme)


# --- models ----------------------------------------------------------------------------------------------------------

_COMPARED = ("cache_bytes", "cache_bytes_read_counted", "fp8_flops_counted", "weight_bytes_read", "ms", "attention_ms")


def _models(chosen: Sequence[Chosen], layers: Sequence[Row], context: int) -> Iterator[Row]:
    """Of each model whose kinds were all chosen: what its layers come to, and that in percent of V3.2's."""
    parts: dict[str, list[Chosen]] = {}
    for one in chosen:
        parts.setdefault(one.model, []).append(one)
    whole = {name: _whole(of, layers, context) for name, of in parts.items() if len(of) == of[0].kinds}
    said = {claim.name: claim.said for claim in claims()} if context == MILLION else {}
    for name, row in whole.items():
        peer = whole.get(PEER)
        yield {
            **row, **{f"{key}_percent": 100 * row[key] / peer[key] if peer else None for key in _COMPARED},
            "cache_bytes_percent_said": said.get(f"{name} cache"),
            "fp8_flops_counted_percent_said": said.get(f"{name} FLOPs"),
        }  # fmt: skip


def _whole(parts: Sequence[Chosen], layers: Sequence[Row], context: int) -> Row:
    """Sums over all layers of a model: bytes of its packed memory, and times over the one that it is fastest with."""
    model = parts[0].model

    def total(key: str, format: str) -> float:
        return sum(r["layers"] * r[key] for r in layers if r["model"] == model and r["cache"] == format)

    fastest = min(parts[0].formats, key=lambda format: total("ms", format))
    timed = ("ms", "attention_ms", "indexer_ms", "experts_ms")
    return {
        "model": model, "context": context, "timed_over": fastest, **{key: total(key, fastest) for key in timed},
        **{key: total(key, "packed") for key in ("cache_bytes", "cache_bytes_read_counted", "weight_bytes_read")},
        "fp8_flops_counted": total("fp8_flops_counted", "packed") + end_flops(parts[0].part.config, "C"),
    }  # fmt: skip


# --- for a person ----------------------------------------------------------------------------------------------------


def lines(found: dict[str, list[Row]]) -> list[str]:
    """Layers, and under them models; what is not measured is called counted."""
    out = [
        f"{'one layer':14s} {'memory':8s} {'x':>3s} {'ms':>8s} = {'attention':>9s} {'indexer':>8s} {'experts':>8s} "
        f"{'rest':>6s} {'weights read':>12s} {'rows read':>10s} {'of read':>8s} {'held B/token':>12s} {'GFLOPs':>8s} "
        f"{'as FP8':>8s}",
        f"{'':14s} {'':8s} {'':>3s} {'measured':>8s}   {'':>9s} {'':>8s} {'':>8s} {'':>6s} {'in memory':>12s} "
        f"{'counted':>10s} {'':>8s} {'in memory':>12s} {'counted':>8s} {'counted':>8s}",
    ]
    for r in found["layers"]:
        out.append(
            f"{r['model'] + ':' + r['kind']:14s} {r['cache']:8s} {r['layers']:3d} {r['ms']:8.1f}   "
            f"{r['attention_ms'] - r['indexer_ms']:9.1f} {r['indexer_ms']:8.1f} {r['experts_ms']:8.1f} "
            f"{r['rest_ms']:6.1f} {r['weight_bytes_read'] / 1e6:9.1f} MB {r['cache_bytes_read_counted'] / 1e6:7.1f} MB "
            f"{r['share_of_read']:8.0%} {r['cache_bytes_per_token']:12.2f} {r['flops_counted'] / 1e9:8.3f} "
            f"{r['fp8_flops_counted'] / 1e9:8.3f}"
        )
    for r in found["layers"]:
        if r["ops"]:
            out += ["", f"ops of {r['model']}:{r['kind']}, {r['cache']} memory", *roofline.lines(r["ops"])]
    for r in found["models"]:
        out.append("")
        out.append(f"all layers of {r['model']} at {r['context']:,} tokens, times over its {r['timed_over']} memory")
        for key, (label, unit, scale) in _LABELS.items():
            text = f"  {label:52s} {r[key] / scale:12,.2f} {unit:6s}"
            if r["model"] != PEER and r[f"{key}_percent"] is not None:
                text += f" {r[f'{key}_percent']:7.2f}% of V3.2"
                if r.get(f"{key}_percent_said") is not None:
                    text += f" (said: {r[f'{key}_percent_said']:.0f}%)"
            out.append(text)
    return out


_LABELS = {
    "cache_bytes": ("memory held, packed, allocated", "GB", 1e9),
    "fp8_flops_counted": ("FLOPs of a token, FP8 equivalents with head, counted", "GFLOP", 1e9),
    "cache_bytes_read_counted": ("rows of it that a token reads, counted", "MB", 1e6),
    "weight_bytes_read": ("weights that a token reads, as they lie in memory", "GB", 1e9),
    "attention_ms": ("time of attention with its indexer, measured", "ms", 1.0),
    "ms": ("time of all layers, measured", "ms", 1.0),
}
