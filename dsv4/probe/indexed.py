"""What a model's indexers are asked on a text, and what its CSA layers then read: for the probes of selection."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4 import ops
from dsv4.config import AnyConfig, ModelConfig
from dsv4.model import LanguageModel, Segment
from dsv4.ops import Spans, topk_lowest

NEG_INF = float("-inf")


@dataclass(frozen=True)
class Asked:
    """One CSA layer on one text: q [T, Hi, Di], weights [T, Hi], keys [E, Di] fp32, what each query sees, and k."""

    layer: int
    q: Tensor
    weights: Tensor
    keys: Tensor
    visible: Spans
    k: int

    def choosers(self, most: int, generator: torch.Generator) -> Tensor:
        """Up to `most` queries that see more entries than they may read, int64, ascending."""
        rows = (self.visible.stop - self.visible.start > self.k).nonzero()[:, 0]
        return rows[torch.randperm(len(rows), generator=generator)[:most]].sort().values

    def scores(self, rows: Tensor, q: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
        """Index scores fp32 [n, E] of some queries, -inf where an entry is not seen; q [n, Hi, Di] and keys in place of
        its own."""
        q, keys = self.q[rows] if q is None else q, self.keys if keys is None else keys
        found = ops.index_scores(q, self.weights[rows], keys) + 0.0  # -0.0 becomes 0.0, as where it is chosen by
        hidden = self.visible.of(rows).hidden(0, len(rows), 0, len(keys), keys.device)
        return found.masked_fill(hidden, NEG_INF)


def layers_of(config: AnyConfig) -> list[int]:
    """The CSA layers of a model's trunk."""
    if not isinstance(config, ModelConfig):
        return []
    return [i for i in range(config.num_hidden_layers) if config.layer_kind(i).indexed]


def needs_choice(config: AnyConfig) -> str | None:
    """Why there is nothing to choose, or None."""
    if not layers_of(config):
        return "the model has no CSA layer, so no indexer chooses what it reads"
    assert isinstance(config, ModelConfig)
    least = config.compress_rate_csa * (config.index_topk + 1)
    if least > config.max_position_embeddings:
        return f"within its {config.max_position_embeddings} positions a query never sees more than it may read"
    return None


def enough_tokens(config: ModelConfig) -> int:
    """A length at which the last query sees twice as many entries as it may read, or as many as there can be."""
    return min(2 * config.compress_rate_csa * config.index_topk, config.max_position_embeddings)


def watch(
    model: LanguageModel, ids: Tensor, pinned: int = 0, embedded: Tensor | None = None
) -> tuple[list[Asked], list[Tensor]]:
    """For every CSA layer what its indexer was asked (without pins), and what it reads int64 [T, k], -1: none.

    ids [T] must be long enough that something is left out. embedded: [T, M] in place of their embeddings.
    """
    asked: list[Asked] = []
    read: list[Tensor] = []
    layers = layers_of(model.config)

    def wrap(name: str, op: Callable) -> Callable:
        def choose(q: Tensor, weights: Tensor, keys: Tensor, visible: Spans, k: int) -> Tensor:
            if not pinned:
                own = q.float().cpu(), weights.float().cpu(), keys[:].float().cpu()
                asked.append(Asked(layers[len(asked)], own[0], own[1], own[2], visible, k))
            return op(q, weights, keys, visible, k)

        def attend(q: Tensor, window_kv: Tensor, window: Spans, entries: Tensor, visible: Spans, chosen: Tensor | None,
                   *rest: object) -> object:  # fmt: skip
            if chosen is not None:
                read.append(chosen.cpu())
            return op(q, window_kv, window, entries, visible, chosen, *rest)

        return choose if name == "index_scores_topk" else attend

    with torch.no_grad(), ops.wrapped(["index_scores_topk", "sparse_attention"], wrap):
        model.trunk(ids, [Segment(len(ids), pinned=pinned)], embedded=embedded)
    assert len(read) == len(layers), "the text is too short for anything to be left out"
    return asked, read


def best(scores: Tensor, k: int) -> Tensor:
    """bool [n, E]: the k best of each row by score, then lowest place."""
    chosen = topk_lowest(scores, k)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)


def margins(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of rows [n, E] with -inf for what is not seen (more than k are): (s_k - s_(k+1)) / std(s) fp64 [n], and whether
    the two are exactly equal, so that the tie rule decides."""
    ordered = scores.double().sort(dim=1, descending=True).values
    seen = scores > NEG_INF
    count = seen.sum(dim=1)
    filled = scores.double().masked_fill(~seen, 0.0)
    mean = filled.sum(dim=1) / count
    spread = ((filled - mean[:, None]).masked_fill(~seen, 0.0).square().sum(dim=1) / count).sqrt()
    gap = ordered[:, k - 1] - ordered[:, k]
    return gap / spread.clamp_min(1e-300), gap == 0


def overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Of two choices bool [n, E]: |a and b| / |a or b|, and |a and b| / |b|, fp64 [n]."""
    both = (a & b).sum(dim=1).double()
    return both / (a | b).sum(dim=1), both / b.sum(dim=1)
