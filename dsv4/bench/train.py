"""Training steps over the length of a document, ours and, on the same weights and tokens, those of transformers.

A step is forward, backward and the optimiser over some documents of random tokens; MTP is left out, which the peer does
not have. Ours has Muon and AdamW, the peer torch's AdamW alone, so the optimiser is a column of its own. Figures are
medians over the steps, the first of several left out; each row is measured in a process of its own, so that its peak of
memory is its own. The peer is timed once its loss and gradients are seen to be ours.

At best: the FLOPs of forward and backward as dsv4/cost counts them, at the rate of square matrix products of the same
dtype that this machine reaches in the same run. Shares are of that.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from dsv4 import cost
from dsv4.bench.frontier import DTYPES, Say, machine
from dsv4.bench.peers import installed, twin
from dsv4.bench.show import machine_line
from dsv4.config import ModelConfig
from dsv4.errors import UserError, nearest
from dsv4.measure.backward import Spent, spent
from dsv4.measure.clock import Skip
from dsv4.measure.resident import forget_peak, peak_bytes
from dsv4.measure.rows import Row
from dsv4.measure.subjects import randomise, tokens
from dsv4.model import Transformer
from dsv4.train.loss import training_loss
from dsv4.train.memory import keep_freed_memory
from dsv4.train.optim import HybridOptimizer, clip_gradients, parameter_groups

PEERS = ("transformers",)
CHECKED = 300  # tokens, at most, of the step in which the peer is compared with ours: beyond a window
# Largest differences in fp32, where only the order of sums differs: of the loss, relative (found: 1e-7), and of
# gradients, relative to the largest of a parameter (found: 1e-5, and 6e-4 for scales of mHC whose terms cancel).
CLOSE_LOSS, CLOSE_GRADIENT = 1e-5, 1e-3
RATE = 1e-4  # of learning: it changes no time


@dataclass(frozen=True)
class Plan:
    """What is measured; `plan` makes one that can be."""

    name: str
    config: ModelConfig
    dtype: str
    contexts: Sequence[int]
    batch: int = 1  # documents in a step
    steps: int = 4
    against: Sequence[str] = ()
    recompute: bool = False
    profile: bool = False


@dataclass(frozen=True)
class Job:
    """A row to be measured. folder: the peer's weights; none: it is ours."""

    plan: Plan
    context: int
    threads: int
    folder: str = ""


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
    threads = torch.get_num_threads()
    for context in plan.contexts:
        yield _row(plan, Job(plan, context, threads), limits, say)
    if not plan.against:
        return
    with tempfile.TemporaryDirectory() as folder:
        found = _apart(_compared, Job(plan, _checked(plan.config), threads, folder))
        if "skipped" not in found:
            say(f"transformers: loss {found['loss']:.2g} and gradients {found['gradients']:.2g} from ours (fp32)")
            if not (found["loss"] <= CLOSE_LOSS and found["gradients"] <= CLOSE_GRADIENT):
                found = {"skipped": f"transformers computes another function: {found}; times would compare nothing"}
        for context in plan.contexts:
            if "skipped" in found:
                yield {"who": "transformers", "ctx": context, **found}
            else:
                yield _row(plan, Job(plan, context, threads, folder), limits, say, found)


def _checked(config: ModelConfig) -> int:
    """Tokens of which every entry is read: among more, scores of few heads tie, which each breaks its own way."""
    ratios = [kind.ratio for kind in config.trunk_kinds if kind.indexed]
    return min([CHECKED, *(ratio * config.index_topk for ratio in ratios)])


def _row(plan: Plan, job: Job, limits: Row, say: Say, apart: Row | None = None) -> Row:
    """One row of the report: what a process of its own found, beside what the machine would do at best."""
    who = "transformers" if job.folder else "dsv4"
    found = _apart(run, job)
    if "skipped" in found:
        return {"who": who, "ctx": job.context, **found}
    tokens = plan.batch * job.context
    flops = plan.batch * cost.weighted(cost.train(plan.config, job.context, mtp=False))
    best, pass_seconds = flops / (1e12 * limits["matmul_tflops"]), found["forward_seconds"] + found["backward_seconds"]
    whole = pass_seconds + found["optimizer_seconds"]
    say(f"{who}: {job.context} tokens, {whole:.2f} s a step")
    return {
        "who": who, "model": plan.name, "dtype": plan.dtype, "ctx": job.context, "batch": plan.batch,
        "recompute": plan.recompute and who == "dsv4", **found, "tok_s": tokens / pass_seconds,
        "whole_tok_s": tokens / whole, "best_tok_s": tokens / best, "share": best / pass_seconds,
        "muon_share": found["muon_seconds"] / whole if who == "dsv4" else None,
        "loss_apart": apart and apart["loss"], "gradients_apart": apart and apart["gradients"], **limits,
    }  # fmt: skip


