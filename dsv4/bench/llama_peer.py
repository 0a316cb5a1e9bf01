"""llama.cpp as a peer: `llama-cpp-python` with its `deepseek4` architecture. Runs in its own Python (peerside.py).

Its converter takes only quantised folders, so the GGUF file is written here from our published folder, number by number
in the dtype that they have; memory has that dtype too.
A token's time is that of one `llama_decode`, the reading of the logits included, without a sampler.
"""

import ctypes
import importlib
import importlib.metadata
import json
import math
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGES = ("llama-cpp-python", "gguf")


def missing() -> str:
    """Why llama.cpp cannot be run here; empty if it can."""
    for package in PACKAGES:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"it has no {package}: pip install llama-cpp-python gguf (0.3.36 or later, built from source)"
    return ""


def version() -> str:
    return "llama-cpp-python " + importlib.metadata.version("llama-cpp-python")


def environment(threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads)}


class Peer:
    """One context that holds one sequence; its memory has the dtype of the weights."""

    def __init__(self, job: dict[str, Any]):
        self.c: Any = importlib.import_module("llama_cpp.llama_cpp")
        gguf = importlib.import_module("gguf")
        path = Path(job["folder"]) / "model.gguf"
        write(Path(job["folder"]), path)
        self.silent = self.c.llama_log_callback(lambda level, text, data: None)
        self.c.llama_log_set(self.silent, None)
        self.c.llama_backend_init()
        self.model = self.c.llama_model_load_from_file(bytes(path), self.c.llama_model_default_params())
        if not self.model:
            raise RuntimeError("llama.cpp does not load the file that was written for it")
        given = self.c.llama_context_default_params()
        given.n_ctx, given.n_batch, given.n_ubatch = job["longest"] + 64, job["chunk"], job["chunk"]
        given.n_threads = given.n_threads_batch = job["threads"]
        kind = gguf.GGMLQuantizationType
        given.type_k = given.type_v = int(kind.F32 if job["dtype"] == "float32" else kind.BF16)
        self.context = self.c.llama_init_from_model(self.model, given)
        if not self.context:
            raise RuntimeError("llama.cpp makes no context for this model")
        self.memory = self.c.llama_get_memory(self.context)
        self.chunk, self.vocab = job["chunk"], json.loads(_text(Path(job["folder"]) / "config.json"))["vocab_size"]

    def best(self, ids: list[int], count: int) -> tuple[list[int], list[float]]:
        self._begin()
        logits = self._read(ids)
        top = max(logits)
        total = top + math.log(sum(math.exp(x - top) for x in logits))
        likeliest = sorted(range(self.vocab), key=lambda i: -logits[i])[:count]
        return likeliest, [logits[i] - total for i in likeliest]

    def measure(self, ids: list[int], steps: int) -> tuple[float, list[float]]:
        self._begin()
        began = time.perf_counter()
        self._read(ids)
        prefill, decode = time.perf_counter() - began, []
        for step in range(steps):
            began = time.perf_counter()
            self._read([ids[step % len(ids)]])
            decode.append(time.perf_counter() - began)
        return prefill, decode

    def _begin(self) -> None:
        self.c.llama_memory_clear(self.memory, True)

    def _read(self, ids: list[int]) -> list[float]:
        """Logits of the last token after `ids` more."""
        for at in range(0, len(ids), self.chunk):
            part = ids[at : at + self.chunk]
            tokens = (self.c.llama_token * len(part))(*part)
            if self.c.llama_decode(self.context, self.c.llama_batch_get_one(tokens, len(part))) != 0:
                raise RuntimeError(f"llama.cpp stops in the {len(part)} tokens from {at}")
        found = self.c.llama_get_logits_ith(self.context, -1)
        return list(ctypes.cast(found, ctypes.POINTER(ctypes.c_float * self.vocab)).contents)


# --- the file --------------------------------------------------------------------------------------------------------

