"""Logits -> the next token of every row. Pure functions, vectorised over the batch; rows never meet.

The order is temperature, top-k, top-p, min-p: that of transformers, and that of vLLM but for min-p, which vLLM puts
before top-k. Temperature comes first, so that top-p and min-p cut the distribution that is drawn from. Top-k comes
before top-p, so that p is a share of what top-k left, not of a tail that nobody may draw. Min-p compares with the
most likely token, which no filter removes; being last, it changes nothing for the others. Legend: n rows, V
vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.engine.types import Logprob, SamplingParams

BROKEN = -1  # what is "drawn" from a row that is not finite


def sample(logits: Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator]) -> list[int]:
    """One token id for each row of logits fp32 [n, V], or BROKEN where the row holds a NaN or an infinity.

    A row that is not greedy takes exactly one number from its own CPU generator: what a request draws depends
    neither on its neighbours nor on the device.
    """
    return draw(logits, params, generators)[0]


def draw(
    logits: Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator]
) -> tuple[list[int], Tensor | None]:
    """As `sample`, with the distributions fp64 [n, V] that the ids were drawn from; None if all rows are greedy."""
    ids, probs = logits.argmax(dim=1), None  # ties: the lowest id
    if any(p.temperature for p in params):
        probs = distributions(logits, params)
        # only now: had this failed above (out of memory), no number would have been lost
        uniform = [numbers(g, 1)[0] for g in generators]
        drawn = pick(probs, torch.tensor(uniform, dtype=torch.float64, device=logits.device))
        greedy = torch.tensor([p.temperature == 0 for p in params], device=logits.device)
        ids = ids.where(greedy, drawn)
    return ids.where(logits.isfinite().all(dim=1), BROKEN).tolist(), probs


def numbers(generator: torch.Generator, count: int) -> list[float]:
    """The next `count` numbers of a generator, uniform in [0, 1)."""
    return [torch.rand((), generator=generator, dtype=torch.float64, device="cpu").item() for _ in range(count)]


def distributions(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The distribution fp64 [n, V] that each row of logits [n, V] is drawn from."""
    names = ("temperature", "top_k", "top_p", "min_p")
    settings = torch.tensor([[getattr(p, name) for p in params] for name in names], dtype=torch.float64)
    temperature, top_k, top_p, min_p = settings.to(logits.device)
    return probabilities(logits, temperature, top_k, top_p, min_p)


def logprobs(logits: Tensor, params: Sequence[SamplingParams], tokens: Sequence[int]) -> list[Logprob | None]:
    """For each row of logits fp32 [n, V] what was asked for of its drawn token; None where nothing was or it is BROKEN.

    Of the distribution as the model gives it, whatever it was drawn from.
    """
    out: list[Logprob | None] = [None] * len(tokens)
    for row, (p, token) in enumerate(zip(params, tokens, strict=True)):
        if p.logprobs is not None and token != BROKEN:
            logs = logits[row].double().log_softmax(dim=0)
            first = logs.sort(descending=True, stable=True).indices[: p.logprobs].tolist()  # ties: the lowest id
            out[row] = Logprob(token, logs[token].item(), tuple((i, logs[i].item()) for i in first))
    return out


def probabilities(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The distribution fp64 [n, V] to draw from; logits [n, V], one setting per row: fp64 [n].

    The most likely token always has a share. A temperature of 0 is the limit: all on the largest logits.
    """
    shifted = logits.double() - logits.amax(dim=1, keepdim=True)  # first, or a tiny temperature overflows
    scaled = shifted / temperature.clamp_min(1e-300)[:, None]
    if (top_k > 0).any() or (top_p < 1).any() or (min_p > 0).any():
        scaled = restrict(scaled, top_k, top_p, min_p)
    return scaled.softmax(dim=1)


def restrict(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """logits fp64 [n, V] with -inf for every token that a row's top-k, top-p or min-p rules out.

    top-k keeps exactly k: by logit, then by lowest id. top-p keeps the smallest set of most likely tokens whose
    share reaches p. min-p keeps what is at least min_p times as likely as the most likely token.
    """
    never = float("-inf")
    ordered, order = logits.sort(dim=1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    ordered = ordered.masked_fill((rank >= top_k[:, None]) & (top_k > 0)[:, None], never)
    share = ordered.softmax(dim=1)
    before = share.cumsum(dim=1) - share  # of all more likely tokens
    # 1 is off in so many words: the sum may round up to 1 before the last token
    beyond = (before >= top_p[:, None]) & (top_p < 1)[:, None]
    ordered = ordered.masked_fill(beyond | (share < min_p[:, None] * share[:, :1]), never)
    return torch.empty_like(logits).scatter_(1, order, ordered)


def pick(probs: Tensor, uniform: Tensor) -> Tensor:
    """The token int64 [n] where the running sum of probs fp64 [n, V] first exceeds the share `uniform` in [0, 1).

    In order of ids, not of probability: when two tokens are about equally likely, rounding may swap their ranks.
    """
    total = probs.cumsum(dim=1)
    total = total.masked_fill(probs == 0, 0.0)  # so that, however sums round, these are never picked
    return (total > uniform[:, None] * total.amax(dim=1, keepdim=True)).int().argmax(dim=1)
