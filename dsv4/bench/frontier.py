"""Prefill and decode over the length of the context, ours and, on the same weights in the same run, a peer's.

A prompt of random ids is read once per repeat; at each context of the list it stands how long all tokens so far have
taken, and a fork of the memory decodes some tokens. What stands in a row is the median over the repeats. Shares are of
what this machine does at best, measured in the same run: square matrix products of the same dtype for prefill, and for
decode the reading of memory (of the weights that one token uses, at least).
"""

import copy
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dsv4 import cost
from dsv4.bench.peers import memory_name, twin
from dsv4.config import ModelConfig
from dsv4.cost import parameters
from dsv4.measure.ceilings import measured_cpu, read_rate
from dsv4.measure.rows import Row
from dsv4.measure.subjects import randomise, tokens
from dsv4.model import Transformer

CHUNK, PEER_CHUNK = 1024, 512  # tokens in a call: in one call the peer would hold tokens x tokens numbers
STEPS = 16  # tokens decoded at each context

Say = Callable[[str], None]


class Ours:
    """A model of ours reading one prompt after the other."""

    name, chunk = "dsv4", CHUNK

    def __init__(self, model: Transformer, format: str, longest: int):
        self.model, self.format, self.longest = model, format, longest

    def begin(self) -> None:
        self.memory = self.model.new_cache(format=self.format, capacity=self.longest + STEPS)[0]

    def read(self, ids: Tensor) -> Tensor:
        """Logits of the last token, [vocab]."""
        return self.model(ids, segments=[(len(ids), self.memory)], rows="last")[0]

    def decoding(self) -> Callable[[Tensor], Tensor]:
        """A function that reads one token after what was read, on a memory of its own."""
        memory = self.memory.fork()
        return lambda token: self.model(token, segments=[(1, memory)], rows="last")[0]

    def bytes(self) -> int | None:
        return self.memory.bytes()


class Theirs:
    """transformers' model with the same weights, fed in chunks."""

    name, chunk = "transformers", PEER_CHUNK

    def __init__(self, model: Any):
        self.model, self.key = model, memory_name(model)

    def begin(self) -> None:
        self.memory: Any = None

    def read(self, ids: Tensor) -> Tensor:
        given = {} if self.memory is None else {self.key: self.memory}
        out = self.model(ids[None], **given, use_cache=True, logits_to_keep=1)
        self.memory = out[self.key]
        return out.logits[0, -1]

    def decoding(self) -> Callable[[Tensor], Tensor]:
        twin = Theirs(self.model)
        twin.memory = copy.deepcopy(self.memory)
        return twin.read

    def bytes(self) -> int | None:
        return None


@torch.inference_mode()
def passes(who: Ours | Theirs, contexts: Sequence[int], repeats: int, say: Say) -> Iterator[tuple[int, Row]]:
    """For each context seconds of its prefill and of a decoded token, medians over the repeats."""
    ids = tokens(who.model, contexts[-1] + 1)
    read: dict[int, list[float]] = {n: [] for n in contexts}
    step: dict[int, list[float]] = {n: [] for n in contexts}
    size: dict[int, int | None] = {}
    for repeat in range(repeats):
        who.begin()
        spent, at = 0.0, 0
        for context in contexts:
            while at < context:
                end = min(at + who.chunk, context)
                spent += _seconds(lambda a=at, b=end: who.read(ids[a:b]))
                at = end
            read[context].append(spent)
            decode = who.decoding()
            times = [_seconds(lambda: decode(ids[-1:])) for _ in range(STEPS)]  # noqa: B023 (called at once)
            step[context].append(statistics.median(times[2:]))
            size[context] = who.bytes()
            say(f"{who.name}: {context} tokens, repeat {repeat + 1} of {repeats}")
    for n in contexts:
        yield n, {
            "prefill_seconds": statistics.median(read[n]), "decode_seconds": statistics.median(step[n]),
            "cache_bytes": size[n],
        }  # fmt: skip


def measure(
    preset: str, dtype: torch.dtype, format: str, contexts: Sequence[int], repeats: int, against: str, say: Say
) -> list[Row]:
    """The rows of ours, then of the peer; Skip where the peer is not installed."""
    config = ModelConfig.preset(preset)
    config = config.with_(num_nextn_predict_layers=0, compress_ratios=config.trunk_ratios)
    model = randomise(Transformer(config, dtype), std=None).eval()
    machine = measured_cpu()
    best = (machine.bf16 if dtype == torch.bfloat16 else machine.fp32) or 0.0
    limits = {"matmul_tflops": best, "read_gb_s": read_rate(torch.device("cpu")) / 1e9}
    say(f"this machine: {best:.3g} TFLOP/s, {limits['read_gb_s']:.3g} GB/s read, {torch.get_num_threads()} threads")
    who: list[Ours | Theirs] = [Ours(model, format, contexts[-1])]
    rows = []
    if against:
        who.append(Theirs(twin(model, dtype)))
    for one in who:
        for context, row in passes(one, contexts, repeats, say):
            rows.append(_row(one, config, dtype, format, context, row, limits))
    return rows


def _row(
    who: Ours | Theirs, config: ModelConfig, dtype: torch.dtype, format: str, context: int, found: Row, limits: Row
) -> Row:
    prefill, decode = context / found["prefill_seconds"], found["decode_seconds"]
    flops = cost.weighted(cost.prefill(config, context)) / found["prefill_seconds"]
    weights = dtype.itemsize * parameters(config)["active"] / decode
    return {
        "who": who.name, "dtype": str(dtype).removeprefix("torch."), "cache": format if who.name == "dsv4" else "",
        "ctx": context, "prefill_tok_s": prefill, "decode_ms": 1e3 * decode, "cache_bytes": found["cache_bytes"],
        "peak_rss": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "prefill_share": flops / 1e12 / limits["matmul_tflops"] if limits["matmul_tflops"] else None,
        "decode_share": weights / 1e9 / limits["read_gb_s"], **limits,
    }  # fmt: skip


def lines(rows: Sequence[Row]) -> list[str]:
    """The rows for a person, under a head; a peer's come with how many times faster ours are."""
    out = [
        f"{'who':13s} {'ctx':>9s} {'prefill tok/s':>13s} {'of matmul':>9s} {'decode ms':>9s} {'of read':>8s} "
        f"{'cache MiB':>9s} {'peak GiB':>8s}"
    ]
    ours = {r["ctx"]: r for r in rows if r["who"] == "dsv4"}
    for r in rows:
        cache = "" if r["cache_bytes"] is None else f"{r['cache_bytes'] / 2**20:.2f}"
        share = "" if r["prefill_share"] is None else f"{r['prefill_share']:.0%}"
        text = (
            f"{r['who']:13s} {r['ctx']:9,d} {r['prefill_tok_s']:13,.0f} {share:>9s} {r['decode_ms']:9.2f} "
            f"{r['decode_share']:8.0%} {cache:>9s} {r['peak_rss'] / 2**30:8.2f}"
        )
        if r["who"] != "dsv4":
            mine = ours[r["ctx"]]
            text += f"   ours: prefill {mine['prefill_tok_s'] / r['prefill_tok_s']:.1f} x"
            text += f", decode {r['decode_ms'] / mine['decode_ms']:.1f} x as fast"
        out.append(text)
    return out


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
