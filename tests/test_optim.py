"""Failures caught here: a wrong Newton-Schulz coefficient or step count, an update of another size, matrices
that are orthogonalised as they are stored instead of as they are meant, an input written to, a parameter in
the wrong group or in none, an AdamW that is not AdamW, a resume that differs, a schedule with a jump or a
dead step.
"""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from dsv4 import controls, ops
from dsv4.config import ModelConfig, V32Config, preset_of
from dsv4.errors import UserError
from dsv4.model.transformer import Transformer
from dsv4.ops.newton_schulz import HYBRID, JORDAN, POLAR_EXPRESS, newton_schulz, polar
from dsv4.train.optim import (
    HybridOptimizer,
    clip_gradients,
    kind_of,
    logical_matrices,
    logical_view,
    parameter_groups,
)
from dsv4.train.schedule import check_schedule, decay_steps, lr_scale, mtp_weight

CONFIG = ModelConfig.preset("tiny")
SHAPES = [(256, 256), (256, 1024), (1024, 256), (24, 512), (37, 53), (53, 37), (16, 64), (4, 256)]
REACH = 1.16e-4  # values above this share of the Frobenius norm end in [0.999, 1.001]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def singular_values(m: Tensor) -> Tensor:
    return torch.linalg.svdvals(m.double())


def through(values: Tensor, steps=HYBRID) -> Tensor:
    """What the step polynomials make of scalar singular values."""
    for a, b, c in steps:
        values = a * values + b * values**3 + c * values**5
    return values


# ---- Newton-Schulz


@pytest.mark.parametrize(
    ("start", "after_8", "after_10"),
    [
        (1e-4, 1.2023, 1.002015),
        (1e-3, 0.9179, 1.000001),
        (1e-2, 1.0860, 1.000019),
        (0.1, 1.1082, 1.000061),
        (0.5, 1.1306, 1.000163),
        (1.0, 1.0810, 1.000014),
    ],
)
def test_hybrid_steps_on_one_singular_value(start: float, after_8: float, after_10: float) -> None:
    """To the last digit given; a diagonal matrix carries `start` beside a value that fills up the norm."""
    m = torch.diag(torch.tensor([math.sqrt(1 - start**2), start], dtype=torch.float64))
    assert len(HYBRID) == 10
    for steps, expected, digits in ((HYBRID[:8], after_8, 4), (HYBRID, after_10, 6)):
        assert round(newton_schulz(m, steps, dtype=torch.float64)[1, 1].item(), digits) == expected


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_end_at_one(shape: tuple[int, int], seed: int) -> None:
    """In fp32, [0.999, 1.001] for every value within reach; a rectangular Gaussian matrix has no others."""
    m = gaussian(*shape, seed=seed)
    start = singular_values(m) / m.double().norm()
    end = singular_values(newton_schulz(m))
    if shape[0] != shape[1]:
        assert start.min() > REACH
    inside = int((start > REACH).sum())
    # The order is not kept by the steps, so: as many values in the band as started within reach.
    assert int(((end > 0.999) & (end < 1.001)).sum()) >= inside
    torch.testing.assert_close(end.sort().values, through(start).sort().values, rtol=0, atol=1e-4)


def test_square_matrices_within_reach_are_orthogonal() -> None:
    """Eight square Gaussian matrices whose smallest value is within reach: all values in the band."""
    found = 0
    for seed in range(40):
        m = gaussian(128, 128, seed=seed)
        if (singular_values(m).min() / m.double().norm()) > REACH:
            found += 1
            values = singular_values(newton_schulz(m))
            assert values.min() > 0.999 and values.max() < 1.001, seed
        if found == 8:
            break
    assert found == 8


def test_five_steps_are_worse() -> None:
    """The usual Muon leaves the values far from one: the ablation switch really switches."""
    values = singular_values(newton_schulz(gaussian(256, 1024), JORDAN))
    assert values.min() < 0.75 and values.max() > 1.1


