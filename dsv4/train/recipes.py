"""A run is one frozen RunConfig; a recipe is a function that returns a whole one. YAML and `a.b=value` go on top."""

from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from dsv4.config import ModelConfig
from dsv4.errors import UserError, nearest
from dsv4.train.schedule import check_schedule, decay_steps


@dataclass(frozen=True)
class DataConfig:
    """path: a .txt, .jsonl or .parquet file or a folder of them; empty = the embedded corpus.

    tokenizer: "bpe" (trained on the data, of the model's vocab_size), "bytes", or a folder or tokenizer.json.
    """

    path: str = ""
    heldout: str = ""  # a source of its own; empty = the embedded held-out split, or every 20th document of `path`
    text_field: str = "text"
    tokenizer: str = "bpe"
    seq_len: int = 1024
    tokens_per_step: int = 8192
    micro_batches: int = 1


@dataclass(frozen=True)
class OptimConfig:
    """Muon and AdamW share one learning rate (paper section 2.4); weight decay as in the paper."""

    lr: float = 2.7e-4
    weight_decay: float = 0.1
    momentum: float = 0.95
    clip: float = 1.0
    ns: str = "hybrid10"


@dataclass(frozen=True)
class ScheduleConfig:
    steps: int = 1000
    warmup: int = 50
    decay_fraction: float = 0.3
    final: float = 0.1


@dataclass(frozen=True)
class LossConfig:
    mtp: float = 0.3
    mtp_in_decay: float = 0.1
    balance: float = 1e-4
    bias_speed: float = 1e-3


@dataclass(frozen=True)
class SaveConfig:
    """Steps between checkpoints and evaluations; how many checkpoints stay; held-out tokens per evaluation."""

    every: int = 200
    keep: int = 2
    eval_every: int = 100
    eval_tokens: int = 65536


