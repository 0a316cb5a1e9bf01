"""What a model is: one frozen schema with the published field names, and the presets.

A published `config.json`, the official `inference/config.json` and the `config.json` that transformers writes all load
through `ModelConfig.from_json`. A layer's kind (`LayerKind`) follows from its ratio: 0 = window, 4 = CSA, 128 = HCA in
the released models, other numbers where `compress_rate_csa` and `compress_rate_hca` say so.
"""

from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dsv4.config.published import layer_types, read_fields, read_json
from dsv4.config.rules import CONSTANTS, RopeScaling, as_ids, check_ids, check_numbers, check_scaling
from dsv4.errors import UserError, nearest, shown

RESIDUALS = ("mhc", "hc", "plain")
ATTENTIONS = ("compressed", "dense", "anchors", "lowrank")


@dataclass(frozen=True)
class LayerKind:
    """What a layer remembers of tokens that have left its window; no part of the model asks for the number itself.

    name: window, csa, hca, or of the attentions that V4 is compared with dense, anchors, lowrank. ratio: tokens of one
    remembered row; 0: nothing beyond the window. overlap: a group is pooled together with the one before it. indexed:
    queries choose among the rows by an indexer's scores.
    """

    name: str
    ratio: int
    overlap: bool
    indexed: bool


WINDOW = LayerKind("window", 0, overlap=False, indexed=False)


@dataclass(frozen=True)
class ModelConfig:
    """Every field of the published configuration that the computation reads; the defaults are V4-Flash.

    `compress_ratios` has one entry per trunk layer and one after them for the MTP block or each stage of the DSpark
    drafter that stands in its place (which must be 0: a pure window); an entry is 0, `compress_rate_csa` or
    `compress_rate_hca`. What V4 is compared with is said by `residual` and by `attention`: compressed (V4's), or in
    place of CSA and HCA dense (every query reads the row of every token), anchors (the window and about the square root
    of the number of tokens, by a learned score) or lowrank (the window, and all tokens before it as rows of
    `attention_rank` numbers with their rotary tail).
    The defaults are for Python; what a file means by leaving a key out is in published.py.
    """

    vocab_size: int = 129280
    hidden_size: int = 4096
    num_hidden_layers: int = 43
    compress_ratios: tuple[int, ...] = (0, 0, *(4, 128) * 20, 4, 0)
    compress_rate_csa: int = 4
    compress_rate_hca: int = 128
    num_attention_heads: int = 64
    head_dim: int = 512
    qk_rope_head_dim: int = 64
    q_lora_rank: int = 1024
    o_groups: int = 8
    o_lora_rank: int = 1024
    sliding_window: int = 128
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 512
    moe_intermediate_size: int = 2048
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 6
    num_hash_layers: int = 3
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    max_position_embeddings: int = 1048576
    num_nextn_predict_layers: int = 1
    initializer_range: float = 0.02
    bos_token_id: int | None = 0  # None: the file does not say
    eos_token_id: int | tuple[int, ...] | None = 1
    residual: str = "mhc"  # how sublayers are joined: V4's mhc; for comparison hc (unconstrained) and plain (x + f(x))
    attention: str = "compressed"  # what layers with a ratio read: V4's; for comparison dense, anchors, lowrank
    attention_rank: int = 0  # numbers in a row of lowrank, its rotary tail apart; 0 for every other attention
    dspark_stages: int = 0  # blocks of the DSpark drafter that V4-Flash-0731 and V4-Pro-0813 have in place of MTP
    dspark_block_size: int = 0  # tokens that it was trained to draft at once
    dspark_noise_token_id: int | None = None  # stands where a token is to be drafted
    dspark_target_layer_ids: tuple[int, ...] = ()  # trunk layers whose streams it reads after them, ascending
    dspark_markov_rank: int = 0

    def __post_init__(self) -> None:
        _check(self)

    @staticmethod
    def preset(name: str, **changes: Any) -> "ModelConfig":
        """A preset by name (tiny, small, bench, base, flash, pro, flash-0731, pro-0813), with single fields replaced by
        `changes`."""
        if name not in PRESETS:
            raise UserError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}{nearest(name, PRESETS)}")
        return PRESETS[name].with_(**changes)

    @staticmethod
    def from_json(source: "dict[str, Any] | str | Path") -> "ModelConfig":
        """Read a configuration (dict, JSON file, or folder holding config.json) in any of the three known spellings."""
        return ModelConfig(**read_fields(source if isinstance(source, dict) else read_json(source)))

    def with_(self, **changes: Any) -> "ModelConfig":
        """This configuration with fields replaced; an unknown name is a UserError that says the nearest one."""
        names = [f.name for f in fields(self)]
        for key in changes:
            if key not in names:
                raise UserError(f"unknown configuration key {key!r}{nearest(key, names)}")
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """The published spelling, ready for `json.dump`; `from_json` reads it back unchanged."""
        data = {**CONSTANTS, **asdict(self)}
        if self.dspark_stages:  # as in the releases: the ratios tell the number of stages, and this one means nothing
            data["num_nextn_predict_layers"] = 1
            del data["dspark_stages"]
        for key in _LEFT_OUT:
            if key not in data:
                continue
            if data[key] == getattr(ModelConfig, key):
                del data[key]
        if "compress_rate_csa" in data or "compress_rate_hca" in data:
            data["layer_types"] = layer_types(self.trunk_ratios, self.compress_rate_csa, self.compress_rate_hca)
        return data

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids of `eos_token_id`, each once, in order."""
        return as_ids(self.eos_token_id)

    @property
    def num_streams(self) -> int:
        """Residual streams; a plain residual is a single one."""
        return 1 if self.residual == "plain" else self.hc_mult

    @property
    def num_draft_blocks(self) -> int:
        """Blocks after the trunk, under `mtp` in files and models: the MTP block, or the stages of a DSpark drafter."""
        return self.num_nextn_predict_layers + self.dspark_stages

    def without_drafts(self) -> "ModelConfig":
        """The trunk alone."""
        of_drafter = {key: getattr(ModelConfig, key) for key in _OF_DRAFTER}
        return replace(self, num_nextn_predict_layers=0, compress_ratios=self.trunk_ratios, **of_drafter)

    @property
    def trunk_ratios(self) -> tuple[int, ...]:
        return self.compress_ratios[: self.num_hidden_layers]

    def layer_kind(self, layer: int) -> LayerKind:
        """The kind of a layer; those from number `num_hidden_layers` on are the MTP block, or a drafter's stages."""
        ratio = self.compress_ratios[layer]
        if not ratio:
            return WINDOW
        if self.attention != "compressed":
            return LayerKind(self.attention, 1, overlap=False, indexed=False)
        csa = ratio == self.compress_rate_csa
        return LayerKind("csa" if csa else "hca", ratio, overlap=csa, indexed=csa)

    @cached_property
    def trunk_kinds(self) -> dict[LayerKind, int]:
        """Each kind of the trunk and its number of layers, by rising ratio: window, csa, hca."""
        found = Counter(self.layer_kind(i) for i in range(self.num_hidden_layers))
        return {kind: found[kind] for kind in sorted(found, key=lambda kind: kind.ratio)}

    @cached_property
    def compressed_kinds(self) -> tuple[LayerKind, ...]:
        """The kinds of the trunk whose rows are pooled from groups of tokens: csa before hca."""
        return tuple(kind for kind in self.trunk_kinds if kind.ratio > 1)

    def uses_hash_routing(self, layer: int) -> bool:
        return layer < min(self.num_hash_layers, self.num_hidden_layers)


