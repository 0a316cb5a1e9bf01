"""Whether a drafter knows its trunk: how many of its drafts the trunk would accept on a text, beside chance.

A drafter of another release may fit in every shape. Its drafts are then no better than those that it makes from the
states of another place of the text: what is left is the habit of the language, which its own tables know. So each draft
is made twice, from its own states and from others, the token before it being the same; the second is the chance.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsv4.cache import SequenceMemory
from dsv4.errors import UserError
from dsv4.model import LanguageModel, Segment, Transformer
from dsv4.text import Tokenizer

PIECES = 4  # of the text, read side by side: each lends its states to the next
LEAST = 64  # tokens of a piece
UNKNOWN, UNABLE = -1, -2  # no token: where nobody judges, and where a drafter has nothing to say
SIGNIFICANT = 4.0  # standard deviations: slots of a block are not independent, so 3 would be too few


@dataclass(frozen=True)
class Acceptance:
    """Of a text read as it stands: a draft is accepted where it is the trunk's likeliest token.

    drafter: "DSpark drafter" or "MTP block". tokens: of the text that were read. judged, accepted, by_chance: drafts by
    slot, those accepted, and those accepted of the ones made from another place's states. won, lost: drafts accepted
    from their own states alone, and from the others alone. expected: the mean of what the confidence head foretells, by
    slot (an MTP block has none).
    """

    drafter: str
    tokens: int
    judged: tuple[int, ...]
    accepted: tuple[int, ...]
    by_chance: tuple[int, ...]
    won: int
    lost: int
    expected: tuple[float, ...]

    @property
    def rate(self) -> float:
        return sum(self.accepted) / sum(self.judged)

    @property
    def chance(self) -> float:
        return sum(self.by_chance) / sum(self.judged)

    @property
    def is_chance(self) -> bool:
        """Whether its own states help it no more than luck would (McNemar's test of the drafts that differ)."""
        return self.won - self.lost <= SIGNIFICANT * math.sqrt(self.won + self.lost)

    def lines(self) -> list[str]:
        """For a person."""
        slots = ", ".join(f"{a / n:.0%}" for a, n in zip(self.accepted, self.judged, strict=True))
        out = [
            f"{self.drafter}: {sum(self.accepted)} of {sum(self.judged)} drafts are the trunk's own choice "
            f"({self.rate:.1%}) on {self.tokens} tokens of text; by slot {slots}",
            f"from the states of another place: {self.chance:.1%}, which is chance",
        ]
        if self.expected:
            out.append(f"its confidence foretells, by slot, {', '.join(f'{p:.0%}' for p in self.expected)}")
        if self.is_chance:
            out.append("NO BETTER THAN CHANCE: the drafter does not know this trunk; is it of another release?")
        return out


@torch.no_grad()
def acceptance(
    model: LanguageModel, tokenizer: Tokenizer, text: str, *, size: int | None = None, most: int = 2048
) -> Acceptance:
    """Measure a model's drafter on a text, of which at most `most` tokens are read; size: slots of a block (default: as
    trained; an MTP block has one). UserError for a model without a drafter, for a text that is too short to tell, and
    for a trunk that is not finite.
    """
    if not isinstance(model, Transformer) or not model.mtp:
        raise UserError("the model has no drafter: there is no acceptance to measure")
    ids = tokenizer.encode(text)[:most]
    each = len(ids) // PIECES
    if each < LEAST:
        raise UserError(
            f"a text of {len(ids)} tokens tells nothing of a drafter: give one of at least {PIECES * LEAST}"
        )
    rows = torch.tensor([[tokenizer.bos_id, *ids[i * each : (i + 1) * each]] for i in range(PIECES)])
    if not model.config.dspark_stages:
        return _of_mtp(model, rows, tokenizer.vocab_size)
    size = model.config.dspark_block_size if size is None else size
    if not 1 <= size <= LEAST // 2:
        raise UserError(f"size={size} must be from 1 to {LEAST // 2} slots of a block")
    return _of_blocks(model, rows, tokenizer.vocab_size, size)


def _of_mtp(model: Transformer, ids: Tensor, vocab: int) -> Acceptance:
    """ids [pieces, n]. The block at row t drafts token t+2, which the trunk's row t+1 judges."""
    pieces, each = ids.shape
    flat, segments = ids.flatten(), [Segment(each) for _ in range(pieces)]
    trunk = model.trunk(flat, segments)
    likeliest = _best(model.logits(trunk.hidden), vocab, UNKNOWN)
    hidden, rows, _ = model.predict_next(trunk, flat)
    other, _, _ = model.predict_next(replace(trunk, streams=trunk.streams.roll(each, dims=0)), flat)
    right = likeliest[rows + 1]
    own, lent = (_best(model.logits(h), vocab) == right for h in (hidden, other))
    return _counted("MTP block", ids, own[:, None], lent[:, None], (right != UNKNOWN)[:, None], None)


def _of_blocks(model: Transformer, ids: Tensor, vocab: int, size: int) -> Acceptance:
    """ids [pieces, n]. A block after every `size` tokens; slot k is told the text's own tokens up to it (as in
    training), so the trunk's row there judges it."""
    pieces, each = ids.shape
    memories = list(model.new_cache(pieces, max_rewind=0, mtp=True))
    likeliest = torch.full((pieces, each + size), UNKNOWN)
    places, own, lent, sure = list[int](), list[Tensor](), list[Tensor](), list[Tensor]()
    for start in range(0, each, size):
        part = ids[:, start : start + size]
        trunk = model.trunk(part.flatten(), [Segment(part.shape[1], memory) for memory in memories])
        at = start + part.shape[1]
        likeliest[:, start:at] = _best(model.logits(trunk.hidden), vocab, UNKNOWN).view(part.shape).cpu()
        if at == each:
            break
        told = pad(ids[:, at : at + size], (0, max(0, at + size - each)))  # beyond the text nothing is judged
        drafts, confidence = _block(model, memories, told, vocab, size)
        others, _ = _block(model, memories, told.roll(1, dims=0), vocab, size)  # piece i - 1's text, piece i's states
        places.append(at)
        own.append(drafts)
        lent.append(others.roll(-1, dims=0))
        sure.append(confidence)
    for memory in memories:
        memory.release()
    right = torch.cat([likeliest[:, at : at + size] for at in places])
    known = right != UNKNOWN
    return _counted("DSpark drafter", ids, torch.cat(own) == right, torch.cat(lent) == right, known, torch.cat(sure))


def _block(
    model: Transformer, memories: list[SequenceMemory], told: Tensor, vocab: int, size: int
) -> tuple[Tensor, Tensor]:
    """The drafts of a block after each memory, and their confidence, [pieces, size] each; told: the text there."""
    made, drafter, told = model.draft_block(told[:, 0], memories, size), model.drafter, told.to(model.device)
    drafts = [_best(drafter.corrected(made.logits[:, k], told[:, k]), vocab) for k in range(size)]
    sure = [drafter.confidence(made.states[:, k], told[:, k]).sigmoid() for k in range(size)]
    return torch.stack(drafts, dim=1).cpu(), torch.stack(sure, dim=1).cpu()


def _best(logits: Tensor, vocab: int, broken: int = UNABLE) -> Tensor:
    """The likeliest token of each row, of those that the tokenizer has; `broken` where the row is not finite."""
    logits = logits[:, :vocab]
    return logits.argmax(dim=1).where(logits.isfinite().all(dim=1), broken)


def _counted(name: str, ids: Tensor, own: Tensor, lent: Tensor, known: Tensor, sure: Tensor | None) -> Acceptance:
    """Booleans [drafts, slots]: accepted, accepted from other states, and which can be judged."""
    if not known.any():
        raise UserError("the trunk's logits are not finite: nothing of its drafter can be judged")
    own, lent = own & known, lent & known

    def by_slot(of: Tensor) -> tuple[int, ...]:
        return tuple(of.sum(dim=0).tolist())

    expected = () if sure is None else tuple((sure.where(known, 0).sum(dim=0) / known.sum(dim=0)).tolist())
    won, lost = int((own & ~lent).sum()), int((lent & ~own).sum())
    return Acceptance(name, ids.numel(), by_slot(known), by_slot(own), by_slot(lent), won, lost, expected)
