"""Speculative decoding: a drafter drafts tokens, the model verifies them in one pass, the memory is rewound.

A decoding request runs its last token and up to `depth` drafts after it; each row's logits judge the draft that follows
it. The first one that is refused is replaced, and the memory forgets what comes after. Then the model's drafter drafts
again. An MTP block reads the trunk's streams and the token after each row: the first draft comes from the row before
the last token, each deeper one from the block's own streams. A DSpark drafter remembers the trunk's rows as the trunk
itself does, and makes a whole block of drafts from the last token in one pass. All this is done before anything is
entered, so a step that is stopped half way draws the same again. What runs is the scheduler's to say, how logits become
distributions sampler.py's.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.cache import SequenceMemory
from dsv4.engine.sampler import BROKEN, distributions, draw, logprobs, numbers, pick
from dsv4.engine.scheduler import Share
from dsv4.engine.types import Draft, Drawn, Logprob, Request, SamplingParams
from dsv4.errors import UserError
from dsv4.model import LanguageModel, Segment, Transformer
from dsv4.model.transformer import Trunk


def check_depth(depth: object, num_draft_blocks: int) -> None:
    """UserError if so many tokens cannot be drafted a step, by a model with so many blocks of a drafter."""
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 0:
        raise UserError(
            f"speculative={depth!r} must be a whole number of tokens to draft a step, or 0 to switch it off"
        )
    if depth and not num_draft_blocks:
        raise UserError(
            f"speculative={depth}, but the model has no MTP block to draft with: leave it out, or use a model that was "
            "trained with num_nextn_predict_layers=1 or with a DSpark drafter"
        )


@dataclass(eq=False)
class Ahead:
    """A request whose next drafts are being made: what this step drew, and the drafts so far."""

    share: Share
    tokens: list[int]
    drafts: list[Draft]

    @property
    def request(self) -> Request:
        return self.share.request

    @property
    def length(self) -> int:
        """Of all that is known when the tokens have been entered."""
        return len(self.request.ids) + sum(t != BROKEN for t in self.tokens)

    @property
    def wanted(self) -> int:
        """How many drafts could still be among ids: one more token is drawn in the step that verifies them."""
        return 0 if BROKEN in self.tokens else self.request.limit - self.length - 1


class Speculation:
    """A model with a drafter that drafts up to `depth` tokens a step; `vocab_size`: ids below it may be drawn."""

    def __init__(self, model: LanguageModel, depth: int, vocab_size: int):
        assert isinstance(model, Transformer) and model.mtp and depth > 0, "see check_depth"
        self.model, self.depth, self.vocab_size = model, depth, vocab_size
        self.blocks = model.config.dspark_stages > 0  # of drafts, and not one after the other

    @staticmethod
    def max_rewind(depth: int) -> int:
        """How far a memory has to be able to go back for it: refused drafts; and, where a request ends with its first
        token of a step, those that had been accepted after it and the drafts that were made after these."""
        return 2 * depth

    @torch.no_grad()
    def draw(self, shares: Sequence[Share]) -> list[Drawn]:
        """Run the shares, two calls of the model or more: what is drawn for each request of which nothing is pending
        then. Memories stand before the last token drawn. An exception leaves them unusable, and every draft and random
        number as it was.
        """
        if not shares:
            return []
        with _numbers_kept([share.request for share in shares]):
            trunk, logits = self._run(shares)
            ready = [share.request for share in shares if not share.request.pending]
            drafts, params = [r.drafts for r in ready], [r.params for r in ready]
            uniform = [
                [] if p.temperature == 0 else numbers(r.generator, 1 + len(r.drafts))
                for r, p in zip(ready, params, strict=True)
            ]
            tokens = verify(logits, params, drafts, uniform)
            told = _told(logits, params, drafts, tokens)
            drawn = dict(zip(ready, tokens, strict=True))
            all_ahead = [Ahead(share, drawn.get(share.request, []), []) for share in shares]
            new = self._draft_blocks(all_ahead) if self.blocks else self._draft(trunk, all_ahead)
        return [Drawn(r, t, x, tuple(new[r])) for r, t, x in zip(ready, tokens, told, strict=True)]

    def _run(self, shares: Sequence[Share]) -> tuple[Trunk, Tensor]:
        """The trunk over the shares; logits of the last token and the drafts of each request that comes to its end."""
        ids, segments, rows = [], [], []
        for share in shares:
            start, request = share.memory.length, share.request
            whole = share.count == request.pending
            ids += request.ids[start : start + share.count]
            ids += [draft.token for draft in request.drafts] if whole else []
            segments.append(Segment(share.count, _memory(share), request.params.pinned))
            rows += range(len(ids) - 1 - len(request.drafts), len(ids)) if whole else []
        trunk = self.model.trunk(torch.tensor(ids), segments)
        return trunk, self._logits(trunk.hidden, rows)

    def _logits(self, hidden: Tensor, rows: list[int]) -> Tensor:
        """Logits fp32 [n, V] of some rows of hidden [T, M]: of the tokens that the tokenizer has."""
        chosen = hidden[torch.tensor(rows, dtype=torch.int64, device=hidden.device)]
        return self.model.logits(chosen)[:, : self.vocab_size]

    def _draft(self, trunk: Trunk, all_ahead: list[Ahead]) -> dict[Request, list[Draft]]:
        """The MTP block over every row of the trunk's run, and deeper drafts; then memories forget what was refused."""
        following, rows, first = list[int](), list[int](), 0
        for ahead, start in zip(all_ahead, trunk.run.starts, strict=True):
            count = ahead.share.count
            after = ahead.request.ids[start + 1 : start + 1 + count]
            after += [t for t in ahead.tokens if t != BROKEN][: count - len(after)]
            following += after + [0] * (count - len(after))  # nothing is known after a draft that was refused
            rows.append(first + ahead.length - 2 - start)
            first += count
        hidden, streams, _ = self.model.draft(trunk, torch.tensor(following))
        for ahead in all_ahead:
            self._stand(ahead)
        going = [(ahead, row) for ahead, row in zip(all_ahead, rows, strict=True) if ahead.tokens and ahead.wanted > 0]
        while going:
            drafts = self.choose([ahead for ahead, _ in going], self._logits(hidden, [row for _, row in going]))
            deeper = []
            for (ahead, row), draft in zip(going, drafts, strict=True):
                if draft is not None:
                    ahead.drafts.append(draft)
                    deeper += [(ahead, row)] if len(ahead.drafts) < min(self.depth, ahead.wanted) else []
            if deeper:
                chosen = torch.tensor([row for _, row in deeper], device=streams.device)
                tokens = torch.tensor([ahead.drafts[-1].token for ahead, _ in deeper])
                memories = [_memory(ahead.share) for ahead, _ in deeper]
                hidden, streams, _ = self.model.draft_deeper(streams[chosen], tokens, memories)
            going = [(ahead, row) for row, (ahead, _) in enumerate(deeper)]
        for ahead in all_ahead:
            self._stand(ahead)
        return {ahead.request: ahead.drafts for ahead in all_ahead}

    def _draft_blocks(self, all_ahead: list[Ahead]) -> dict[Request, list[Draft]]:
        """Memories forget what was refused; then a block of a DSpark drafter at the end of each.

        A block always has `depth` slots, as its drafts depend on their number, however many of them are wanted.
        """
        for ahead in all_ahead:
            self._stand(ahead)
        going = [(row, ahead) for row, ahead in enumerate(a for a in all_ahead if a.tokens and a.wanted > 0)]
        if going:
            anchors = torch.tensor([ahead.tokens[-1] for _, ahead in going])
            made = self.model.draft_block(anchors, [_memory(ahead.share) for _, ahead in going], self.depth)
        for slot in range(self.depth):
            going = [(row, ahead) for row, ahead in going if len(ahead.drafts) == slot < ahead.wanted]
            if not going:
                break
            before = torch.tensor([(ahead.drafts[-1].token if slot else ahead.tokens[-1]) for _, ahead in going])
            logits = made.logits[[row for row, _ in going], slot]
            logits = self.model.drafter.corrected(logits, before.to(logits.device))[:, : self.vocab_size]
            for (_, ahead), draft in zip(going, self.choose([ahead for _, ahead in going], logits), strict=True):
                ahead.drafts += [] if draft is None else [draft]
        return {ahead.request: ahead.drafts for ahead in all_ahead}

    def _stand(self, ahead: Ahead) -> None:
        """A memory stands before the last token that is known, or where a part of a prompt ends."""
        memory = ahead.share.memory
        memory.rewind(max(0, memory.length - (ahead.length - 1)))

    def choose(self, ahead: Sequence[Ahead], logits: Tensor) -> list[Draft | None]:
        """One more draft for each, from the drafter's logits fp32 [n, V]; None where they are not finite.

        Drawn as the request draws its tokens, with a number of its own generator; greedy ones take the likeliest.
        """
        params = [a.request.params for a in ahead]
        tokens, probs = draw(logits, params, [a.request.generator for a in ahead])
        greedy = [p.temperature == 0 for p in params]
        return [
            None if token == BROKEN else Draft(token, None if probs is None or greedy[i] else probs[i])
            for i, token in enumerate(tokens)
        ]


