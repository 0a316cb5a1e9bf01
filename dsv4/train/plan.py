"""What a run would take, before it takes it: which parameter goes to which optimiser and why, memory, FLOPs, time.

The model is built on the meta device, where it has shapes and no numbers, so that V4-Pro is planned on a laptop.
Weights, gradients and momenta are counted exactly: fp32, spread evenly over the ranks. Activations are an estimate from
below: what enters the products with weights, not all that our backward pass keeps.
"""

import math
import os
import re
from dataclasses import dataclass, replace
from typing import Any

import torch

from dsv4 import controls
from dsv4.config import AnyConfig, ModelConfig
from dsv4.cost.hardware import machine
from dsv4.errors import UserError
from dsv4.model import LanguageModel
from dsv4.train.figures import flops_of
from dsv4.train.memory import machine_bytes
from dsv4.train.optim import Kind, kind_of, logical_matrices
from dsv4.train.runconfig import RunConfig

MOST_RANKS = 1_000_000
FP32, BF16 = 4, 2  # bytes
SLOTS: dict[Kind, int] = {"muon": 1, "adamw_decay": 2, "adamw_plain": 2}  # momenta of a number
WHY = (  # the first that ends a parameter's name decides
    (("embed.weight", "head.weight"), "a row for each token, not a map between vectors: AdamW in the paper"),
    (("_base", "_scale"), "static biases and gating factors of mHC: AdamW in the paper"),
    (("norm.weight",), "gains of a norm: AdamW in the paper"),
    (("attn_sink",), "one number a head, no matrix; the paper does not say"),
    ((".ape", ".anchor_score.weight"), "biases by place, which map nothing; the paper does not say"),
    (("_fn",), "mHC's projections, each by itself: the head's, or W_pre, W_post and W_res"),
    ((".w13",), "each expert's gate and up, each by itself"),
    ((".w2",), "each expert's down projection"),
    ((".wo_a.weight",), "the matrix of each group of heads"),
    ((".compressor.wkv.weight", ".compressor.wgate.weight"), "one matrix, or series a and b of overlapping groups"),
)


@dataclass(frozen=True)
class Row:
    """Parameters of one name in all layers. matrices: those that Muon orthogonalises in one of them, count x [a, b]."""

    name: str
    tensors: int
    shape: tuple[int, ...]
    numbers: int
    kind: Kind
    matrices: str
    why: str


def parameter_rows(model: LanguageModel, config: AnyConfig, *, heads_apart: bool = False) -> list[Row]:
    """Every trained parameter in exactly one row, those that differ in the number of their layer alone in the same."""
    found: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    named = dict(model.named_parameters())
    for name, p in named.items():
        pattern = re.sub(r"\b\d+\b", "N", name)
        found.setdefault((pattern, tuple(p.shape)), []).append(name)
    rows = []
    for (pattern, shape), names in found.items():
        kind = kind_of(names[0], named[names[0]])
        stacks = (
            logical_matrices(names[0], torch.Size(shape), config, heads_apart=heads_apart) if kind == "muon" else []
        )
        matrices = ", ".join(f"{count} x [{a}, {b}]" for count, a, b in stacks)
        rows.append(Row(pattern, len(names), shape, len(names) * math.prod(shape), kind, matrices, _why(pattern, kind)))
    return rows


def _why(name: str, kind: Kind) -> str:
    said = next((why for ends, why in WHY if name.endswith(ends)), "")
    return said or ("a matrix that maps vectors" if kind == "muon" else "no matrix")


def meta_model(config: AnyConfig) -> LanguageModel:
    """The model without its numbers."""
    with torch.device("meta"):
        return controls.build(config)


def state_bytes(rows: list[Row]) -> dict[str, int]:
    """Bytes of fp32 weights, gradients and momenta over all ranks."""
    numbers = sum(r.numbers for r in rows)
    momenta = sum(r.numbers * SLOTS[r.kind] for r in rows)
    return {"weights": FP32 * numbers, "gradients": FP32 * numbers, "momenta": FP32 * momenta}


def activation_bytes(config: RunConfig, tokens: int, width: int = BF16) -> int:
    """At least so many bytes of activations for `tokens` tokens in one backward pass, of numbers of `width` bytes.

    Of each block its streams as they come in; and of all blocks, or with recompute of one at a time, the inputs of its
    products with weights: what enters each of them is needed for the weight's gradient.
    """
    k = config.model
    if not isinstance(k, ModelConfig):
        inner, streams = 8 * k.hidden_size, k.hidden_size
    else:
        heads = k.num_attention_heads * k.head_dim
        attention = k.hidden_size + 2 * k.q_lora_rank + heads + k.head_dim + heads + k.o_groups * k.o_lora_rank
        experts = (k.num_experts_per_tok + k.n_shared_experts) * 3 * k.moe_intermediate_size + k.hidden_size
        streams = (1 if k.residual == "plain" else k.hc_mult) * k.hidden_size
        inner = attention + experts + streams  # streams once more, between attention and experts
    kept = 1 if config.recompute else k.num_hidden_layers
    return width * tokens * (k.num_hidden_layers * streams + kept * inner)


