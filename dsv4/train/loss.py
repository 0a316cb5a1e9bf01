"""What training minimises: next token, the token after it (MTP), a small sequence-wise balance term, and what the
indexers learn from; all fp32."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.model import LanguageModel
from dsv4.model.head import IGNORE
from dsv4.model.moe import Routing
from dsv4.model.segments import IndexPhase
from dsv4.model.shards import Shard
from dsv4.train.balance import learned_gates


@dataclass(frozen=True)
class Totals:
    """What the means of one update are over, in all its micro-batches together."""

    targets: int
    mtp_targets: int
    sequences: int
    mtp_sequences: int  # those long enough for MTP to have a row in them
    tokens: int


@dataclass(frozen=True)
class Loss:
    """`total` is what to minimise, with a graph; the rest are plain numbers for the log, in nats.

    All are the shares of a micro-batch in the means over its update: summed over the micro-batches, they are the means.
    """

    total: Tensor
    next_token: float
    mtp: float
    balance: float
    loads: dict[int, Tensor]  # by number of a layer with a learned gate: tokens sent to each expert, fp32 [X]
    index_kl: dict[int, float]  # by number of a layer whose indexer learns: a mean over all tokens
    index_found: dict[int, Tensor]  # of these: the sums of `ops.index_recall`, fp64 [3] on the CPU


def count_totals(parts: Iterable[tuple[Tensor, list[int]]]) -> Totals:
    """The totals of an update from the (targets int64 [T], lengths) of its micro-batches."""
    targets = mtp_targets = sequences = mtp_sequences = tokens = 0
    for part, lengths in parts:
        known = part != IGNORE
        first = torch.tensor([0, *lengths[:-1]]).cumsum(0)  # the target of a sequence's first row is no MTP target
        targets += int(known.sum())
        mtp_targets += int(known.sum()) - int(known[first].sum())
        sequences += len(lengths)
        mtp_sequences += sum(n > 1 for n in lengths)
        tokens += sum(lengths)
    return Totals(targets, mtp_targets, sequences, mtp_sequences, tokens)


def training_loss(
    model: LanguageModel,
    ids: Tensor,
    targets: Tensor,
    lengths: list[int] | Shard,
    *,
    mtp_weight: float,
    balance_weight: float,
    totals: Totals | None = None,
    phase: IndexPhase = "off",
    index_weight: float = 1.0,
) -> Loss:
    """ids, targets int64 [T] cut into documents of `lengths`; targets are -100 where there is nothing to predict.

    The MTP target of row t is the target of row t+1, so nothing is predicted across a document's end. totals: of the
    update that this is a micro-batch of; default: it is all of it. phase: whether indexers learn (model/segments.py);
    index_weight: of the sum of their losses, of which each is a mean over tokens (one that reads fewer than two entries
    counts as 0). lengths may be one process's part of a row that several read: then the losses are that part's share.
    """
    if totals is None:
        assert not isinstance(lengths, Shard), "the means of a shared update are over all of it"
        totals = count_totals([(targets, lengths)])
    losses = model(ids, segments=lengths, targets=targets, phase=phase)
    total = nll = losses.nll / max(1, totals.targets)
    mtp = 0.0
    if losses.mtp_nll is not None:
        nll_mtp = losses.mtp_nll / max(1, totals.mtp_targets)
        total, mtp = total + mtp_weight * nll_mtp, nll_mtp.item()
    balance = torch.zeros((), device=nll.device)
    learned = {layer: losses.routing[layer] for layer in learned_gates(model) if layer in losses.routing}
    loads: dict[int, Tensor] = {}
    for layer, (routing, sequences) in learned.items():
        drafting = layer == len(model.layers)
        count = totals.mtp_sequences if drafting else totals.sequences
        if isinstance(lengths, Shard):
            routing, share = shared_balance(routing, lengths, count, drafting)
        else:
            share = balance_loss(routing, sequences, count)
        balance, loads[layer] = balance + share, _load(routing)
    total = total + balance_weight * balance
    kl = {layer: found.kl / totals.tokens for layer, found in losses.indexed.items()}
    for value in kl.values():
        total = total + index_weight * value
    found = {layer: indexed.found.cpu() for layer, indexed in losses.indexed.items()}
    return Loss(total, nll.item(), mtp, balance.item(), loads, {n: v.item() for n, v in kl.items()}, found)


def heldout_nll(
    model: LanguageModel, ids: Tensor, targets: Tensor, lengths: list[int] | Shard, phase: IndexPhase = "off"
) -> float:
    """Sum of -log p(target) over a packed batch, in nats, without a graph."""
    with torch.no_grad():
        return model(ids, segments=lengths, targets=targets, mtp=False, phase=phase).nll.item()


def balance_loss(routing: Routing, lengths: list[int], count: int | None = None) -> Tensor:
    """Mean over sequences of sum_e f_e P_e (paper 2.1, as in V3): 1 when balanced, up to X/K when not.

    f_e = X / (K T) x tokens sent to e, P_e = mean share of e in the scores; both within one sequence of T tokens.
    count: the sequences that the mean is over, where these are only some of them.
    """
    sequence = torch.repeat_interleave(torch.tensor(lengths, device=routing.scores.device))
    return _balance(routing, sequence, lengths, count or len(lengths), lambda sent: sent)


def shared_balance(routing: Routing, shard: Shard, count: int, drafting: bool) -> tuple[Routing, Tensor]:
    """The same for the tokens of one process's part of a row, whose sequences others have parts of: what was decided
    for those that count, and their share of the loss. drafting: the routing lacks the last token of each document."""
    device = routing.scores.device
    sequence = (shard.documents[~shard.ends] if drafting else shard.documents).to(device)
    if shard.counted < len(shard.row.lengths):
        keep = (sequence < shard.counted).nonzero()[:, 0]
        routing = Routing(routing.scores[keep], routing.chosen[keep], routing.weights[keep])
        sequence = sequence[keep]
    lengths = [max(1, n - drafting) for n in shard.row.lengths]
    return routing, _balance(routing, sequence, lengths, max(1, count), shard.summed)


def _balance(
    routing: Routing, sequence: Tensor, lengths: list[int], count: int, summed: Callable[[Tensor], Tensor]
) -> Tensor:
    """sequence int64 [T]: that of each token, of `lengths` in all. summed: tokens sent, over all that have parts."""
    scores, chosen = routing.scores, routing.chosen
    num = scores.shape[1]
    per_sequence = torch.tensor(lengths, dtype=torch.float32, device=scores.device)[:, None]
    sent = torch.zeros(len(lengths) * num, device=scores.device)
    sent.scatter_add_(0, (sequence[:, None] * num + chosen).flatten(), torch.ones(chosen.numel(), device=scores.device))
    sent = summed(sent)
    fraction = sent.view(len(lengths), num) * (num / chosen.shape[1]) / per_sequence
    share = scores / scores.sum(dim=1, keepdim=True)
    mean_share = torch.zeros(len(lengths), num, device=scores.device).index_add(0, sequence, share) / per_sequence
    return (fraction * mean_share).sum() / count


def _load(routing: Routing) -> Tensor:
    return torch.bincount(routing.chosen.flatten(), minlength=routing.scores.shape[1]).float()
