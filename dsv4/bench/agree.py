"""Whether a peer computes the same function as ours, before the two are timed: a ratio of speeds means nothing else.

After prompts of several lengths the peer names its likeliest tokens with their log-probabilities. They are set beside
those of the same weights in fp32 with plain memory, and how far they are away is compared with how far ours are, in the
numbers and the memory of that peer: two roundings of one function differ alike, another function differs by far more.
The median over the prompts counts, since a rounding (or a tie, which each breaks its own way) that sends one token to
another expert or entry moves a whole prompt. What only shows in few of the prompts, such as which entries an indexer
leaves out of a long memory, is therefore not judged.
"""

import statistics
from collections.abc import Mapping

import torch
from torch import Tensor

from dsv4.measure.clock import Skip
from dsv4.measure.subjects import tokens
from dsv4.model import Transformer

LENGTHS = (1, 40, 130, 150, 200, 260, 300, 700, 900)  # of prompts: most beyond a window, groups open and closed
BEST = 20  # likeliest tokens that are compared

# Largest differences. In fp32 only the order of the sums differs (transformers: 2e-6), and what a peer does in fp16
# inside (llama.cpp: 1e-3), while a window of 127 tokens is 0.2 away and a lost sink 0.15. In bf16 a rounding may send a
# token to another expert (ours 0.02, transformers 0.02 to 0.1), so only what is far away is refused (a lost bias of the
# gates: 0.35, nano-deepseek-v4 0.2.0: 0.7): fp32 is the sharper judge. Twice ours where the memory rounds (0.14).
CLOSE, TIMES = {torch.float32: 5e-3, torch.bfloat16: 0.15}, 2.0

Best = tuple[list[int], list[float]]  # ids and log-probabilities


class Judge:
    """The exact log-probabilities of one model after each prompt.

    model: the one that is timed. It is copied to fp32 for the time of this call.
    """

    def __init__(self, model: Transformer):
        self.model, self.ids = model, tokens(model, LENGTHS[-1], seed=1)
        exact = Transformer(model.config, torch.float32).eval()
        exact.load_state_dict(model.state_dict())
        self.exact = {n: logprobs(exact, "float32", self.ids[:n]) for n in LENGTHS}
        self.number = min(BEST, model.config.vocab_size)
        self.known: dict[str, float] = {}  # of `ours`

    def apart(self, found: Mapping[int, Best]) -> float:
        """The median over the prompts of the tokens' mean distance from the exact log-probabilities."""
        away = ((torch.tensor(values) - self.exact[n][torch.tensor(ids)]).abs() for n, (ids, values) in found.items())
        return statistics.median(one.mean().item() for one in away)

    def ours(self, format: str) -> float:
        """The same for the timed model with a memory of that format; computed once."""
        if format not in self.known:
            found = {n: best(logprobs(self.model, format, self.ids[:n]), self.number) for n in LENGTHS}
            self.known[format] = self.apart(found)
        return self.known[format]

    def check(self, who: str, found: Mapping[int, Best], format: str) -> tuple[float, float]:
        """How far the peer is away, and ours with that format; Skip if the peer computes something else."""
        assert set(found) == set(LENGTHS), "a prompt has no answer"
        theirs, ours = self.apart(found), self.ours(format)
        if not theirs <= max(CLOSE[self.model.dtype], TIMES * ours):
            raise Skip(
                f"{who} computes another function: its log-probabilities are {theirs:.3f} from the exact ones, where "
                f"the rounding of such numbers moves ours by {ours:.4f}; times would compare nothing"
            )
        return theirs, ours


@torch.inference_mode()
def logprobs(model: Transformer, format: str, ids: Tensor) -> Tensor:
    """Of the token after `ids`, fp32 [vocab], read through a memory of that format."""
    memory = model.new_cache(format=format, capacity=len(ids))[0]
    return model(ids, segments=[(len(ids), memory)], rows="last")[0].log_softmax(-1)


def best(logprobs: Tensor, count: int) -> Best:
    """The likeliest of log-probabilities [vocab]."""
    found = logprobs.topk(count)
    return found.indices.tolist(), found.values.tolist()
