"""Does a whole model on a device agree with the reference on the CPU, and its paths with each other?

Per model: logits of packed documents, the entries that the indexer chose, gradients of the training loss; and on the
device itself a sequence in chunks, token by token and beside others against the sequence as one piece.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dsv4 import ops
from dsv4.bench.parity import row
from dsv4.bench.report import Row
from dsv4.bench.sizes import Sizes
from dsv4.config import ModelConfig, RopeScaling
from dsv4.model import Transformer
from dsv4.model.indexer import Indexer
from dsv4.train.loss import training_loss

# fp32, largest difference over largest number: sums are taken in another order layer after layer. bf16: a few percent
# after five layers.
LOGITS = {torch.float32: 5e-5, torch.bfloat16: 5e-2}
GRADIENTS = {torch.float32: 5e-4, torch.bfloat16: 1e-1}
CHUNKS = (127, 5, 1)
Choices = dict[str, list[tuple[int, ...]]]


def _csa() -> ModelConfig:
    """CSA in three layers of five. 32 index heads: with fewer, many scores are exactly zero and tie."""
    return ModelConfig(
        vocab_size=256, hidden_size=96, num_hidden_layers=5, compress_ratios=(0, 4, 4, 128, 4, 0),
        num_attention_heads=4, head_dim=48, qk_rope_head_dim=16, q_lora_rank=48, o_groups=2, o_lora_rank=48,
        index_n_heads=32, index_head_dim=32, index_topk=8, moe_intermediate_size=64, n_routed_experts=8,
        num_experts_per_tok=2, num_hash_layers=1, max_position_embeddings=8192,
        rope_scaling=RopeScaling(factor=16.0, original_max_position_embeddings=256),
    )  # fmt: skip


# What is compared: the tiny preset, and a model whose CSA layers choose 8 of up to 75 entries by gathering rows. With
# these seeds no choice of an expert or an entry hangs on a rounding (the closest runner-up is more than 1e-4 of the
# scores' spread behind), so all choices in fp32 must be the same.
MODELS: dict[str, Callable[[], Transformer]] = {
    "tiny": lambda: lively(ModelConfig.preset("tiny"), seed=0),
    "csa": lambda: lively(_csa(), seed=10),
}


@torch.no_grad()
def lively(config: ModelConfig, seed: int) -> Transformer:
    """A model on the CPU whose every parameter matters: a fresh one has zero sinks and biases and hardly mixes.

    Gains lie around 1, biases and scales are of order 1/2, matrices keep the size of what they multiply.
    """
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        leaf = name.rpartition(".")[2]
        noise = torch.randn(p.shape, generator=generator)
        if name.endswith("norm.weight"):
            p.copy_(1 + 0.1 * noise)
        elif leaf.endswith(("_base", "_scale")) or leaf in ("attn_sink", "ape"):
            p.copy_(0.5 * noise)
        else:
            p.copy_(noise * p.shape[-1] ** -0.5)
    for name, b in model.named_buffers():
        if name.endswith("gate.bias"):
            b.copy_(0.1 * torch.randn(b.shape, generator=generator))
    return model


def tokens(config: ModelConfig, count: int, seed: int = 1) -> Tensor:
    """Random ids int64 [count], on the CPU."""
    return torch.randint(0, config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def model_rows(name: str, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Iterator[Row]:
    """All rows of one model in one dtype."""
    truth = MODELS[name]()
    subject = Transformer(truth.config, dtype).to(device)
    subject.load_state_dict(truth.state_dict())
    yield from _against_reference(name, truth, subject, sizes)
    yield from _against_itself(name, subject, sizes)
    masters = Transformer(truth.config).to(device)
    masters.load_state_dict(truth.state_dict())
    masters.dtype = dtype  # as in training: fp32 weights, activations in `dtype`
    yield _gradients(name, truth, masters, sizes)


@torch.no_grad()
def _against_reference(name: str, truth: Transformer, subject: Transformer, sizes: Sizes) -> Iterator[Row]:
    ids, dtype = tokens(truth.config, sum(sizes.documents)), subject.dtype
    tape: list[Tensor] = []
    with ops.using("reference"), choices(truth) as want_chosen, recording(tape):
        want = truth(ids, segments=sizes.documents)
    with choices(subject) as chosen, replaying(tape if dtype != torch.float32 else None):
        got = subject(ids, segments=sizes.documents)
    yield row(f"{name} model: logits", dtype, [got], [want], LOGITS[dtype])
    if dtype == torch.float32:
        yield _same_choices(f"{name} model: chosen entries", chosen, want_chosen)


@torch.no_grad()
def _against_itself(name: str, subject: Transformer, sizes: Sizes) -> Iterator[Row]:
    ids, dtype = tokens(subject.config, sizes.stream), subject.dtype
    # in bf16 a rounding now and then picks another expert or entry for a token
    measure = "max_rel" if dtype == torch.float32 else "typical_rel"
    with choices(subject) as want_chosen:
        want = subject(ids)
    for size in CHUNKS:
        memory = subject.new_cache()
        with choices(subject) as chosen:
            got = torch.cat([subject(part, segments=[(len(part), memory[0])]) for part in ids.split(size)])
        label = f"{name} model: " + (f"in chunks of {size}" if size > 1 else "token by token")
        yield row(f"{label} = whole", dtype, [got], [want], LOGITS[dtype], measure)
        if dtype == torch.float32:
            yield _same_choices(f"{label}: chosen entries", chosen, want_chosen)
    got = _beside_others(subject, ids)
    yield row(f"{name} model: beside others = alone", dtype, [got], [want], LOGITS[dtype], measure)


def _beside_others(model: Transformer, ids: Tensor) -> Tensor:
    """Logits of `ids` whose second half runs in one call with a decoding sequence and two new documents."""
    half = len(ids) // 2
    other, (mine, decoding) = ids.flip(0), model.new_cache(2)
    first = model(ids[:half], segments=[(half, mine)])
    model(other[:half], segments=[(half, decoding)])
    run = torch.cat([other[half : half + 1], ids[half:], other[:9], other[:5]])
    logits = model(run, segments=[(1, decoding), (len(ids) - half, mine), 9, 5])
    return torch.cat([first, logits[1 : 1 + len(ids) - half]])


def _gradients(name: str, truth: Transformer, subject: Transformer, sizes: Sizes) -> Row:
    """The training loss with everything in it, on packed documents; in fp32 the worst parameter is named."""
    ids, dtype = tokens(truth.config, sum(sizes.documents)), subject.dtype
    tape: list[Tensor] = []

    def step(model: Transformer) -> None:
        loss = training_loss(model, ids, ids.roll(-1), list(sizes.documents), mtp_weight=0.3, balance_weight=0.01)
        loss.total.backward()

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
        rows = [row(f"{name} model: gradient of {n}", dtype, [a], [b], GRADIENTS[dtype]) for n, (a, b) in pairs.items()]
        return max(rows, key=lambda r: r["max_rel"])
    # in bf16 a small parameter may be all noise: what counts is the direction of the whole step
    together = [torch.cat([g[i].float().cpu().flatten() for g in pairs.values()]) for i in (0, 1)]
    return row(f"{name} model: gradients, all together", dtype, together[:1], together[1:], GRADIENTS[dtype])


def _same_choices(name: str, got: Choices, want: Choices) -> Row:
    """A row that counts the (layer, token) pairs whose entries differ; none may."""
    pairs = [(a, b) for layer in want for a, b in zip(got[layer], want[layer], strict=True)]
    differing = torch.tensor([float(sum(a != b for a, b in pairs))])
    return row(f"{name} of {len(pairs)} queries", torch.float32, [differing], [torch.zeros(1)], 0.0)


_CHOOSING = ("topk_lowest", "index_scores_topk")


@contextmanager
def recording(tape: list[Tensor]) -> Iterator[None]:
    """Keeps what the ops that choose experts and entries return, in order of the calls."""

    def keep(name: str, op: Callable) -> Callable:
        def call(*args) -> Tensor:
            tape.append(op(*args))
            return tape[-1]

        return call

    with ops.wrapped(_CHOOSING, keep):
        yield


@contextmanager
def replaying(tape: list[Tensor] | None) -> Iterator[None]:
    """Lets these ops return what was kept: in bf16 a rounding may choose otherwise, and the rest is then incomparable.

    None: they choose for themselves.
    """
    if tape is None:
        yield
        return
    kept = iter(tape)
    with ops.wrapped(_CHOOSING, lambda name, op: lambda *args: next(kept).to(args[0].device)):
        yield
    assert next(kept, None) is None, "the two runs chose a different number of times"


@contextmanager
def choices(model: Transformer) -> Iterator[Choices]:
    """Records for every CSA layer and token of the calls inside which entries it reads, counted in its document."""
    seen: Choices = {}

    def watch(name: str) -> Callable:
        def record(module, args, output) -> None:
            for piece, chosen in zip(args[2].pieces, output, strict=True):
                visible = piece.groups[4].visible
                spans = zip(visible.start.tolist(), visible.stop.tolist(), strict=True)
                rows = [range(lo, hi) for lo, hi in spans] if chosen is None else chosen.tolist()
                for lo, read in zip(visible.start.tolist(), rows, strict=True):
                    seen.setdefault(name, []).append(tuple(r - lo for r in read if r >= 0))

        return record

    handles = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if isinstance(m, Indexer)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
