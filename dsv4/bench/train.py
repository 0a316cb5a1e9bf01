"""Training steps over the length of a document, ours and, on the same weights and tokens, those of transformers.

A step is forward, backward and the optimiser over some documents of random tokens; MTP is left out, which the peer does
not have. The optimiser is this package's Muon and AdamW for both, on the same matrices, in a column of its own. Figures
are medians over the steps, the first of several left out; each row is measured in a process of its own, so that its
peak of memory is its own. The peer is timed once its loss and gradients are seen to be ours. A length that cannot fit
into the memory, going by two shorter ones, is not begun.

At best: the FLOPs of forward and backward as dsv4/cost counts them, at the rate of square matrix products of the same
dtype that this machine reaches between the steps, the median of that: on a shared machine it is not the same from one
minute to the next. Shares are of that.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import torch

from dsv4 import cost
from dsv4.bench.cost import available_bytes
from dsv4.bench.frontier import DTYPES, Say, machine
from dsv4.bench.peers import installed
from dsv4.bench.show import machine_line
from dsv4.bench.trainstep import Job, Plan, compared, counterparts, run
from dsv4.config import ModelConfig
from dsv4.errors import UserError, nearest
from dsv4.measure.clock import Skip
from dsv4.measure.rows import Row

PEERS = ("transformers",)
CHECKED = 300  # tokens, at most, of the step in which the peer is compared with ours: beyond a window
# Largest differences in fp32, where only the order of sums differs: of the loss, relative (found: 1e-7), and of
# gradients, relative to the largest of a parameter (found: 1e-5, and 6e-4 for scales of mHC whose terms cancel).
CLOSE_LOSS, CLOSE_GRADIENT = 1e-5, 1e-3


def plan(preset: str, dtype: str, contexts: Sequence[int], against: Sequence[str], **options: Any) -> Plan:
    """A plan of the options; UserError for one that cannot be measured here."""
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} cannot be trained in: use {', '.join(DTYPES)}{nearest(dtype, DTYPES)}")
    config = ModelConfig.preset(preset).without_drafts()
    for name in against:
        if name not in PEERS:
            raise UserError(f"--against {name} is unknown: use {', '.join(PEERS)}{nearest(name, PEERS)}")
        try:
            installed()
        except Skip as reason:
            raise UserError(f"{reason}: pip install 'transformers>=5.23,<5.25'") from None
    if contexts[-1] > config.max_position_embeddings:
        raise UserError(f"--context {contexts[-1]}: {preset} has positions up to {config.max_position_embeddings}")
    return Plan(preset, config, dtype, contexts, against=against, **options)


def measure(plan: Plan, say: Say) -> Iterator[Row]:
    """The rows of ours, then of the peer; {"who", "ctx", "skipped": why} for what fails, or computes something else."""
    limits = machine(getattr(torch, plan.dtype))
    say(machine_line(limits))
    threads, peaks = torch.get_num_threads(), dict[int, int]()
    for context in plan.contexts:
        yield _row(plan, Job(plan, context, threads), limits, say, peaks)
    if not plan.against:
        return
    with tempfile.TemporaryDirectory() as folder:
        peaks = {}
        found: Any = _apart(compared, Job(plan, _checked(plan.config), threads, folder))
        if "skipped" not in found:
            say(f"transformers: loss {found['loss']:.2g} and gradients {found['gradients']:.2g} from ours (fp32)")
            if not (found["loss"] <= CLOSE_LOSS and found["gradients"] <= CLOSE_GRADIENT):
                found = {"skipped": f"transformers computes another function: {found}; times would compare nothing"}
            else:
                found |= _apart(counterparts, Job(plan, 0, threads))
        for context in plan.contexts:
            if "skipped" in found:
                yield {"who": "transformers", "ctx": context, **found}
            else:
                yield _row(plan, Job(plan, context, threads, folder, found["names"]), limits, say, peaks, found)


def _checked(config: ModelConfig) -> int:
    """Tokens of which every entry is read: among more, scores of few heads tie, which each breaks its own way."""
    ratios = [kind.ratio for kind in config.trunk_kinds if kind.indexed]
    return min([CHECKED, *(ratio * config.index_topk for ratio in ratios)])


def _row(plan: Plan, job: Job, limits: Row, say: Say, peaks: dict[int, int], apart: Row | None = None) -> Row:
    """One row of the report: what a process of its own found, beside what the machine would do at best.

    peaks: bytes of the shorter contexts of the same implementation, to which this one's are added.
    """
    who = "transformers" if job.folder else "dsv4"
    least, there = least_bytes(peaks, job.context), available_bytes()
    if least > there:
        why = f"it would need at least {least / 2**30:.0f} GiB of memory, and {there / 2**30:.0f} GiB are there"
        return {"who": who, "ctx": job.context, "skipped": why, "least_bytes": least}
    found = _apart(run, job)
    if "skipped" in found:
        return {"who": who, "ctx": job.context, **found}
    peaks[job.context] = found["peak_rss"]
    tokens = plan.batch * job.context
    flops = plan.batch * cost.weighted(cost.train(plan.config, job.context, mtp=False))
    best, pass_seconds = flops / (1e12 * found["matmul_tflops"]), found["forward_seconds"] + found["backward_seconds"]
    whole = pass_seconds + found["optimizer_seconds"]
    say(f"{who}: {job.context} tokens, {whole:.2f} s a step")
    return {
        "who": who, "model": plan.name, "dtype": plan.dtype, "ctx": job.context, "batch": plan.batch,
        "recompute": plan.recompute and who == "dsv4", **limits, **found, "tok_s": tokens / pass_seconds,
        "whole_tok_s": tokens / whole, "best_tok_s": tokens / best, "share": best / pass_seconds,
        "muon_share": found["muon_seconds"] / whole,
        "loss_apart": apart and apart["loss"], "gradients_apart": apart and apart["gradients"],
    }  # fmt: skip


def least_bytes(peaks: dict[int, int], context: int) -> int:
    """A lower bound of what a context takes, from the two longest of shorter ones, 0 from fewer: a step's grows with
    the length or with its square, so not less than along a line."""
    if len(peaks) < 2:
        return 0
    (a, low), (b, high) = sorted(peaks.items())[-2:]
    return int(high + (high - low) * (context - b) / (b - a))


def _apart(work: Callable[[Job], Row], job: Job) -> Row:
    """What `work` finds in a process of its own; {"skipped": why} where the machine ends it."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(work, job).result()
        except BrokenProcessPool:
            return {"skipped": "its process was ended from outside, perhaps as the memory was full"}