def _apart(work: Callable[[Job], Row], job: Job) -> Row:
    """What `work` finds in a process of its own; {"skipped": why} where the machine ends it."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(work, job).result()
        except BrokenProcessPool:
            return {"skipped": "its process was ended from outside, perhaps as the memory was full"}


# --- in the process of a row -----------------------------------------------------------------------------------------


def run(job: Job) -> Row:
    """Seconds of the parts of a step, medians; the loss of the first; the most bytes that the process had in memory."""
    torch.set_num_threads(job.threads)
    keep_freed_memory()
    step = _Peer(job) if job.folder else _Ours(job)
    forget_peak()
    times = [step() for _ in range(job.plan.steps)]
    peak, counted = peak_bytes(), times[1:] or times
    found: Row = {f"{part}_seconds": statistics.median(t[part] for t in counted) for part in counted[0]}
    profile = step.profile() if job.plan.profile and isinstance(step, _Ours) else None
    return {**found, "loss": step.losses[0], "peak_rss": peak, "profile": profile}


class _Clock:
    """Seconds from lap to lap."""

    def __init__(self) -> None:
        self.at = time.perf_counter()

    def lap(self) -> float:
        before, self.at = self.at, time.perf_counter()
        return self.at - before


class _Ours:
    """A model of ours and its optimiser, in two halves so that each can be timed. A call is a step."""

    def __init__(self, job: Job):
        self.model = _model(job.plan)
        self.ids, self.lengths = tokens(self.model, job.plan.batch * job.context), [job.context] * job.plan.batch
        groups = parameter_groups(self.model.named_parameters(), job.plan.config)
        self.muon = HybridOptimizer([g for g in groups if g["kind"] == "muon"], RATE)
        self.adamw = HybridOptimizer([g for g in groups if g["kind"] != "muon"], RATE)
        self.losses: list[float] = []

    def loss(self) -> Tensor:
        found = training_loss(
            self.model, self.ids, _targets(self.ids, self.lengths), self.lengths, mtp_weight=0.0, balance_weight=0.0
        )
        self.losses.append(found.next_token)
        return found.total

    def __call__(self) -> dict[str, float]:
        self.model.zero_grad(set_to_none=True)
        clock = _Clock()
        loss = self.loss()
        forward = clock.lap()
        loss.backward()
        backward = clock.lap()
        clip_gradients(self.model.parameters(), 1.0)
        self.adamw.step()
        rest = clock.lap()
        self.muon.step()
        muon = clock.lap()
        return {"forward": forward, "backward": backward, "optimizer": rest + muon, "muon": muon}

    def profile(self) -> list[Row]:
        """Where the time of one more forward and backward goes, op by op."""
        self.model.zero_grad(set_to_none=True)
        with spent() as found:
            clock = _Clock()
            loss = self.loss()
            forward = clock.lap()
            loss.backward()
            backward = clock.lap()
        return _profile(found, forward, backward)


class _Peer:
    """transformers' model with torch's AdamW; as _Ours."""

    def __init__(self, job: Job):
        installed()
        from transformers import DeepseekV4ForCausalLM

        dtype = getattr(torch, job.plan.dtype)
        self.model: Any = DeepseekV4ForCausalLM.from_pretrained(job.folder, dtype=dtype).train()
        self.ids = tokens(self.model, job.plan.batch * job.context).view(job.plan.batch, -1)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE)
        self.losses: list[float] = []

    def __call__(self) -> dict[str, float]:
        self.model.zero_grad(set_to_none=True)
        clock = _Clock()
        loss = self.model(self.ids, labels=self.ids, use_cache=False).loss
        self.losses.append(loss.item())
        forward = clock.lap()
        loss.backward()
        backward = clock.lap()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return {"forward": forward, "backward": backward, "optimizer": clock.lap()}


def _model(plan: Plan, dtype: str = "") -> Transformer:
    """fp32 weights, the same for everyone, computed with in the plan's dtype."""
    model = Transformer(plan.config, compute_dtype=dtype or plan.dtype, recompute=plan.recompute)
    return randomise(model, std=None)