def plan(config: RunConfig, *, ranks: int = 1, mfu: float = 0.4, hardware: str = "h200") -> dict[str, Any]:
    """Everything `dsv4 train --plan` prints. UserError for impossible numbers or an unknown accelerator.

    Of a run with stages, figures of a step are the last one's, memory is that of the largest step.

    mfu: the share of the accelerator's bf16 rate that is reached; not measured here, so it is for the asker to state.
    """
    if not 1 <= ranks <= MOST_RANKS:
        raise UserError(f"--ranks {ranks} must be from 1 to {MOST_RANKS:,}")
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu} must be above 0 and at most 1, such as 0.4")
    device = machine(hardware).device
    rows = parameter_rows(meta_model(config.model), config.model, heads_apart=config.optim.heads_apart)
    stages = _stages(config, ranks, ranks * mfu * device.flops("bf16"))
    last, tokens = stages[-1], max(s["tokens_per_rank"] for s in stages)
    memory = {name: -(-size // ranks) for name, size in state_bytes(rows).items()}
    memory["activations, at least"] = activation_bytes(config, tokens)
    return {
        "parameters": sum(r.numbers for r in rows),
        "rows": [vars(r) for r in rows],
        "ranks": ranks,
        "hardware": device.name,
        "memory_per_rank": memory,
        "memory_per_rank_total": sum(memory.values()),
        "fits": sum(memory.values()) <= device.memory * 1e9,
        "device_bytes": int(device.memory * 1e9),
        "mfu": mfu,
        **{name: value for name, value in last.items() if name not in ("start", "steps", "tokens", "days")},
        "tokens": sum(s["tokens"] for s in stages),
        "days": sum(s["days"] for s in stages),
        "stages": stages,
    }


def _stages(config: RunConfig, ranks: int, speed: float) -> list[dict[str, Any]]:
    """What each stage of a run takes, at `speed` FLOP/s."""
    found, course = [], config.data.course.stages
    for s, following in zip(course, [*(s.start for s in course[1:]), config.schedule.steps], strict=True):
        flops = flops_of(config.model, [s.seq_len]) / s.seq_len
        rate, steps = speed / flops, following - s.start
        found.append(
            {
                "start": s.start,
                "steps": steps,
                "seq_len": s.seq_len,
                "tokens_per_step": s.tokens_per_step,
                "tokens_per_rank": -(-s.tokens_per_step // (ranks * config.data.micro_batches)),
                "flops_per_token": flops,
                "flops_per_step": flops * s.tokens_per_step,
                "tokens_per_second": rate,
                "seconds_per_step": s.tokens_per_step / rate,
                "tokens": steps * s.tokens_per_step,
                "days": steps * s.tokens_per_step / rate / 86400,
            }
        )
    return found


def check_memory(config: RunConfig, device: torch.device) -> None:
    """UserError, before any work, if a run needs more memory than the machine has, all of it: a lower bound of what it
    takes. Processes of a run share it; those of one machine, the machine's."""
    rows = parameter_rows(meta_model(config.model), config.model)
    d, world = config.data, max(1, int(os.environ.get("WORLD_SIZE", 1)))
    local = 1 if device.type == "cuda" else max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    state = sum(state_bytes(rows).values()) * local // world
    largest = max(stage.tokens_per_step for stage in d.course.stages)
    least = replace(config, recompute=True)  # what is kept of a block can be computed again, what enters it cannot
    activations = activation_bytes(least, largest // d.micro_batches) * local // world
    has = machine_bytes(device)
    if state + activations > has:
        raise UserError(
            f"the run needs at least {_gib(state)} for weights, gradients and momenta and {_gib(activations)} for "
            f"activations, and this {'GPU' if device.type == 'cuda' else 'machine'} has {_gib(has)}: choose a smaller "
            f"model{', raise data.micro_batches' if state < has else ''} or see what it takes with --plan"
        )


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"


def lines(found: dict[str, Any]) -> list[str]:
    """A plan for a person."""
    out = [f"{found['parameters']:,} parameters", ""]
    cells = [("parameter", "tensors", "shape", "numbers", "to", "matrices", "why")]
    for r in found["rows"]:
        to = {"muon": "Muon", "adamw_decay": "AdamW, decay", "adamw_plain": "AdamW"}[r["kind"]]
        shape = "x".join(map(str, r["shape"]))
        cells.append((r["name"], str(r["tensors"]), shape, f"{r['numbers']:,}", to, r["matrices"], r["why"]))
    widths = [max(len(row[i]) for row in cells) for i in range(6)]
    out += ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[6]]).rstrip() for row in cells]
    out += ["", f"on each of {found['ranks']:,} ranks of {found['hardware']}, {_gib(found['device_bytes'])}:"]
    for name, size in [*found["memory_per_rank"].items(), ("together", found["memory_per_rank_total"])]:
        out.append(f"  {name:<24}{_gib(size):>14}")
    out.append(f"  {'it fits' if found['fits'] else 'IT DOES NOT FIT: take more ranks or micro-batches'}")
    out.append("")
    for s in found["stages"]:
        if len(found["stages"]) > 1:
            out.append(f"from step {s['start']:,} on, sequences of {s['seq_len']:,}:")
        out += [
            f"a step: {s['tokens_per_step']:,} tokens, {s['tokens_per_rank']:,} a rank at a time; "
            f"{s['flops_per_token'] / 1e9:,.1f} GFLOP a token, {s['flops_per_step']:.3g} FLOP in all",
            f"at an MFU of {found['mfu']:.0%}: {s['tokens_per_second']:,.0f} tokens/s, "
            f"{s['seconds_per_step']:,.2f} s a step, {s['days']:,.1f} days for {s['tokens']:,} tokens",
        ]
    if len(found["stages"]) > 1:
        out.append(f"all stages: {found['days']:,.1f} days for {found['tokens']:,} tokens")
    return out
