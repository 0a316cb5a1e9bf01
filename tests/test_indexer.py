"""Failures caught here: an indexer loss that is not the KL from the attention's distribution (heads summed, window and
sink in the denominator) or whose gradient is not its own; a gradient that leaks into the trunk or out of it; a block
that sees another document; recall that counts wrongly; a parameter that a step leaves without a gradient tensor.

Truth is float64 with dense masks and loops (PlainV4 and what is written here), under autograd.
"""

from collections.abc import Callable

import pytest
import torch
from differences import differ
from torch import Tensor

from dsv4 import ModelConfig, ops
from dsv4.conform.plain import PlainV4
from dsv4.measure.subjects import small_model, tokens
from dsv4.model import Transformer
from dsv4.model import attention as attention_file
from dsv4.model.indexer import Indexed
from dsv4.ops import Spans
from dsv4.ops.blocked import blocks
from dsv4.train.loss import training_loss

Args = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Spans, Tensor | None, float]


# --- the op ---------------------------------------------------------------------------------------


def case(lengths: list[int], k: int | None, *, scale: float = 1.0, seed: int = 0) -> Args:
    """Arguments of index_kl for packed documents: 5 index heads of 6, 3 heads of 8; `scale` widens the target."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    start, stop, base = [], [], 0
    for n in lengths:
        start += [base] * n
        stop += [base + (t + 1) // 4 for t in range(n)]
        base += n // 4
    visible, n = Spans(torch.tensor(start), torch.tensor(stop)), sum(lengths)
    q, weights, keys = normal(n, 5, 6), normal(n, 5), normal(base, 6)
    chosen = None if k is None else ops.index_scores_topk(normal(n, 5, 6), weights, keys, visible, k)
    return q, weights, keys, scale * normal(n, 3, 8), normal(base, 8), 2 + normal(n, 3), visible, chosen, 8**-0.5


def read_by(args: Args, t: int) -> list[int]:
    visible, chosen = args[6:8]
    if chosen is not None:
        return [e for e in chosen[t].tolist() if e >= 0]
    return list(range(int(visible.start[t]), int(visible.stop[t])))


def distributions(args: Args, t: int, rows: list[int]) -> tuple[Tensor, Tensor]:
    """Target and log of the indexer's distribution of query t over entries, float64, term by term."""
    q, weights, keys, attn_q, entries, lse = (a.double() for a in args[:6])  # type: ignore[union-attr]
    mass = torch.stack([
        sum(torch.exp(attn_q[t, h] @ entries[e] * args[8] - lse[t, h]) for h in range(attn_q.shape[1]))
        for e in rows
    ])  # fmt: skip
    scores = torch.stack([
        sum(weights[t, h] * torch.relu(q[t, h] @ keys[e]) for h in range(q.shape[1])) for e in rows
    ])  # fmt: skip
    return mass / mass.sum(), scores - torch.log(torch.exp(scores).sum())


def plain_kl(args: Args) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for t in range(len(args[0])):
        rows = read_by(args, t)
        if rows:
            target, log_s = distributions(args, t, rows)
            total = total + (target * (target.log() - log_s)).sum()
    return total


def with_gradient(loss: Callable[[Args], Tensor], args: Args, dtype: torch.dtype) -> list[Tensor]:
    """The loss and its gradients for q, weights and keys."""
    asked = [a.detach().to(dtype).requires_grad_() for a in args[:3]]
    out = loss((*asked, *args[3:]))  # type: ignore[arg-type]
    out.backward()
    return [out.detach(), *(a.grad for a in asked)]  # type: ignore[misc]


