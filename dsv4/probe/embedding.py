"""gain.pgd: how large a change of every embedding does it take to change the next token?

max over delta, |delta_t| <= eps |x_t| for every token t, of the best other logit less that of the clean argmax, at the
last token, by projected gradient ascent on the embeddings. (KL to the clean distribution is no good here: its gradient
is zero at the start, and it also grows where the model only becomes surer.) Choices stay discrete: hash layers keep
routing by the ids; what indexer and learned gates choose is chosen anew at every step, but carries no gradient. Covers:
eps50, the median over inputs of the smallest eps at which the argmax changes, by bisection; the same for the same block
weights with a plain residual; noise of the same size in random directions, which must do less; and the share of tokens
whose experts the attack at that eps changed.

Does not cover: whether any text has such embeddings (that is for attacks on tokens), or a bound from below: ascent
finds flips, it does not prove that there is none at a smaller eps.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dsv4.config import ModelConfig
from dsv4.model import LanguageModel, Segment, Transformer
from dsv4.probe import stats
from dsv4.probe.jacobian import with_residual, without_parameters
from dsv4.probe.record import Record
from dsv4.probe.subject import Recorder, Settings, Subject

NAME = "gain.pgd"
SMALLEST, LARGEST = 2.0**-10, 2.0


def ascend(
    objective: Callable[[Tensor], Tensor], x: Tensor, eps: Tensor, steps: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """The points x + delta [B, T, M] of projected ascent from a random start, one after each step.

    objective: [B, T, M] -> [B], each of its own row. eps [B]: delta_t stays within eps |x_t|; a step goes eps / 8 |x_t|
    along the gradient of each token.
    """
    reach = eps[:, None, None] * x.norm(dim=2, keepdim=True)
    delta = torch.randn(x.shape, generator=generator, device="cpu").to(x)
    delta = delta / delta.norm(dim=2, keepdim=True) * reach * 0.5
    for _ in range(steps):
        with torch.enable_grad():
            moved = delta.requires_grad_(True)
            gradient = torch.autograd.grad(objective(x + moved).sum(), moved)[0]
        size = gradient.norm(dim=2, keepdim=True)
        delta = delta.detach() + reach / 8 * gradient / size.clamp_min(torch.finfo(x.dtype).tiny)
        delta = delta * (reach / delta.norm(dim=2, keepdim=True).clamp_min(1e-30)).clamp(max=1.0)
        yield x + delta


class Asked:
    """B texts of T ids and a model: what it makes of other embeddings [B, T, M] in their place."""

    def __init__(self, model: LanguageModel, ids: Tensor):
        self.model, self.ids = model, ids
        self.segments = [Segment(ids.shape[1])] * len(ids)
        with torch.no_grad():
            self.x = model.embedded(ids.flatten(), None).view(*ids.shape, -1)
            self.best = self.logits(self.x).argmax(dim=1)
            self.routing = self.experts(self.x)

    def logits(self, x: Tensor) -> Tensor:
        """Of the last tokens, [B, V]."""
        trunk = self.model.trunk(self.ids.flatten(), self.segments, embedded=x.flatten(0, 1))
        return self.model.head(trunk.hidden[trunk.last])

    def margin(self, x: Tensor) -> Tensor:
        """The best other logit less that of the clean argmax, [B]: positive where another token is the likeliest."""
        logits, best = self.logits(x), self.best[:, None]
        own = logits.gather(1, best)[:, 0]
        return logits.scatter(1, best, float("-inf")).amax(dim=1) - own

    def flipped(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.margin(x) > 0

    def experts(self, x: Tensor) -> list[Tensor]:
        """The experts of every token in every layer, in ascending order."""
        with torch.no_grad():
            trunk = self.model.trunk(self.ids.flatten(), self.segments, embedded=x.flatten(0, 1))
        return [r.chosen.sort(dim=1).values for r in trunk.routing if r is not None]


def flip_radii(asked: Asked, settings: Settings, steps: int, halvings: int) -> tuple[Tensor, Tensor]:
    """For each text the smallest eps at which an attack changes the argmax, to a factor of 2^(11 / 2^halvings), inf
    where none below LARGEST does; and the points that did it [B, T, M]."""
    low = torch.full((len(asked.ids),), SMALLEST).log2()
    high = torch.full_like(low, LARGEST).log2()
    radius, best = torch.full_like(low, float("inf")), asked.x.clone()
    for turn in range(halvings + 1):
        middle = high if turn == 0 else (low + high) / 2  # first: does it flip at all?
        found = torch.zeros(len(low), dtype=torch.bool)
        generator = settings.generator(700 + turn)
        for point in ascend(asked.margin, asked.x, middle.exp2().to(asked.x), steps, generator):
            now = asked.flipped(point).cpu() & ~found
            best[now] = point.detach()[now]
            found |= now
            if found.all():
                break
        radius = torch.where(found, middle.exp2(), radius)
        high = torch.where(found, middle, high)
        low = torch.where(found, low, middle)
    return radius, best


def run(subject: Subject, settings: Settings) -> Iterator[Record]:
    record = Recorder(NAME, subject, settings)
    ids = torch.stack(list(subject.windows(settings.pick(12, 64), settings.pick(32, 128), settings, salt=11)))
    steps, halvings = settings.pick(16, 40), settings.pick(5, 8)
    medians: dict[str, float] = {}
    models: dict[str, LanguageModel] = {"own": subject.model}
    if isinstance(subject.model, Transformer) and isinstance(subject.config, ModelConfig):
        if subject.config.residual == "mhc":
            models["plain"] = with_residual(subject.model, "plain")
    for name, model in models.items():
        with without_parameters(model):
            asked = Asked(model, ids)
            radii, points = flip_radii(asked, settings, steps, halvings)
        capped = radii.clamp(max=LARGEST)
        never = int(radii.isinf().sum())
        medians[name] = float(capped.median())
        noise = torch.randn(asked.x.shape, generator=settings.generator(12)).to(asked.x)
        noise = noise / noise.norm(dim=2, keepdim=True) * asked.x.norm(dim=2, keepdim=True)
        random = int(asked.flipped(asked.x + capped.to(asked.x)[:, None, None] * noise).sum())
        changed = [
            (a != b).any(dim=1).double().mean() for a, b in zip(asked.experts(points), asked.routing, strict=True)
        ]
        what = "" if name == "own" else " with a plain residual in place of mHC"
        yield record(
            f"eps50{what}", medians[name], "|delta| / |x|", n=len(ids),
            interval=stats.bootstrap(capped, stats.median, seed=settings.seed),
            detail={"radii": capped.tolist(), "never": never, "flipped_by_noise_of_that_size": random / len(ids),
                    "tokens_with_other_experts": [float(c) for c in changed], "steps": steps},
            finding=f"Changing every embedding by {medians[name]:.2%} of its length, in directions found by gradient, "
            f"changes half of all next tokens{what}; noise of that size changes {random / len(ids):.0%}.",
        )  # fmt: skip