def _targets(ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """The token after each, none after a document's last."""
    targets = ids.roll(-1)
    targets[torch.tensor(lengths).cumsum(0) - 1] = -100
    return targets


def _compared(job: Job) -> Row:
    """How far the peer's loss and gradients are from ours, in fp32 with the same weights, which are left in the folder.

    Ours are put in place of the weights of a model, which is then read as the peer reads models: what belongs to what
    needs no second table of names. An indexer's have no gradient there, and zeros here.
    """
    from dsv4.checkpoint import save  # needs safetensors, which comes with transformers

    torch.set_num_threads(job.threads)
    ours = _model(job.plan, "float32")
    save(ours, job.folder, "transformers")
    peer = twin(ours, torch.float32)
    ids = tokens(ours, job.context)
    theirs = peer(ids[None], labels=ids[None], use_cache=False).loss
    theirs.backward()
    found = training_loss(
        ours, ids, _targets(ids, [len(ids)]), [len(ids)], mtp_weight=0.0, balance_weight=0.0
    )  # fmt: skip
    found.total.backward()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(parameter.grad)  # type: ignore[arg-type]
    mine = dict(twin(ours, torch.float32).named_parameters())
    apart = 0.0
    for name, parameter in peer.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        largest = grad.abs().max().item()
        away = (grad - mine[name]).abs().max().item()
        apart = max(apart, away / largest if largest else (math.inf if away else 0.0))
    return {"loss": abs(found.next_token / theirs.item() - 1), "gradients": apart}


# --- for a person ----------------------------------------------------------------------------------------------------


def _profile(found: dict[str, Spent], forward: float, backward: float) -> list[Row]:
    """A row for each op, dearest first, then what lies between them."""
    rows = [(name, s.forward, s.backward) for name, s in found.items()]
    rows.sort(key=lambda row: -row[1] - row[2])
    rows.append(("between ops", forward - sum(r[1] for r in rows), backward - sum(r[2] for r in rows)))
    return [
        {"op": name, "forward_seconds": f, "backward_seconds": b, "share": (f + b) / (forward + backward)}
        for name, f, b in rows
    ]


def lines(rows: Sequence[Row]) -> list[str]:
    """The rows for a person, under a head; a peer's come with how many times faster ours are."""
    rows, skipped = [r for r in rows if "skipped" not in r], [r for r in rows if "skipped" in r]
    out = [machine_line(rows[0])] if rows else []
    out.append(
        f"{'who':13s} {'ctx':>7s} {'batch':>5s} {'forward s':>9s} {'backward s':>10s} {'tok/s':>7s} {'at best':>7s} "
        f"{'share':>6s} {'optimizer s':>11s} {'Muon':>6s} {'whole tok/s':>11s} {'peak GiB':>8s}"
    )
    ours = {r["ctx"]: r for r in rows if r["who"] == "dsv4"}
    for r in rows:
        muon = "" if r["muon_share"] is None else f"{r['muon_share']:.1%}"
        text = (
            f"{r['who']:13s} {r['ctx']:7,d} {r['batch']:5d} {r['forward_seconds']:9.3f} {r['backward_seconds']:10.3f} "
            f"{r['tok_s']:7,.0f} {r['best_tok_s']:7,.0f} {r['share']:6.0%} {r['optimizer_seconds']:11.3f} {muon:>6s} "
            f"{r['whole_tok_s']:11,.0f} {r['peak_rss'] / 2**30:8.2f}"
        )
        if r["who"] != "dsv4" and (mine := ours.get(r["ctx"])):
            text += (
                f"   ours: {mine['tok_s'] / r['tok_s']:.1f} x as fast, {mine['peak_rss'] / r['peak_rss']:.0%} memory"
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