# every residue of a length mod 4, documents too short for an entry, more than one block of queries
LENGTHS = [[1], [3], [4], [5], [6], [7], [8], [3, 21, 2, 18], [64], [65], [30, 37], [70, 1, 59]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("k", [None, 1, 2, 5])
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_loss_and_gradient_are_those_of_the_definition(lengths: list[int], k: int | None, backend: str) -> None:
    args = case(lengths, k)
    want = with_gradient(plain_kl, args, torch.float64) if len(args[2]) else None
    with ops.using(backend):
        got = with_gradient(lambda a: ops.index_kl(*a), args, torch.float32)
    if want is None:  # no entry at all: a loss of nothing, with a graph
        assert got[0] == 0 and all(g is not None and not g.any() for g in got[1:])
        return
    for a, b in zip(want, got, strict=True):
        assert differ(a.float(), b) <= 1e-5 * max(1.0, a.abs().max().item())


@pytest.mark.parametrize("numbers", [1 << 23, 1 << 9, 1])
@pytest.mark.parametrize("k", [None, 3])
def test_blocks_of_any_size(numbers: int, k: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where documents lie so far apart that each query's entries are gathered."""
    monkeypatch.setattr(blocks, "BLOCK_NUMBERS", numbers)
    monkeypatch.setattr(blocks, "FEW", 4)
    args = case([9, 40, 5, 5, 5, 5, 30, 31], k)
    with ops.using("reference"):
        want = with_gradient(lambda a: ops.index_kl(*a), args, torch.float32)
    got = with_gradient(lambda a: ops.index_kl(*a), args, torch.float32)
    for a, b in zip(want, got, strict=True):
        assert differ(a, b) <= 1e-5 * max(1.0, a.abs().max().item())


@pytest.mark.parametrize("shift", [-200.0, 200.0])
def test_heads_that_look_elsewhere_do_not_matter_and_nothing_overflows(shift: float) -> None:
    """A log-sum-exp far above all scores: the attention gives next to nothing to entries, but still in a proportion."""
    args = case([50], None)
    moved = (*args[:5], args[5] + shift, *args[6:])
    for backend in ("reference", "blocked"):
        with ops.using(backend):
            a = with_gradient(lambda a: ops.index_kl(*a), args, torch.float32)
            b = with_gradient(lambda a: ops.index_kl(*a), moved, torch.float32)  # type: ignore[arg-type]
        assert all(differ(x, y) <= 2e-4 * max(1.0, x.abs().max().item()) for x, y in zip(a, b, strict=True))
    one = (*args[:5], args[5] + torch.tensor([0.0, 300.0, 300.0]), *args[6:])
    alone = (*args[:3], args[3][:, :1], args[4], args[5][:, :1], *args[6:])
    assert differ(ops.index_kl(*one), ops.index_kl(*alone)) <= 1e-4  # type: ignore[arg-type]


def test_an_indexer_that_is_the_attention_has_nothing_to_learn() -> None:
    """One head each, a score that is the logarithm of the target up to a constant: KL 0, gradient 0."""
    args = case([64], None)
    entries = args[4].abs()
    q = args[3][:, :1].abs()
    same = (q, torch.full((64, 1), args[8]), entries, q, entries, args[5][:, :1], *args[6:])
    for value in with_gradient(lambda a: ops.index_kl(*a), same, torch.float32):  # type: ignore[arg-type]
        assert value.abs().max() < 2e-5


def test_narrow_operands() -> None:
    """bf16 queries and keys are widened; the gradient comes back in their dtype."""
    args = case([70, 59], None)
    narrow = [a.bfloat16() if i in (0, 2, 3, 4) else a for i, a in enumerate(args[:6])]  # type: ignore[union-attr]
    wide = [a.float() for a in narrow]  # type: ignore[union-attr]
    loss = ops.index_kl(*(t.requires_grad_() if i == 0 else t for i, t in enumerate(narrow)), *args[6:])  # type: ignore[arg-type, misc]
    loss.backward()
    assert narrow[0].grad is not None and narrow[0].grad.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert differ(loss, ops.index_kl(*wide, *args[6:])) < 1e-3 * loss.item()  # type: ignore[arg-type]


@pytest.mark.parametrize("numbers", [1 << 23, 1 << 9])
@pytest.mark.parametrize("k", [1, 3, 8, 40])
def test_recall_and_mass_are_those_of_the_definition(k: int, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_NUMBERS", numbers)
    args = case([70, 3, 59], None, scale=3.0)
    want = [0.0, 0.0, 0.0]
    for t in range(len(args[0])):
        rows = read_by(args, t)
        if len(rows) <= k:
            continue
        target, log_s = distributions(args, t, rows)
        best, mine = (set(d.argsort(descending=True, stable=True)[:k].tolist()) for d in (target, log_s))
        share = sum(target[e].item() for e in mine) / sum(target[e].item() for e in best)
        want = [want[0] + 1, want[1] + len(best & mine) / k, want[2] + share]
    assert ops.index_recall(*args[:7], k, args[8]).tolist() == pytest.approx(want, rel=1e-5)


# --- in the model ---------------------------------------------------------------------------------


class PlainLearner(PlainV4):
    """PlainV4 that adds up its indexers' losses; their weights are leaves, and nothing else carries a gradient."""

    def __init__(self, model: Transformer, dense: bool):
        super().__init__(model.config, model.state_dict(), "indexer not asked" if dense else None)
        self.learned = {n: t.requires_grad_() for n, t in self.w.items() if ".indexer." in n}
        self.kl: dict[int, Tensor] = {}

    def attention(self, prefix: str, layer: int, x: Tensor) -> Tensor:
        c, w = self.c, self.w
        with torch.no_grad():
            y = super().attention(prefix, layer, x)
        if c.compress_ratios[layer] != c.compress_rate_csa:
            return y
        t, width, freq = torch.arange(len(x)), c.head_dim, self.frequencies(4)
        qr = self.norm(x @ w[f"{prefix}wq_a.weight"].T, f"{prefix}q_norm.weight")
        q = (qr @ w[f"{prefix}wq_b.weight"].T).view(len(x), c.num_attention_heads, width)
        q = self.rotate(q / (q.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt(), t, freq)
        kv = self.rotate(self.norm(x @ w[f"{prefix}wkv.weight"].T, f"{prefix}kv_norm.weight"), t, freq)
        entries = self.compress(f"{prefix}compressor.", x, 4, width, freq, 1.0)
        read = self.visible(t, len(entries), 4)
        if not self.made("indexer not asked"):
            with torch.no_grad():
                read = self.choose(f"{prefix}indexer.", x, qr, read, freq)
        asks = (qr @ w[f"{prefix}indexer.wq_b.weight"].T).view(len(x), c.index_n_heads, c.index_head_dim)
        keys = self.compress(f"{prefix}indexer.compressor.", x, 4, c.index_head_dim, freq, 1.0)
        products = torch.einsum("thd,kd->thk", self.rotate(asks, t, freq), keys).relu()
        weights = x @ w[f"{prefix}indexer.weights_proj.weight"].T * (c.index_n_heads * c.index_head_dim) ** -0.5
        scores = torch.einsum("th,thk->tk", weights, products)
        kl = torch.zeros((), dtype=torch.float64)
        for i in range(len(x)):
            rows = read[i].nonzero()[:, 0]
            if len(rows) < 2:
                continue
            seen = kv[max(0, i + 1 - c.sliding_window) : i + 1]
            logits = torch.cat([q[i] @ seen.T * width**-0.5, q[i] @ entries[rows].T * width**-0.5], dim=1)
            p = torch.cat([logits, w[f"{prefix}attn_sink"][:, None]], dim=1).softmax(dim=1)[:, len(seen) : -1].sum(0)
            p = (p / p.sum()).detach()
            kl = kl + (p * (p.log() - scores[i, rows].log_softmax(0))).sum()
        self.kl[layer] = self.kl.get(layer, 0.0) + kl
        return y


def learned(model: Transformer, ids: Tensor, lengths: list[int], phase: str) -> dict[int, Indexed]:
    return model(ids, segments=lengths, targets=torch.full_like(ids, -100), phase=phase, mtp=False).indexed


def model_with_csa(**changes: int) -> Transformer:
    return small_model((0, 4, 128, 4), mtp=1, sliding_window=16, **changes)


@pytest.mark.parametrize("phase", ["warmup", "sparse"])
def test_the_model_learns_the_loss_of_the_definition(phase: str) -> None:
    """Two CSA layers, three documents; the gradient of every indexer parameter."""
    model = model_with_csa(index_topk=4)
    lengths = [61, 3, 46]
    ids = tokens(model, sum(lengths))
    plain = PlainLearner(model, dense=phase == "warmup")
    with torch.no_grad():
        embedded = ids.split(lengths)
    for document in embedded:
        plain.streams(document)
    got = learned(model, ids, lengths, phase)
    assert got.keys() == plain.kl.keys() == {1, 3}
    for layer, want in plain.kl.items():
        assert got[layer].kl.item() == pytest.approx(want.item(), rel=1e-5)
    sum(plain.kl.values()).backward()  # type: ignore[union-attr]
    sum(i.kl for i in got.values()).backward()  # type: ignore[union-attr]
    for name, p in model.named_parameters():
        if name in plain.learned:
            want = plain.learned[name].grad
            assert want is not None and want.any() and p.grad is not None
            assert differ(want.float(), p.grad) <= 1e-4 * want.abs().max().item(), name
        else:
            assert p.grad is None, f"{name}: the indexer's loss reaches the trunk"


def gradients(model: Transformer, ids: Tensor, lengths: list[int], phase: str, weight: float) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss = training_loss(
        model, ids, ids.roll(-1), lengths, mtp_weight=0.3, balance_weight=0.1, phase=phase, index_weight=weight
    )  # fmt: skip
    loss.total.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert not missing, f"without a gradient tensor: {missing}"
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", [False, True])
def test_the_trunk_does_not_feel_the_indexers_loss_and_the_indexer_nothing_else(recompute: bool) -> None:
    model = model_with_csa(index_topk=4)
    model.recompute = recompute
    ids, lengths = tokens(model, 150), [80, 70]
    without, whole = (gradients(model, ids, lengths, "sparse", weight) for weight in (0.0, 1.0))
    off = gradients(model, ids, lengths, "off", 1.0)
    for name in whole:
        if ".indexer." in name:
            assert whole[name].any() and not without[name].any() and not off[name].any(), name
        else:
            assert torch.equal(whole[name], without[name]) and torch.equal(whole[name], off[name]), name


def test_dense_phases_read_every_entry() -> None:
    """As a model whose top-k covers all; sparse ones do not."""
    few, all_ = model_with_csa(index_topk=4), model_with_csa(index_topk=400)
    ids = tokens(few, 150)

    def loss(model: Transformer, phase: str) -> float:
        return model(ids, segments=[80, 70], targets=ids.roll(-1), phase=phase).nll.item()

    assert loss(few, "dense") == loss(few, "warmup") == loss(all_, "off") != loss(few, "off")
    assert loss(few, "off") == loss(few, "sparse")


@pytest.mark.parametrize("phase", ["off", "dense", "warmup", "sparse"])
@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 2], [7], [127], [129], [200]], ids=str)
def test_every_parameter_has_a_gradient_tensor(phase: str, lengths: list[int]) -> None:
    """Where no group closes, no second token follows or nothing is to be learned, it is zero; so the processes that
    share a model never wait for a gradient that one of them does not have."""
    model = model_with_csa()
    found = gradients(model, tokens(model, sum(lengths)), lengths, phase, 1.0)
    assert all(g.isfinite().all() for g in found.values())
    quiet = {n for n, g in found.items() if not g.any()}
    assert any("compressor" in n for n in quiet) == (max(lengths) < 128 or phase in ("off", "dense"))
    assert all(n.startswith("mtp.") <= (max(lengths) == 1) for n in quiet if ".gate." not in n)


def test_the_report_is_of_queries_that_see_more_than_they_may_choose() -> None:
    """And of all of them, where they are few; recall of the trunk's own choice when scores are the attention's is 1."""
    model = model_with_csa(index_topk=8)
    for lengths, count in (([30], 0), ([35], 0), ([36], 1), ([60, 50], 25 + 15)):
        found = learned(model, tokens(model, sum(lengths)), lengths, "sparse")[1].found.tolist()
        assert found[0] == count and 0 <= found[1] <= count and 0 <= found[2] <= count + 1e-9
    before = found
    attention_file.SAMPLED, whole = 10, attention_file.SAMPLED
    try:
        sampled = learned(model, tokens(model, 110), [60, 50], "sparse")[1].found.tolist()
    finally:
        attention_file.SAMPLED = whole
    assert sampled[0] == 10 and abs(sampled[1] / 10 - before[1] / before[0]) < 0.3


def test_the_report_is_the_same_for_dense_and_chosen_reading() -> None:
    """The best entries are those of all that a query sees, not of the few that it has read."""
    model = small_model((4,), index_topk=8, sliding_window=16)  # the first layer: the same inputs in both
    ids = tokens(model, 200)
    a, b = (learned(model, ids, [200], phase)[0].found for phase in ("warmup", "sparse"))
    assert torch.allclose(a, b, rtol=1e-5) and a[0] == 200 - 4 * 9 + 1


def test_bf16_computation() -> None:
    torch.manual_seed(0)
    wide = Transformer(ModelConfig.preset("tiny", initializer_range=0.1))
    narrow = Transformer(wide.config, compute_dtype="bfloat16")
    narrow.load_state_dict(wide.state_dict())
    ids = tokens(wide, 300)
    for phase in ("warmup", "sparse"):
        kl = [learned(m, ids, [200, 100], phase)[1].kl.item() for m in (wide, narrow)]
        assert kl[1] == pytest.approx(kl[0], rel=0.05)
        found = gradients(narrow, ids, [200, 100], phase, 1.0)
        assert all(g.isfinite().all() and g.dtype == torch.float32 for g in found.values())
        assert all(g.any() for n, g in found.items() if ".indexer." in n)


def test_memory_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of queries x entries, forward or backward: with small blocks the largest one grows like the length. Few
    heads, so that what rightly grows with it is smaller than what must not be there."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, Tensor):
                    self.numbers = max(self.numbers, t.numel())
            return out

    monkeypatch.setattr(blocks, "BLOCK_NUMBERS", 1 << 14)
    model = small_model((4,), index_topk=8, sliding_window=16, index_n_heads=2)
    sizes = []
    for length in (400, 1600):
        ids = tokens(model, length)
        with Largest() as largest:
            gradients(model, ids, [length], "warmup", 1.0)
            gradients(model, ids, [length], "sparse", 1.0)
        sizes.append(largest.numbers)
    assert 3 * sizes[0] < sizes[1] < 4.1 * sizes[0] and sizes[1] < 1600 * 400
