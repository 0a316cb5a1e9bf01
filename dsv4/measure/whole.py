"""Does a whole model on a device agree with the reference on the CPU, and its paths with each other?

Per model: logits of packed documents, the entries that the indexer chose, gradients of the training loss; and on the
device itself a sequence in chunks, token by token and beside others against the sequence as one piece.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dsv4 import ops
from dsv4.measure import subjects
from dsv4.measure.replay import Choices, choices, recording, replaying
from dsv4.measure.rows import Row, parity_row
from dsv4.measure.sizes import Sizes
from dsv4.measure.subjects import stream, tokens
from dsv4.model import Transformer

# fp32, largest difference over largest number: sums are taken in another order layer after layer. bf16: a few percent
# after five layers.
LOGITS = {torch.float32: 5e-5, torch.bfloat16: 5e-2}
GRADIENTS = {torch.float32: 5e-4, torch.bfloat16: 1e-1}
CHUNKS = (127, 5, 1)
Loss = Callable[[Transformer, Tensor, Tensor, list[int]], Tensor]  # (model, ids, targets, lengths of documents) -> loss


def model_rows(name: str, device: torch.device, dtype: torch.dtype, sizes: Sizes, loss: Loss) -> Iterator[Row]:
    """All rows of one model in one dtype; `loss` is what the gradients are of."""
    truth = subjects.MODELS[name]()
    subject = Transformer(truth.config, dtype).to(device)
    subject.load_state_dict(truth.state_dict())
    yield from _against_reference(name, truth, subject, sizes)
    yield from _against_itself(name, subject, sizes)
    masters = Transformer(truth.config).to(device)
    masters.load_state_dict(truth.state_dict())
    masters.dtype = dtype  # as in training: fp32 weights, activations in `dtype`
    yield _gradients(name, truth, masters, sizes, loss)


@torch.no_grad()
def _against_reference(name: str, truth: Transformer, subject: Transformer, sizes: Sizes) -> Iterator[Row]:
    ids, dtype = tokens(truth, sum(sizes.documents)), subject.dtype
    tape: list[Tensor] = []
    with ops.using("reference"), choices(truth) as want_chosen, recording(tape):
        want = truth(ids, segments=sizes.documents)
    with choices(subject) as chosen, replaying(tape if dtype != torch.float32 else None):
        got = subject(ids, segments=sizes.documents)
    yield parity_row(f"{name} model: logits", dtype, [got], [want], LOGITS[dtype])
    if dtype == torch.float32:
        yield _same_choices(f"{name} model: chosen entries", chosen, want_chosen)


@torch.no_grad()
def _against_itself(name: str, subject: Transformer, sizes: Sizes) -> Iterator[Row]:
    ids, dtype = tokens(subject, sizes.stream), subject.dtype
    # in bf16 a rounding now and then picks another expert or entry for a token
    measure = "max_rel" if dtype == torch.float32 else "typical_rel"
    with choices(subject) as want_chosen:
        want = subject(ids)
    for size in CHUNKS:
        with choices(subject) as chosen:
            got = stream(subject, ids, size)
        label = f"{name} model: " + (f"in chunks of {size}" if size > 1 else "token by token")
        yield parity_row(f"{label} = whole", dtype, [got], [want], LOGITS[dtype], measure)
        if dtype == torch.float32:
            yield _same_choices(f"{label}: chosen entries", chosen, want_chosen)
    got = _beside_others(subject, ids)
    yield parity_row(f"{name} model: beside others = alone", dtype, [got], [want], LOGITS[dtype], measure)


def _beside_others(model: Transformer, ids: Tensor) -> Tensor:
    """Logits of `ids` whose second half runs in one call with a decoding sequence and two new documents."""
    half = len(ids) // 2
    other, (mine, decoding) = ids.flip(0), model.new_cache(2)
    first = model(ids[:half], segments=[(half, mine)])
    model(other[:half], segments=[(half, decoding)])
    run = torch.cat([other[half : half + 1], ids[half:], other[:9], other[:5]])
    logits = model(run, segments=[(1, decoding), (len(ids) - half, mine), 9, 5])
    return torch.cat([first, logits[1 : 1 + len(ids) - half]])


def _gradients(name: str, truth: Transformer, subject: Transformer, sizes: Sizes, loss: Loss) -> Row:
    """Of the loss of packed documents; in fp32 the worst parameter is named."""
    ids, dtype = tokens(truth, sum(sizes.documents)), subject.dtype
    tape: list[Tensor] = []

    def step(model: Transformer) -> None:
        loss(model, ids, ids.roll(-1), list(sizes.documents)).backward()

    with ops.using("reference"), recording(tape):
        step(truth)
    with replaying(tape if dtype != torch.float32 else None):
        step(subject)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for (n, a), b in zip(subject.named_parameters(), truth.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), f"{n} has a gradient on one side only"
        if a.grad is not None and b.grad is not None:
            pairs[n] = (a.grad, b.grad)
    if dtype == torch.float32:
        of = f"{name} model: gradient of "
        rows = [parity_row(of + n, dtype, [a], [b], GRADIENTS[dtype]) for n, (a, b) in pairs.items()]
        return max(rows, key=lambda r: r["max_rel"])
    # in bf16 a small parameter may be all noise: what counts is the direction of the whole step
    together = [torch.cat([g[i].float().cpu().flatten() for g in pairs.values()]) for i in (0, 1)]
    return parity_row(f"{name} model: gradients, all together", dtype, together[:1], together[1:], GRADIENTS[dtype])


def _same_choices(name: str, got: Choices, want: Choices) -> Row:
    """A row that counts the (layer, token) pairs whose entries differ; none may."""
    pairs = [(a, b) for layer in want for a, b in zip(got[layer], want[layer], strict=True)]
    differing = torch.tensor([float(sum(a != b for a, b in pairs))])
    return parity_row(f"{name} of {len(pairs)} queries", torch.float32, [differing], [torch.zeros(1)], 0.0)