def test_each_step_of_polar_express_is_the_nearest_quintic() -> None:
    """Of all odd quintics the nearest to 1 over an interval leaves its error with alternating sign at four points, the
    ends among them (Chebyshev). The interval of a step is what the one before has left."""
    low, high = 1e-3, 1.0
    for step in POLAR_EXPRESS:
        values = torch.linspace(low, high, 400_001, dtype=torch.float64)
        error = 1 - through(values, [step])
        most = error.abs().max().item()
        turns = ((error[1:-1] - error[:-2]) * (error[2:] - error[1:-1]) <= 0).nonzero()[:, 0] + 1
        extremes = torch.stack([error[0], *error[turns], error[-1]])
        if most > 1e-4:  # beyond that the six digits of a coefficient are seen
            assert len(extremes) == 4
            torch.testing.assert_close(extremes, most * torch.tensor([1.0, -1, 1, -1]).double(), rtol=1e-3, atol=1e-5)
        low, high = 1 - most, 1 + most
    assert low > 1 - 1e-6 and high < 1 + 1e-6


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("shape", [(256, 1024), (1024, 256), (24, 512), (53, 37)])
def test_singular_values_of_polar_express(shape: tuple[int, int], dtype: torch.dtype, near: float) -> None:
    m = gaussian(*shape)
    assert singular_values(m).min() > 1e-3 * m.double().norm()
    values = singular_values(newton_schulz(m, POLAR_EXPRESS, dtype=dtype))
    assert (values - 1).abs().max() < near


def test_heads_apart() -> None:
    """Each head's block of the queries' projections is orthogonalised as if it were a parameter of its own."""
    c = CONFIG
    named = dict(Transformer(c).named_parameters())
    indexer = next(name for name in named if name.endswith(".indexer.wq_b.weight"))
    shapes = {
        "layers.2.attn.wq_b.weight": (c.num_attention_heads, c.head_dim, c.q_lora_rank),
        indexer: (c.index_n_heads, c.index_head_dim, c.q_lora_rank),
    }
    for name, (heads, width, columns) in shapes.items():
        shape = named[name].shape
        assert logical_matrices(name, shape, c) == [(1, heads * width, columns)]
        assert logical_matrices(name, shape, c, heads_apart=True) == [(heads, width, columns)]
    groups = parameter_groups(named.items(), c, heads_apart=True)
    apart = dict(zip(groups[0]["names"], groups[0]["matrices"], strict=True))
    plain = parameter_groups(named.items(), c)[0]
    differ = {n for n, stacks in zip(plain["names"], plain["matrices"], strict=True) if apart[n] != stacks}
    assert differ == {n for n in named if n.endswith(".wq_b.weight")}


@pytest.mark.parametrize("shape", [(64, 64), (24, 512), (53, 37)])
def test_agrees_with_svd(shape: tuple[int, int]) -> None:
    """Same singular vectors as the exact answer, hence also not transposed; values within 6e-4 of one."""
    m = gaussian(*shape, seed=3)
    torch.testing.assert_close(newton_schulz(m), polar(m), rtol=0, atol=6e-4)
    torch.testing.assert_close(newton_schulz(m.mT), newton_schulz(m).mT, rtol=0, atol=1e-6)


@pytest.mark.parametrize("orthogonalise", [newton_schulz, polar])
def test_stack_is_one_by_one(orthogonalise) -> None:
    """Leading dims only stack; a matrix feels neither its neighbours nor their scale, zeros or NaN."""
    m = gaussian(3, 2, 24, 40)
    m[0, 0] *= 1e20
    m[0, 1] *= 1e-20
    m[1, 0] = 0
    together = orthogonalise(m)
    for i in range(3):
        for j in range(2):
            torch.testing.assert_close(together[i, j], orthogonalise(m[i, j]), rtol=0, atol=1e-6)
    assert together[1, 0].eq(0).all()
    if orthogonalise is newton_schulz:
        m[2, 1, 0, 0] = float("nan")
        broken = newton_schulz(m)
        assert broken[2, 1].isnan().all() and broken[:2].isfinite().all()


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-10, 1e10, 1e30])
def test_magnitude_does_not_matter(scale: float) -> None:
    """Also where the squares of the entries vanish or overflow in fp32."""
    m = gaussian(12, 30)
    values = singular_values(newton_schulz(m * scale))
    assert values.min() > 0.999 and values.max() < 1.001


