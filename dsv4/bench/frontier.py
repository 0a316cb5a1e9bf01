"""Prefill and decode over the length of the context, ours and, on the same weights in the same run, those of peers.

A prompt of random ids is read once per repeat; at each context of the list it stands how long all tokens so far have
taken, and a fork of the memory decodes some tokens. A peer that cannot fork reads each context from its beginning. What
stands in a row is the median over the repeats. A peer is timed once it is seen to compute the same (agree.py).

At best, by what this machine does in the same run, before and after each repeat (the median): a prompt takes the FLOPs
counted by dsv4/cost at the rate of square matrix products of the same dtype, or the reading of all weights and the
writing of its memory, whichever is longer; a token takes the reading of the weights that it uses and of the rows that
it attends to. Shares are of that.
"""

import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv4 import cost
from dsv4.bench import outside
from dsv4.bench.agree import LENGTHS, Best, Judge, best
from dsv4.bench.peers import Theirs, installed, twin
from dsv4.bench.show import machine_line
from dsv4.config import ModelConfig
from dsv4.cost import kv_bytes
from dsv4.cost.params import active_bytes, weight_bytes
from dsv4.errors import UserError, nearest
from dsv4.measure.ceilings import measured_cpu, product_rate, read_rate
from dsv4.measure.clock import Skip
from dsv4.measure.rows import Row
from dsv4.measure.subjects import randomise, tokens
from dsv4.model import Transformer
from dsv4.model.packed import pack_weights

CHUNK = 1024  # tokens in a call
STEPS, WARM = 16, 2  # tokens decoded at each context; the first of them are not counted

DTYPES = ("float32", "bfloat16")
# Peers, and the format of their memory as ours name it; "": that of the dtype.
PEERS = {"transformers": "", "nano": "", "llama": "", "vllm": "packed"}
# The model that vLLM can run: a preset with the sizes that its kernels are made for.
VLLM_SIZES: dict[str, Any] = {
    "head_dim": 512, "qk_rope_head_dim": 64, "index_head_dim": 128, "index_topk": 512, "n_routed_experts": 64,
    "num_experts_per_tok": 6,
}  # fmt: skip
_READ_AS = {"packed": "published"}  # our formats as dsv4/cost names them
_VLLM_READS = "fp8"  # its index keys are FP8 where the packed ones are FP4

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is measured, judged and with every peer found before any work; `plan` makes one."""

    name: str
    config: ModelConfig
    dtype: torch.dtype
    format: str
    contexts: Sequence[int]
    repeats: int = 3
    against: dict[str, outside.Outside | None] = field(default_factory=dict)  # None: transformers, in this process
    released: bool = False  # weights in FP8 and FP4
    batch: int = 1  # sequences that also decode side by side

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def versions(self) -> dict[str, str]:
        """Each peer with its version."""
        return {name: peer.version if peer else f"transformers {installed()}" for name, peer in self.against.items()}

    @property
    def weights(self) -> str:
        """How weights are kept, as dsv4/cost names it."""
        return "published" if self.released else self.dtype_name

    def format_of(self, who: str) -> str:
        """The format of someone's memory, as ours would be."""
        return self.format if who == "dsv4" else PEERS[who] or self.dtype_name


