"""What indexers score, with a gradient: how a text has to change to move what CSA reads.

The model detaches what its indexer is made of, as nothing of its own loss may come to it. Here the same scores are made
once more from the same inputs, in a graph that leads through all layers below to the embeddings. Hash layers route by
the ids of the text; what lower indexers and gates choose is chosen as it is and carries no gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.model import LanguageModel, Segment
from dsv4.model.indexer import Indexer
from dsv4.probe.attacks import GRADIENT, RUN, Target
from dsv4.probe.indexed import NEG_INF

SLOPE = 4.0  # of the sigmoid that stands for "above 0", per standard deviation of a query's scores
PACE = 0.3  # of an embedding's mean number, a step of `bend`
BEST = 8  # tokens of a slot that `swap_many` draws from


def scores_of(model: LanguageModel, texts: Tensor, x: Tensor, rows: Tensor) -> list[Tensor]:
    """For each CSA layer the index scores fp32 [B, n, E] of the queries `rows` of the texts int64 [B, T], -inf where an
    entry is not seen; x: what stands for the texts' embeddings, [B T, M], to which the graph leads."""
    found: list[Tensor] = []

    count, length = texts.shape

    def look(indexer: Indexer, args: tuple) -> None:
        h, qr, run, _ = args
        (part,) = run.parts  # texts without memories are one, whose entries lie one text after the other
        (pool,) = indexer.compressor(h, run, [None])
        q, weights = indexer.queries(h, qr, run)
        keys = pool.float().unflatten(0, (count, -1))
        dots = torch.einsum("bnhd,bed->bnhe", q.unflatten(0, (count, length))[:, rows].float(), keys)
        scores = torch.einsum("bnh,bnhe->bne", weights.unflatten(0, (count, length))[:, rows], dots.relu())
        seen = part.groups[indexer.kind.name].visible.of(rows)
        hidden = seen.hidden(0, len(rows), 0, keys.shape[1], keys.device)
        found.append(scores.masked_fill(hidden, NEG_INF))

    hooks = [m.register_forward_pre_hook(look) for m in model.layers.modules() if isinstance(m, Indexer)]
    try:
        model.trunk(texts.flatten(), [Segment(texts.shape[1])] * len(texts), embedded=x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@dataclass(frozen=True)
class Aim:
    """What an attacker wants of a query: that at least `need` of margins(scores [n, E]) [n, c] are above 0."""

    margins: Callable[[Tensor], Tensor]
    need: int

    def reached(self, scores: Tensor) -> Tensor:
        """bool [n]."""
        return (self.margins(scores) > 0).sum(dim=1) >= self.need

    def loss(self, scores: Tensor) -> Tensor:
        """[n], smooth in the scores: exp(-c / need), c the count of margins above 0 with a sigmoid for each. So every
        entry has a gradient, not the k-th alone, and queries that are far from it have as much as others."""
        return torch.exp(-torch.sigmoid(SLOPE * self.margins(scores)).sum(dim=1) / self.need)


def evicts(blocks: int, k: int) -> Aim:
    """That k of the entries after the first `blocks` are above all of those, so that none of them is read."""

    def margins(scores: Tensor) -> Tensor:
        return (scores[:, blocks:] - scores[:, :blocks].amax(dim=1, keepdim=True)) / spread(scores)

    return Aim(margins, k)


def wins(block: int, k: int) -> Aim:
    """That an entry is above the k-th best of the others, so that it is read."""

    def margins(scores: Tensor) -> Tensor:
        others = torch.cat([scores[:, :block], scores[:, block + 1 :]], dim=1)
        return (scores[:, block, None] - others.topk(k, dim=1).values[:, -1:]) / spread(scores)

    return Aim(margins, 1)


def spread(scores: Tensor) -> Tensor:
    """The standard deviation of the scores of what each query sees, [n, 1], without a gradient."""
    seen = scores.detach() > NEG_INF
    count = seen.sum(dim=1)
    filled = scores.detach().masked_fill(~seen, 0.0)
    mean = filled.sum(dim=1) / count
    square = (filled - mean[:, None]).masked_fill(~seen, 0.0).square().sum(dim=1) / count
    return square.sqrt().clamp_min(1e-12)[:, None]


class Steered:
    """A text in whose slots an attacker wants to move what CSA reads: a `Target`, whose loss is the mean over layers
    and queries of that of the aim."""

    def __init__(self, model: LanguageModel, ids: Tensor, slots: Tensor, rows: Tensor, aim: Aim, allowed: Tensor):
        self.model, self.ids, self.slots, self.rows = model, ids, slots, rows
        self.aim, self.allowed = aim, allowed

    def loss(self, texts: Tensor, x: Tensor) -> Tensor:
        """[B], with a graph to x [B T, M]."""
        layers = scores_of(self.model, texts, x, self.rows)
        return torch.stack([self.aim.loss(s.flatten(0, 1)).view(s.shape[:2]).mean(dim=1) for s in layers]).mean(dim=0)

    def embedded(self, texts: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model.embedded(texts.flatten().to(self.model.device), None)

    def losses(self, texts: Tensor) -> Tensor:
        with torch.no_grad():
            parts = texts.split(max(1, RUN // texts.shape[1]))
            return torch.cat([self.loss(some, self.embedded(some)).cpu() for some in parts])

    def gradient(self, text: Tensor) -> Tensor:
        """Of the loss with respect to the relaxed one-hot rows of the slots, fp32 [L, V] on the CPU."""
        found = self.slope(text, self.embedded(text[None]))[1]
        return (found[self.slots.to(found.device)] @ self.model.embed.weight.detach().float().T).cpu()

    def slope(self, text: Tensor, x: Tensor) -> tuple[float, Tensor]:
        """The loss at embeddings x [T, M] and its gradient [T, M]."""
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            loss = self.loss(text[None], x).sum()
            return float(loss.detach()), torch.autograd.grad(loss, x)[0].float()

    def rate(self, text: Tensor, x: Tensor | None = None) -> float:
        """The share of queries of all layers in which the attacker has it."""
        with torch.no_grad():
            x = self.embedded(text[None]) if x is None else x
            layers = scores_of(self.model, text[None], x, self.rows)
            return float(torch.cat([self.aim.reached(s[0]) for s in layers]).double().mean())


def bend(goal: Steered, text: Tensor, steps: int) -> tuple[float, Tensor, float]:
    """The best share that embeddings of the slots reach, each of the length that embeddings have in the middle, by
    ascent from those of `text`; the text of the tokens that are nearest to them by angle; and its share.

    No text need have such embeddings: the first is an upper bound, what is left of it the last. Hash layers route by
    the ids of `text`.
    """
    start, table = goal.embedded(text[None]), goal.model.embed.weight.detach().float()
    size, slots = table.norm(dim=1).median(), goal.slots.to(start.device)
    free = start[slots].clone().requires_grad_(True)
    optimiser = torch.optim.Adam([free], lr=PACE * float(size) / free.shape[1] ** 0.5)
    best, where, lowest = goal.rate(text), free.detach().clone(), float("inf")
    for _ in range(steps):
        whole = start.clone()
        whole[slots] = free.detach() / free.detach().norm(dim=1, keepdim=True) * size
        loss, slope = goal.slope(text, whole)
        if loss < lowest:
            lowest, where, best = loss, whole[slots], max(best, goal.rate(text, whole))
        free.grad = slope[slots]
        optimiser.step()
    angles = torch.nn.functional.normalize(where, dim=1) @ torch.nn.functional.normalize(table, dim=1).T
    nearest = angles.masked_fill(~goal.allowed.to(angles.device), NEG_INF).argmax(dim=1).cpu()
    projected = text.clone()
    projected[goal.slots] = nearest
    return best, projected, goal.rate(projected)


def swap_many(goal: Target, text: Tensor, budget: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """From a text on, swap by the gradient in 1, 2, 4, ... slots at once, those where most is predicted, and keep the
    best of these texts where it lowers the loss, until `budget` texts have been run. Each slot gets one of its BEST
    tokens, the first of them in the first round. The text and its loss."""
    loss, cost, counts = float(goal.losses(text[None])[0]), 1, [len(goal.slots)]
    while counts[-1] > 1:
        counts.append(counts[-1] // 2)
    gradient, rank = goal.gradient(text), torch.zeros(len(goal.slots), 1, dtype=torch.int64)
    while cost + GRADIENT + len(counts) <= budget:
        gain = gradient - gradient.gather(1, text[goal.slots][:, None])
        ranked = gain.masked_fill(~goal.allowed, float("inf")).topk(min(BEST, gain.shape[1]), dim=1, largest=False)
        token, hoped = ranked.indices.gather(1, rank)[:, 0], ranked.values.gather(1, rank)[:, 0]
        order, texts = hoped.argsort(), text.repeat(len(counts), 1)
        for row, count in zip(texts, counts, strict=True):
            row[goal.slots[order[:count]]] = token[order[:count]]
        losses, cost = goal.losses(texts), cost + len(texts)
        best = int(losses.argmin())
        if float(losses[best]) < loss:
            text, loss = texts[best], float(losses[best])
            gradient, cost = goal.gradient(text), cost + GRADIENT
        rank = torch.randint(0, ranked.indices.shape[1], rank.shape, generator=generator)
    return text, loss
