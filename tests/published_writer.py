"""A checkpoint in the released format, made without dsv4: from transformers' model and numpy alone.

Names, dtypes and layouts are those of the released files (FP8 e4m3 with a UE8M0 scale for every 128 x 128, FP4 experts
two to a byte with one for every 32 of a row, BF16, FP32, int64), quantised and written to safetensors by the few lines
here.
"""

import json
import re
from pathlib import Path

import numpy as np
import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

SIZES = dict(
    vocab_size=300, hidden_size=256, moe_intermediate_size=128, num_attention_heads=4, head_dim=128,
    q_lora_rank=128, o_groups=2, o_lora_rank=128, sliding_window=16, index_n_heads=32, index_head_dim=128, index_topk=8,
    n_routed_experts=4, num_experts_per_tok=2, num_hash_layers=1, hc_mult=4, hc_sinkhorn_iters=20, hc_eps=1e-6,
    rms_norm_eps=1e-6, routed_scaling_factor=1.5, swiglu_limit=10.0, compress_rope_theta=160000.0, rope_theta=10000.0,
    max_position_embeddings=1048576,
)  # fmt: skip
RATIOS = [0, 4, 128, 4]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.array([(8 + m if e else m) * 2.0 ** (max(e, 1) - 10) for e in range(16) for m in range(8)][:127])
NAMES = (
    ("model.embed_tokens", "embed"), ("lm_head", "head"), ("model.hc_head.hc_", "hc_head_"), ("model.", ""),
    ("self_attn.sinks", "attn.attn_sink"), ("self_attn.compressor.indexer.scorer", "attn.indexer"),
    ("self_attn.compressor.indexer.q_b_proj", "attn.indexer.wq_b"),
    ("self_attn.compressor.indexer.", "attn.indexer.compressor."), ("self_attn.q_a_proj", "attn.wq_a"),
    ("self_attn.q_a_norm", "attn.q_norm"), ("self_attn.q_b_proj", "attn.wq_b"), ("self_attn.kv_proj", "attn.wkv"),
    ("self_attn.o_a_proj", "attn.wo_a"), ("self_attn.o_b_proj", "attn.wo_b"), ("self_attn.", "attn."),
    ("compressor.kv_proj", "compressor.wkv"), ("compressor.gate_proj", "compressor.wgate"),
    ("compressor.kv_norm", "compressor.norm"), ("position_bias", "ape"), ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"), ("attn_hc.", "hc_attn_"), ("ffn_hc.", "hc_ffn_"), ("mlp.", "ffn."),
    ("e_score_correction_bias", "bias"), ("shared_experts.gate_proj", "shared_experts.w1"),
    ("shared_experts.up_proj", "shared_experts.w3"), ("shared_experts.down_proj", "shared_experts.w2"),
)  # fmt: skip
FP8 = re.compile(r"(attn\.(wq_a|wq_b|wkv|wo_a|wo_b)|indexer\.wq_b|shared_experts\.w[123]|[eh]_proj)\.weight$")
FP32 = re.compile(r"hc_|ape$|attn_sink$|gate\.bias$")