def plan(
    preset: str,
    dtype: str,
    format: str,
    contexts: Sequence[int],
    repeats: int,
    against: Sequence[str],
    python: str,
    *,
    weights: str = "",
    batch: int = 1,
) -> Plan:
    """A plan of the options; an empty dtype or format is what the peers ask for, empty weights those of the dtype.

    UserError for an unknown peer, one that is not there, and numbers that vLLM does not run.
    """
    if weights not in ("", "released"):
        raise UserError(f"--weights {weights} is unknown: use released, or leave it out for those of the dtype")
    if weights and against:
        raise UserError("--weights released has no peer here that runs the same: leave out --against")
    for name in against:
        if name not in PEERS:
            raise UserError(f"--against {name} is unknown: use {', '.join(PEERS)}{nearest(name, PEERS)}")
    config = ModelConfig.preset(preset)
    config = config.without_drafts()
    name = preset
    if "vllm" in against:
        if dtype not in ("", "bfloat16"):
            raise UserError(f"--against vllm runs in bfloat16 alone, not in {dtype}: leave out --dtype")
        config, name = config.with_(**VLLM_SIZES), f"{preset} in the sizes that vLLM can run"
    dtype = dtype or ("bfloat16" if "vllm" in against else "float32")
    format = format or ("packed" if "vllm" in against else dtype)
    for option, value, known in (("dtype", dtype, DTYPES), ("cache", format, (*DTYPES, "packed"))):
        if value not in known:
            raise UserError(
                f"--{option} {value} cannot be measured here: use {', '.join(known)}{nearest(value, known)}"
            )
    found: dict[str, outside.Outside | None] = {}
    for peer in against:
        if peer != "transformers":
            found[peer] = outside.find(peer, python, torch.get_num_threads())
            continue
        try:
            installed()
        except Skip as reason:
            raise UserError(f"{reason}: pip install 'transformers>=5.23,<5.25'") from None
        found[peer] = None
    return Plan(name, config, getattr(torch, dtype), format, contexts, repeats, found, bool(weights), batch)


class Ours:
    """A model of ours reading one prompt after the other."""

    name, chunk = "dsv4", CHUNK

    def __init__(self, model: Transformer, format: str, longest: int, batch: int = 1):
        self.model, self.format, self.longest, self.batch = model, format, longest, batch

    def begin(self) -> None:
        self.memory = self.model.new_cache(format=self.format, capacity=self.longest + STEPS)[0]

    def read(self, ids: Tensor) -> Tensor:
        """Logits of the last token, [vocab]."""
        return self.model(ids, segments=[(len(ids), self.memory)], rows="last")[0]

    def decoding(self) -> Callable[[Tensor], Tensor]:
        """A function that reads one token after what was read, on a memory of its own."""
        memory = self.memory.fork()
        return lambda token: self.model(token, segments=[(1, memory)], rows="last")[0]

    def side_by_side(self) -> float:
        """Seconds of a step in which `batch` sequences decode a token each, all from what was read; the median."""
        ids = tokens(self.model, self.batch, seed=1)
        segments = [(1, self.memory.fork()) for _ in ids]
        steps = [_seconds(lambda: self.model(ids, segments=segments, rows="last")) for _ in range(STEPS)]
        return statistics.median(steps[WARM:])

    def bytes(self) -> int | None:
        return self.memory.bytes()


def measure(plan: Plan, say: Say) -> Iterator[Row]:
    """The rows of ours, then of each peer; for one that fails or computes something else {"who", "skipped": why}."""
    config = plan.config
    model = randomise(Transformer(config, plan.dtype), std=None).eval()
    say(f"{plan.name}: {model.num_parameters():,} parameters, {plan.weights}, memory {plan.format}")
    if plan.released:
        pack_weights(model)
    judge = Judge(model) if plan.against else None
    limits = Limits(plan.dtype)
    say(machine_line(limits.row()))
    ours = Ours(model, plan.format, plan.contexts[-1], plan.batch)
    for context, found in passes(ours, plan.contexts, plan.repeats, say, limits.again):
        yield row(plan, "dsv4", context, found, limits.row())
    for name, peer in plan.against.items():
        assert judge
        limits = Limits(plan.dtype)
        try:
            timed = _outside(plan, peer, model, judge, say) if peer else _inside(plan, model, judge, say, limits.again)
            for context, found in timed:
                yield row(plan, name, context, found, limits.row())
        except Skip as reason:
            yield {"who": name, "skipped": str(reason)}