# Published name -> name in the file (llama.cpp's src/llama-arch.cpp), `.weight` apart.
_WHOLE = {
    "embed": "token_embd", "norm": "output_norm", "head": "output",
    "hc_head_fn": "output_hc_fn", "hc_head_base": "output_hc_base", "hc_head_scale": "output_hc_scale",
}  # fmt: skip
# The same behind `layers.N.` and `blk.N.`.
_OF_LAYER = {
    "attn_norm": "attn_norm", "ffn_norm": "ffn_norm", "attn.attn_sink": "attn_sinks", "attn.wq_a": "attn_q_a",
    "attn.wq_b": "attn_q_b", "attn.q_norm": "attn_q_a_norm", "attn.wkv": "attn_kv", "attn.kv_norm": "attn_kv_a_norm",
    "attn.wo_a": "attn_output_a", "attn.wo_b": "attn_output_b", "attn.indexer.wq_b": "indexer.attn_q_b",
    "attn.indexer.weights_proj": "indexer.proj", "ffn.gate": "ffn_gate_inp", "ffn.gate.tid2eid": "ffn_gate_tid2eid",
    "hc_attn_fn": "hc_attn_fn", "hc_attn_base": "hc_attn_base", "hc_attn_scale": "hc_attn_scale",
    "hc_ffn_fn": "hc_ffn_fn", "hc_ffn_base": "hc_ffn_base", "hc_ffn_scale": "hc_ffn_scale",
    **{
        f"{ours}.{a}": f"{theirs}_compressor_{b}"
        for ours, theirs in (("attn.compressor", "attn"), ("attn.indexer.compressor", "indexer"))
        for a, b in (("ape", "ape"), ("wkv", "kv"), ("wgate", "gate"), ("norm", "norm"))
    },
    **{
        f"{ours}.{a}": f"ffn_{b}_{theirs}"
        for ours, theirs in (("ffn.shared_experts", "shexp"), ("ffn.experts", "exps"))
        for a, b in (("w1", "gate"), ("w2", "down"), ("w3", "up"))
    },
}  # fmt: skip
_EXPERT = re.compile(r"layers\.(\d+)\.ffn\.experts\.(\d+)\.(w[123])\.weight")


def write(folder: Path, path: Path) -> None:
    """The model of a published folder (one model.safetensors in fp32 or bf16, no MTP) as GGUF, without a vocabulary."""
    gguf, numpy = (importlib.import_module(name) for name in ("gguf", "numpy"))
    config = json.loads(_text(folder / "config.json"))
    writer = gguf.GGUFWriter(path, "deepseek4")
    for key, value in keys(config).items():
        _add_key(writer, key, value)
    experts: dict[tuple[int, str], dict[int, Any]] = {}
    for name, kind, data in tensors(folder / "model.safetensors"):
        if found := _EXPERT.fullmatch(name):
            layer, expert, matrix = int(found[1]), int(found[2]), found[3]
            rows = experts.setdefault((layer, matrix), {})
            rows[expert] = data
            if len(rows) < config["n_routed_experts"]:
                continue
            data = numpy.stack([rows[i] for i in range(len(rows))])
            name = f"layers.{layer}.ffn.experts.{matrix}.weight"
            experts.pop((layer, matrix))
        if target := target_name(name, config["num_hash_layers"]):
            _add_tensor(writer, gguf, target, kind, data)
    assert not experts, "an expert is missing"
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def target_name(name: str, hash_layers: int) -> str:
    """A published tensor's name in the file; empty for the bias of a hash-routed gate, which nothing reads."""
    plain = name.removesuffix(".weight")
    if plain in _WHOLE:
        return f"{_WHOLE[plain]}.weight"
    _, layer, part = plain.split(".", 2)
    if part == "ffn.gate.bias":
        return f"blk.{layer}.exp_probs_b.bias" if int(layer) >= hash_layers else ""
    return f"blk.{layer}.{_OF_LAYER[part]}.weight"