# --- for a person ----------------------------------------------------------------------------------------------------


def lines(rows: Sequence[Row]) -> list[str]:
    """The rows for a person, under a head; a peer's come with how many times faster ours are."""
    rows, skipped = [r for r in rows if "skipped" not in r], [r for r in rows if "skipped" in r]
    out = [machine_line(rows[0])] if rows else []
    if any(r["who"] != "dsv4" for r in rows):
        out.append("a whole step has the same optimiser, ours, in all rows")
    out.append(
        f"{'who':13s} {'ctx':>7s} {'batch':>5s} {'forward s':>9s} {'backward s':>10s} {'tok/s':>7s} {'at best':>7s} "
        f"{'share':>6s} {'optimizer s':>11s} {'Muon':>6s} {'whole tok/s':>11s} {'peak GiB':>8s}"
    )
    ours = {r["ctx"]: r for r in rows if r["who"] == "dsv4"}
    for r in rows:
        text = (
            f"{r['who']:13s} {r['ctx']:7,d} {r['batch']:5d} {r['forward_seconds']:9.3f} {r['backward_seconds']:10.3f} "
            f"{r['tok_s']:7,.0f} {r['best_tok_s']:7,.0f} {r['share']:6.0%} {r['optimizer_seconds']:11.3f} "
            f"{r['muon_share']:6.1%} {r['whole_tok_s']:11,.0f} {r['peak_rss'] / 2**30:8.2f}"
        )
        if r["who"] != "dsv4" and (mine := ours.get(r["ctx"])):
            text += (
                f"   ours: {mine['tok_s'] / r['tok_s']:.1f} x as fast, {mine['whole_tok_s'] / r['whole_tok_s']:.1f} x "
                f"with the optimiser, {mine['peak_rss'] / r['peak_rss']:.0%} memory"
            )
        out.append(text)
    for r in rows:
        if r["profile"]:
            out.append(f"{r['who']} at {r['ctx']:,d} tokens, op by op (the rest of the backward pass is between ops):")
            out += [
                f"  {p['op']:18s} forward {p['forward_seconds']:8.3f} s  backward {p['backward_seconds']:8.3f} s "
                f"{p['share']:6.1%}"
                for p in r["profile"]
            ]
    return out + [f"{r['who']} at {r['ctx']:,d}: skipped: {r['skipped']}" for r in skipped]
