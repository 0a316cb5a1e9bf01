"""FLOPs of one token's forward pass at a context length, by component: 2 per multiply-accumulate.

Not counted: norms, softmax, top-k selection, rotations, Sinkhorn, activations, the embedding lookup.
"""

from dsv4.config import ModelConfig
from dsv4.cost.params import layer_parameters


def flops_by_component(config: ModelConfig, context: int) -> dict[str, int]:
    """FLOPs of one token that stands at position `context` - 1 (so it sees `context` tokens), without MTP."""
    k, d, n = config, config.hidden_size, config.hc_mult
    out: dict[str, int] = {}

    def add(name: str, flops: int) -> None:
        out[name] = out.get(name, 0) + flops

    for layer in range(k.num_hidden_layers):
        r = k.compress_ratios[layer]
        p = layer_parameters(k, layer)
        series = 2 if r == 4 else 1
        add("attention projections", 2 * (p["attention"] - k.num_attention_heads))
        if r:
            add("compressor", 2 * 2 * d * series * k.head_dim)
        if r == 4:
            ih, ic = k.index_n_heads, k.index_head_dim
            add("indexer projections", 2 * (k.q_lora_rank * ih * ic + d * ih + 4 * d * ic))
            add("indexer scores", 2 * ih * ic * (context // 4))
        add("core attention", 4 * k.num_attention_heads * k.head_dim * attended(k, r, context))
        add("router", 2 * p["router"])
        add("experts", 2 * p["shared expert"] * (1 + k.num_experts_per_tok))
        add("hyper-connections", 2 * 2 * (2 + n) * n * n * d + 4 * (2 * n * d + n * n * d))
    add("hyper-connections", 2 * n * n * d)
    add("head", 2 * k.vocab_size * d)
    return out


def flops_per_token(config: ModelConfig, context: int) -> int:
    """The sum of `flops_by_component`."""
    return sum(flops_by_component(config, context).values())


def attended(config: ModelConfig, ratio: int, context: int) -> int:
    """Rows that one query reads in a layer: its window, and the entries it may see or chooses."""
    entries = {0: 0, 4: min(context // 4, config.index_topk), 128: context // 128}[ratio]
    return min(context, config.sliding_window) + entries