def tensors(path: Path) -> Iterator[tuple[str, str, Any]]:
    """(name, dtype as safetensors says it, numpy array) of a file; bf16 as bytes, two of them in the last axis each."""
    numpy = importlib.import_module("numpy")
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    data = numpy.memmap(path, dtype=numpy.uint8, mode="r", offset=8 + size)
    plain = {"F32": numpy.float32, "I64": numpy.int64, "I32": numpy.int32}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            shape, kind = entry["shape"], entry["dtype"]
            if kind == "BF16":
                yield name, kind, data[begin:end].reshape(*shape[:-1], 2 * shape[-1])
            else:
                yield name, kind, data[begin:end].view(plain[kind]).reshape(shape)


def keys(c: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp's loader reads beside the tensors, from a published configuration."""
    layers, rope = c["num_hidden_layers"], c["rope_scaling"]
    own = {
        "vocab_size": c["vocab_size"], "block_count": layers, "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"], "embedding_length_out": c["hidden_size"] * c["hc_mult"],
        "feed_forward_length": c["moe_intermediate_size"], "attention.head_count": c["num_attention_heads"],
        "attention.head_count_kv": 1, "attention.key_length": c["head_dim"], "attention.value_length": c["head_dim"],
        "rope.dimension_count": c["qk_rope_head_dim"], "rope.freq_base": float(c["rope_theta"]),
        "attention.layer_norm_rms_epsilon": float(c["rms_norm_eps"]), "attention.q_lora_rank": c["q_lora_rank"],
        "attention.sliding_window": c["sliding_window"], "expert_count": c["n_routed_experts"],
        "expert_used_count": c["num_experts_per_tok"], "expert_gating_func": 4,  # sqrtsoftplus
        "expert_feed_forward_length": c["moe_intermediate_size"], "expert_shared_count": c["n_shared_experts"],
        "expert_weights_scale": float(c["routed_scaling_factor"]), "expert_weights_norm": True,
        "swiglu_clamp_exp": [float(c["swiglu_limit"])] * layers,
        "swiglu_clamp_shexp": [float(c["swiglu_limit"])] * layers,
        "attention.indexer.head_count": c["index_n_heads"], "attention.indexer.key_length": c["index_head_dim"],
        "attention.indexer.top_k": c["index_topk"], "attention.output_group_count": c["o_groups"],
        "attention.output_lora_rank": c["o_lora_rank"], "attention.compress_ratios": c["compress_ratios"],
        "attention.compress_rope_freq_base": float(c["compress_rope_theta"]), "hyper_connection.count": c["hc_mult"],
        "hyper_connection.sinkhorn_iterations": c["hc_sinkhorn_iters"],
        "hyper_connection.epsilon": float(c["hc_eps"]), "hash_layer_count": c["num_hash_layers"],
    }  # fmt: skip
    if rope["type"] == "yarn":
        own |= {
            "rope.scaling.type": "yarn", "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.yarn_beta_fast": float(rope["beta_fast"]),
            "rope.scaling.yarn_beta_slow": float(rope["beta_slow"]),
        }  # fmt: skip
    return {"tokenizer.ggml.model": "no_vocab"} | {f"deepseek4.{key}": value for key, value in own.items()}


def _add_key(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def _add_tensor(writer: Any, gguf: Any, name: str, kind: str, data: Any) -> None:
    """Vectors are fp32 there, whatever they were; matrices stay as they are, and what names experts is int32."""
    numpy = importlib.import_module("numpy")
    if kind == "BF16" and data.ndim == 1:  # the upper two bytes of an fp32
        data, kind = (data.view(numpy.uint16).astype(numpy.uint32) << 16).view(numpy.float32), "F32"
    if kind == "BF16":
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, data.astype(numpy.int32) if kind == "I64" else data)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")
