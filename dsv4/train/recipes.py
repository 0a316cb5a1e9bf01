"""A run is one frozen RunConfig; a recipe is a function that returns a whole one. YAML and `a.b=value` go on top.

Every setting is judged when the RunConfig is made: before any text is read or folder written.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dsv4.checkpoint import read_config, resolve_checkpoint
from dsv4.config import AnyConfig, ModelConfig, kind_of, preset_of
from dsv4.errors import UserError, nearest, shown
from dsv4.settings import merge, read_overrides, read_yaml
from dsv4.train.anticipate import AnticipatoryConfig
from dsv4.train.dataconfig import DataConfig
from dsv4.train.optim import ORTHOGONALISERS
from dsv4.train.parallel.config import ParallelConfig
from dsv4.train.schedule import check_schedule, decay_steps
from dsv4.train.stages import Stage

DTYPES = ("float32", "bfloat16")  # of Newton-Schulz
LARGEST = 10**12  # of whatever is counted: more would be a slip of the keyboard


@dataclass(frozen=True)
class OptimConfig:
    """Muon and AdamW share one learning rate (paper section 2.4); weight decay as in the paper.

    newton_schulz: how Muon orthogonalises, a key of optim.ORTHOGONALISERS (ops/newton_schulz.py has the coefficients
    and their sources); newton_schulz_dtype: of its arithmetic. heads_apart: each head of wq_b is a matrix of its own.
    """

    lr: float = 2.7e-4
    weight_decay: float = 0.1
    momentum: float = 0.95
    clip: float = 1.0
    newton_schulz: str = "hybrid10"
    newton_schulz_dtype: str = "float32"
    heads_apart: bool = False


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
class IndexerConfig:
    """How the indexers of CSA learn. Unless `train`, they do not: CSA reads what they choose as they began.

    The paper's three phases, in updates: `dense`, in which CSA reads every entry; `warmup`, which train the indexers
    alone, at the rate `lr`, while the course of everything else stands still; then sparse attention, in which indexers
    follow the common rate. from_stage: the number of the stage (data.stages, from 1) whose start ends the dense phase,
    in place of `dense`. weight: of their loss. It is a scale of the indexers' gradient alone, which has a clipping
    of its own, and Muon and AdamW make the same step of a gradient of any scale.
    """

    train: bool = False
    dense: int = 0
    warmup: int = 0
    weight: float = 1.0
    lr: float = 1e-3
    from_stage: int = 0


@dataclass(frozen=True)
class SaveConfig:
    """Steps between checkpoints and evaluations; how many checkpoints stay; held-out tokens per evaluation.

    whole: of a run that several processes share, with the whole weights in the published layout beside the parts that
    each process writes: turn it off where they do not fit into the memory of the first one's machine.
    """

    every: int = 200
    keep: int = 2
    eval_every: int = 100
    eval_tokens: int = 65536
    whole: bool = True


@dataclass(frozen=True)
class RunConfig:
    model: AnyConfig = field(default_factory=lambda: ModelConfig.preset("small"))
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    indexer: IndexerConfig = field(default_factory=IndexerConfig)
    anticipatory: AnticipatoryConfig = field(default_factory=AnticipatoryConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    seed: int = 0
    recompute: bool = False
    start_from: str = ""  # a checkpoint whose weights the run begins with; `dsv4 train --from` sets it

    def __post_init__(self) -> None:
        s = self.schedule
        _check_whole("schedule.steps", s.steps)
        _check_whole("schedule.warmup", s.warmup, smallest=0)
        _check_stages(self.data, self.indexer, s.steps)
        _check_indexer(self.indexer, self.dense_steps, self.model, s.steps)
        trunk = self.trunk_steps
        check_schedule(trunk, s.warmup, decay_steps(trunk, s.decay_fraction), s.final)
        for group in ("data", "save"):
            for name, value in vars(getattr(self, group)).items():
                if type(value) is int:
                    _check_whole(f"{group}.{name}", value)
        _check_optim(self.optim)
        for name, value in vars(self.loss).items():
            if not 0 <= value < math.inf:
                raise UserError(f"loss.{name}={value} must be a finite number of at least 0")
        if not 0 <= self.seed < 1 << 64:
            raise UserError(f"seed={self.seed} must be a whole number from 0 to 2**64 - 1")
        if isinstance(self.model, ModelConfig) and self.model.dspark_stages:
            raise UserError(
                f"model.dspark_stages={self.model.dspark_stages}: a DSpark drafter is not trained here; train the "
                "trunk alone, without the dspark_* keys"
            )
        self.anticipatory.check(self.model)
        self.parallel.check(self.model)
        for n, stage in enumerate(self.data.course.stages):
            where = f"data.stages[{n - 1}]" if n else "data"
            if self.data.micro_batches > stage.tokens_per_step:
                raise UserError(
                    f"data.micro_batches={self.data.micro_batches} must be at most "
                    f"{where}.tokens_per_step={stage.tokens_per_step}"
                )
            if stage.seq_len > self.model.max_position_embeddings:
                raise UserError(
                    f"{where}.seq_len={stage.seq_len} exceeds "
                    f"max_position_embeddings={self.model.max_position_embeddings}"
                )

    @property
    def dense_steps(self) -> int:
        """Updates in which CSA reads every entry, before the indexers' warm-up."""
        i = self.indexer
        return self.data.stages[i.from_stage - 1].start if i.from_stage else i.dense

    @property
    def trunk_steps(self) -> int:
        """Updates of everything but the indexers, whose warm-up has none: what the schedule's course is over."""
        return self.schedule.steps - self.indexer.warmup

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, ready for YAML and JSON; `resolve` reads it back unchanged.

        A model of another kind than V4 says so first, as `model.kind`.
        """
        settings, kind = asdict(self), kind_of(self.model)
        for key in [key for key in settings["model"] if key.startswith("dspark_") and key != "dspark_stages"]:
            del settings["model"][key]  # of the drafter that no run has; runs of before that named none go on
        if kind != "v4":
            settings["model"] = {"kind": kind, **settings["model"]}
        return _plain(settings)


def _plain(value: Any) -> Any:
    """Tuples as lists; an infinity, which JSON does not have, as the text that reads back as one."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _check_whole(name: str, value: int, smallest: int = 1) -> None:
    if not smallest <= value <= LARGEST:
        rule = "must be positive" if smallest else "must not be negative"
        raise UserError(f"{name}={value} {rule if value < smallest else f'is beyond all reason: at most {LARGEST:,}'}")