def nearest(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Codes of numbers on a grid of positive numbers, ties to the even code."""
    a = np.abs(values)
    right = np.clip(np.searchsorted(grid, a), 1, len(grid) - 1)
    low, high = a - grid[right - 1], grid[right] - a
    return np.where((low < high) | ((low == high) & (right % 2 == 1)), right - 1, right)


def quantise(w: np.ndarray, code: str, more: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes, scale bytes, what they stand for); more: by how many powers of two scales are above what would do."""
    high, wide, grid = (1, 32, E2M1) if code == "fp4" else (128, 128, E4M3)
    rows, columns = w.shape
    padded = np.pad(w, ((0, -rows % high), (0, -columns % wide)))
    largest = np.abs(padded.reshape(padded.shape[0] // high, high, -1, wide)).max(axis=(1, 3))
    power = np.ceil(np.log2(np.maximum(largest, 1e-30) / grid[-1])).astype(int)
    power = power + more[: power.shape[0], : power.shape[1]]
    scale = np.repeat(np.repeat(2.0**power, high, 0), wide, 1)[:rows, :columns]
    codes = nearest(w / scale, grid)
    numbers = np.copysign(grid[codes] * scale, w)
    signed = codes + np.signbit(w) * (8 if code == "fp4" else 128)
    if code == "fp4":
        signed = signed[:, 0::2] + 16 * signed[:, 1::2]  # the even column in the low nibble
    return signed.astype(np.uint8), (power + 127).astype(np.uint8), numbers


def bf16(w: np.ndarray) -> np.ndarray:
    """Numbers that BF16 holds: the lower half of their FP32 bits is nought."""
    return (w.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


def write_file(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values()))


def published(name: str) -> str:
    for theirs, released in NAMES:
        name = name.replace(theirs, released, 1) if theirs != "model." else re.sub(r"^model\.", "", name)
    return name


@torch.no_grad()
def write(folder: Path, *, experts: str = "fp4", shards: int = 5) -> DeepseekV4ForCausalLM:
    """A folder as it would be released, and transformers' model of the same numbers; the MTP block is in the folder
    only.

    experts: "fp4", or "fp8" as in the base models.
    """
    rng = np.random.default_rng(7)
    torch.manual_seed(1)
    rope = {"rope_type": "yarn", "rope_theta": 160000.0, "factor": 16.0, "original_max_position_embeddings": 65536,
            "beta_fast": 32, "beta_slow": 1, "attention_factor": 1.0, "partial_rotary_factor": 0.25}  # fmt: skip
    main = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    config = DeepseekV4Config(
        **SIZES, num_hidden_layers=4, compress_ratios=RATIOS, partial_rotary_factor=0.25,
        rope_parameters={"main": main, "compress": rope},
    )  # fmt: skip
    model = DeepseekV4ForCausalLM(config).eval()
    out: dict[str, tuple[str, list[int], bytes]] = {}

    def put(name: str, w: np.ndarray) -> np.ndarray:
        """A tensor into the folder; the numbers it has there."""
        code = experts if ".experts." in name else "fp8" if FP8.search(name) else ""
        if code:
            codes, scales, numbers = quantise(w, code, rng.integers(0, 2, (w.shape[0], w.shape[1])))
            out[name] = ("F8_E4M3" if code == "fp8" else "I8", list(codes.shape), codes.tobytes())
            out[name[: -len("weight")] + "scale"] = ("F8_E8M0", list(scales.shape), scales.tobytes())
            return numbers
        if name.endswith("tid2eid"):
            out[name] = ("I64", list(w.shape), w.astype("<i8").tobytes())
            return w
        if FP32.search(name):
            out[name] = ("F32", list(w.shape), w.astype("<f4").tobytes())
            return w.astype(np.float32)
        w = bf16(w)
        out[name] = ("BF16", list(w.shape), (w.view(np.uint32) >> 16).astype("<u2").tobytes())
        return w

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith("tid2eid"):
            return rng.random((SIZES["vocab_size"], SIZES["n_routed_experts"])).argsort(axis=1)[:, :2]
        return rng.normal(1.0 if "norm" in name else 0.0, 0.1, shape).astype(np.float32)

    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        if "inv_freq" in name or "rotary" in name:
            continue
        stem = published(name).removesuffix(".weight")
        if ".experts." in name:
            prefix, inner = stem.rpartition(".")[0], SIZES["moe_intermediate_size"]
            for e in range(len(tensor)):
                if "gate_up" in name:
                    halves = [put(f"{prefix}.{e}.{w}.weight", draw(w, (inner, tensor.shape[2]))) for w in ("w1", "w3")]
                    tensor[e] = torch.from_numpy(np.concatenate(halves))
                else:
                    tensor[e] = torch.from_numpy(put(f"{prefix}.{e}.w2.weight", draw("w2", tuple(tensor.shape[1:]))))
            continue
        tensor.copy_(torch.from_numpy(put(published(name), draw(name, tuple(tensor.shape))).copy()))
    block = {n: t for n, t in out.items() if n.startswith("layers.2.") and not n.endswith(".scale")}
    for name, (dtype, shape, _) in block.items():  # the MTP block has all that this one has but its compressors
        if "compressor" not in name and "indexer" not in name:
            wide = (shape[0], 2 * shape[1]) if dtype == "I8" else tuple(shape)
            put(name.replace("layers.2.", "mtp.0."), draw(name, wide))
    m = SIZES["hidden_size"]
    for name in ("e_proj.weight", "h_proj.weight"):
        put(f"mtp.0.{name}", draw(name, (m, m)))
    for name in ("enorm.weight", "hnorm.weight", "norm.weight"):
        put(f"mtp.0.{name}", draw("norm", (m,)))
    for name, shape in (("fn", (4, 4 * m)), ("base", (4,)), ("scale", (1,))):
        put(f"mtp.0.hc_head_{name}", draw(name, shape))
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    order = list(out)
    rng.shuffle(order)
    where = {name: names[i % shards] for i, name in enumerate(order)}  # a matrix and its scales need not be neighbours
    for file in names:
        write_file(folder / file, {name: out[name] for name in order if where[name] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    said = {
        **SIZES, "num_hidden_layers": 4, "compress_ratios": [*RATIOS, 0], "qk_rope_head_dim": 32, "n_shared_experts": 1,
        "num_nextn_predict_layers": 1, "model_type": "deepseek_v4", "architectures": ["DeepseekV4ForCausalLM"],
        "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32,
                         "beta_slow": 1},
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "activation_scheme":
        "dynamic",
                                "weight_block_size": [128, 128]},
        **({"expert_dtype": "fp4"} if experts == "fp4" else {}),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(said))
    return model
