"""`dsv4 train`: a run from a recipe, settings and data, into a folder that can be stopped and resumed."""

import json
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv4.cli.common import resolve_device, resolve_dtype
from dsv4.cli.hints import command
from dsv4.cli.progress import preparation_progress, shown_as_long_as_read, training_progress
from dsv4.measure.ceilings import multiply_rate
from dsv4.train.log import plot_loss
from dsv4.train.memory import keep_freed_memory
from dsv4.train.parallel.processes import Processes, processes
from dsv4.train.plan import lines, plan
from dsv4.train.recipes import resolve
from dsv4.train.runconfig import RunConfig
from dsv4.train.trackers import check_tracker, tracking
from dsv4.train.trainer import NotFinite, Trainer

Report = Callable[[dict[str, Any]], None]

MANY_PASSES = 4.0  # over the same text: from about here a model learns it by heart rather than from it


def train(
    settings: Annotated[list[str] | None, typer.Argument(help="key=value overrides, such as optim.lr=3e-4.")] = None,
    recipe: Annotated[
        str,
        typer.Option(help="tiny_cpu, phases, curriculum, demo, small_cpu, base_1gpu, sft, flash_shape or pro_shape."),
    ] = "small",
    config: Annotated[Path | None, typer.Option(help="YAML with settings, such as a run's config.yaml.")] = None,
    data: Annotated[str, typer.Option(help="Text to learn from: a file, a folder or hf:NAME; default: embedded.")] = "",
    out: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/train"),
    start_from: Annotated[
        str, typer.Option("--from", help="A run or checkpoint whose weights, model and tokenizer to begin with.")
    ] = "",
    resume: Annotated[
        str, typer.Option(help="Go on from a checkpoint: its path, or auto for the newest of --out, if any.")
    ] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the computation; master weights are float32.")] = "float32",
    tracker: Annotated[
        str, typer.Option("--log", help="A tracker beside log.jsonl: trackio, wandb or tensorboard.")
    ] = "",
    planned: Annotated[bool, typer.Option("--plan", help="Print what the run takes, and do nothing.")] = False,
    ranks: Annotated[int, typer.Option(help="With --plan: accelerators that share the run.")] = 1,
    mfu: Annotated[float, typer.Option(help="With --plan: the share of their bf16 rate that is reached.")] = 0.4,
    hardware: Annotated[str, typer.Option(help="With --plan: the accelerator, such as h200, b200 or mi355x.")] = "h200",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON line per step instead of progress.")] = False,
) -> None:
    """Train a model.

    Text: .txt, .jsonl or .parquet, also .gz and .zst, a folder of these, or hf:OWNER/NAME, to which /CONFIG, :SPLIT and
    @REVISION may be added; several with weights as data.mix. Conversations, rows of messages, are learned with
    data.format=chat. A resumed run may change optim, schedule,
    indexer and save settings.

    Example: dsv4 train --recipe small --data my_texts/ --out runs/mine optim.lr=1e-3 schedule.steps=2000
    What V4-Pro would take: dsv4 train --recipe pro_shape --plan --ranks 2048 --mfu 0.35
    Several processes: torchrun --nproc-per-node 4 -m dsv4 train --out runs/mine parallel.ep=2 (docs/scale.md)
    Fine-tuning: dsv4 train --recipe sft --from runs/mine --data chats.jsonl --out runs/chat
    """
    run = resolve(recipe, config, settings, data=data, start_from=start_from)
    if planned:
        found = plan(run, ranks=ranks, mfu=mfu, hardware=hardware)
        print(json.dumps(found) if as_json else "\n".join(lines(found)))
        return
    with processes(run.parallel, str(resolve_device(device))) as shared:
        trainer = run_training(
            run, out, resume=resume, device=device, dtype=dtype, as_json=as_json, tracker=tracker, shared=shared
        )  # fmt: skip
    if not shared.is_first:
        raise typer.Exit(int(not trainer.finished))
    print(f"{'finished' if trainer.finished else 'stopped'}: {out}", file=sys.stderr)
    if not trainer.finished:
        print(f"go on with: {resume_command(out)}", file=sys.stderr)
        raise typer.Exit(1)


def run_training(
    run: RunConfig,
    out: Path,
    *,
    resume: str = "",
    device: str = "auto",
    dtype: str = "float32",
    as_json: bool = False,
    tracker: str = "",
    shared: Processes | None = None,
) -> Trainer:
    """Train with progress on stderr and draw the loss plot; the trainer says whether it came to the schedule's end.

    shared: the processes that train together, of which the first one says and draws all that.
    """
    place, numbers = resolve_device(device), resolve_dtype(dtype)
    check_tracker(tracker)
    keep_freed_memory()
    if shared is not None and not shared.is_first:
        logging.getLogger("dsv4").setLevel(logging.ERROR)
        trainer = Trainer(run, out, resume=resume, device=str(place), dtype=numbers, processes=shared)
        trainer.run()
        return trainer
    with preparation_progress() as preparing:
        trainer = Trainer(
            run, out, resume=resume, device=str(place), dtype=numbers, on_progress=preparing,
            peak=partial(multiply_rate, place, numbers), processes=shared,
        )  # fmt: skip
    passes = trainer.passes
    if passes > MANY_PASSES:
        tokens, each = trainer.train_data.num_tokens, "those of one source" if run.data.mix else "each"
        print(f"note: the text has {tokens:,} tokens; this run sees {each} about {passes:.0f} times", file=sys.stderr)
    try:
        with tracking(tracker, out, trainer.config.to_dict(), trainer.progress.step) as track:
            if as_json:
                trainer.run(both(track, shown_as_long_as_read(lambda record: print(json.dumps(record), flush=True))))
            else:
                with training_progress(trainer.progress.step, run.schedule.steps) as report:
                    trainer.run(both(track, shown_as_long_as_read(report)))
    except NotFinite as error:
        if error.good:
            lower = f"optim.lr={run.optim.lr / 2:g}"
            print(f"go on with: {resume_command(out, str(error.good))} {lower}", file=sys.stderr)
        raise
    plot_loss(out)
    return trainer


def both(first: Report, second: Report) -> Report:
    """A function that hands a record to two."""

    def report(record: dict[str, Any]) -> None:
        first(record)
        second(record)

    return report


def resume_command(out: Path, resume: str = "auto") -> str:
    """The command that goes on with the run in `out`."""
    return command("train", "--config", out / "config.yaml", "--out", out, "--resume", resume)