def verify(
    logits: Tensor,
    params: Sequence[SamplingParams],
    drafts: Sequence[Sequence[Draft]],
    uniform: Sequence[Sequence[float]],
) -> list[list[int]]:
    """Accept drafts or replace them: for each request those accepted, in order, and one token more, or BROKEN.

    logits fp32 [n, V]: for each request a row for each of its drafts and one for the token after them. uniform: for
    each that is not greedy as many numbers in [0, 1), one to judge each draft and one for the last token.

    A draft x of distribution q is accepted with probability min(1, p(x) / q(x)), p being what the row gives after
    temperature and filters; the token in place of the first refused one is drawn from the positive part of p - q, after
    the last draft from p. So tokens are distributed as if each was drawn from its p (Leviathan et al. 2023, theorem
    in appendix A.1; Chen et al. 2023). Greedy requests accept a draft that is the likeliest token.
    """
    counts = [1 + len(d) for d in drafts]
    assert len(logits) == sum(counts)
    finite, best = logits.isfinite().all(dim=1).tolist(), logits.argmax(dim=1).tolist()  # ties: the lowest id
    sampled = any(p.temperature for p in params)
    probs, judged = torch.empty(0), list[tuple[float, float]]()
    if sampled:
        probs = distributions(logits, [p for p, n in zip(params, counts, strict=True) for _ in range(n)])
        judged = _shares_of_drafts(probs, drafts)
    out: list[list[int]] = []
    last: list[int] = []  # the row of each request's last token
    refused: list[Draft | None] = []
    first, place = 0, 0
    for i, mine in enumerate(drafts):
        taken = 0
        for j, draft in enumerate(mine):
            if params[i].temperature == 0:
                accepted = best[first + j] == draft.token
            else:
                p, q = judged[place + j]
                accepted = uniform[i][j] * q < p
            if not finite[first + j] or not accepted:
                break
            taken += 1
        out.append([draft.token for draft in mine[:taken]])
        last.append(first + taken)
        refused.append(mine[taken] if taken < len(mine) else None)
        first, place = first + counts[i], place + len(mine)
    final = [best[row] for row in last]
    if sampled:
        weights = probs[last]
        for i, draft in enumerate(refused):
            if draft is not None:
                weights[i] = residual(weights[i], draft)
        shares = torch.tensor([u[-1] if u else 0.0 for u in uniform], dtype=torch.float64, device=logits.device)
        drawn = pick(weights, shares).tolist()
        final = [best[row] if p.temperature == 0 else x for p, row, x in zip(params, last, drawn, strict=True)]
    for tokens, row, token in zip(out, last, final, strict=True):
        tokens.append(token if finite[row] else BROKEN)
    return out


