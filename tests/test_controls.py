"""The models that V4 is compared with, against transformers 5.23's `deepseek_v32` and `llama` as an oracle: the same
random weights in fp32 give the same logits and gradients.

Failures caught here: anything in which these models are not V3.2 and Llama; chunks that change a number; a sequence
that depends on what else is in the call; a fork, rewind, snapshot or restore that is not exact; a memory that allocates
other bytes than its rows, or reads new rows otherwise than old ones; memory that grows with the square of the length; a
call that V4's model takes and these do not.
Ties are kept out (their order is not defined there): 32 index heads.
"""

from collections import Counter
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from differences import differ
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4.config import LlamaConfig, RopeScaling, V32Config
from dsv4.controls import ControlTransformer, DenseTransformer, V32Transformer, dense, v32
from dsv4.controls.memory import FORMATS
from dsv4.cost import kv_bytes, params
from dsv4.errors import UserError
from dsv4.measure import subjects
from dsv4.measure.subjects import fill
from dsv4.model.moe import Routing
from dsv4.ops import rotate
from dsv4.ops.blocked import blocks

LOGITS = 5e-5  # the largest absolute difference allowed; logits reach about 6
GRADIENTS = 1e-4  # of the largest entry of each gradient
SMALL = dict(
    vocab_size=131, hidden_size=96, num_hidden_layers=3, num_attention_heads=4, q_lora_rank=40, kv_lora_rank=48,
    qk_nope_head_dim=24, qk_rope_head_dim=16, v_head_dim=20, index_n_heads=32, index_head_dim=32,
    intermediate_size=80, moe_intermediate_size=40, n_routed_experts=16, num_experts_per_tok=4,
    max_position_embeddings=4096,
)  # fmt: skip
V32: dict[str, V32Config] = {
    # YaRN that acts on most pairs at these lengths; one dense layer, two with groups of experts
    "YaRN": V32Config(
        **SMALL, index_topk=12, first_k_dense_replace=1, n_group=4, topk_group=2,
        rope_scaling=RopeScaling(factor=8.0, original_max_position_embeddings=64),
    ),
    # no scaling, two dense layers, one group, more rows read
    "default": V32Config(
        **SMALL, index_topk=33, first_k_dense_replace=2, n_group=1, topk_group=1, rope_scaling=RopeScaling("default"),
    ),
}  # fmt: skip
LLAMA = LlamaConfig(
    vocab_size=131, hidden_size=96, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=20,
    intermediate_size=80, max_position_embeddings=4096,
)  # fmt: skip
CASES = [*V32, "llama"]

# transformers' name of a tensor -> ours, part by part
NAMES = {
    "model.": "", "embed_tokens": "embed", "lm_head": "head", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn": "attn", "q_a_proj": "wq_a", "q_a_layernorm": "q_norm",
    "q_b_proj": "wq_b", "kv_a_proj_with_mqa": "wkv_a", "kv_a_layernorm": "kv_norm", "kv_b_proj": "wkv_b",
    "o_proj": "wo", "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "mlp": "ffn", "experts.gate_up_proj": "experts.w13",
    "experts.down_proj": "experts.w2", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2",
    "e_score_correction_bias": "bias",
}  # fmt: skip


def our_name(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def make_peer(case: str) -> Any:
    """transformers' model with random weights large enough for a mistake to show."""
    torch.manual_seed(0)
    if case == "llama":
        peer = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **vars(LLAMA),
                tie_word_embeddings=False,
                rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            )
        )
    else:
        c = V32[case]
        scaling: dict[str, Any] = {"rope_type": c.rope_scaling.type, "rope_theta": c.rope_theta}
        if c.rope_scaling.type == "yarn":
            scaling |= {**vars(c.rope_scaling), "mscale": 1.0, "mscale_all_dim": 1.0}
        fields = {k: v for k, v in vars(c).items() if k not in ("rope_scaling", "rope_theta")}
        peer = transformers.DeepseekV32ForCausalLM(
            transformers.DeepseekV32Config(
                **fields,
                num_key_value_heads=c.num_attention_heads,
                rope_parameters=scaling,
                attn_implementation="eager",
            )
        )
        assert peer.model.rotary_emb.attention_scaling == 1.0, "equal mscales leave the amplitude of cos and sin alone"
    with torch.no_grad():
        for name, p in peer.named_parameters():
            p.copy_(1 + 0.1 * torch.randn_like(p)) if name.endswith("norm.weight") else p.normal_(0, 0.1)
        for name, b in peer.named_buffers():
            if name.endswith("e_score_correction_bias"):
                b.normal_(0, 0.2)
    return peer.eval()