def test_zeros_stay_zeros() -> None:
    for shape in ((3, 5), (5, 3), (2, 4, 4)):
        assert newton_schulz(torch.zeros(shape)).eq(0).all()
        assert polar(torch.zeros(shape)).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_input_is_not_written_to(dtype: torch.dtype) -> None:
    """A cast to the same dtype returns the caller's own tensor: nothing may be divided in place after it."""
    for work in (torch.float32, torch.bfloat16, torch.float64):
        for shape in ((8, 12), (12, 8), (2, 8, 8)):
            m = gaussian(*shape).to(dtype)
            before = m.clone()
            assert newton_schulz(m, dtype=work).dtype == work
            polar(m, dtype=work)
            assert torch.equal(m, before)


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (24, 512)])
def test_bf16_arithmetic(shape: tuple[int, int]) -> None:
    values = singular_values(newton_schulz(gaussian(*shape), dtype=torch.bfloat16))
    assert values.min() > 0.98 and values.max() < 1.02


# ---- which parameter goes where


def published_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every trainable parameter of a model with one window, one CSA and one HCA layer and an MTP block."""
    d, n, i, e = c.hidden_size, c.hc_mult, c.moe_intermediate_size, c.n_routed_experts
    group_in = c.num_attention_heads * c.head_dim // c.o_groups
    mixing = (2 + n) * n

    def compressor(prefix: str, ratio: int, width: int) -> dict[str, tuple[int, ...]]:
        stored = width * (2 if ratio == 4 else 1)
        return {
            f"{prefix}.ape": (ratio, stored),
            f"{prefix}.wkv.weight": (stored, d),
            f"{prefix}.wgate.weight": (stored, d),
            f"{prefix}.norm.weight": (width,),
        }

    def block(prefix: str, ratio: int) -> dict[str, tuple[int, ...]]:
        shapes = {
            f"{prefix}.attn_norm.weight": (d,),
            f"{prefix}.ffn_norm.weight": (d,),
            **{f"{prefix}.hc_{part}_fn": (mixing, n * d) for part in ("attn", "ffn")},
            **{f"{prefix}.hc_{part}_base": (mixing,) for part in ("attn", "ffn")},
            **{f"{prefix}.hc_{part}_scale": (3,) for part in ("attn", "ffn")},
            f"{prefix}.attn.attn_sink": (c.num_attention_heads,),
            f"{prefix}.attn.wq_a.weight": (c.q_lora_rank, d),
            f"{prefix}.attn.q_norm.weight": (c.q_lora_rank,),
            f"{prefix}.attn.wq_b.weight": (c.num_attention_heads * c.head_dim, c.q_lora_rank),
            f"{prefix}.attn.wkv.weight": (c.head_dim, d),
            f"{prefix}.attn.kv_norm.weight": (c.head_dim,),
            f"{prefix}.attn.wo_a.weight": (c.o_groups * c.o_lora_rank, group_in),
            f"{prefix}.attn.wo_b.weight": (d, c.o_groups * c.o_lora_rank),
            f"{prefix}.ffn.gate.weight": (e, d),
            f"{prefix}.ffn.experts.w13": (e, 2, i, d),
            f"{prefix}.ffn.experts.w2": (e, d, i),
            f"{prefix}.ffn.shared_experts.w1.weight": (i, d),
            f"{prefix}.ffn.shared_experts.w2.weight": (d, i),
            f"{prefix}.ffn.shared_experts.w3.weight": (i, d),
        }
        if ratio:
            shapes |= compressor(f"{prefix}.attn.compressor", ratio, c.head_dim)
        if ratio == 4:
            indexer = f"{prefix}.attn.indexer"
            shapes |= {
                f"{indexer}.wq_b.weight": (c.index_n_heads * c.index_head_dim, c.q_lora_rank),
                f"{indexer}.weights_proj.weight": (c.index_n_heads, d),
                **compressor(f"{indexer}.compressor", ratio, c.index_head_dim),
            }
        return shapes

    def ending(prefix: str) -> dict[str, tuple[int, ...]]:
        return {
            f"{prefix}norm.weight": (d,),
            f"{prefix}hc_head_fn": (n, n * d),
            f"{prefix}hc_head_base": (n,),
            f"{prefix}hc_head_scale": (1,),
        }

    mtp = {f"mtp.0.{name}.weight": (d, d) for name in ("e_proj", "h_proj")}
    mtp |= {f"mtp.0.{name}.weight": (d,) for name in ("enorm", "hnorm")}
    ends = {"embed.weight": (c.vocab_size, d), "head.weight": (c.vocab_size, d)}
    layers = block("layers.0", 0) | block("layers.1", 4) | block("layers.2", 128)
    return ends | layers | ending("") | mtp | block("mtp.0.block", 0) | ending("mtp.0.")


ADAMW_PLAIN = ("norm.weight", "_base", "_scale", ".attn_sink", ".ape")
MUON = (
    "_fn", ".wq_a.weight", ".wq_b.weight", ".wkv.weight", ".wgate.weight", ".wo_a.weight", ".wo_b.weight",
    ".weights_proj.weight", ".gate.weight", ".w13", ".w2", ".w1.weight", ".w2.weight", ".w3.weight",
    "e_proj.weight", "h_proj.weight",
)  # fmt: skip


def parameters_of(shapes: dict[str, tuple[int, ...]], scale: float = 0.02) -> dict[str, Tensor]:
    return {name: torch.nn.Parameter(torch.randn(shape) * scale) for name, shape in shapes.items()}


def with_gradients(parameters: dict[str, Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters.values():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def test_every_parameter_is_in_exactly_one_group() -> None:
    parameters = parameters_of(published_shapes(CONFIG))
    groups = parameter_groups(parameters.items(), CONFIG)
    placed = {name: group["kind"] for group in groups for name in group["names"]}
    assert sum(len(group["params"]) for group in groups) == len(placed) == len(parameters)
    for name, kind in placed.items():
        if name in ("embed.weight", "head.weight"):
            assert kind == "adamw_decay", name
        else:
            # Each name matches exactly one of the two lists, so neither hides a mistake of the other.
            assert (name.endswith(ADAMW_PLAIN), name.endswith(MUON)) in ((True, False), (False, True)), name
            assert kind == ("adamw_plain" if name.endswith(ADAMW_PLAIN) else "muon"), name
    assert {group["kind"]: group["weight_decay"] for group in groups} == {
        "muon": 0.1,
        "adamw_decay": 0.1,
        "adamw_plain": 0.0,
    }


def test_the_names_above_are_the_models() -> None:
    """So that a parameter added to the model has to be thought about here."""
    config = CONFIG.with_(num_hidden_layers=3, compress_ratios=(0, 4, 128, 0))
    with torch.device("meta"):
        model = Transformer(config)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == published_shapes(config)


def test_frozen_parameters_are_in_no_group() -> None:
    parameters = parameters_of({"layers.0.attn.wkv.weight": (8, 8), "norm.weight": (8,)})
    parameters["norm.weight"].requires_grad_(False)
    groups = parameter_groups(parameters.items(), CONFIG)
    assert [len(group["params"]) for group in groups] == [1, 0, 0]


def test_logical_matrices() -> None:
    c = CONFIG
    shapes = {name: torch.Size(shape) for name, shape in published_shapes(c).items()}
    d, i, e, n = c.hidden_size, c.moe_intermediate_size, c.n_routed_experts, c.hc_mult
    group_in = c.num_attention_heads * c.head_dim // c.o_groups
    expected = {
        "layers.1.ffn.experts.w13": [(2 * e, i, d)],
        "layers.1.ffn.experts.w2": [(e, d, i)],
        "layers.1.attn.wo_a.weight": [(c.o_groups, c.o_lora_rank, group_in)],
        "layers.1.attn.wq_b.weight": [(1, c.num_attention_heads * c.head_dim, c.q_lora_rank)],
        "layers.1.attn.wkv.weight": [(1, c.head_dim, d)],
        "layers.1.attn.compressor.wkv.weight": [(2, c.head_dim, d)],
        "layers.1.attn.compressor.wgate.weight": [(2, c.head_dim, d)],
        "layers.1.attn.indexer.compressor.wkv.weight": [(2, c.index_head_dim, d)],
        "layers.2.attn.compressor.wkv.weight": [(1, c.head_dim, d)],
        "layers.1.hc_attn_fn": [(1, n, n * d), (1, n, n * d), (1, n * n, n * d)],
        "mtp.0.block.hc_ffn_fn": [(1, n, n * d), (1, n, n * d), (1, n * n, n * d)],
        "hc_head_fn": [(1, n, n * d)],
        "mtp.0.hc_head_fn": [(1, n, n * d)],
    }
    for name, runs in expected.items():
        assert logical_matrices(name, shapes[name], c) == runs, name
    for name, shape in shapes.items():
        if kind_of(name, torch.empty(shape, device="meta")) == "muon":
            assert sum(math.prod(run) for run in logical_matrices(name, shape, c)) == shape.numel(), name


@pytest.mark.parametrize("kind", ["v32", "llama"])
def test_the_matrices_of_what_v4_is_compared_with(kind: str) -> None:
    """Norms and their biases get AdamW without decay, all else but both ends Muon; wkv_a is W^DKV over W^KR."""
    config = preset_of(kind, "tiny")
    with torch.device("meta"):
        named = dict(controls.build(config).named_parameters())
    groups = {group["kind"]: group for group in parameter_groups(named.items(), config)}
    assert sum(len(group["names"]) for group in groups.values()) == len(named)
    assert groups["adamw_decay"]["names"] == ["embed.weight", "head.weight"]
    plain = groups["adamw_plain"]
    assert plain["weight_decay"] == 0 and all("norm." in name for name in plain["names"])
    runs = dict(zip(groups["muon"]["names"], groups["muon"]["matrices"], strict=True))
    assert not any("norm" in name for name in runs)
    assert all(sum(math.prod(run) for run in of) == named[name].numel() for name, of in runs.items())
    if isinstance(config, V32Config):
        d, i = config.hidden_size, config.moe_intermediate_size
        assert runs["layers.1.attn.wkv_a.weight"] == [(1, 48, d), (1, 16, d)]
        assert runs["layers.1.attn.wkv_b.weight"] == [(1, 4 * 64, 48)]
        assert runs["layers.1.ffn.experts.w13"] == [(16, i, d)] and "layers.1.ffn.gate.weight" in runs
        assert "layers.1.attn.indexer.wk.weight" in runs
    else:
        assert runs["layers.0.attn.wk.weight"] == [(1, 64, config.hidden_size)]


# ---- Muon


def optimizer(parameters: dict[str, Tensor], lr: float = 0.01, **options) -> HybridOptimizer:
    return HybridOptimizer(parameter_groups(parameters.items(), CONFIG), lr, **options)


def updates_of(shapes: dict[str, tuple[int, ...]], seed: int = 1, **options) -> dict[str, Tensor]:
    """Update / lr of one step from zero parameters, where decay does nothing."""
    parameters = parameters_of(shapes, scale=0.0)
    with_gradients(parameters, seed)
    optimizer(parameters, lr=1.0, **options).step()
    return {name: -p.detach() for name, p in parameters.items()}


def test_update_rms() -> None:
    """0.18 for every logical matrix: up to 0.06% above, as the steps leave values in [1, 1.0006].

    A square matrix may start with one singular value too small to arrive, and then misses its share 1 / n.
    """
    shapes = {k: v for k, v in published_shapes(CONFIG).items() if len(v) > 1 and not k.endswith(".ape")}
    del shapes["embed.weight"], shapes["head.weight"]
    for name, update in updates_of(shapes).items():
        for run in logical_view(update, logical_matrices(name, update.shape, CONFIG)):
            for matrix in run:
                rms, (a, b) = matrix.square().mean().sqrt().item(), matrix.shape
                least = 0.99999 if a != b else math.sqrt(1 - 1 / a)
                assert 0.18 * least < rms < 0.18 * 1.0006, (name, rms)


def test_muon_by_hand() -> None:
    """Three steps against the paper's lines written out, with decay and Nesterov."""
    lr, mu, wd = 0.02, 0.95, 0.1
    name = "layers.0.attn.wkv.weight"
    parameters = {name: torch.nn.Parameter(gaussian(16, 40))}
    muon = optimizer(parameters, lr=lr)
    w, m = gaussian(16, 40), torch.zeros(16, 40)
    for step in range(3):
        g = gaussian(16, 40, seed=10 + step)
        parameters[name].grad = g.clone()
        muon.step()
        m = mu * m + g
        w = w * (1 - lr * wd) - lr * newton_schulz(mu * m + g) * math.sqrt(40) * 0.18
        assert torch.equal(parameters[name].grad, g)
    torch.testing.assert_close(parameters[name].detach(), w, rtol=0, atol=1e-6)
    torch.testing.assert_close(muon.state_dict()[f"{name}.momentum"], m, rtol=1e-6, atol=1e-6)


