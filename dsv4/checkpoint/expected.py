"""The tensors that a V4 configuration asks for, by published names: shapes, and how a release stores each.

Written out from the configuration without building a model, so that a checkpoint of 150,000 tensors is judged at once
and without torch; the tests hold it to the models. Roles: "fp8" a matrix released in blocks of 128 x 128, "fp4" one of
a routed expert, "bf16" and "fp32" numbers, "int64" a table of ids.
"""

from collections.abc import Iterator
from typing import NamedTuple

from dsv4.config import AnyConfig, LayerKind, ModelConfig
from dsv4.config.v4 import WINDOW

FP8_BLOCK, FP4_BLOCK = 128, 32


class Want(NamedTuple):
    """What a configuration asks for under a name."""

    shape: tuple[int, ...]
    role: str


def wanted(config: AnyConfig) -> dict[str, Want]:
    """Every tensor of a model by its published name: the trunk's, and its MTP block's or DSpark drafter's.

    What V4 is compared with (controls, other residuals and attentions) is told by building it on the meta device.
    """
    if not isinstance(config, ModelConfig) or (config.residual, config.attention) != ("mhc", "compressed"):
        return _of_model(config)
    c = config
    found = {
        "embed.weight": Want((c.vocab_size, c.hidden_size), "bf16"),
        "head.weight": Want((c.vocab_size, c.hidden_size), "bf16"),
        "norm.weight": Want((c.hidden_size,), "bf16"),
        **dict(_collapse("", c)),
    }
    for layer in range(c.num_hidden_layers):
        found.update(_block(f"layers.{layer}.", c, c.layer_kind(layer), c.uses_hash_routing(layer)))
    if c.num_nextn_predict_layers:
        found.update(_mtp(c))
    if c.dspark_stages:
        found.update(_drafter(c))
    return found


