"""What a checkpoint is: told by its config.json, its tensors' names and dtypes, and nothing else."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dsv4.config import PRESETS, AnyConfig, LlamaConfig, ModelConfig, V32Config
from dsv4.errors import shown

# What V4.1 has in place of V4's, as far as it matters to who has V4 code.
V41_DIFFERS = (
    "attention: CSA2, whose compressed rows and choices several layers share, in place of CSA and HCA; the lower half "
    "of the layers encodes, the upper half decodes",
    "Engram: tables of n-grams, read into the residual streams of two layers",
    "hyper-connections in a single pass, without hc_head",
    "FP8 in blocks of 32 x 32, rows of the memory in FP4 with a scale for 16 numbers",
    "no hash-routed layers; the gates have a second bias for image tokens",
    "the DSpark drafter has its own experts and other names",
)


@dataclass(frozen=True)
class Identity:
    """what: in a few words. reads: what dsv4 does with it. differs: from V4, where it is a relative."""

    what: str
    reads: str
    differs: tuple[str, ...] = ()


def identify(
    data: dict[str, Any] | None, config: AnyConfig | None, names: Collection[str], fp8_experts: bool
) -> Identity:
    """data: config.json as it stands, None without one. config: what it was read to, None if it could not be.
    names: of the tensors. fp8_experts: routed experts are in FP8, as a -Base release has them."""
    kind = (data or {}).get("model_type", "deepseek_v4" if data else None)
    if isinstance(config, ModelConfig):
        return _v4(config, names, fp8_experts)
    if isinstance(config, V32Config):
        theirs = any(".self_attn." in name for name in names)
        reads = "the control model of dsv4/controls reads it"
        if theirs:
            reads = "dsv4 counts it (dsv4 cost) and reads its own copies; these are the published names, not dsv4's"
        return Identity("DeepSeek-V3.2: MLA with an indexer over all tokens", reads)
    if isinstance(config, LlamaConfig):
        return Identity(
            "a dense transformer with grouped queries (Llama)", "the control model of dsv4/controls reads it"
        )
    if kind == "deepseek_v41" or any(".engram." in name for name in names):
        return Identity("DeepSeek-V4.1, another architecture than V4", "dsv4 does not read it", V41_DIFFERS)
    if kind == "deepseek_v4":
        return Identity("DeepSeek-V4 by its model_type, with a configuration that cannot be read", "not without that")
    if isinstance(kind, str) and kind:
        return Identity(f"a model of type {shown(kind)}, no DeepSeek-V4", "dsv4 does not read it")
    return Identity(_guess(names), "not without its config.json")


def _v4(config: ModelConfig, names: Collection[str], fp8_experts: bool) -> Identity:
    size = next((name for name in ("flash", "pro") if _trunk(PRESETS[name]) == _trunk(config)), "")
    name = f"DeepSeek-V4-{size.capitalize()}" if size else "a model of the DeepSeek-V4 architecture"
    if (config.residual, config.attention) != ("mhc", "compressed"):
        name = f"a relative of DeepSeek-V4 (residual {config.residual}, attention {config.attention})"
    if config.dspark_stages:
        date = {"flash": "-0731", "pro": "-0813"}.get(size, "")
        return Identity(f"{name}{date}, with a DSpark drafter of {config.dspark_stages} stages", "it loads")
    if size and fp8_experts:
        name += "-Base"
    drafts = any(n.startswith(("mtp.", "model.mtp.")) for n in names)
    return Identity(f"{name}{', with an MTP block' if drafts else ''}", "it loads")


@lru_cache
def _trunk(config: ModelConfig) -> ModelConfig:
    """What is the same in all releases of one size."""
    same = {"initializer_range": 0.02, "bos_token_id": None, "eos_token_id": None, "max_position_embeddings": 1}
    return config.without_drafts().with_(**same)


def _guess(names: Collection[str]) -> str:
    """By the names alone."""
    if any("lora_" in name for name in names):
        return "an adapter (LoRA), to be merged into the model that it was made for"
    if any(".attn.compressor." in name or ".attn.wo_a." in name for name in names):
        drafter = any(".markov_head." in name for name in names)
        return "DeepSeek-V4 by its tensors" + (", with a DSpark drafter" if drafter else "")
    if any(".kv_a_proj_with_mqa." in name or ".attn.wkv_a." in name for name in names):
        indexed = any(".indexer." in name for name in names)
        return f"DeepSeek-{'V3.2' if indexed else 'V3 or V2'} by its tensors"
    return "safetensors files of an unknown model"