class Limits:
    """What this processor does at best, in the dtype of a run. On a shared machine it is not the same from one minute
    to the next, so rows are read against the median of what was measured in between."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.first = dtype, machine(dtype)
        self.flops, self.read = [self.first["matmul_tflops"]], [self.first["read_gb_s"]]

    def again(self) -> None:
        self.flops.append(product_rate(self.dtype) / 1e12)
        self.read.append(read_rate(torch.device("cpu")) / 1e9)

    def row(self) -> Row:
        medians = {"matmul_tflops": statistics.median(self.flops), "read_gb_s": statistics.median(self.read)}
        return {**self.first, **medians}


def machine(dtype: torch.dtype) -> Row:
    """What this processor does at best, measured now: TFLOP/s of matrix products, GB/s read and copied."""
    best = measured_cpu()
    return {
        "matmul_tflops": (best.bf16 if dtype == torch.bfloat16 else best.fp32) or 0.0,
        "fp32_tflops": best.fp32 or 0.0, "bf16_tflops": best.bf16 or 0.0,
        "read_gb_s": read_rate(torch.device("cpu")) / 1e9, "copy_gb_s": 1e3 * best.bandwidth,
        "threads": torch.get_num_threads(),
    }  # fmt: skip


@torch.inference_mode()
def passes(
    who: Ours | Theirs, contexts: Sequence[int], repeats: int, say: Say, after: Callable[[], object]
) -> Iterator[tuple[int, Row]]:
    """For each context seconds of its prefill and of a decoded token, medians over the repeats. after: called after
    each of these."""
    ids = tokens(who.model, contexts[-1] + 1)
    samples = Samples(contexts)
    size: dict[int, int | None] = {}
    together: dict[int, list[float]] = {n: [] for n in contexts}
    for repeat in range(repeats):
        who.begin()
        spent, at = 0.0, 0
        for context in contexts:
            while at < context:
                end = min(at + who.chunk, context)
                spent += _seconds(lambda a=at, b=end: who.read(ids[a:b]))
                at = end
            decode = who.decoding()
            samples.add(context, spent, [_seconds(lambda: decode(ids[-1:])) for _ in range(STEPS)])  # noqa: B023
            if isinstance(who, Ours) and who.batch > 1:
                together[context].append(who.side_by_side())
            size[context] = who.bytes()
            say(f"{who.name}: {context} tokens, repeat {repeat + 1} of {repeats}")
        after()
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for context, found in samples.medians():
        batch = statistics.median(together[context]) if together[context] else None
        yield context, {**found, "batch_seconds": batch, "cache_bytes": size[context], "peak_rss": peak}


class Samples:
    """Seconds of each repeat, by context."""

    def __init__(self, contexts: Sequence[int]):
        self.read: dict[int, list[float]] = {n: [] for n in contexts}
        self.step: dict[int, list[float]] = {n: [] for n in contexts}

    def add(self, context: int, prefill: float, steps: Sequence[float]) -> None:
        self.read[context].append(prefill)
        self.step[context].append(statistics.median(steps[WARM:]))

    def medians(self) -> Iterator[tuple[int, Row]]:
        for n, seconds in self.read.items():
            decode = statistics.median(self.step[n])
            yield n, {"prefill_seconds": statistics.median(seconds), "decode_seconds": decode}


def _inside(
    plan: Plan, model: Transformer, judge: Judge, say: Say, after: Callable[[], object]
) -> Iterator[tuple[int, Row]]:
    """transformers, in this process."""
    who = Theirs(twin(model, plan.dtype))
    found: dict[int, Best] = {}
    with torch.inference_mode():
        for length in LENGTHS:
            who.begin()
            parts = [who.read(part) for part in judge.ids[:length].split(who.chunk)]
            found[length] = best(parts[-1].float().log_softmax(-1), judge.number)
    apart = _checked(plan, who.name, found, judge, say)
    for context, row in passes(who, plan.contexts, plan.repeats, say, after):
        yield context, {**row, **apart}


def _outside(
    plan: Plan, peer: outside.Outside, model: Transformer, judge: Judge, say: Say
) -> Iterator[tuple[int, Row]]:
    """A peer in a Python of its own, which reads the weights from a folder."""
    from dsv4.checkpoint import save  # needs safetensors

    samples, peak = Samples(plan.contexts), 0
    apart: Row = {}
    best_of: dict[int, Best] = {}
    judge.ours(plan.format_of(peer.name))  # before the peer begins: it goes on to its timings while it is judged
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder, max_shard_bytes=1 << 62)
        job = {
            "folder": folder, "dtype": plan.dtype_name, "threads": torch.get_num_threads(), "chunk": CHUNK,
            "longest": max(plan.contexts[-1], LENGTHS[-1]) + STEPS, "contexts": list(plan.contexts),
            "repeats": plan.repeats, "steps": STEPS, "checks": LENGTHS, "best": judge.number,
            "ids": tokens(model, plan.contexts[-1]).tolist(), "check_ids": judge.ids.tolist(),
        }  # fmt: skip
        for found in peer.run(job):
            if "length" in found:
                best_of[found["length"]] = found["tokens"], found["logprobs"]
                if len(best_of) == len(LENGTHS):
                    apart = _checked(plan, peer.version, best_of, judge, say, peer.name)
            else:
                samples.add(found["context"], found["prefill_seconds"], found["step_seconds"])
                peak = found["peak_rss"]
                say(f"{peer.version}: {found['context']} tokens, repeat {found['repeat'] + 1} of {plan.repeats}")
    for context, row in samples.medians():
        yield context, {**row, **apart, "cache_bytes": None, "peak_rss": peak}


def _checked(plan: Plan, who: str, found: dict[int, Best], judge: Judge, say: Say, name: str = "") -> Row:
    """How far the peer and ours are from the exact function; Skip if it is another one."""
    format = plan.format_of(name or who)
    theirs, ours = judge.check(who, found, format)
    say(f"{who}: log-probabilities {theirs:.2g} from the exact ones; ours with {format} memory {ours:.2g}")
    return {"apart": theirs, "apart_ours": ours}


def row(plan: Plan, who: str, context: int, found: Row, limits: Row) -> Row:
    """A row of the report: what was found, and what the machine would do at best."""
    best_prefill, best_decode = at_best(plan, who, context, limits)
    batch = plan.batch / found["batch_seconds"] if found.get("batch_seconds") else None
    return {
        "who": who, "dtype": plan.dtype_name, "weights": plan.weights, "cache": plan.format if who == "dsv4" else "",
        "ctx": context, "batch": plan.batch, "batch_tok_s": batch,
        "prefill_tok_s": context / found["prefill_seconds"], "decode_ms": 1e3 * found["decode_seconds"],
        "prefill_best_tok_s": context / best_prefill, "decode_best_ms": 1e3 * best_decode,
        "prefill_share": best_prefill / found["prefill_seconds"], "decode_share": best_decode / found["decode_seconds"],
        "batch_times": batch * found["decode_seconds"] if batch else None,
        "cache_bytes": found["cache_bytes"], "peak_rss": found["peak_rss"],
        "apart": found.get("apart"), "apart_ours": found.get("apart_ours"), **limits,
    }  # fmt: skip


def at_best(plan: Plan, who: str, context: int, limits: Row) -> tuple[float, float]:
    """Seconds of a prompt and of a decoded token at the machine's rates, for the memory that someone has."""
    config, format = plan.config, plan.format_of(who)
    format = _VLLM_READS if who == "vllm" else _READ_AS.get(format, format)
    bytes_per_second = 1e9 * limits["read_gb_s"]
    moved = weight_bytes(config, plan.weights) + sum(kv_bytes.held(config, context, format).values())
    computing = cost.weighted(cost.prefill(config, context)) / (1e12 * limits["matmul_tflops"])
    read = active_bytes(config, plan.weights) + sum(kv_bytes.read(config, context, format).values())
    return max(computing, moved / bytes_per_second), read / bytes_per_second


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
