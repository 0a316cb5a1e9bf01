"""`dsv4 train`: a run from a recipe, settings and data, into a folder that can be stopped and resumed."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from dsv4.cli.common import resolve_device, resolve_dtype
from dsv4.cli.progress import training_progress
from dsv4.train.log import plot_loss
from dsv4.train.memory import keep_freed_memory
from dsv4.train.recipes import RunConfig, resolve
from dsv4.train.trainer import Trainer


def train(
    settings: Annotated[list[str] | None, typer.Argument(help="key=value overrides, such as optim.lr=3e-4.")] = None,
    recipe: Annotated[str, typer.Option(help="tiny, demo, small or base.")] = "small",
    config: Annotated[Path | None, typer.Option(help="YAML with settings, such as a run's config.yaml.")] = None,
    data: Annotated[str, typer.Option(help=".txt, .jsonl or .parquet file, or a folder; default: embedded.")] = "",
    out: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/train"),
    resume: Annotated[str, typer.Option(help='"auto" or the path of a checkpoint.')] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the computation; master weights are float32.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON line per step instead of progress.")] = False,
) -> None:
    """Train a model.

    Example: dsv4 train --recipe small --data my_texts/ --out runs/mine optim.lr=1e-3 schedule.steps=2000
    """
    overrides = list(settings or []) + ([f"data.path={json.dumps(data)}"] if data else [])
    run = resolve(recipe, config, overrides)
    finished = run_training(run, out, resume=resume, device=device, dtype=dtype, as_json=as_json)
    print(f"{'finished' if finished else 'stopped'}: {out}", file=sys.stderr)
    if not finished:
        print(f"go on with: dsv4 train --config {out}/config.yaml --out {out} --resume auto", file=sys.stderr)
        raise typer.Exit(1)


def run_training(
    run: RunConfig, out: Path, *, resume: str = "", device: str = "auto", dtype: str = "float32", as_json: bool = False
) -> bool:
    """Train with progress on stderr and draw the loss plot; True when the schedule was completed."""
    keep_freed_memory()
    trainer = Trainer(run, out, resume=resume, device=str(resolve_device(device)), dtype=resolve_dtype(dtype))
    if as_json:
        finished = trainer.run(lambda record: print(json.dumps(record), flush=True))
    else:
        with training_progress(trainer.progress.step, run.schedule.steps) as report:
            finished = trainer.run(report)
    plot_loss(out)
    return finished
