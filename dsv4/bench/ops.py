"""`dsv4 bench ops`: every op of a decode step and of a chunk of prefill, timed where it runs, as a share of what this
processor can do at best: square matrix products of the same dtype, or reading memory, whichever bounds the op.

The memory before the chunk, or before the token, is filled with random rows. How work is counted: measure/roofline.py.
"""

from collections.abc import Callable, Sequence

import torch

from dsv4.config import ModelConfig
from dsv4.errors import UserError
from dsv4.measure import roofline
from dsv4.measure.ceilings import measured_cpu, read_rate
from dsv4.measure.roofline import Rates, profile
from dsv4.measure.rows import Row
from dsv4.measure.subjects import fill, randomise, tokens
from dsv4.model import Transformer

CHUNK = 1024  # tokens of a chunk of prefill, of a context that is as long
Say = Callable[[str], None]


def machine_rates(dtype: torch.dtype) -> Rates:
    """What this processor reaches in products of `dtype` and in reading, measured now."""
    machine = measured_cpu()
    best = machine.bf16 if dtype == torch.bfloat16 else machine.fp32
    assert best, "measured_cpu measures both"
    return Rates(1e12 * best, read_rate(torch.device("cpu")))


@torch.inference_mode()
def measure(
    preset: str, dtype: torch.dtype, format: str, context: int, repeats: int, say: Say, rates: Rates | None = None
) -> list[Row]:
    """Rows of a decode step and of a chunk that both end at `context`; UserError where the preset is not so long."""
    config = ModelConfig.preset(preset)
    config = config.without_drafts()
    if context > config.max_position_embeddings:
        raise UserError(
            f"--context {context} is beyond {preset}, whose max_position_embeddings={config.max_position_embeddings}: "
            "give at most that"
        )
    model = randomise(Transformer(config, dtype), std=None).eval()
    rows: list[Row] = []
    for phase, count in (("decode", 1), ("prefill", min(CHUNK, context))):
        memory = model.new_cache(format=format, capacity=context, max_rewind=count)[0]
        fill(memory, context - count, torch.Generator().manual_seed(0))
        if rates is None:
            rates = machine_rates(dtype)
            say(f"this machine: {rates.flops / 1e12:.3g} TFLOP/s, {rates.bytes / 1e9:.3g} GB/s read")
        ids = tokens(model, count)

        def step(memory=memory, ids=ids, count=count) -> None:
            model(ids, segments=[(count, memory)], rows="last")
            memory.rewind(count)

        say(f"{phase}: {count} tokens that end at {context}, {repeats} times")
        for row in profile(step, repeats, rates):
            rows.append({
                "preset": preset, "dtype": str(dtype).removeprefix("torch."), "cache": format, "phase": phase,
                "context": context, "tokens": count, "threads": torch.get_num_threads(), **row,
                "matmul_tflops": rates.flops / 1e12, "read_gb_s": rates.bytes / 1e9,
            })  # fmt: skip
    return rows


def lines(rows: Sequence[Row]) -> list[str]:
    """A table for each phase."""
    out = []
    for phase in dict.fromkeys(r["phase"] for r in rows):
        found = [r for r in rows if r["phase"] == phase]
        out.append(f"{phase}: {found[0]['tokens']} tokens that end at {found[0]['context']:,}")
        out += [*roofline.lines(found), ""]
    return out[:-1]