def residual(p: Tensor, refused: Draft) -> Tensor:
    """What is left to draw from when a draft was refused: the positive part of p - q, fp64 [V], not normalised.

    p itself where nothing is left, which happens only where the two differ by roundings.
    """
    left = p.clone()
    if refused.probs is None:
        left[refused.token] = 0
    else:
        left = (left - refused.probs).clamp_min(0)
    return left if left.any() else p


def _shares_of_drafts(probs: Tensor, drafts: Sequence[Sequence[Draft]]) -> list[tuple[float, float]]:
    """(p, q) of every draft, one request's after the other's; where there is no q it is 1."""
    rows, tokens, shares, first = list[int](), list[int](), list[Tensor](), 0
    for mine in drafts:
        rows += range(first, first + len(mine))
        tokens += [draft.token for draft in mine]
        shares += [probs.new_ones(()) if draft.probs is None else draft.probs[draft.token] for draft in mine]
        first += 1 + len(mine)
    q = torch.stack(shares).tolist() if shares else []
    return list(zip(probs[rows, tokens].tolist(), q, strict=True))


def _told(
    logits: Tensor, params: Sequence[SamplingParams], drafts: Sequence[Sequence[Draft]], tokens: Sequence[list[int]]
) -> list[tuple[Logprob, ...]]:
    """The log-probabilities of each request's tokens, where they were asked for."""
    rows, first = list[int](), 0
    for mine, drawn in zip(drafts, tokens, strict=True):
        rows += range(first, first + len(drawn))
        first += 1 + len(mine)
    wide = [p for p, drawn in zip(params, tokens, strict=True) for _ in drawn]
    told = iter(logprobs(logits[rows], wide, [t for drawn in tokens for t in drawn]))
    return [tuple(x for x in [next(told) for _ in drawn] if x is not None) for drawn in tokens]


def _memory(share: Share) -> SequenceMemory:
    memory = share.memory
    assert isinstance(memory, SequenceMemory), "a Transformer's memories"
    return memory


@contextmanager
def _numbers_kept(requests: Sequence[Request]) -> Iterator[None]:
    """Whatever stops a step half way, the random numbers that it drew are drawn again by the next one."""
    before = [(r.generator, r.generator.get_state()) for r in requests if r.params.temperature]
    try:
        yield
    except BaseException:
        for generator, state in before:
            generator.set_state(state)
        raise