_ZERO_OK = {
    "num_hash_layers", "num_nextn_predict_layers", "initializer_range", "attention_rank", "dspark_stages",
    "dspark_block_size", "dspark_markov_rank",
}  # fmt: skip
_OF_DRAFTER = (
    "dspark_stages", "dspark_block_size", "dspark_noise_token_id", "dspark_target_layer_ids", "dspark_markov_rank",
)  # fmt: skip
# Not written where they say what every released model without a drafter is: such files have none of them.
_LEFT_OUT = ("compress_rate_csa", "compress_rate_hca", "residual", "attention", "attention_rank", *_OF_DRAFTER)


def _check(c: ModelConfig) -> None:
    """The rules between fields; each failure is one sentence."""
    if not isinstance(c.rope_scaling, RopeScaling):
        raise UserError(f"rope_scaling={shown(c.rope_scaling)} must be a RopeScaling")
    check_scaling(c.rope_scaling)
    check_numbers(c, _ZERO_OK)
    check_ids("eos_token_id", c.eos_token_id, c.vocab_size)
    if isinstance(c.bos_token_id, list | tuple):
        raise UserError(f"bos_token_id={shown(c.bos_token_id)} must be one token id")
    check_ids("bos_token_id", c.bos_token_id, c.vocab_size)
    if isinstance(c.eos_token_id, list):
        object.__setattr__(c, "eos_token_id", tuple(c.eos_token_id))
    if not isinstance(c.compress_ratios, list | tuple) or not all(type(r) is int for r in c.compress_ratios):
        raise UserError(
            f"compress_ratios={shown(c.compress_ratios)} must be a list of whole numbers: one ratio per layer"
        )
    object.__setattr__(c, "compress_ratios", tuple(c.compress_ratios))
    want = c.num_hidden_layers + c.num_draft_blocks
    if len(c.compress_ratios) != want:
        after = "dspark_stages" if c.dspark_stages else "num_nextn_predict_layers"
        raise UserError(
            f"compress_ratios has {len(c.compress_ratios)} entries but num_hidden_layers + {after} = {want}: give one "
            "ratio per trunk layer and a 0 for each MTP layer, or each stage of a DSpark drafter"
        )
    csa, hca = c.compress_rate_csa, c.compress_rate_hca
    if hca == csa or hca % csa:
        raise UserError(
            f"compress_rate_hca={hca} must be a multiple of compress_rate_csa={csa} and not the same: groups of both "
            "close together, and the ratio alone tells the kinds apart"
        )
    unknown = [r for r in c.compress_ratios if r not in (0, csa, hca)]
    if unknown:
        raise UserError(
            f"compress ratio {shown(unknown[0])} is unknown: use 0 (window), {csa} (compress_rate_csa) or {hca} "
            "(compress_rate_hca)"
        )
    if any(c.compress_ratios[c.num_hidden_layers :]):
        raise UserError("the MTP entries of compress_ratios (the last ones) must be 0: an MTP block is a pure window")
    _check_drafter(c)
    for key, known in (("residual", RESIDUALS), ("attention", ATTENTIONS)):
        value = getattr(c, key)
        if value not in known:
            raise UserError(
                f"{key}={shown(value)} is unknown: use one of {', '.join(known)}{nearest(str(value)[:80], known)}"
            )
    _check_rank(c)
    if c.num_nextn_predict_layers > 1:
        raise UserError(f"num_nextn_predict_layers={c.num_nextn_predict_layers}: at most 1 MTP block is supported")
    if c.n_shared_experts != 1:
        raise UserError(f"n_shared_experts={c.n_shared_experts}: V4 has exactly 1 shared expert")
    if c.qk_rope_head_dim % 2 or c.qk_rope_head_dim > min(c.head_dim, c.index_head_dim):
        raise UserError(
            f"qk_rope_head_dim={c.qk_rope_head_dim} must be even and at most head_dim={c.head_dim} and "
            f"index_head_dim={c.index_head_dim}"
        )
    if c.head_dim % 2 or c.index_head_dim % 2:
        raise UserError(
            f"head_dim={c.head_dim} and index_head_dim={c.index_head_dim} must be even: channels rotate in pairs"
        )
    if c.num_attention_heads % c.o_groups:
        raise UserError(f"num_attention_heads={c.num_attention_heads} must be a multiple of o_groups={c.o_groups}")
    if c.num_experts_per_tok > c.n_routed_experts:
        raise UserError(
            f"num_experts_per_tok={c.num_experts_per_tok} must be at most n_routed_experts={c.n_routed_experts}"
        )