@torch.no_grad()
def with_its_weights(model: ControlTransformer, peer: Any) -> ControlTransformer:
    own = model.state_dict()
    given = {our_name(n): t for n, t in peer.state_dict().items()}
    assert own.keys() == given.keys()
    for name, tensor in own.items():
        tensor.copy_(given[name].view_as(tensor))
    return model


def build(case: str, dtype: torch.dtype = torch.float32) -> ControlTransformer:
    return DenseTransformer(LLAMA, dtype) if case == "llama" else V32Transformer(V32[case], dtype)


@pytest.fixture(scope="module", params=CASES)
def pair(request) -> tuple[Any, ControlTransformer]:
    peer = make_peer(request.param)
    return peer, with_its_weights(build(request.param), peer)


@pytest.fixture(params=CASES)
def model(request) -> ControlTransformer:
    return with_its_weights(build(request.param), make_peer(request.param))


def ids_of(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, SMALL["vocab_size"], (count,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def theirs(peer: Any, ids: Tensor) -> Tensor:
    return peer(ids[None], use_cache=False).logits[0]


@torch.no_grad()
def stream(model: ControlTransformer, ids: Tensor, chunk: int, memory=None) -> Tensor:
    memory = model.new_cache() if memory is None else memory
    return torch.cat([model(part, memory) for part in ids.split(chunk)])


# --- logits and gradients --------------------------------------------------------------------------------------------


def test_logits_at_every_length(pair):
    """One call; rows are chosen from position 12 or 33 on."""
    peer, model = pair
    ids = ids_of(201)
    for length in (1, 2, 3, 11, 12, 13, 14, 25, 32, 33, 34, 35, 67, 128, 201):
        want = theirs(peer, ids[:length])
        assert want.std() > 0.5, "weights too small to prove anything"
        with torch.no_grad():
            assert differ(want, model(ids[:length])) < LOGITS, f"length {length}"
            assert differ(want[-1:], model(ids[:length], rows="last")) < LOGITS, f"length {length}"


def test_logits_in_chunks_and_token_by_token(pair):
    peer, model = pair
    ids = ids_of(201, seed=1)
    want = theirs(peer, ids)
    for chunk in (1, 7, 12, 33, 64, 201):
        assert differ(want, stream(model, ids, chunk)) < LOGITS, f"chunks of {chunk}"
    uneven = torch.cat([stream(model, ids[:20], 20, m := model.new_cache(capacity=64)), stream(model, ids[20:], 50, m)])
    assert differ(want, uneven) < LOGITS, "beyond its capacity a memory grows"


def test_gradients(pair):
    """Every parameter that transformers trains; the indexer's have no gradient there, and zeros here."""
    peer, model = pair
    ids = ids_of(80, seed=2)
    direction = torch.randn(80, SMALL["vocab_size"], generator=torch.Generator().manual_seed(1))
    (peer(ids[None], use_cache=False).logits[0] * direction).sum().backward()
    (model(ids) * direction).sum().backward()
    own = dict(model.named_parameters())
    untrained = []
    for name, p in peer.named_parameters():
        mine = own.pop(our_name(name))
        if p.grad is None:
            untrained.append(name)
            assert mine.grad is not None and not mine.grad.any(), name
            continue
        assert mine.grad is not None, name
        largest = p.grad.abs().max().item()
        assert largest > 0, name
        assert differ(p.grad.view_as(mine) / largest, mine.grad / largest) <= GRADIENTS, name
    assert not own and all(".indexer." in name for name in untrained)
    peer.zero_grad(set_to_none=True)
    model.zero_grad(set_to_none=True)


# --- mistakes that are easily made -----------------------------------------------------------------------------------


def rotate_last_halves(x: Tensor, turn: Tensor) -> Tensor:
    start = x.shape[-1] - 2 * turn.shape[-1]
    return torch.cat([x[..., :start], dense.rotate_halves(x[..., start:], turn)], dim=-1)


def rotate_first_pairs(x: Tensor, turn: Tensor) -> Tensor:
    stop = 2 * turn.shape[-1]
    return torch.cat([rotate(x[..., :stop], turn), x[..., stop:]], dim=-1)


def each(attribute: str, value: Any):
    """Sets an attribute on every module that has it."""

    def flip(model, patch):
        found = [m for m in model.modules() if hasattr(m, attribute)]
        assert found
        for m in found:
            patch.setattr(m, attribute, value(m) if callable(value) else value)

    return flip


def replaced(module, name: str, value: Any):
    return lambda model, patch: patch.setattr(module, name, value)


def biased_weights(model, patch):
    """The selection bias enters the experts' weights."""
    for m in model.modules():
        if isinstance(m, v32.GroupedGate):

            def forward(x, m=m, right=m.forward):
                decided = right(x)
                weights = ((x @ m.weight.T).sigmoid() + m.bias).gather(1, decided.chosen)
                return Routing(decided.scores, decided.chosen, weights / weights.sum(dim=1, keepdim=True) * m.scale)

            patch.setattr(m, "forward", forward)


def without_mscale(model, patch):
    for m in model.modules():
        if isinstance(m, v32.LatentAttention):
            patch.setattr(m, "scale", (m.nope + model.config.qk_rope_head_dim) ** -0.5)


def one_row_more(model, patch):
    for m in model.modules():
        if isinstance(m, v32.TokenIndexer):
            patch.setattr(m, "topk", m.topk + 1)


MISTAKES = {
    "main attention rotates halves": replaced(v32, "rotate", rotate_last_halves),
    "indexer rotates pairs": replaced(v32, "rotate_halves", rotate_first_pairs),
    "indexer rotates its last channels": replaced(v32, "rotate_halves", rotate_last_halves),
    "mscale omitted": without_mscale,
    "one row too many": one_row_more,
    "groups of experts ignored": each("topk_group", lambda m: m.groups),
    "selection bias in the weights": biased_weights,
    "weights not scaled": lambda model, patch: [
        patch.setattr(m, "scale", 1.0) for m in model.modules() if isinstance(m, v32.GroupedGate)
    ],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_its_weights(build("YaRN"), make_peer("YaRN"))
    ids = ids_of(120, seed=3)
    with torch.no_grad():
        right = model(ids)
        MISTAKES[mistake](model, monkeypatch)
        assert differ(right, model(ids)) > 1e-3


# --- sizes, memory ---------------------------------------------------------------------------------------------------


def test_parameters_of_the_released_models() -> None:
    with torch.device("meta"):
        sizes = V32Transformer(V32Config()).num_parameters(), DenseTransformer(LlamaConfig()).num_parameters()
    assert sizes == (671_877_929_216, 405_853_388_800)


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_belongs_to_one_family_of_its_size(case: str) -> None:
    """dsv4/cost counts these models family by family; routing biases are buffers."""
    config = LLAMA if case == "llama" else V32[case]
    with torch.device("meta"):
        tensors = dict(build(case).state_dict())
    found = params.families(config)
    sizes = dict.fromkeys((f.name for f in found), 0)
    for name, tensor in tensors.items():
        (family,) = [f for f in found if f.matches(name)]
        sizes[family.name] += tensor.numel()
    assert sizes == {f.name: f.count for f in found}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("capacity", [0, 1, 63, 200])
def test_bytes_of_a_memory(case: str, capacity: int) -> None:
    """As many rows as tokens, in every format, to the byte what dsv4/cost counts."""
    model = build(case)
    for format in FORMATS[type(model.config)]:
        memory = model.new_cache(format=format, capacity=capacity)[0]
        known = {"packed": "published", "float16": "bfloat16"}.get(format, format)
        assert memory.bytes() == sum(kv_bytes.held(model.config, capacity, known).values())
        fill(memory, capacity)
        assert memory.length == capacity and model(ids_of(3), memory).isfinite().all()


def test_a_packed_memory_is_near_an_exact_one_and_the_same_for_every_chunk() -> None:
    """FP8 rows move logits by some percent of their spread; chunks differ where a last bit crosses a border."""
    config = replace(V32["default"], index_topk=512)  # all rows are read: a choice that falls otherwise would hide this
    model = V32Transformer(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1 if name.endswith("norm.weight") else 0, 0.1)
    ids = ids_of(150)
    exact, one = (stream(model, ids, 50, model.new_cache(format=f)) for f in ("float32", "packed"))
    assert 0 < (exact - one).abs().mean() < 0.1 * exact.std()
    for chunk in (1, 7, 150):
        assert (one - stream(model, ids, chunk, model.new_cache(format="packed"))).abs().mean() < 2e-3
    chosen = V32Transformer(replace(config, index_topk=40))
    chosen.load_state_dict(model.state_dict())
    assert stream(chosen, ids, 50, chosen.new_cache(format="packed")).isfinite().all()


def test_memory_is_linear_in_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of tokens x tokens in forward or backward."""

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, Tensor):
                    self.numbers = max(self.numbers, t.numel())
            return out

    for case in ("YaRN", "llama"):
        config = replace(LLAMA if case == "llama" else V32[case], max_position_embeddings=1 << 15)
        model: ControlTransformer = DenseTransformer(config) if case == "llama" else V32Transformer(config)
        length = 4096
        for file in (dense, blocks):
            monkeypatch.setattr(file, "BLOCK_NUMBERS", 1 << 19)
        with Largest() as seen:
            model(ids_of(length)).sum().backward()
        assert seen.numbers < length**2 / 4, case


# --- the contract of V4's own model: segments, memories, losses -------------------------------------------------------


def documents(*lengths: int, seed: int = 5) -> list[Tensor]:
    return list(ids_of(sum(lengths), seed).split(lengths))


@torch.no_grad()
def test_documents_in_one_run_are_each_alone(model):
    """Lengths below and above what the indexer chooses, as a flat run and as the rows of a batch."""
    parts = documents(5, 1, 70, 40)
    together = model(torch.cat(parts), segments=[len(p) for p in parts])
    assert differ(torch.cat([model(p) for p in parts]), together) < 1e-5
    batch = torch.stack(documents(45, 45))
    assert differ(torch.stack([model(row) for row in batch]), model(batch)) < 1e-5


@torch.no_grad()
def test_prompts_beside_decoding_memories_are_each_alone(model):
    """A decoding memory, a chunk of a prompt, a document without memory and a new memory, in one call and by rows."""
    first, second, third, fourth = documents(60, 50, 7, 30)
    decoding, reading, new = model.new_cache(3)
    model(first[:59], decoding), model(second[:20], reading)
    run = torch.cat([first[59:], second[20:], third, fourth])
    logits = model(run, segments=[(1, decoding), (30, reading), 7, (30, new)])
    want = [model(first)[59:], model(second)[20:], model(third), model(fourth)]
    assert differ(torch.cat(want), logits) < 1e-5
    assert (decoding.length, reading.length, new.length) == (60, 50, 30)
    memory = model.new_cache()
    last = model(first, segments=[(60, memory)], rows="last")
    assert differ(want[0], last) < 1e-5
    assert differ(model(first)[[3, 50]], model(first, rows=torch.tensor([3, 50]))) < 1e-5


def test_the_loss_of_packed_documents_is_that_of_each_alone(model):
    """With its gradient, with activations computed again, and with bfloat16 activations over fp32 weights."""
    parts = documents(20, 1, 41)
    targets = [F.pad(p[1:], (0, 1), value=-100) for p in parts]
    each = [F.cross_entropy(model(p), t, reduction="sum") for p, t in zip(parts, targets, strict=True) if len(p) > 1]
    alone = torch.stack(each).sum()
    alone.backward()
    want = {name: p.grad for name, p in model.named_parameters()}
    for recompute in (False, True):
        model.zero_grad(set_to_none=True)
        model.recompute = recompute
        losses = model(torch.cat(parts), segments=[len(p) for p in parts], targets=torch.cat(targets))
        assert losses.mtp_nll is None and losses.nll.item() == pytest.approx(alone.item(), rel=1e-6)
        gated = [i for i, layer in enumerate(model.layers) if hasattr(layer.ffn, "gate")]
        assert list(losses.routing) == gated, "by the number of the layer, not by its place among those with a gate"
        assert all(lengths == [20, 1, 41] for _, lengths in losses.routing.values())
        losses.nll.backward()
        for name, p in model.named_parameters():
            assert (p.grad is None) == (want[name] is None), name
            if p.grad is not None:
                assert differ(want[name], p.grad) <= 1e-5 * max(1.0, want[name].abs().max().item()), name
    half = type(model)(model.config, compute_dtype="bfloat16")
    half.load_state_dict(model.state_dict())
    lengths = [len(p) for p in parts]
    losses = half(torch.cat(parts), segments=lengths, targets=torch.cat(targets))
    losses.nll.backward()
    assert losses.nll.item() == pytest.approx(alone.item(), rel=0.03)
    assert half.layers[0].attn.wo.weight.grad.dtype == torch.float32 and half.new_cache()[0].format == "bfloat16"


@torch.no_grad()
def test_a_weight_is_used_once_in_a_call(model):
    """However many segments there are: only attention goes from one to the next."""
    used: Counter[str] = Counter()
    for name, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_hook(lambda *_, name=name: used.update([name]))
    model(ids_of(150), segments=[(50, model.new_cache()), 60, (40, model.new_cache())])
    twice = {"attn.wkv_b": 2}  # its two halves, before and behind attention
    found = {name for name in used if used[name] != twice.get(name.split(".", 2)[-1], 1)}
    assert len(used) > 15 and not found, found


@torch.no_grad()
def test_forks_rewinds_and_snapshots_are_exact(model):
    """Bit for bit, in every format: a memory that went back, was copied or was restored gives the logits of one that
    never left."""
    ids, other = ids_of(90, seed=7), ids_of(40, seed=8)

    def after(length: int, format: str) -> Any:
        memory = model.new_cache(format=format)[0]
        model(ids[:length], memory)
        return memory

    for format, length in product(FORMATS[type(model.config)], (1, 12, 33, 64, 65, 80)):
        memory = after(length, format)
        saved = {name: tensor.clone() for name, tensor in memory.snapshot().items()}
        want = model(ids[length:], after(length, format))
        twin = memory.fork()
        model(other, twin)  # a copy that goes its own way
        assert torch.equal(want, model(ids[length:], memory)), (format, length)
        memory.rewind(90 - length)
        model(other, memory)
        memory.rewind(40)
        assert memory.length == length and torch.equal(want, model(ids[length:], memory)), (format, length)
        for fresh in (model.new_cache(format=format)[0], twin):
            fresh.restore(saved)
            assert torch.equal(want, model(ids[length:], fresh)), (format, length)


@torch.no_grad()
def test_a_stopped_call_leaves_the_memory_as_it_was(model):
    memory = model.new_cache()[0]
    ids = ids_of(60, seed=9)
    model(ids[:40], memory)
    want = model(ids[40:], memory.fork())

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.layers[-1].ffn.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(ids_of(30), memory)
    hook.remove()
    memory.refuse_torn()
    assert memory.length == 40 and torch.equal(want, model(ids[40:], memory))


@torch.no_grad()
def test_a_batch_of_memories_goes_back_whole_or_not_at_all(model):
    batch = model.new_cache(2)
    model(torch.stack(documents(30, 30)), batch)
    model(ids_of(10), batch[1])
    assert batch.lengths == [30, 40]
    saved, twin = batch.snapshot(), batch.fork()
    with pytest.raises(UserError, match="cannot rewind 35"):
        batch.rewind(35)
    assert batch.lengths == [30, 40]
    batch.rewind(20)
    assert batch.lengths == [10, 20] and twin.lengths == [30, 40]
    with pytest.raises(UserError, match="1 snapshots for 2 rows"):
        batch.restore(saved[:1])
    with pytest.raises(UserError, match="the snapshot has no length"):
        batch.restore([saved[0], {}])
    assert batch.lengths == [10, 20]
    batch.restore(saved)
    assert batch.lengths == [30, 40] and batch.bytes() == sum(row.bytes() for row in batch) > 0
    batch.release()
    assert batch.bytes() == 0
    with pytest.raises(UserError, match="was released"):
        model(ids_of(3), segments=[(3, batch[0])])


@torch.no_grad()
def test_a_pool_makes_memories_and_is_never_full(model):
    pool = model.new_pool(format="bfloat16", max_rewind=0)
    memory, other = pool.new(), pool.new(capacity=100)
    assert memory.bytes() == 0 < other.bytes() and memory.format == "bfloat16"
    assert pool.shortage([(memory, 10**9), (other, 1)]) == 0
    with pytest.raises(UserError, match="cache format 'int8'"):
        model.new_pool(format="int8")
    with pytest.raises(UserError, match="pages=3"):
        model.new_pool(pages=3)
    model(ids_of(20), other)
    other.release(), other.release()
    assert other.bytes() == 0
    for use in (other.fork, other.snapshot, lambda: other.rewind(1), lambda: other.restore(memory.snapshot())):
        with pytest.raises(UserError, match="was released"):
            use()


def test_a_snapshot_of_something_else_is_refused_and_changes_nothing(model):
    memory = model.new_cache()[0]
    with torch.no_grad():
        model(ids_of(30), memory)
    right = memory.snapshot()
    name = next(n for n in right if n != "length")
    wrong = {
        "is missing": {n: t for n, t in right.items() if n != name},
        "float64": {**right, name: right[name].double()},
        "is unknown": {**right, "layers.9.more": right[name]},
        "has length 5000": {**right, "length": torch.tensor([5000])},
        "expected": {**right, "length": torch.tensor([29])},
    }
    for part, snapshot in wrong.items():
        with pytest.raises(UserError, match=part):
            memory.restore(snapshot)
        assert memory.length == 30 and torch.equal(memory.snapshot()[name], right[name])


def test_wrong_use() -> None:
    model = build("default")
    other = replace(V32["default"], index_head_dim=24)
    for part, call in {
        "non-empty integer tensor": lambda: model(torch.zeros(2, 0, dtype=torch.int64)),
        "token id 131": lambda: model(torch.tensor([131])),
        "5000 tokens do not fit": lambda: model(ids_of(5000)),
        "another configuration": lambda: model(ids_of(3), build("YaRN").new_cache()),
        "made for another": lambda: model(ids_of(3), subjects.small_model((0,)).new_cache()),
        "was made for": lambda: subjects.small_model((0,))(ids_of(3) % 97, model.new_cache()),
        "appears in two segments": lambda: model(ids_of(6), segments=[(3, m := model.new_cache()[0]), (3, m)]),
        "has no MTP block": lambda: model.new_cache(mtp=True),
        "batch=0": lambda: model.new_cache(0),
        "max_rewind=-1": lambda: model.new_cache(max_rewind=-1),
        "rows of ids for a cache of 2": lambda: model(ids_of(3), model.new_cache(2)),
        "cannot rewind 1 tokens": lambda: model.new_cache()[0].rewind(1),
        "cache format 'int8'": lambda: model.new_cache(format="int8"),
        "not a power of two": lambda: V32Transformer(other).new_cache(format="packed"),
        "must not be negative": lambda: model.new_cache(capacity=-1),
        "too few": lambda: replace(V32["default"], n_group=16, topk_group=1),
        "must divide": lambda: replace(V32["default"], n_group=5),
    }.items():
        with pytest.raises(UserError, match=part):
            call()
