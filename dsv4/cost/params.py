"""Parameters of a V4 configuration by component; equal, to the unit, to the model built on the meta device.

Router biases and hash tables are buffers and not counted. "Active" is what one token multiplies by: everything but the
embedding table and the experts it is not sent to. Symbols: d hidden, c head width, r compress ratio.
"""

from dsv4.config import ModelConfig


def parameters(config: ModelConfig) -> dict[str, int]:
    """Counts by component of the trunk, their `total` and `active`, and the MTP block apart as `mtp`."""
    layers = range(config.num_hidden_layers)
    counts: dict[str, int] = {}
    for layer in layers:
        for name, count in layer_parameters(config, layer).items():
            counts[name] = counts.get(name, 0) + count
    d, v, n = config.hidden_size, config.vocab_size, config.hc_mult
    head = n * n * d + n + 1
    counts = {"embedding": v * d, **counts, "head": v * d}
    counts["norms"] += d
    counts["hyper-connections"] += head
    total = sum(counts.values())
    idle = len(layers) * (config.n_routed_experts - config.num_experts_per_tok) * expert_parameters(config)
    active = total - counts["embedding"] - idle
    mtp = 0
    if config.num_nextn_predict_layers:
        mtp = sum(layer_parameters(config, len(layers)).values()) + 2 * d * d + 3 * d + head
    return {**counts, "total": total, "active": active, "mtp": mtp}


def expert_parameters(config: ModelConfig) -> int:
    return 3 * config.hidden_size * config.moe_intermediate_size


def layer_parameters(config: ModelConfig, layer: int) -> dict[str, int]:
    """Counts of one block by component."""
    k, r = config, config.compress_ratios[layer]
    d, c, ql = k.hidden_size, k.head_dim, k.q_lora_rank
    heads, ih, ic = k.num_attention_heads, k.index_n_heads, k.index_head_dim
    series = 2 if r == 4 else 1  # two overlapping series
    rows = (2 + k.hc_mult) * k.hc_mult
    return {
        "attention": d * ql + ql * heads * c + d * c + (heads * c + k.o_groups * d) * k.o_lora_rank + heads,
        "compressor": (2 * d + r) * series * c + c if r else 0,
        "indexer": ql * ih * ic + d * ih + (2 * d + 4) * 2 * ic + ic if r == 4 else 0,
        "router": k.n_routed_experts * d,
        "shared expert": expert_parameters(k),
        "routed experts": k.n_routed_experts * expert_parameters(k),
        "hyper-connections": 2 * (rows * k.hc_mult * d + rows + 3),
        "norms": 2 * d + ql + c,
    }
