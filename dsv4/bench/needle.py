"""A needle in a long text: a few tokens, older than all that windows can carry, reach the logits of a later query.

Two prompts differ in the needle alone: `LENGTH` times one token or another, neither of which the text has. Both end
with the first of them as a query. The needle stands so far back that no chain of windows, one a layer, leads from it to
the query: what differs in the logits has come through compressed entries. The same prompt twice differs by 0 bits.

The model is random, so it retrieves nothing by meaning; its indexers are constructed (`finder`), without training, so
that a query chooses entries of tokens like itself. So that this can be seen, the needle is the same token as the query.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4.cache import SequenceMemory
from dsv4.config import ModelConfig
from dsv4.errors import UserError
from dsv4.measure.replay import choices
from dsv4.measure.rows import Row
from dsv4.model import Transformer

LENGTH, QUERY = 16, 8  # tokens
QUIET = 0.1  # of what sublayers add to the streams: a token then still resembles itself in the last layers
SHORT = 4096  # tokens of the prompt with less text

Read = Callable[[Tensor, SequenceMemory], None]  # tokens into a memory, in chunks


@torch.no_grad()
def finder(model: Transformer, seed: int = 0) -> Transformer:
    """Make every indexer score an entry by how much its tokens resemble the query: q = B c(x), k = mean of B c(x).

    c is the query latent of the layer and B random, the same for all heads; channels that rotate stay empty, so that
    distance does not count. A direction u that all embeddings share, and c does not see, gives heads a positive weight.
    """
    config, g = model.config, torch.Generator().manual_seed(seed)
    width = config.index_head_dim - config.qk_rope_head_dim
    u = torch.randn(config.hidden_size, generator=g)
    u /= u.norm()
    embed = model.embed.weight.float()
    embed -= torch.outer(embed @ u, u)
    model.embed.weight.copy_(embed + embed.norm(dim=1).mean() * u)
    blocks: list[Any] = list(model.layers)
    for block in blocks:
        attn, experts, shared = block.attn, block.ffn.experts, block.ffn.shared_experts
        for weight in (attn.wo_b.weight, experts.w2, shared.w2.weight):
            weight.mul_(QUIET)
        if attn.indexer is None:
            continue
        index, common = attn.indexer, u * block.attn_norm.weight
        common /= common.norm()
        latent = attn.wq_a.weight.float()
        latent -= torch.outer(latent @ common, common)
        attn.wq_a.weight.copy_(latent)
        b = torch.randn(width, config.q_lora_rank, generator=g) * config.q_lora_rank**-0.5
        query = index.wq_b.weight.zero_().view(index.heads, index.width, -1)
        query[:, :width] = b.to(query.dtype)
        key = index.compressor.wkv.weight.zero_().view(-1, index.width, config.hidden_size)
        key[:, :width] = (b * attn.q_norm.weight) @ latent
        index.compressor.wgate.weight.zero_()
        index.compressor.ape.zero_()
        index.compressor.norm.weight.fill_(1)
        index.weights_proj.weight.copy_(common.expand(index.heads, -1))
    return model


@dataclass(frozen=True)
class Needle:
    """Where it stands in a prompt of `context` tokens, and which two tokens it may be; the first is also the query."""

    context: int
    at: int
    tokens: tuple[int, int]

    def prompt(self, text: Tensor, token: int) -> Tensor:
        """The text int64 [context or more] from `at` on, with the needle in front and the query at the end."""
        out = text[self.at : self.context].clone()
        out[:LENGTH], out[-QUERY:] = token, self.tokens[0]
        return out


def reach(config: ModelConfig) -> int:
    """Tokens that windows can carry something, one after the other through all layers."""
    return config.num_hidden_layers * (config.sliding_window - 1)


def least_context(config: ModelConfig) -> int:
    """The shortest prompt in which a needle has a place (with one token before it)."""
    return 1 + LENGTH + reach(config) + QUERY


def place(config: ModelConfig, context: int, depth: float | None, seed: int) -> int:
    """Where the needle begins: at a share of the context, or drawn, from the last sixteenth of a long context.

    UserError where it would be too near the end, or the context is too short.
    """
    last = context - (least_context(config) - 1)
    if last < 1:
        raise UserError(f"a needle needs a context of {least_context(config)} tokens, not {context}: give more")
    if depth is None:
        first = context - context // 16 if context > 65536 else 1
        return int(torch.randint(first, last + 1, (), generator=torch.Generator().manual_seed(seed)))
    if not 1 <= int(depth * context) <= last:
        raise UserError(
            f"--needle-depth {depth} must be between 0 and {last / context:.4f}, or windows reach the needle"
        )
    return int(depth * context)


def unused(text: Tensor, vocab: int) -> tuple[int, int]:
    """Two tokens that the text does not have."""
    free = (torch.bincount(text, minlength=vocab) == 0).nonzero()[:, 0].tolist()
    if len(free) < 2:
        raise UserError(f"the text uses all but {len(free)} of {vocab} tokens and a needle takes 2: give less text")
    return free[-1], free[-2]


@torch.inference_mode()
def compare(model: Transformer, needle: Needle, text: Tensor, before: SequenceMemory, read: Read) -> Row:
    """Both prompts, and the first once more, from a memory of the text before the needle: what the query chose, and how
    far its logits are apart."""
    logits, chosen = [], []
    for token in (*needle.tokens, needle.tokens[0]):
        ids, memory = needle.prompt(text, token), before.fork()
        read(ids[:-1], memory)
        with choices(model) as entries:
            logits.append(model(ids[-1:], segments=[(1, memory)], rows="last")[0])
        chosen.append({name: set(rows[0]) for name, rows in entries.items()})
        memory.release()
    groups = _groups(model.config, needle.at)
    difference = (logits[0] - logits[1]).float()
    entries = needle.context // model.config.compress_rate_csa
    return {
        "context": needle.context, "at": needle.at, "tokens_after": needle.context - needle.at - LENGTH,
        "groups": len(groups), "entries": entries, "chance": min(1.0, model.config.index_topk / entries),
        "found": [len(groups & layer) for layer in chosen[0].values()],
        "found_of_another": [len(groups & layer) for layer in chosen[1].values()],
        "largest_difference": float(difference.abs().max()), "rms_difference": float(difference.square().mean().sqrt()),
        "logits_std": float(logits[0].float().std()),
        "repeat_difference": float((logits[0] - logits[2]).abs().max()),
    }  # fmt: skip


def _groups(config: ModelConfig, at: int) -> set[int]:
    """The entries that hold something of the needle: an entry also pools the group before its own."""
    ratio = config.compress_rate_csa
    return set(range(at // ratio, (at + LENGTH - 1) // ratio + 2))


def lines(rows: list[Row]) -> list[str]:
    """For a person: the long context, then the short one."""
    out = []
    for r in rows:
        layers = len(r["found"])
        found, other = (sum(n > 0 for n in r[name]) for name in ("found", "found_of_another"))
        out.append(
            f"needle of {LENGTH} tokens {r['tokens_after']:,} before the end of {r['context']:,}: chosen in {found} of "
            f"{layers} CSA layers ({sum(r['found'])} of {layers * r['groups']} entries; of another needle "
            f"{sum(r['found_of_another'])}, by chance {r['chance'] * layers * r['groups']:.2g}, in {other} layers)"
        )
        out.append(
            f"  logits differ by {r['largest_difference']:.3g} (rms {r['rms_difference']:.3g}; their spread is "
            f"{r['logits_std']:.3g}); the same prompt twice: {r['repeat_difference']:g}"
        )
    return out