def _check_drafter(c: ModelConfig) -> None:
    """The keys of a DSpark drafter come together, in place of the MTP block, and fit the trunk."""
    given = [key for key in _OF_DRAFTER[1:] if getattr(c, key) != getattr(ModelConfig, key)]
    if not c.dspark_stages:
        if given:
            raise UserError(
                f"{given[0]}={shown(getattr(c, given[0]))} is a DSpark drafter's, and dspark_stages is 0: say how many "
                "stages it has, or leave it out"
            )
        return
    if c.num_nextn_predict_layers:
        raise UserError(
            f"num_nextn_predict_layers={c.num_nextn_predict_layers} beside a DSpark drafter, which stands in the place "
            "of the MTP block: set it to 0"
        )
    missing = [key for key in _OF_DRAFTER[1:] if key not in given]
    if missing:
        raise UserError(
            f"a DSpark drafter of {c.dspark_stages} stages needs {', '.join(missing)}: add what it was trained with, "
            "or set dspark_stages to 0 for the trunk alone"
        )
    if type(c.dspark_noise_token_id) is not int:
        raise UserError(f"dspark_noise_token_id={shown(c.dspark_noise_token_id)} must be one token id")
    check_ids("dspark_noise_token_id", c.dspark_noise_token_id, c.vocab_size)
    ids, layers = c.dspark_target_layer_ids, range(c.num_hidden_layers)
    whole = isinstance(ids, list | tuple) and all(type(i) is int and i in layers for i in ids)
    if not whole or list(ids) != sorted(set(ids)):
        raise UserError(
            f"dspark_target_layer_ids={shown(ids)} must be ascending layers of the trunk, which has 0 to "
            f"{c.num_hidden_layers - 1}: is the drafter another model's?"
        )
    object.__setattr__(c, "dspark_target_layer_ids", tuple(ids))


