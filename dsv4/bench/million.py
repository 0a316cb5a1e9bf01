"""One million tokens of real text through one model on this processor: prefill, decode on the way, memory, a needle.

The text is the embedded corpus, by a BPE that was trained on it (repeated where it is too short, which is said); the
weights are random, from a seed (bench/needle.py says what is constructed), so nothing is said about what a model
would answer. The prompt is read once, in chunks, into a pool of pages that was allocated for it; at 4K, at every power
of two from 32K on and at the end a fork of the memory decodes some tokens, and it is noted what the process holds.

Shares are of what this machine does at best in square matrix products of that dtype, measured in the same run.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4 import cost
from dsv4.bench import needle as needles
from dsv4.bench.cost import available_bytes
from dsv4.bench.frontier import CHUNK
from dsv4.cache import Pool, SequenceMemory
from dsv4.config import ModelConfig
from dsv4.cost import kv_bytes
from dsv4.cost.params import parameters
from dsv4.data import documents
from dsv4.errors import UserError
from dsv4.measure.ceilings import measured_cpu
from dsv4.measure.resident import forget_peak, peak_bytes, resident_bytes
from dsv4.measure.rows import Row
from dsv4.measure.subjects import randomise
from dsv4.model import Transformer
from dsv4.text import train_bpe

STEPS = 64  # tokens decoded at each mark
SPARE = 3  # pages beside those of the context: a fork copies one and goes on into two
FORMATS = {"packed": "published", "float32": "float32", "bfloat16": "bfloat16"}  # as dsv4/cost names them
_TEXT_BYTES = 8  # of text for a token that is wanted, far more than a token has
_LEAST_TEXT = 1 << 20  # bytes from which a vocabulary is learned
_ROOM = 1_500_000_000  # bytes for the program, the text and what a chunk works in

Say = Callable[[str], None]
Show = Callable[[str, int, int], None]  # what is being read, tokens done, tokens in all


@dataclass(frozen=True)
class Options:
    """What is run. dtype: None: bfloat16 where the processor multiplies it faster than float32. depth: of the needle, a
    share of the context; None: drawn."""

    preset: str = "bench"
    context: int = 1 << 20
    dtype: torch.dtype | None = None
    format: str = "packed"
    needle: bool = False
    depth: float | None = None
    seed: int = 0


def measure(options: Options, say: Say, show: Show) -> Row:
    """The report as plain data. UserError before any work for what cannot be run; after Ctrl-C in the prompt it ends
    there: `stopped_at`."""
    config = model_config(options)
    if options.format not in FORMATS:
        raise UserError(f"--cache {options.format} is not counted by dsv4 cost: use {', '.join(FORMATS)}")
    at = needles.place(config, options.context, options.depth, options.seed) if options.needle else None
    least = needles.least_context(config)
    if options.needle and options.context < 2 * least:
        raise UserError(f"--needle compares with a shorter prompt: it needs a context of {2 * least} tokens or more")
    _check_room(config, options)

    machine = measured_cpu()
    best, plain = machine.bf16 or 0.0, machine.fp32 or 0.0
    dtype = options.dtype or (torch.bfloat16 if best > plain else torch.float32)
    best = best if dtype == torch.bfloat16 else plain
    threads = torch.get_num_threads()
    say(f"this machine: {best:.3g} TFLOP/s in {_name(dtype)}, {threads} threads; learning a vocabulary")
    text, about = corpus(options.context, config.vocab_size)
    say(f"{about['tokens']:,} tokens of text, {about['characters_per_token']:.2f} characters each; {_repeated(about)}")

    model = needles.finder(randomise(Transformer(config, dtype), options.seed, None)).eval()
    pages = -(-options.context // 128) + SPARE
    pool = model.new_pool(options.format, pages=pages, slots=3 if options.needle else 2, max_rewind=0)
    ids = torch.tensor(text)
    reader = Reader(model, pool, ids, marks(options.context), at, show)
    complete = reader.run()
    found: Row = {
        "preset": options.preset, "dtype": _name(dtype), "cache": options.format, "context": options.context,
        "seed": options.seed, "chunk": CHUNK, "threads": threads, "matmul_tflops": best, "text": about,
        "marks": [_shares(config, row, best) for row in reader.rows], "stopped_at": None if complete else reader.done,
    }  # fmt: skip
    if complete:
        found["memory"] = reader.memory_report(options)
        found["growth"] = growth(config, options.format, options.context)
    if complete and at is not None:
        try:
            found["needle"] = reader.needle(options, needles.unused(ids, config.vocab_size))
        except KeyboardInterrupt:
            found["stopped_at"] = reader.done
    return found


def model_config(options: Options) -> ModelConfig:
    """The preset without its MTP block, with room for the context and for what is decoded after it."""
    config = ModelConfig.preset(options.preset)
    config = config.without_drafts()
    return config.with_(max_position_embeddings=max(config.max_position_embeddings, options.context + STEPS))


def marks(context: int) -> list[int]:
    """Where it is measured: 4K, each power of two from 32K, the end; of a short text a quarter, a half, the end."""
    found = [n for n in (4096, *(1 << k for k in range(15, context.bit_length()))) if n < context]
    return [*(found or [n for n in (context // 4, context // 2) if n]), context]


def corpus(count: int, vocab: int) -> tuple[list[int], Row]:
    """`count` tokens of the embedded texts, by a BPE of `vocab` tokens that learned from as much of them as is needed;
    and what there was of them."""
    wanted, texts, size = max(_LEAST_TEXT, _TEXT_BYTES * count), [], 0
    for text in itertools.chain(documents("train"), documents("heldout")):
        texts.append(text)
        size += len(text)
        if size >= wanted:
            break
    tokenizer = train_bpe(texts, vocab)
    ids = [i for text in texts for i in tokenizer.encode(text)]
    about = {
        "tokens": len(ids), "characters_per_token": size / len(ids), "vocabulary": tokenizer.vocab_size,
        "times_read": count / len(ids),
    }  # fmt: skip
    return (ids * -(-count // len(ids)))[:count], about


class Reader:
    """One prompt on its way into a memory: what was measured at the marks, and a fork from where the needle goes."""

    def __init__(
        self, model: Transformer, pool: Pool, ids: Tensor, places: list[int], needle_at: int | None, show: Show
    ):
        self.model, self.pool, self.ids, self.show, self.needle_at = model, pool, ids, show, needle_at
        self.places = places
        self.memory = pool.new()
        self.before: SequenceMemory | None = None  # the needle
        self.done = 0
        self.seconds = 0.0
        self.rows: list[Row] = []
        self.peak = 0
        self.peak_is_ours = False

    @torch.inference_mode()
    def run(self) -> bool:
        """Read the whole prompt; False if Ctrl-C stopped it."""
        self.peak_is_ours = forget_peak()
        self.show("prompt", 0, len(self.ids))
        stops = sorted({*self.places, *([] if self.needle_at is None else [self.needle_at])})
        try:
            for end in stops:
                for part in self.ids[self.done : end].split(CHUNK):
                    began = time.perf_counter()
                    self.model(part, segments=[(len(part), self.memory)], rows="last")
                    self.seconds += time.perf_counter() - began
                    self.done += len(part)
                    self.show("prompt", self.done, len(self.ids))
                if end == self.needle_at:
                    self.before = self.memory.fork()
                if end in self.places:
                    self.rows.append(self._mark())
        except KeyboardInterrupt:
            return False
        return True

    def _mark(self) -> Row:
        held, peak = resident_bytes(), peak_bytes()
        fork, steps = self.memory.fork(), []
        token = self.ids[self.done - 1 : self.done]
        for _ in range(STEPS):
            began = time.perf_counter()
            logits = self.model(token, segments=[(1, fork)], rows="last")
            steps.append(time.perf_counter() - began)
            token = logits[0].argmax()[None]
        fork.release()
        return {
            "context": self.done, "prefill_seconds": self.seconds, "decode_seconds": statistics.median(steps),
            "cache_bytes": self.memory.bytes(), "allocated_bytes": self.pool.bytes(), "resident_bytes": held,
            "peak_bytes": max(peak, peak_bytes()),
        }  # fmt: skip

    def memory_report(self, options: Options) -> Row:
        """What the memory of the prompt takes beside the formula, and what the process took at most."""
        form, context = FORMATS[options.format], options.context
        counted = sum(kv_bytes.held(self.model.config, context, form).values())
        return {
            "allocated_bytes": self.pool.bytes(), "allocated_per_token": self.pool.bytes() / context,
            "held_bytes": self.memory.bytes(), "counted_bytes": counted, "counted_per_token": counted / context,
            "difference": self.pool.bytes() / counted - 1, "peak_bytes": peak_bytes(),
            "peak_is_of": "the reading" if self.peak_is_ours else "the whole program",
        }  # fmt: skip

    def needle(self, options: Options, tokens: tuple[int, int]) -> list[Row]:
        """The needle in the whole prompt, whose memory is given up for it, and in a short one."""
        assert self.before is not None and self.needle_at is not None
        self.memory.release()
        read = self._read("needle", 3 * (options.context - self.needle_at))
        long = needles.Needle(options.context, self.needle_at, tokens)
        rows = [needles.compare(self.model, long, self.ids, self.before, read)]
        self.before.release()
        context = min(needles.SHORT, options.context // 2)
        context = max(context, needles.least_context(self.model.config))
        short = needles.Needle(context, needles.place(self.model.config, context, None, options.seed), tokens)
        memory = self.pool.new()
        with torch.inference_mode():
            self._read("short prompt", short.at)(self.ids[: short.at], memory)
        read = self._read("needle in a short prompt", 3 * (context - short.at))
        return [*rows, needles.compare(self.model, short, self.ids, memory, read)]

    def _read(self, what: str, total: int) -> needles.Read:
        done = 0
        self.show(what, 0, total)

        def read(ids: Tensor, memory: SequenceMemory) -> None:
            nonlocal done
            for part in ids.split(CHUNK):
                self.model(part, segments=[(len(part), memory)], rows="last")
                done += len(part)
                self.show(what, done, total)

        return read


def growth(config: ModelConfig, format: str, context: int) -> Row:
    """What the pages of a memory come to that was made without a capacity and grows as tokens come: nothing is
    allocated to find out. wasted: beside what it holds, at the end and at most from 32K tokens on. peak_bytes: while a
    growth copied its largest store."""
    pool = Pool(config, format=format, device="meta", max_rewind=0, slots=1)
    memory, worst, peak = pool.new(), 0.0, 0
    for at in range(0, context, CHUNK):
        size, before = min(CHUNK, context - at), pool.num_pages
        pool.reserve([(memory, size)])
        memory.length += size
        if pool.num_pages > before:
            largest = max(store.data.untyped_storage().nbytes() for _, _, store in pool.stores())
            peak = max(peak, pool.bytes() + largest * before // pool.num_pages)
        if memory.length >= 1 << 15:
            worst = max(worst, pool.bytes() / memory.bytes() - 1)
    return {
        "allocated_bytes": pool.bytes(), "held_bytes": memory.bytes(), "peak_bytes": peak,
        "wasted": pool.bytes() / memory.bytes() - 1, "wasted_at_most": worst,
    }  # fmt: skip


def lines(found: Row) -> list[str]:
    """The report for a person."""
    text = found["text"]
    out = [
        f"preset {found['preset']}, {found['dtype']}, cache {found['cache']}, {found['threads']} threads, chunks of "
        f"{found['chunk']}; {found['matmul_tflops']:.3g} TFLOP/s at best; {_repeated(text)}",
        f"{'tokens':>9s} {'prefill s':>9s} {'tok/s':>7s} {'of matmul':>9s} {'decode ms':>9s} {'ratio':>6s} "
        f"{'cache MiB':>9s} {'resident':>8s} {'less cache':>10s}",
    ]
    for r in found["marks"]:
        share = "" if r["share"] is None else f"{r['share']:.0%}"
        held = [f"{x / 2**20:.0f}" if x is not None else "?" for x in (r["resident_bytes"], r["rest_bytes"])]
        ratio = r["decode_seconds"] / found["marks"][0]["decode_seconds"]
        out.append(
            f"{r['context']:9,d} {r['prefill_seconds']:9.1f} {r['tok_s']:7,.0f} {share:>9s} "
            f"{1e3 * r['decode_seconds']:9.2f} {ratio:6.2f} {r['cache_bytes'] / 2**20:9.1f} "
            f"{held[0]:>8s} {held[1]:>10s}"
        )
    if "memory" in found:
        m, g = found["memory"], found["growth"]
        out += [
            f"cache: {m['allocated_per_token']:.2f} bytes a token are allocated, {m['counted_per_token']:.2f} counted "
            f"({m['difference']:+.2%}); if it grew as tokens come it would take {g['wasted']:.1%} more than it holds "
            f"({g['wasted_at_most']:.0%} at worst on the way)",
            f"at most {m['peak_bytes'] / 2**20:,.0f} MiB of memory in {m['peak_is_of']}",
        ]
    out += needles.lines(found["needle"]) if "needle" in found else []
    if found["stopped_at"] is not None:
        out.append(f"stopped after {found['stopped_at']:,} of {found['context']:,} tokens of the prompt")
    return out


def _shares(config: ModelConfig, row: Row, best: float) -> Row:
    """A mark with what follows from it."""
    seconds, held = row["prefill_seconds"], row["resident_bytes"]
    flops = cost.weighted(cost.prefill(config, row["context"])) / seconds
    return row | {
        "tok_s": row["context"] / seconds, "share": flops / 1e12 / best if best else None,
        "rest_bytes": None if held is None else held - row["allocated_bytes"],
    }  # fmt: skip


def _check_room(config: ModelConfig, options: Options) -> None:
    """UserError if the memory and the weights would not fit: it would be found out after minutes."""
    cache = sum(kv_bytes.held(config, options.context, FORMATS[options.format]).values())
    needed, there = cache + 4 * parameters(config)["total"] + _ROOM, available_bytes()
    if needed > there:
        raise UserError(
            f"{options.context} tokens need about {needed / 1e9:.1f} GB ({cache / 1e9:.1f} GB of cache) and "
            f"{there / 1e9:.1f} GB are free: give a smaller --context or --cache packed"
        )


def _repeated(text: dict[str, Any]) -> str:
    times = text["times_read"]
    return "the text is read once at most" if times <= 1 else f"the text is short: it is read {times:.1f} times"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
