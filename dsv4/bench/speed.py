"""How fast one of our models runs: prefill, decode and training steps, as rows for the report.

Rates are per second of wall time with everything that a caller waits for: planning on the host, moving ids, reading
the next token back. FLOPs are counted by dsv4/cost (2 per multiply-accumulate, what the formula needs and not what was
done), so their share of the measured matmul ceiling says how much of the device the model puts to use.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from dsv4 import cost
from dsv4.config import ModelConfig
from dsv4.cost import flops_per_token, parameters
from dsv4.measure.ceilings import ceiling
from dsv4.measure.clock import Budget, Timing, timed
from dsv4.measure.rows import Row
from dsv4.measure.sizes import Sizes
from dsv4.measure.subjects import tokens
from dsv4.model import Transformer
from dsv4.train.loss import training_loss
from dsv4.train.optim import HybridOptimizer, clip_gradients, parameter_groups

Job = tuple[str, float, Callable[[], Row]]  # what it is, about how many seconds it takes on a GPU, the work
DTYPE = torch.bfloat16


def jobs(preset: str, device: torch.device, sizes: Sizes, budget: Budget, ceilings: list[Row]) -> Iterator[Job]:
    """Everything that is timed of a preset, in order of interest."""
    config = ModelConfig.preset(preset)
    model = Transformer(config, DTYPE).to(device)
    rate = partial(speed_row, "dsv4", preset, config, ceilings)

    def prefill(length: int) -> Row:
        return rate("prefill", length, 1, length, timed(lambda: prefill_once(model, length), device, budget))

    def decode(context: int, batch: int) -> Row:
        steps = Decoding(model, context, batch, sizes.decode_steps)
        return rate("decode", context, batch, batch * sizes.decode_steps, timed(steps, device, budget))

    def train(kind: str) -> Row:
        batch, length = sizes.train
        step = TrainingStep(trunk_only(config), batch, length, device, optimise=kind == "train")
        return rate(kind, length, batch, batch * length, timed(step, device, budget))

    for length in sizes.prefill:
        yield f"{preset} prefill of {length}", 2 + length / 1000, lambda n=length: prefill(n)
    for context in sizes.decode_after:
        for batch in sizes.decode_batches:
            yield f"{preset} decode after {context}, batch {batch}", 8 + context / 4000, partial(decode, context, batch)
    for kind in ("forward+backward", "train"):
        yield f"{preset} {kind}", 15, partial(train, kind)


@torch.no_grad()
def prefill_once(model: Transformer, length: int) -> Any:
    """Read a prompt of random ids, up to the logits of its last token; returns the memory it went into."""
    memory = model.new_cache(capacity=length + 1024)[0]
    model(tokens(model, length), segments=[(length, memory)], rows="last")
    return memory


class Decoding:
    """Sequences that have read `context` tokens each; a call decodes `steps` more greedily, one at a time."""

    def __init__(self, model: Transformer, context: int, batch: int, steps: int):
        memory = prefill_once(model, context)
        self.model, self.steps = model, steps
        self.segments = [(1, memory.fork()) for _ in range(batch)]
        self.next = tokens(model, batch)

    @torch.no_grad()
    def __call__(self) -> None:
        for _ in range(self.steps):
            self.next = self.model(self.next, segments=self.segments).argmax(dim=-1).cpu()


class TrainingStep:
    """Packed documents through the loss and back, fp32 weights and bf16 activations; on wish the optimiser as well."""

    def __init__(self, config: ModelConfig, batch: int, length: int, device: torch.device, *, optimise: bool):
        self.model = Transformer(config, compute_dtype=DTYPE).to(device)
        self.ids, self.lengths = tokens(self.model, batch * length), [length] * batch
        groups = parameter_groups(self.model.named_parameters(), config)
        self.optimizer = HybridOptimizer(groups, lr=1e-4)
        self.optimise = optimise

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = training_loss(
            self.model, self.ids, self.ids.roll(-1), self.lengths, mtp_weight=0.0, balance_weight=1e-4
        )  # fmt: skip
        loss.total.backward()
        if self.optimise:
            clip_gradients(self.model.parameters(), 1.0)
            self.optimizer.step()


def trunk_only(config: ModelConfig) -> ModelConfig:
    """Without the MTP block: neither the FLOP count nor the peer has one."""
    return config.without_drafts()


def speed_row(
    who: str, preset: str, config: ModelConfig, ceilings: list[Row], what: str, context: int, batch: int, tokens: int,
    timing: Timing,
) -> Row:  # fmt: skip
    """One row of the report; `tokens` went through the model in each timed call."""
    rate = tokens / timing.median
    flops = rate * _flops(config, what, context)
    matmul, copy = ceiling(ceilings, "matmul bfloat16"), ceiling(ceilings, "copy")
    # a decoding step has to read at least the weights of one token, whatever the batch
    read = 2 * parameters(config)["active"] * rate / batch if what == "decode" else None
    return {
        "who": who, "preset": preset, "what": what, "context": context, "batch": batch, "dtype": "bfloat16",
        "tokens_per_call": tokens, "seconds": timing.median, "fastest": timing.fastest, "slowest": timing.slowest,
        "repeats": timing.repeats, "tokens_per_second": rate, "tflops": flops / 1e12,
        "share_of_matmul": flops / matmul if matmul else None,
        "share_of_copy": read / copy if read and copy else None,
        "peak_bytes": timing.peak_bytes, "times_transformers": None,
    }  # fmt: skip


def _flops(config: ModelConfig, what: str, context: int) -> float:
    """FLOPs per token: at the end of the context for decode, else the mean over a whole one."""
    if what == "decode":
        return flops_per_token(config, context)
    work = cost.prefill(config, context) if what == "prefill" else cost.train(config, context, mtp=False)
    return cost.weighted(work) / context