def test_storage_layout_does_not_matter() -> None:
    """Stacked experts = single matrices; groups of `wo_a`, parts of an mHC `fn`, series of `wkv` likewise."""
    c = CONFIG
    shapes = published_shapes(c)
    grads = {
        name: gaussian(*shapes[name], seed=7)
        for name in (
            "layers.1.ffn.experts.w13",
            "layers.1.attn.wo_a.weight",
            "layers.1.hc_attn_fn",
            "layers.1.attn.compressor.wkv.weight",
        )
    }
    w13, wo_a, fn, wkv = grads.values()
    n = c.hc_mult
    parts = {
        "layers.1.ffn.experts.w13": [*w13[:, 0], *w13[:, 1]],
        "layers.1.attn.wo_a.weight": wo_a.chunk(c.o_groups),
        "layers.1.hc_attn_fn": fn.split([n, n, n * n]),
        "layers.1.attn.compressor.wkv.weight": wkv.chunk(2),
    }
    stored = {name: torch.nn.Parameter(torch.zeros_like(g)) for name, g in grads.items()}
    for name, p in stored.items():
        p.grad = grads[name]
    optimizer(stored, lr=1.0).step()
    for name, pieces in parts.items():
        single = {f"x.{k}.weight": torch.nn.Parameter(torch.zeros_like(g)) for k, g in enumerate(pieces)}
        for p, piece in zip(single.values(), pieces, strict=True):
            p.grad = piece.clone()
        optimizer(single, lr=1.0).step()
        whole = stored[name].detach()
        if name.endswith("w13"):
            whole = whole.transpose(0, 1)
        together = torch.cat([p.detach().flatten() for p in single.values()])
        torch.testing.assert_close(whole.flatten(), together, rtol=0, atol=2e-6)


