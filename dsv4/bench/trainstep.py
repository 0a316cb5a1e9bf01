"""What runs in the process of a row of bench/train.py: a step of ours or of transformers, in parts that are timed; and
the comparison of the two before the latter is timed.

Both have the same optimiser, ours, on the same matrices: to which of our parameters one of theirs belongs is read off a
model of ours that was filled with numbers of its parameters and read as they read models.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv4.bench.peers import installed, twin
from dsv4.config import ModelConfig
from dsv4.measure.backward import Spent, spent
from dsv4.measure.ceilings import product_rate
from dsv4.measure.resident import forget_peak, peak_bytes
from dsv4.measure.rows import Row
from dsv4.measure.subjects import randomise, tokens
from dsv4.model import Transformer
from dsv4.train.loss import training_loss
from dsv4.train.memory import keep_freed_memory
from dsv4.train.optim import HybridOptimizer, clip_gradients, drop_zero_gradients, parameter_groups

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
    """A row to be measured. folder: the peer's weights; none: it is ours. names: of the peer's parameters, to ours."""

    plan: Plan
    context: int
    threads: int
    folder: str = ""
    names: dict[str, str] = field(default_factory=dict)


def run(job: Job) -> Row:
    """Seconds of the parts of a step and the rate of matrix products after it, medians over all steps but the first;
    the first one's loss; the most bytes that the process had in memory."""
    torch.set_num_threads(job.threads)
    keep_freed_memory()
    step = _Peer(job) if job.folder else _Ours(job)
    forget_peak()
    times, rates = [], []
    for i in range(job.plan.steps):
        times.append(step())
        if i or job.plan.steps == 1:
            rates.append(product_rate(getattr(torch, job.plan.dtype)))
    peak, counted = peak_bytes(), times[1:] or times
    found: Row = {f"{part}_seconds": statistics.median(t[part] for t in counted) for part in counted[0]}
    found["matmul_tflops"] = statistics.median(rates) / 1e12
    profile = step.profile() if job.plan.profile and isinstance(step, _Ours) else None
    return {**found, "loss": step.losses[0], "peak_rss": peak, "profile": profile}


class _Clock:
    """Seconds from lap to lap."""

    def __init__(self) -> None:
        self.at = time.perf_counter()

    def lap(self) -> float:
        before, self.at = self.at, time.perf_counter()
        return self.at - before


class _Update:
    """Clipping, Muon and AdamW as in a training run, on parameters by our names; in two halves to be timed."""

    def __init__(self, config: ModelConfig, parameters: dict[str, Tensor]):
        with torch.device("meta"):
            groups = parameter_groups(Transformer(config).named_parameters(), config)
        for group in groups:  # which matrices are in a parameter is read off ours: theirs may have other shapes
            group["params"] = [parameters[name] for name in group["names"]]
        self.parameters = list(parameters.values())
        self.muon = HybridOptimizer([g for g in groups if g["kind"] == "muon"], RATE)
        self.adamw = HybridOptimizer([g for g in groups if g["kind"] != "muon"], RATE)

    def __call__(self) -> dict[str, float]:
        clock = _Clock()
        drop_zero_gradients(self.parameters)
        clip_gradients(self.parameters, 1.0)
        self.adamw.step()
        rest = clock.lap()
        self.muon.step()
        muon = clock.lap()
        return {"optimizer": rest + muon, "muon": muon}


class _Ours:
    """A model of ours and its optimiser. A call is a step."""

    def __init__(self, job: Job):
        self.model = _model(job.plan)
        self.ids, self.lengths = tokens(self.model, job.plan.batch * job.context), [job.context] * job.plan.batch
        self.update = _Update(job.plan.config, dict(self.model.named_parameters()))
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
        return {"forward": forward, "backward": backward, **self.update()}

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
    """transformers' model; as _Ours."""

    def __init__(self, job: Job):
        installed()
        from transformers import DeepseekV4ForCausalLM

        dtype = getattr(torch, job.plan.dtype)
        self.model: Any = DeepseekV4ForCausalLM.from_pretrained(job.folder, dtype=dtype).train()
        self.ids = tokens(self.model, job.plan.batch * job.context).view(job.plan.batch, -1)
        theirs = {job.names[name]: p for name, p in self.model.named_parameters()}
        self.update = _Update(job.plan.config, theirs)
        self.losses: list[float] = []

    def __call__(self) -> dict[str, float]:
        self.model.zero_grad(set_to_none=True)
        clock = _Clock()
        loss = self.model(self.ids, labels=self.ids, use_cache=False).loss
        self.losses.append(loss.item())
        forward = clock.lap()
        loss.backward()
        backward = clock.lap()
        return {"forward": forward, "backward": backward, **self.update()}


def _model(plan: Plan, dtype: str = "") -> Transformer:
    """fp32 weights, the same for everyone, computed with in the plan's dtype."""
    model = Transformer(plan.config, compute_dtype=dtype or plan.dtype, recompute=plan.recompute)
    return randomise(model, std=None)


def _targets(ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """The token after each, none after a document's last."""
    targets = ids.roll(-1)
    targets[torch.tensor(lengths).cumsum(0) - 1] = -100
    return targets


def compared(job: Job) -> Row:
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


@torch.no_grad()
def counterparts(job: Job) -> Row:
    """The names of the peer's parameters, to ours. Both lie in the same order in memory, as what is orthogonalised is
    cut out of that: both are read with random numbers, then with each parameter's own number in it."""
    ours = _model(job.plan, "float32")
    mine = dict(twin(ours, torch.float32).named_parameters())
    named = list(ours.named_parameters())
    before = [p.clone() for _, p in named]
    for number, (_, p) in enumerate(named):
        p.fill_(number)
    found: dict[str, str] = {}
    for theirs, p in twin(ours, torch.float32).named_parameters():
        number = int(p.flatten()[0])
        name = named[number][0]
        assert torch.equal(mine[theirs].flatten(), before[number].flatten()), f"{theirs} is not laid out as {name}"
        found[theirs] = name
    assert len(found) == len(set(found.values())) == len(named), "a parameter has no counterpart, or two"
    return {"names": found}


def _profile(found: dict[str, Spent], forward: float, backward: float) -> list[Row]:
    """A row for each op, dearest first, then what lies between them."""
    rows = [(name, s.forward, s.backward) for name, s in found.items()]
    rows.sort(key=lambda row: -row[1] - row[2])
    rows.append(("between ops", forward - sum(r[1] for r in rows), backward - sum(r[2] for r in rows)))
    return [
        {"op": name, "forward_seconds": f, "backward_seconds": b, "share": (f + b) / (forward + backward)}
        for name, f, b in rows
    ]