def _check_rank(c: ModelConfig) -> None:
    """`attention_rank` belongs to the low-rank attention alone, which has no number of its own to fall back to."""
    rank, widest = c.attention_rank, c.head_dim - c.qk_rope_head_dim
    if c.attention != "lowrank":
        if rank:
            raise UserError(
                f"attention_rank={rank} is for attention='lowrank' alone: leave it out with attention={c.attention!r}"
            )
    elif not rank:
        raise UserError("attention='lowrank' needs attention_rank, the numbers kept of a row: give it")
    elif rank > widest:
        raise UserError(
            f"attention_rank={rank} must be at most head_dim={c.head_dim} less qk_rope_head_dim={c.qk_rope_head_dim}: "
            "a row has no more numbers to keep"
        )


# --- presets --------------------------------------------------------------------------------------------------------

_SMALL_ROPE = RopeScaling(factor=16.0, original_max_position_embeddings=4096)

PRESETS: dict[str, ModelConfig] = {
    # About 1M parameters: tests. Every layer kind, two hash layers, an MTP block.
    "tiny": ModelConfig(
        vocab_size=512, hidden_size=96, num_hidden_layers=5, compress_ratios=(0, 4, 128, 4, 128, 0),
        num_attention_heads=4, head_dim=48, qk_rope_head_dim=16, q_lora_rank=48, o_groups=2, o_lora_rank=48,
        sliding_window=128, index_n_heads=4, index_head_dim=32, index_topk=32, moe_intermediate_size=64,
        n_routed_experts=8, num_experts_per_tok=2, num_hash_layers=2, rope_scaling=_SMALL_ROPE,
        max_position_embeddings=65536,
    ),
    # About 10M parameters: the demo.
    "small": ModelConfig(
        vocab_size=2048, hidden_size=256, num_hidden_layers=6, compress_ratios=(0, 0, 4, 128, 4, 128, 0),
        num_attention_heads=8, head_dim=64, qk_rope_head_dim=32, q_lora_rank=128, o_groups=4, o_lora_rank=64,
        sliding_window=128, index_n_heads=4, index_head_dim=64, index_topk=256, moe_intermediate_size=160,
        n_routed_experts=8, num_experts_per_tok=2, num_hash_layers=2, rope_scaling=_SMALL_ROPE,
        max_position_embeddings=65536,
    ),
    "bench": ModelConfig(
        vocab_size=4096, hidden_size=512, num_hidden_layers=8, compress_ratios=(0, 0, *(4, 128) * 3, 0),
        num_attention_heads=8, head_dim=128, qk_rope_head_dim=32, q_lora_rank=256, o_groups=4, o_lora_rank=128,
        sliding_window=128, index_n_heads=8, index_head_dim=64, index_topk=128, moe_intermediate_size=256,
        n_routed_experts=16, num_experts_per_tok=4, num_hash_layers=3,
    ),
    "base": ModelConfig(
        vocab_size=8192, hidden_size=640, num_hidden_layers=10, compress_ratios=(0, 0, *(4, 128) * 4, 0),
        num_attention_heads=10, head_dim=128, qk_rope_head_dim=32, q_lora_rank=320, o_groups=5, o_lora_rank=128,
        sliding_window=128, index_n_heads=8, index_head_dim=64, index_topk=512, moe_intermediate_size=256,
        n_routed_experts=16, num_experts_per_tok=4, num_hash_layers=3,
    ),
    "flash": ModelConfig(),
    "pro": ModelConfig(
        hidden_size=7168, num_hidden_layers=61, compress_ratios=(128, 128, *(4, 128) * 29, 4, 0),
        num_attention_heads=128, q_lora_rank=1536, o_groups=16, index_topk=1024, moe_intermediate_size=3072,
        n_routed_experts=384, routed_scaling_factor=2.5,
    ),
}  # fmt: skip


def _with_drafter(trunk: ModelConfig, targets: tuple[int, ...], rank: int) -> ModelConfig:
    """A release of 2026 with a DSpark drafter of three stages in place of the MTP block."""
    return replace(
        trunk, num_nextn_predict_layers=0, compress_ratios=(*trunk.trunk_ratios, 0, 0, 0), dspark_stages=3,
        dspark_block_size=5, dspark_noise_token_id=128799, dspark_target_layer_ids=targets, dspark_markov_rank=rank,
    )  # fmt: skip


PRESETS["flash-0731"] = _with_drafter(PRESETS["flash"], (40, 41, 42), 256)
PRESETS["pro-0813"] = _with_drafter(PRESETS["pro"], (58, 59, 60), 512)