def _check_optim(o: OptimConfig) -> None:
    if not 0 < o.lr < math.inf:
        raise UserError(f"optim.lr={o.lr} must be a positive finite number, such as 3e-4")
    if not 0 <= o.weight_decay < math.inf:
        raise UserError(f"optim.weight_decay={o.weight_decay} must be a finite number of at least 0")
    if not 0 <= o.momentum < 1:
        raise UserError(f"optim.momentum={o.momentum} must be at least 0 and below 1")
    if not o.clip > 0:
        raise UserError(f"optim.clip={o.clip} must be a positive norm, or inf for no clipping")
    for name, known in (("newton_schulz", ORTHOGONALISERS), ("newton_schulz_dtype", DTYPES)):
        value = getattr(o, name)
        if value not in known:
            raise UserError(f"optim.{name}={shown(value)} must be one of {', '.join(known)}{nearest(value, known)}")


def _check_stages(data: DataConfig, i: IndexerConfig, steps: int) -> None:
    if data.stages and data.stages[-1].start >= steps:
        raise UserError(
            f"data.stages[{len(data.stages) - 1}].start={data.stages[-1].start} is not reached in the {steps} steps of "
            "schedule.steps: raise schedule.steps, or leave the stage out"
        )
    if not 0 <= i.from_stage <= len(data.stages):
        raise UserError(
            f"indexer.from_stage={i.from_stage} must be the number of one of the {len(data.stages)} data.stages, from "
            "1, or 0 for none"
        )
    if i.from_stage and i.dense:
        raise UserError(
            f"indexer.dense={i.dense} and indexer.from_stage={i.from_stage} both say where the dense phase ends: give "
            "one of them"
        )


def _check_indexer(i: IndexerConfig, dense: int, model: AnyConfig, steps: int) -> None:
    for name in ("dense", "warmup"):
        _check_whole(f"indexer.{name}", getattr(i, name), smallest=0)
    if not 0 <= i.weight < math.inf:
        raise UserError(f"indexer.weight={i.weight} must be a finite number of at least 0")
    if not 0 < i.lr < math.inf:
        raise UserError(f"indexer.lr={i.lr} must be a positive finite number, such as 1e-3")
    if not i.train:
        if dense or i.warmup:
            said = f"indexer.from_stage={i.from_stage}" if i.from_stage else f"indexer.dense={i.dense}"
            raise UserError(
                f"{said} and indexer.warmup={i.warmup} are phases of indexers that learn: "
                "add indexer.train=true, or leave them at 0"
            )
        return
    if not (isinstance(model, ModelConfig) and any(kind.indexed for kind in model.trunk_kinds)):
        raise UserError(
            "indexer.train=true, but the model has no CSA layer: choose indexer.train=false, or a V4 that has one"
        )
    if dense + i.warmup > steps or i.warmup == steps:
        said = f"indexer.from_stage={i.from_stage} (step {dense})" if i.from_stage else f"indexer.dense={i.dense}"
        raise UserError(
            f"{said} + indexer.warmup={i.warmup} must leave the {steps} steps of schedule.steps "
            "something to train: lower them, or raise schedule.steps"
        )


