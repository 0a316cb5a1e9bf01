"""Everything `dsv4 cost` says, as plain data: what --json prints, and what the tables and the page are drawn from.

A model's report answers a planner; the comparison sets V4 beside V3.2 and Llama-3.1-405B.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dsv4.config import CONTROLS, PRESETS, AnyConfig, ModelConfig
from dsv4.cost import causes, compare, hardware, kv_bytes
from dsv4.cost.flops import SCHEMES, by_component, decode, prefill, train, weighted
from dsv4.cost.params import DTYPES, active_by_component, active_bytes, parameters, weight_bytes
from dsv4.errors import UserError, nearest

KNOWN: dict[str, AnyConfig] = {**PRESETS, **CONTROLS}
COMPARED = ("v3.2", "pro", "flash", "llama-405b")
Scheme = str | Mapping[str, float]
MOST_TOKENS_PER_SECOND = 1_000_000  # of one sequence


def check_context(config: AnyConfig, contexts: Sequence[int]) -> None:
    """UserError if a context is longer than the model can have."""
    for context in contexts:
        if context > config.max_position_embeddings:
            raise UserError(
                f"a context of {context:,} tokens is beyond max_position_embeddings="
                f"{config.max_position_embeddings:,}: give at most that"
            )


def check_load(batch: int, rate: float, dtype: str, page_tokens: int) -> None:
    """UserError for a load that cannot be counted: sequences, tokens per second for each, formats, page size."""
    hardware.check_batch(batch)
    if not math.isfinite(rate) or not 0 <= rate <= MOST_TOKENS_PER_SECOND:
        most = f"{MOST_TOKENS_PER_SECOND:,}"
        raise UserError(f"a rate of {rate} is not one: give tokens per second for each sequence, from 0 to {most}")
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown: use one of {', '.join(DTYPES)}{nearest(dtype, DTYPES)}")
    kv_bytes.check_page(page_tokens)


def of_model(
    name: str,
    config: AnyConfig,
    contexts: Sequence[int],
    *,
    batch: int = 1,
    machines: Sequence[hardware.Machine] = (),
    dtype: str = "published",
    scheme: Scheme = "C",
    rate: float = 0.0,
    page_tokens: int = 1,
) -> dict[str, Any]:
    """Parameters, FLOPs, bytes and machines of one model at the given contexts (tokens).

    batch: sequences decoded together. rate: tokens per second that each should get, for the smallest machines.
    page_tokens: growing stores are rounded up to pages. Raises UserError before anything is counted.
    """
    check_context(config, contexts)
    check_load(batch, rate, dtype, page_tokens)
    count = parameters(config)
    extra = ("total", "active", "embedding_table", "routing_biases", "mtp")
    two = kv_bytes.fixed_and_per_token(config, dtype)
    return {
        "model": name,
        "dtype": dtype,
        "batch": batch,
        "rate": rate,
        "scheme": scheme if isinstance(scheme, str) else dict(scheme),
        "parameters": {k: count[k] for k in extra},
        "parameters_by_component": {k: v for k, v in count.items() if k not in extra},
        "active_by_component": active_by_component(config),
        "weight_bytes": weight_bytes(config, dtype),
        "active_bytes_per_token": active_bytes(config, dtype),
        "cache_fixed_and_per_token": {kind: [fixed, float(each)] for kind, (fixed, each) in two.items()},
        "row_bytes": _row_bytes(config, dtype),
        "contexts": [_at(config, c, batch, machines, dtype, scheme, page_tokens) for c in contexts],
        "smallest_machines": [
            {
                "machine": m.name,
                "context": max(contexts),
                "batch": batch,
                "sequences": hardware.sequences(config, m, max(contexts), dtype),
                "tokens_per_second": hardware.step(config, m, max(contexts), batch, dtype).tokens_per_second,
            }
            for m in hardware.smallest(config, max(contexts), batch, rate, dtype)
        ],
        "cache_outweighs_weights_from": compare.cache_outweighs_weights(config, batch, dtype),
        "critical_batch": {c: hardware.critical_batch(config, c, dtype) for c in contexts},
    }


def _row_bytes(config: AnyConfig, dtype: str) -> dict[str, int]:
    row, key = kv_bytes.row_bytes(config, dtype)
    sizes: dict[str, int] = {"attention row": row, "index key": key}
    if isinstance(config, ModelConfig) and config.attention == "lowrank":
        sizes["low-rank row"] = kv_bytes.far_row_bytes(config, dtype)
    return sizes


def _at(
    config: AnyConfig,
    context: int,
    batch: int,
    machines: Sequence[hardware.Machine],
    dtype: str,
    scheme: Scheme,
    page_tokens: int,
) -> dict[str, Any]:
    work = decode(config, context)
    steps = []
    for m in machines:
        step = hardware.step(config, m, context, batch, dtype)
        fit = hardware.sequences(config, m, context, dtype)
        more = {"seconds": step.seconds, "bound": step.bound, "tokens_per_second": step.tokens_per_second}
        more["prefill_seconds"] = hardware.prefill_seconds(config, m, context, dtype)
        steps.append({**asdict(step), **more, "sequences": fit})
    held = kv_bytes.held(config, context, dtype, page_tokens=page_tokens)
    read = kv_bytes.read(config, context, dtype)
    return {
        "context": context,
        "decode_flops": weighted(work),
        "decode_flops_weighted": weighted(work, scheme),
        "decode_by_component": by_component(work, scheme),
        "prefill_flops": weighted(prefill(config, context)),
        "train_flops_per_token": weighted(train(config, context)) / context,
        "cache_bytes": sum(held.values()),
        "cache_by_part": held,
        "cache_read_bytes": sum(read.values()),
        "cache_read_by_part": read,
        "machines": steps,
    }


def comparison(contexts: Sequence[int] = compare.CONTEXTS, *, scheme: Scheme = "C") -> dict[str, Any]:
    """V4-Pro and V4-Flash beside V3.2 and Llama-3.1-405B, the claims and what they rest on.

    V3.2 and Llama are counted beyond their own longest context, as the report does.
    """
    check_context(KNOWN["pro"], contexts)
    for name in COMPARED[:3]:
        if not weighted(decode(KNOWN[name], min(contexts)), scheme):
            raise UserError(f"by these weights a token of {name} costs nothing, so there is nothing to compare with it")
    tried, hits = compare.grid()
    targets = compare.targets()
    rows = []
    for c in contexts:
        row: dict[str, Any] = {"context": c}
        for name in COMPARED:
            config = KNOWN[name]
            row[name] = {
                "flops": weighted(decode(config, c), scheme),
                "flops_raw": weighted(decode(config, c)),
                "cache_bytes": sum(kv_bytes.held(config, c).values()),
                "cache_read_bytes": sum(kv_bytes.read(config, c).values()),
            }
        rows.append(row)
    return {
        "scheme": scheme if isinstance(scheme, str) else dict(scheme),
        "parameters": {name: parameters(KNOWN[name]) for name in COMPARED},
        "active_bytes": {name: active_bytes(KNOWN[name]) for name in COMPARED},
        "contexts": rows,
        "components": {n: by_component(decode(KNOWN[n], compare.MILLION), scheme) for n in COMPARED},
        "cache_parts": {n: kv_bytes.held(KNOWN[n], compare.MILLION) for n in COMPARED},
        "claims": [{**asdict(c), "error": c.error} for c in compare.claims()],
        "claims_at_1e6": [{**asdict(c), "error": c.error} for c in compare.claims(1_000_000)],
        "other_ways_to_count_flops": compare.flops_alternatives(),
        "other_ways_to_count_the_cache": compare.cache_alternatives(),
        "readings": {"tried": tried, "fit": len(hits), "best": hits[:3]},
        "free_fit": {
            f"{c:,}, scheme {s}": compare.free_fit(c, s) for c in (1_000_000, compare.MILLION) for s in ("A", "C", "D")
        },
        "flops_causes": {n: _shares(causes.flops_causes(k), causes.FLOP_CAUSES) for n, k in targets.items()},
        "cache_causes": {n: _shares(causes.cache_causes(k), causes.CACHE_CAUSES) for n, k in targets.items()},
        "public_statements": [asdict(v) for v in causes.verdicts()],
        "hybrids": compare.hybrids(),
        "csa_cheaper_than_hca_from": {n: compare.csa_cheaper_than_hca(k) for n, k in targets.items()},
        "cache_outweighs_weights_from": {
            n: {f"batch {b}": compare.cache_outweighs_weights(KNOWN[n], b) for b in (1, 16, 64)} for n in COMPARED
        },
    }


def _shares(shares: Mapping[str, causes.Share], what: Mapping[str, str]) -> dict[str, Any]:
    return {name: {"what": what[name], **asdict(share)} for name, share in shares.items()}


def what_fits(
    config: AnyConfig, machines: Sequence[hardware.Machine], contexts: Sequence[int], dtype: str = "published"
) -> list[list[int]]:
    """Sequences beside the weights, machines x contexts; -1 where the weights do not fit."""
    return [[hardware.sequences(config, m, c, dtype) for c in contexts] for m in machines]


def scheme_name(scheme: Scheme) -> str:
    """A scheme in words."""
    return f"{scheme}: {SCHEMES[scheme][0]}" if isinstance(scheme, str) else f"weights {dict(scheme)}"
