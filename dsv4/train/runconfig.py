"""A run is one frozen RunConfig. Every setting is judged when it is made: before any text is read or folder written."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from dsv4.config import AnyConfig, ModelConfig, kind_of
from dsv4.errors import UserError, nearest, shown
from dsv4.train.anticipate import AnticipatoryConfig
from dsv4.train.dataconfig import DataConfig
from dsv4.train.optim import ORTHOGONALISERS
from dsv4.train.parallel.config import ParallelConfig
from dsv4.train.schedule import check_schedule, decay_steps

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
