"""A recipe is a function that returns a whole RunConfig. YAML and `a.b=value` go on top."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from dsv4.checkpoint import read_config, resolve_checkpoint
from dsv4.config import ModelConfig, kind_of, preset_of
from dsv4.errors import UserError, nearest
from dsv4.settings import merge, read_overrides, read_yaml
from dsv4.train.dataconfig import DataConfig
from dsv4.train.runconfig import IndexerConfig, LossConfig, OptimConfig, RunConfig, SaveConfig, ScheduleConfig
from dsv4.train.stages import Stage


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