def released(name: str, want: Want, *, base: bool = False) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name in the file, dtype, shape) of what a release stores for a tensor; base: experts in FP8, as -Base has."""
    shape, role = want
    if role == "fp4" and not base:
        yield name, "I8", packed_shape(shape)
        yield scale_of(name), "F8_E8M0", fp4_scales(shape)
    elif role in ("fp8", "fp4"):
        yield name, "F8_E4M3", shape
        yield scale_of(name), "F8_E8M0", fp8_scales(shape)
    else:
        yield name, {"bf16": "BF16", "fp32": "F32", "int64": "I64"}[role], shape


def scale_of(name: str) -> str:
    """The published name of a matrix's scales."""
    return name.removesuffix("weight") + "scale"


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """FP4: two numbers of a row in a byte."""
    return (shape[0], -(-shape[1] // 2))


def fp4_scales(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], -(-shape[1] // FP4_BLOCK))


def fp8_scales(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (-(-shape[0] // FP8_BLOCK), -(-shape[1] // FP8_BLOCK))


def _collapse(prefix: str, c: ModelConfig) -> Iterator[tuple[str, Want]]:
    yield f"{prefix}hc_head_fn", Want((c.hc_mult, c.hc_mult * c.hidden_size), "fp32")
    yield f"{prefix}hc_head_base", Want((c.hc_mult,), "fp32")
    yield f"{prefix}hc_head_scale", Want((1,), "fp32")


def _mtp(c: ModelConfig) -> Iterator[tuple[str, Want]]:
    yield from _block("mtp.0.", c, WINDOW, hashed=False)
    for name in ("e_proj", "h_proj"):
        yield f"mtp.0.{name}.weight", Want((c.hidden_size, c.hidden_size), "fp8")
    for name in ("enorm", "hnorm", "norm"):
        yield f"mtp.0.{name}.weight", Want((c.hidden_size,), "bf16")
    yield from _collapse("mtp.0.", c)


def _drafter(c: ModelConfig) -> Iterator[tuple[str, Want]]:
    """Of a DSpark drafter: its blocks, what leads into the first and out of the last."""
    d, vocab, rank = c.hidden_size, c.vocab_size, c.dspark_markov_rank
    for stage in range(c.dspark_stages):
        yield from _block(f"mtp.{stage}.", c, WINDOW, hashed=False)
    last = f"mtp.{c.dspark_stages - 1}."
    yield "mtp.0.main_proj.weight", Want((d, len(c.dspark_target_layer_ids) * d), "fp8")
    yield "mtp.0.main_norm.weight", Want((d,), "bf16")
    yield f"{last}norm.weight", Want((d,), "bf16")
    yield from _collapse(last, c)
    for name in ("markov_w1", "markov_w2"):
        yield f"{last}markov_head.{name}.weight", Want((vocab, rank), "bf16")
    yield f"{last}confidence_head.proj.weight", Want((1, d + rank), "bf16")


def _block(prefix: str, c: ModelConfig, kind: LayerKind, hashed: bool) -> Iterator[tuple[str, Want]]:
    d, width, heads, inner = c.hidden_size, c.head_dim, c.num_attention_heads, c.moe_intermediate_size
    rows = (2 + c.hc_mult) * c.hc_mult
    for part in ("attn", "ffn"):
        yield f"{prefix}{part}_norm.weight", Want((d,), "bf16")
        yield f"{prefix}hc_{part}_fn", Want((rows, c.hc_mult * d), "fp32")
        yield f"{prefix}hc_{part}_base", Want((rows,), "fp32")
        yield f"{prefix}hc_{part}_scale", Want((3,), "fp32")
    yield f"{prefix}attn.attn_sink", Want((heads,), "fp32")
    yield f"{prefix}attn.wq_a.weight", Want((c.q_lora_rank, d), "fp8")
    yield f"{prefix}attn.q_norm.weight", Want((c.q_lora_rank,), "bf16")
    yield f"{prefix}attn.wq_b.weight", Want((heads * width, c.q_lora_rank), "fp8")
    yield f"{prefix}attn.wkv.weight", Want((width, d), "fp8")
    yield f"{prefix}attn.kv_norm.weight", Want((width,), "bf16")
    yield f"{prefix}attn.wo_a.weight", Want((c.o_groups * c.o_lora_rank, heads * width // c.o_groups), "fp8")
    yield f"{prefix}attn.wo_b.weight", Want((d, c.o_groups * c.o_lora_rank), "fp8")
    if kind.ratio:
        yield from _compressor(f"{prefix}attn.compressor.", d, width, kind)
    if kind.indexed:
        indexer, keys = f"{prefix}attn.indexer.", c.index_head_dim
        yield f"{indexer}wq_b.weight", Want((c.index_n_heads * keys, c.q_lora_rank), "fp8")
        yield f"{indexer}weights_proj.weight", Want((c.index_n_heads, d), "bf16")
        yield from _compressor(f"{indexer}compressor.", d, keys, kind)
    yield f"{prefix}ffn.gate.weight", Want((c.n_routed_experts, d), "bf16")
    if hashed:
        yield f"{prefix}ffn.gate.tid2eid", Want((c.vocab_size, c.num_experts_per_tok), "int64")
    else:
        yield f"{prefix}ffn.gate.bias", Want((c.n_routed_experts,), "fp32")
    up, down = (inner, d), (d, inner)
    for matrix, shape in (("w1", up), ("w2", down), ("w3", up)):
        yield f"{prefix}ffn.shared_experts.{matrix}.weight", Want(shape, "fp8")
        want = Want(shape, "fp4")
        for expert in range(c.n_routed_experts):
            yield f"{prefix}ffn.experts.{expert}.{matrix}.weight", want


def _compressor(prefix: str, d: int, width: int, kind: LayerKind) -> Iterator[tuple[str, Want]]:
    series = 2 if kind.overlap else 1
    yield f"{prefix}ape", Want((kind.ratio, series * width), "fp32")
    for name in ("wkv", "wgate"):
        yield f"{prefix}{name}.weight", Want((series * width, d), "bf16")
    yield f"{prefix}norm.weight", Want((width,), "bf16")


def _of_model(config: AnyConfig) -> dict[str, Want]:
    import torch

    from dsv4 import controls
    from dsv4.checkpoint.names import file_names

    with torch.device("meta"):
        state = controls.build(config).state_dict()
    found: dict[str, Want] = {}
    for name, tensor in state.items():
        role = "bf16" if tensor.is_floating_point() else "int64"
        for file_name, place in file_names(name, tuple(tensor.shape), "published"):
            found[file_name] = Want(tuple(tensor.shape[len(place) :]), role)
    return found