def test_chunking_changes_nothing() -> None:
    """Memory bounds cut piles of same-shaped matrices anywhere: also inside a stack, and below one matrix."""
    shapes = {
        "layers.0.ffn.experts.w13": (5, 2, 8, 12),
        "layers.0.ffn.shared_experts.w1.weight": (8, 12),
        "layers.1.ffn.experts.w13": (3, 2, 8, 12),
    }
    with ops.using("blocked"):  # in C++ each matrix is by itself
        whole = updates_of(shapes)
        for limit in (1, 3 * 96, 7 * 96, 10 * 96, 11 * 96):
            for name, update in updates_of(shapes, chunk_elements=limit).items():
                torch.testing.assert_close(update, whole[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("ns_dtype", [torch.float32, torch.bfloat16])
def test_bf16_gradients_and_parameters(ns_dtype: torch.dtype) -> None:
    """The momentum stays fp32 and true to the sum of gradients, which are not written to."""
    p = torch.nn.Parameter(torch.zeros(16, 24, dtype=torch.bfloat16))
    parameters = {"layers.0.attn.wkv.weight": p}
    muon = optimizer(parameters, lr=0.1, ns_dtype=ns_dtype)
    expected = torch.zeros(16, 24)
    for step in range(3):
        g = gaussian(16, 24, seed=step).bfloat16()
        p.grad = g.clone()
        muon.step()
        expected = 0.95 * expected + g.float()
        assert torch.equal(p.grad, g)
    momentum = muon.state_dict()["layers.0.attn.wkv.weight.momentum"]
    assert momentum.dtype == torch.float32 and p.isfinite().all()
    torch.testing.assert_close(momentum, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ns", ["hybrid10", "svd"])
def test_zero_gradient_only_decays(ns: str) -> None:
    """An expert that saw no token: no NaN, no movement but the decay."""
    p = torch.nn.Parameter(gaussian(3, 2, 8, 8))
    before = p.detach().clone()
    p.grad = gaussian(3, 2, 8, 8, seed=2)
    p.grad[1] = 0
    optimizer({"layers.0.ffn.experts.w13": p}, lr=0.5, ns=ns).step()
    torch.testing.assert_close(p.detach()[1], before[1] * (1 - 0.5 * 0.1))
    assert p.isfinite().all() and not torch.equal(p[0], before[0])


def test_no_gradient_no_touch() -> None:
    """Neither decay nor state moves a parameter whose gradient is None."""
    shapes = {"embed.weight": (8, 4), "norm.weight": (4,), "layers.0.attn.wkv.weight": (4, 4)}
    parameters = parameters_of(shapes)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    opt = optimizer(parameters)
    opt.step()
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())
    assert all(tensor.eq(0).all() for tensor in opt.state_dict().values())


def test_ns_switch() -> None:
    shapes = {"layers.0.attn.wkv.weight": (32, 64)}
    hybrid, jordan, svd = (
        updates_of(shapes, ns=ns)["layers.0.attn.wkv.weight"] / math.sqrt(64) / 0.18
        for ns in ("hybrid10", "jordan5", "svd")
    )
    torch.testing.assert_close(singular_values(svd), torch.ones(32, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(hybrid, svd, rtol=0, atol=6e-4)
    assert (singular_values(jordan) - 1).abs().max() > 0.05


# ---- AdamW


def test_adamw_is_torchs() -> None:
    """Twenty steps, tiny and zero gradients included, beside torch.optim.AdamW with the paper's numbers."""
    shapes = {"embed.weight": (16, 8), "norm.weight": (8,), "layers.0.attn.attn_sink": (4,)}
    ours = parameters_of(shapes)
    theirs = {name: torch.nn.Parameter(p.detach().clone()) for name, p in ours.items()}
    reference = torch.optim.AdamW(
        [
            {"params": [theirs["embed.weight"]], "weight_decay": 0.1},
            {"params": [p for n, p in theirs.items() if n != "embed.weight"], "weight_decay": 0.0},
        ],
        lr=0.01, betas=(0.9, 0.95), eps=1e-20, foreach=False,
    )  # fmt: skip
    opt = optimizer(ours)
    for step in range(20):
        with_gradients(ours, seed=step)
        for name, p in ours.items():
            assert p.grad is not None
            p.grad *= 10.0 ** (-2 * (step % 8))
            p.grad[0] = 0
            theirs[name].grad = p.grad.clone()
        opt.step()
        reference.step()
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], rtol=1e-5, atol=1e-7)


# ---- state


def test_state_round_trip_is_bit_exact(tmp_path) -> None:
    """Through a safetensors file, into a fresh optimiser: every later step has the same bits."""
    from safetensors.torch import load_file, save_file

    shapes = published_shapes(CONFIG)
    parameters = parameters_of(shapes)
    opt = optimizer(parameters)
    for step in range(3):
        with_gradients(parameters, step)
        parameters["layers.1.attn.indexer.wq_b.weight"].grad = None  # has no loss of its own yet
        opt.step()
    save_file(opt.state_dict(), tmp_path / "state.safetensors")
    copies = {name: torch.nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    resumed = optimizer(copies)
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    for step in range(3, 6):
        for params, o in ((parameters, opt), (copies, resumed)):
            with_gradients(params, step)
            o.set_lr(0.01 / step)
            o.step()
    assert all(torch.equal(p, copies[name]) for name, p in parameters.items())
    theirs = resumed.state_dict()
    assert all(torch.equal(t, theirs[name]) for name, t in opt.state_dict().items())


def test_state_of_another_model_is_refused() -> None:
    parameters = parameters_of({"embed.weight": (8, 4), "layers.0.attn.wkv.weight": (4, 4)})
    opt = optimizer(parameters)
    good = {name: tensor.clone() for name, tensor in opt.state_dict().items()}
    assert set(good) == {
        "layers.0.attn.wkv.weight.momentum",
        "embed.weight.exp_avg", "embed.weight.exp_avg_sq", "embed.weight.steps",
    }  # fmt: skip
    bad: list[tuple[dict[str, Tensor], str]] = [
        ({k: v for k, v in good.items() if k != "embed.weight.steps"}, "lacks 'embed.weight.steps'"),
        (good | {"x.momentum": torch.zeros(1)}, "also has 'x.momentum'"),
        (good | {"embed.weight.exp_avg": torch.ones(8, 5)}, r"\[8, 5\].*\[8, 4\]"),
        (good | {"embed.weight.exp_avg": torch.ones(8, 4).half()}, "float16"),
    ]
    for state, message in bad:
        with pytest.raises(UserError, match=message):
            opt.load_state_dict(state)
    assert all(tensor.eq(0).all() for tensor in opt.state_dict().values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ns": "hybrid"}, "hybrid10, jordan5, polar_express, svd"),
        ({"lr": -1.0}, "-1.0"),
        ({"lr": float("nan")}, "nan"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"betas": (0.9, 1.5)}, "beta2 is 1.5"),
    ],
)
def test_impossible_options(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        optimizer(parameters_of({"norm.weight": (4,)}), **options)


# ---- clipping


def test_clipping() -> None:
    parameters = parameters_of({"a.weight": (3, 4), "b.weight": (5,), "c.weight": (2,)})
    parameters["a.weight"].grad = torch.full((3, 4), 3.0)
    parameters["b.weight"].grad = torch.full((5,), -4.0)
    norm = math.sqrt(12 * 9 + 5 * 16)
    assert clip_gradients(parameters.values(), math.inf) == pytest.approx(norm)
    assert parameters["a.weight"].grad.eq(3).all()  # only measured
    assert clip_gradients(parameters.values(), 2 * norm) == pytest.approx(norm)
    assert parameters["a.weight"].grad.eq(3).all()  # already short enough
    assert clip_gradients(parameters.values(), 1.0) == pytest.approx(norm)
    assert clip_gradients(parameters.values(), math.inf) == pytest.approx(1.0)
    torch.testing.assert_close(parameters["b.weight"].grad, torch.full((5,), -4.0 / norm))
    assert clip_gradients([parameters["c.weight"]], 1.0) == 0.0
    with pytest.raises(UserError, match="positive"):
        clip_gradients(parameters.values(), 0.0)


def test_norm_is_fp32_also_for_bf16_gradients() -> None:
    """bf16 has three digits: neither the sum nor its root may pass through it."""
    p = torch.nn.Parameter(torch.zeros(99_999, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    assert clip_gradients([p], math.inf) == pytest.approx(math.sqrt(99_999), rel=1e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_norm_is_reported_and_changes_nothing(poison: float) -> None:
    p, q = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(4))
    p.grad, q.grad = torch.ones(4), torch.ones(4)
    p.grad[1] = poison
    assert not math.isfinite(clip_gradients([p, q], 0.5))
    assert q.grad.eq(1).all() and p.grad[0] == 1


# ---- schedule

LENGTHS = st.tuples(st.integers(1, 400), st.integers(0, 400), st.integers(0, 400))


@given(LENGTHS, st.floats(0, 1))
def test_schedule_course(lengths: tuple[int, int, int], final: float) -> None:
    """Up in equal steps, flat at 1, down without a rise to exactly `final`; never 0 on the way."""
    total, warmup, decay = lengths
    assume(warmup + decay <= total)
    course = [lr_scale(step, total, warmup, decay, final) for step in range(total + 3)]
    assert all(0 < value <= 1 for value in course[: total - 1])
    for step in range(warmup):
        assert course[step] == (step + 1) / warmup
    assert all(value == 1 for value in course[warmup : total - decay])
    falling = course[max(total - decay - 1, 0) : total]
    assert all(later <= earlier for earlier, later in zip(falling, falling[1:], strict=False))
    if decay:
        assert course[total - 1 :] == [final] * 4
    if decay > 1:
        middle = (course[total - decay + (decay - 1) // 2] + course[total - decay + decay // 2 - 1]) / 2
        assert middle == pytest.approx((1 + final) / 2, abs=1e-9)
    if decay > 4 and final < 1:  # a cosine leaves slowly: a straight line would fall faster at first
        assert course[total - decay] > 1 - (1 - final) / decay


@given(LENGTHS)
def test_mtp_weight_turns_where_the_rate_does(lengths: tuple[int, int, int]) -> None:
    total, warmup, decay = lengths
    assume(warmup + decay <= total)
    for step in range(total):
        in_decay = step >= total - decay
        assert mtp_weight(step, total, warmup, decay) == (0.1 if in_decay else 0.3)
        if lr_scale(step, total, warmup, decay) < 1 and step >= warmup:
            assert in_decay


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ((0, 0, 0), "0 steps"),
        ((100, 60, 50), "60.*50.*100"),
        ((100, -1, 0), "-1"),
        ((100, 0, -5), "-5"),
        ((100, 10, 10, 1.5), "1.5"),
        ((100, 10, 10, float("nan")), "nan"),
    ],
)
def test_impossible_schedules(setting: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_schedule(*setting)
    with pytest.raises(UserError, match=message):
        lr_scale(0, *setting)


def test_decay_steps() -> None:
    assert [decay_steps(200, f) for f in (0, 0.25, 1)] == [0, 50, 200]
    with pytest.raises(UserError, match="20"):
        decay_steps(200, 20)