@dataclass(frozen=True)
class RunConfig:
    model: ModelConfig = field(default_factory=lambda: ModelConfig.preset("small"))
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    seed: int = 0
    recompute: bool = False

    def __post_init__(self) -> None:
        s = self.schedule
        check_schedule(s.steps, s.warmup, decay_steps(s.steps, s.decay_fraction), s.final)
        positive = {
            "data.seq_len": self.data.seq_len, "data.tokens_per_step": self.data.tokens_per_step,
            "data.micro_batches": self.data.micro_batches, "optim.lr": self.optim.lr, "save.every": self.save.every,
            "save.keep": self.save.keep, "save.eval_every": self.save.eval_every,
            "save.eval_tokens": self.save.eval_tokens,
        }  # fmt: skip
        for name, value in positive.items():
            if value <= 0:
                raise UserError(f"{name}={value} must be positive")
        if self.data.tokens_per_step % self.data.micro_batches:
            raise UserError(
                f"data.tokens_per_step={self.data.tokens_per_step} must be a multiple of "
                f"data.micro_batches={self.data.micro_batches}"
            )
        if self.data.seq_len > self.model.max_position_embeddings:
            raise UserError(
                f"data.seq_len={self.data.seq_len} exceeds max_position_embeddings={self.model.max_position_embeddings}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, ready for YAML; `from_dict` reads it back unchanged."""
        config = asdict(self)
        config["model"]["compress_ratios"] = list(self.model.compress_ratios)
        return config


def demo() -> RunConfig:
    """About five minutes on two cores: one layer of every kind, on the embedded corpus.

    No MTP block (it would cost a quarter of the time). index_topk covers every entry of a training sequence, as in the
    paper's first, dense phase: the indexer has nothing to learn from yet, and its choice would be arbitrary.
    """
    model = ModelConfig.preset(
        "small", num_hidden_layers=3, num_nextn_predict_layers=0, compress_ratios=(0, 4, 128), hidden_size=160,
        num_attention_heads=4, q_lora_rank=96, o_groups=2, index_head_dim=32, index_topk=128,
        moe_intermediate_size=128, num_hash_layers=1,
    )  # fmt: skip
    return RunConfig(
        model=model,
        data=DataConfig(seq_len=512, tokens_per_step=2048),
        optim=OptimConfig(lr=4e-3),
        loss=LossConfig(bias_speed=1e-2),  # a short run has to find its balance sooner
        schedule=ScheduleConfig(steps=440, warmup=15, decay_fraction=0.8),
        save=SaveConfig(every=220, keep=1, eval_every=110, eval_tokens=32768),
    )


def tiny() -> RunConfig:
    """Seconds: for tests and for trying the plumbing."""
    return RunConfig(
        model=ModelConfig.preset("tiny"),
        data=DataConfig(seq_len=256, tokens_per_step=1024),
        optim=OptimConfig(lr=4e-3),
        schedule=ScheduleConfig(steps=100, warmup=10, decay_fraction=0.5),
        save=SaveConfig(every=50, keep=2, eval_every=50, eval_tokens=8192),
    )


def small() -> RunConfig:
    """About 10M parameters: an hour or two on two cores."""
    return RunConfig(
        data=DataConfig(seq_len=1024, tokens_per_step=8192),
        optim=OptimConfig(lr=2e-3),
        schedule=ScheduleConfig(steps=1000, warmup=30, decay_fraction=0.5),
    )


def base() -> RunConfig:
    """About 100M parameters: a run for one GPU."""
    return RunConfig(
        model=ModelConfig.preset("base"),
        data=DataConfig(seq_len=2048, tokens_per_step=131072, micro_batches=4),
        optim=OptimConfig(lr=1e-3),
        schedule=ScheduleConfig(steps=10000, warmup=200, decay_fraction=0.3),
        save=SaveConfig(every=500, keep=2, eval_every=250, eval_tokens=262144),
        recompute=True,
    )


RECIPES = {"demo": demo, "tiny": tiny, "small": small, "base": base}


def resolve(recipe: str, yaml_file: Path | None = None, overrides: list[str] | None = None) -> RunConfig:
    """A recipe by name, a YAML file's values on top, then `optim.lr=3e-4`-style overrides."""
    if recipe not in RECIPES:
        raise UserError(f"unknown recipe {recipe!r}: choose one of {', '.join(RECIPES)}")
    config = RECIPES[recipe]()
    if yaml_file is not None:
        config = merge(config, read_yaml(yaml_file))
    changes: dict[str, Any] = {}
    for item in overrides or []:
        path, eq, value = item.partition("=")
        if not eq or not path:
            raise UserError(f"override {item!r} is not of the form key=value, such as optim.lr=3e-4")
        at = changes
        *parents, leaf = path.strip().split(".")
        for key in parents:
            at = at.setdefault(key, {})
        at[leaf] = _scalar(value, item)
    return merge(config, changes)


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a YAML file of run settings") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML ({' '.join(str(error).split())}): mend it") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no settings: write key: value lines such as those of a run's config.yaml")
    return values


def merge(config: Any, changes: dict[str, Any], where: str = "") -> Any:
    """`config` (a nested frozen dataclass) with nested `changes`; unknown keys name the nearest one."""
    if where == "model" and isinstance(changes.get("preset"), str):
        changes = dict(changes)
        config = ModelConfig.preset(changes.pop("preset"))
    known = {f.name: getattr(config, f.name) for f in fields(config)}
    new: dict[str, Any] = {}
    for key, value in changes.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in known:
            hint = nearest(str(key), known) or f"; known here: {', '.join(known)}"
            raise UserError(f"unknown configuration key {name!r}{hint}")
        new[key] = _converted(known[key], value, name)
    return replace(config, **new)


def _converted(old: Any, value: Any, name: str) -> Any:
    """`value` as the type of `old`, without guessing."""
    if is_dataclass(old):
        if not isinstance(value, dict):
            raise UserError(f"{name}={value!r} must be a group of settings, such as {name}.{fields(old)[0].name}=...")
        return merge(old, value, name)
    if isinstance(old, tuple) and isinstance(value, list | tuple):
        return tuple(value)
    if isinstance(old, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 3e-4 as text
        except ValueError:
            pass
    if isinstance(old, str) and value is None:
        return ""
    if type(value) is not type(old):
        raise UserError(f"{name}={value!r} must be of type {type(old).__name__}, such as {old!r}")
    return value


def _scalar(text: str, item: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"override {item!r} has a value that is not valid YAML: quote it") from None
