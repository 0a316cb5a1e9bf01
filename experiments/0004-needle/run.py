"""Trains a small V4 to find values by their keys, then asks it at many times the length that it was trained at.

`python experiments/0004-needle/run.py [--out FOLDER] [--texts N] [--seed N]`: minutes on one core. The subject has
a layer of each kind (window, CSA, HCA); a control, trained on the first part of the same course, has windows alone.
Prints the figures of README.md and writes everything to FOLDER: figures.json, report.html, the models. What is there
already is not computed again.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4.checkpoint import load, save
from dsv4.cli.probe import line
from dsv4.config import ModelConfig
from dsv4.model import Transformer
from dsv4.model.head import IGNORE
from dsv4.model.segments import IndexPhase
from dsv4.probe import needle, recovery, report, runner
from dsv4.probe.needles import IdTask
from dsv4.probe.record import Record
from dsv4.probe.subject import Recorder, Settings, Subject
from dsv4.probe.table import PROBES, Probe
from dsv4.train.balance import update_balance_bias
from dsv4.train.indexer import index_figures, is_index_parameter, thaw
from dsv4.train.loss import training_loss
from dsv4.train.optim import HybridOptimizer, clip_gradients, drop_zero_gradients, parameter_groups
from dsv4.train.schedule import lr_scale

VOCABULARY, TOKENS, WINDOW = 128, 2048, 8
TASK = IdTask(keys=range(64, 96), values=range(96, 128), fill=range(2, 64))
SPACE = 16  # tokens of a row for each pair and its question
RATE, WARMUP = 4e-3, 20


@dataclass(frozen=True)
class Stage:
    """Updates with rows of one length. phase: of the indexers (docs/indexer.md)."""

    steps: int
    length: int
    phase: IndexPhase = "dense"


COURSE = (
    Stage(300, 64), Stage(120, 128), Stage(120, 256), Stage(160, 512), Stage(50, 512, "warmup"),
    Stage(100, 512, "sparse"),
)  # fmt: skip
TRAINED = 512
LENGTHS = [TRAINED << i for i in range(5)]  # up to 16 times


def config_of(ratios: Sequence[int]) -> ModelConfig:
    """About 0.3M parameters; CSA reads 16 entries of the 128 that a row of 512 has."""
    return ModelConfig.preset(
        "tiny", vocab_size=VOCABULARY, num_hidden_layers=len(ratios), compress_ratios=tuple(ratios),
        num_nextn_predict_layers=0, sliding_window=WINDOW, index_n_heads=8, index_topk=16, num_hash_layers=1,
        n_routed_experts=4, num_experts_per_tok=2,
    )  # fmt: skip


# --- rows ------------------------------------------------------------------------------------------------------------


def row(length: int, gap: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids and targets int64 [length]: filler, pairs of key and value, and each key once more at least `gap` tokens
    later, where the value that follows is what is to be learned; nothing else is.

    Places are even ones: pairs do not overlap. Which of a group's places a value falls on is drawn row by row.
    """
    shift = int(torch.randint(0, 2, (1,), generator=generator))
    slots = (length - shift) // 2
    pairs = min(len(TASK.keys), length // SPACE)
    ids, targets = TASK.filler(length, generator), torch.full((length,), IGNORE)
    needles = TASK.needles(pairs, generator)
    order = torch.randperm(slots, generator=generator).tolist()
    free = set(order)
    for one in needles:
        first = next((s for s in order if s in free and 2 * s + gap < length - 2), None)
        again = next((s for s in order if s in free and first is not None and 2 * (s - first) >= gap), None)
        if first is None or again is None:
            continue
        free -= {first, again}
        for slot in (first, again):
            place = 2 * slot + shift
            ids[place], ids[place + 1] = one.before[0], TASK.candidates[one.value]
        targets[2 * again + shift] = TASK.candidates[one.value]
    return ids, targets


def batch(stage: Stage, gap: int, generator: torch.Generator) -> tuple[Tensor, Tensor, list[int]]:
    """About TOKENS tokens of rows: ids, targets, lengths."""
    rows = [row(stage.length, gap, generator) for _ in range(TOKENS // stage.length)]
    return torch.cat([ids for ids, _ in rows]), torch.cat([targets for _, targets in rows]), [stage.length] * len(rows)


# --- training --------------------------------------------------------------------------------------------------------


class Training:
    """A model in its course: `trunk` updates of everything, beside those of the indexer alone."""

    def __init__(self, config: ModelConfig, seed: int, trunk: int):
        torch.manual_seed(seed)
        self.config, self.seed = config, seed
        self.model, self.generator = Transformer(config), torch.Generator().manual_seed(seed)
        groups = parameter_groups(self.model.named_parameters(), config, weight_decay=0.01)
        self.optimizer, self.trunk, self.done = HybridOptimizer(groups, RATE), trunk, 0
        self.indexed = any(kind.indexed for kind in config.trunk_kinds)
        self.gap = config.num_hidden_layers * WINDOW  # what windows alone cannot hand on

    def copied(self) -> "Training":
        """Another one from here on, but for the rows to come, which begin anew."""
        other = Training(self.config, self.seed, self.trunk)
        other.model.load_state_dict(self.model.state_dict())
        other.optimizer.load_state_dict(self.optimizer.state_dict())
        other.done = self.done
        return other

    def batch(self, stage: Stage) -> tuple[Tensor, Tensor, list[int]]:
        return batch(stage, self.gap, self.generator)

    def update(self, stage: Stage, rows: tuple[Tensor, Tensor, list[int]]) -> tuple[float, dict[str, Any]]:
        """One update; the loss at questions, and the indexer's figures where it learns."""
        model, optimizer, phase = self.model, self.optimizer, stage.phase if self.indexed else "off"
        thaw(model.named_parameters(), phase if self.indexed else "dense")
        warming = phase == "warmup"
        optimizer.set_lr(RATE * (1.0 if warming else lr_scale(self.done, self.trunk, WARMUP, self.trunk // 2)))
        optimizer.zero_grad(set_to_none=True)
        loss = training_loss(model, *rows, mtp_weight=0.0, balance_weight=1e-4, phase=phase)
        loss.total.backward()
        drop_zero_gradients(model.parameters())
        named = list(model.named_parameters())
        norms = [
            clip_gradients([p for name, p in named if is_index_parameter(name) is side], 1.0) for side in (False, True)
        ]
        optimizer.step()
        if not warming:
            update_balance_bias(model, loss.loads, 1e-2)
            self.done += 1
        return loss.next_token, index_figures(phase, [loss], norms[1]) if self.indexed else {}


def updates_of(course: Sequence[Stage], indexed: bool = True) -> list[Stage]:
    """The stage of every update; a model without indexers has none to warm up."""
    return [stage for stage in course for _ in range(stage.steps) if indexed or stage.phase != "warmup"]


def trunk_of(course: Sequence[Stage]) -> int:
    """Updates of everything."""
    return sum(stage.steps for stage in course if stage.phase != "warmup")


def train(config: ModelConfig, seed: int, course: Sequence[Stage] = COURSE) -> Transformer:
    """A model that has seen the course."""
    training = Training(config, seed, trunk_of(course))
    steps, recent, began = updates_of(course, training.indexed), list[float](), time.perf_counter()
    for step, stage in enumerate(steps):
        loss, figures = training.update(stage, training.batch(stage))
        recent = [*recent, loss][-20:]
        if (step + 1) % 20 == 0:
            print(f"{step + 1} of {len(steps)}: rows of {stage.length}, loss {sum(recent) / 20:.3f} (chance "
                  f"{math.log(len(TASK.values)):.3f}) {figures.get('index_recall', '')} "
                  f"{time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)  # fmt: skip
    return training.model


# --- figures ---------------------------------------------------------------------------------------------------------


def probes_of(texts: int) -> list[Probe]:
    """The two probes, asking in the form that the model was trained in."""

    def find(subject: Subject, settings: Settings) -> Iterator[Record]:
        generator = settings.generator(21)
        asks = (a for n in LENGTHS for a in needle.ask(subject.model, TASK, n, texts, generator))
        yield from needle.told(Recorder(needle.NAME, subject, settings), asks, len(TASK.values))

    def recover(subject: Subject, settings: Settings) -> Iterator[Record]:
        record = Recorder(recovery.NAME, subject, settings)
        yield recovery.decoded(record, subject, settings)
        yield from recovery.told(record, recovery.by_needles(subject.model, TASK, settings), len(TASK.values))

    runs = {needle.NAME: find, recovery.NAME: recover}
    return [replace(PROBES[name], run=run) for name, run in runs.items()]


def by_path(model: Transformer, texts: int, seed: int) -> dict[str, Any]:
    """Right answers and questions by length, where questions read the text by one kind of layers alone."""
    found: dict[str, Any] = {}
    for kind in ("csa", "hca", "window"):
        for length in (TRAINED, 4 * TRAINED):
            asks = list(needle.ask(model, TASK, length, texts, Settings(seed).generator(22), kind))
            found[f"{kind} alone, {length}"] = shares(asks)
    return found


def shares(asks: Sequence[needle.Ask]) -> dict[str, Any]:
    """Right answers, questions and mean bits."""
    n = len(asks)
    return {"right": sum(a.right for a in asks), "n": n, "bits": sum(a.bits for a in asks) / n}


def of_folder(folder: Path, ratios: Sequence[int], course: Sequence[Stage], seed: int) -> Transformer:
    """The trained model in a folder, trained now where there is none."""
    if not (folder / "config.json").exists():
        save(train(config_of(ratios), seed, course), folder)
    model = load(folder)
    assert isinstance(model, Transformer)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/needle"))
    parser.add_argument("--texts", type=int, default=128, help="of each length; 128 have every phase once")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    began, subject = time.perf_counter(), of_folder(given.out / "subject", (0, 4, 128), COURSE, given.seed)
    trained = time.perf_counter() - began
    records = runner.run(
        Subject(subject, name="subject"), probes_of(given.texts), Settings(given.seed), given.out / "probes",
        lambda name, done, total, record: print(line(record) if record else name, file=sys.stderr, flush=True),
    )  # fmt: skip
    report.write([given.out / "probes"], given.out / "report.html")
    figures = {"by path": by_path(subject, given.texts // 4, given.seed)}
    control = of_folder(given.out / "windows", (0, 0, 0), COURSE[:2], given.seed)
    asks = list(needle.ask(control, TASK, TRAINED, given.texts // 4, Settings(given.seed).generator(22)))
    figures |= {"windows alone, trained so": shares(asks), "trained_seconds": trained,
                "seconds": time.perf_counter() - began}  # fmt: skip
    (given.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    print("\n".join(line(r) for r in records))
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