def demo() -> RunConfig:
    """Five to ten minutes on two cores: one layer of every kind and an MTP block, on the embedded corpus.

    CSA reads 32 of up to 128 entries. Its indexer learns in the paper's three phases: it has nothing to learn from
    before attention knows what it wants.
    """
    model = ModelConfig.preset(
        "small", num_hidden_layers=3, num_nextn_predict_layers=1, compress_ratios=(0, 4, 128, 0), hidden_size=160,
        num_attention_heads=4, q_lora_rank=96, o_groups=2, index_head_dim=32, index_topk=32,
        moe_intermediate_size=128, num_hash_layers=1,
    )  # fmt: skip
    return RunConfig(
        model=model,
        data=DataConfig(seq_len=512, tokens_per_step=2048),
        optim=OptimConfig(lr=4e-3),
        loss=LossConfig(bias_speed=1e-2),  # a short run has to find its balance sooner
        schedule=ScheduleConfig(steps=470, warmup=15, decay_fraction=0.8),
        indexer=IndexerConfig(train=True, dense=300, warmup=30),
        save=SaveConfig(every=235, keep=1, eval_every=94, eval_tokens=32768),
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


def phases() -> RunConfig:
    """Minutes on one core: the paper's three phases in small, on single bytes.

    A window of 32 bytes leaves the rest of 512 to 128 entries, of which the sparse phase reads 16.
    """
    model = ModelConfig.preset(
        "tiny", vocab_size=258, num_hidden_layers=4, compress_ratios=(0, 4, 128, 4, 0), sliding_window=32,
        index_n_heads=8, index_topk=16,
    )  # fmt: skip
    return RunConfig(
        model=model,
        data=DataConfig(tokenizer="bytes", seq_len=512, tokens_per_step=2048),
        optim=OptimConfig(lr=4e-3),
        loss=LossConfig(bias_speed=1e-2),
        schedule=ScheduleConfig(steps=520, warmup=15, decay_fraction=0.5),
        indexer=IndexerConfig(train=True, dense=300, warmup=100, lr=4e-3),
        save=SaveConfig(every=200, keep=2, eval_every=40, eval_tokens=16384),
    )


def curriculum() -> RunConfig:
    """A minute or two on one core: the paper's course of lengths in small, 4K, 16K, 64K and 1M as 64, 256, 1024 and
    4096 bytes.

    Steps grow on the way, as the paper's do. The indexers learn from the third length on, as the paper's do from 64K.
    """
    model = ModelConfig.preset(
        "tiny", vocab_size=258, num_hidden_layers=4, compress_ratios=(0, 4, 128, 4, 0), sliding_window=32,
        index_n_heads=8, index_topk=16, max_position_embeddings=4096,
    )  # fmt: skip
    stages = (Stage(40, 0, 1024), Stage(60, 256, 2048), Stage(80, 1024, 0), Stage(100, 4096, 8192))
    return RunConfig(
        model=model,
        data=DataConfig(tokenizer="bytes", seq_len=64, tokens_per_step=512, stages=stages),
        optim=OptimConfig(lr=4e-3),
        loss=LossConfig(bias_speed=1e-2),
        schedule=ScheduleConfig(steps=110, warmup=10, decay_fraction=0.4),
        indexer=IndexerConfig(train=True, from_stage=3, warmup=10, lr=4e-3),
        save=SaveConfig(every=50, keep=2, eval_every=20, eval_tokens=8192),
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


def sft() -> RunConfig:
    """Supervised fine-tuning on conversations, for a model of the size of small: start it --from a trained one."""
    return RunConfig(
        data=DataConfig(seq_len=1024, tokens_per_step=8192, format="chat"),
        optim=OptimConfig(lr=3e-4),
        schedule=ScheduleConfig(steps=300, warmup=10, decay_fraction=0.9),
        loss=LossConfig(mtp=0.1),
        save=SaveConfig(every=100, keep=2, eval_every=50, eval_tokens=65536),
    )


def flash_shape() -> RunConfig:
    """V4-Flash as the paper trains it at 64K, for a cluster: 32T tokens in steps of 75.5M. `dsv4 train --plan` says
    what it takes. The paper's other lengths are 4096, 16384 and 1048576 (section 4.2.2), from steps that it does not
    state: data.stages takes them (docs/stages.md)."""
    return _shape("flash", tokens=75_497_472, steps=424_000, lr=2.7e-4)


def pro_shape() -> RunConfig:
    """V4-Pro likewise: 33T tokens in steps of 94.4M."""
    return _shape("pro", tokens=94_371_840, steps=350_000, lr=2.0e-4)


def _shape(preset: str, *, tokens: int, steps: int, lr: float) -> RunConfig:
    """What the paper states of both: 2000 steps of warm-up, a final rate of a tenth, MTP 0.3 and then 0.1, balance
    1e-4, bias 1e-3, Muon's values (section 4.2.2). Where the decay begins it does not say: here at 70%."""
    return RunConfig(
        model=ModelConfig.preset(preset),
        data=DataConfig(seq_len=65536, tokens_per_step=tokens),
        optim=OptimConfig(lr=lr),
        schedule=ScheduleConfig(steps=steps, warmup=2000, decay_fraction=0.3),
        save=SaveConfig(every=500, keep=2, eval_every=1000, eval_tokens=16_777_216),
        recompute=True,
    )


RECIPES = {
    "demo": demo, "tiny": tiny, "phases": phases, "curriculum": curriculum, "small": small, "base": base, "sft": sft,
    "tiny_cpu": tiny, "small_cpu": small, "base_1gpu": base,  # the same, named by what they run on
    "flash_shape": flash_shape, "pro_shape": pro_shape,
}  # fmt: skip


def resolve(
    recipe: str,
    yaml_file: Path | None = None,
    overrides: list[str] | None = None,
    *,
    data: str = "",
    start_from: str = "",
) -> RunConfig:
    """A recipe by name, a YAML file's values on top, then `optim.lr=3e-4`-style overrides and a path of `data`.

    `model.kind` and `model.preset` are no fields of a model but say what the others are fields of: the last one given
    decides, and all other settings of a model are judged by its class. start_from: a run or checkpoint that gives
    weights, model and tokenizer in place of the recipe's.
    """
    if recipe not in RECIPES:
        raise UserError(f"unknown recipe {recipe!r}: choose one of {', '.join(RECIPES)}{nearest(recipe, RECIPES)}")
    config = _started(RECIPES[recipe](), start_from) if start_from else RECIPES[recipe]()
    settings = {} if yaml_file is None else renamed(read_yaml(yaml_file))
    given, rest = _named(overrides or [])
    chosen = {**_named_in(settings), **given}
    if chosen.get("kind", "v4") != "v4":
        config = replace(config, model=preset_of(chosen["kind"], chosen.get("preset", recipe)))
    config = _merge(config, settings)
    changes = read_overrides(config, rest)
    if "preset" in given:
        changes["model"] = {"preset": given["preset"], **changes.get("model", {})}
    if data:
        if "path" in changes.get("data", {}):
            raise UserError("data.path is given twice, as an override and as --data: give it once")
        changes.setdefault("data", {})["path"] = data
    return _merge(config, changes)


def renamed(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run, with names that have changed since it was started as they are now."""
    optim = settings.get("optim")
    if isinstance(optim, dict) and "ns" in optim and "newton_schulz" not in optim:
        settings = {**settings, "optim": {"newton_schulz" if k == "ns" else k: v for k, v in optim.items()}}
    return settings


def _started(config: RunConfig, start_from: str) -> RunConfig:
    """A recipe with the model and tokenizer of a checkpoint, and sequences no longer than that model's."""
    folder = resolve_checkpoint(Path(start_from).absolute())
    model = read_config(folder)
    seq_len = min(config.data.seq_len, model.max_position_embeddings)
    data = replace(config.data, tokenizer=str(folder), seq_len=seq_len)
    return replace(config, model=model, data=data, start_from=str(folder))


_NAMING = ("kind", "preset")  # of a model: what the settings of it are settings of


def _named(overrides: list[str]) -> tuple[dict[str, str], list[str]]:
    """What `model.kind=` and `model.preset=` say, and the other overrides."""
    given: dict[str, str] = {}
    rest: list[str] = []
    for item in overrides:
        path, equals, text = item.partition("=")
        key = path.strip().removeprefix("model.")
        if not equals or key not in _NAMING or path.strip() == key:
            rest.append(item)
        elif key in given:
            raise UserError(f"model.{key} is given twice: give it once")
        else:
            given[key] = text
    return given, rest


def _named_in(settings: dict[str, Any]) -> dict[str, str]:
    """The same of a file's settings."""
    model = settings.get("model")
    return {key: str(model[key]) for key in _NAMING if key in model} if isinstance(model, dict) else {}


def _merge(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    model = changes.get("model")
    if isinstance(model, dict):
        if "preset" in model:
            config = replace(config, model=preset_of(kind_of(config.model), str(model["preset"])))
        changes = {**changes, "model": {k: v for k, v in model.items() if k not in _NAMING}}
    return merge(config, changes)
