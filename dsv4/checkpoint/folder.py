"""The layout of a run folder, and which checkpoint a path means.

config.yaml              all settings
log.jsonl, loss.png      the run's own record, and the picture of it; report.html, the page that dsv4 report draws
tracker.json             the id under which a tracker knows the run, where one was asked for
data/                    the prepared text
checkpoints/
  step-000123/           weights in the published layout, config.json, tokenizer.json, optimiser, state, digests
  latest                 a text file: the name of the checkpoint that the run goes on from
  last_good              while the loss is far above its own past: the newest from before that, which then stays
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from dsv4 import files
from dsv4.errors import UserError, nearest

_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class RunFolder:
    """Where the files of a run are. A checkpoint is whole, under its name, or not there."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def picture(self) -> Path:
        return self.path / "loss.png"

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def _latest(self) -> Path:
        return self.checkpoints / "latest"

    @property
    def _last_good(self) -> Path:
        return self.checkpoints / "last_good"

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.checkpoints / f"step-{step:06d}"

    def numbered(self) -> dict[int, Path]:
        """The checkpoints by their step."""
        found = ((_STEP.fullmatch(p.name), p) for p in self.checkpoints.glob("step-*"))
        return {int(match[1]): p for match, p in found if match}

    def named(self) -> Path | None:
        """The checkpoint that the pointer names, None without a pointer; UserError if the pointer is damaged."""
        return _beside(self._latest) if self._latest.exists() else None

    def latest(self) -> Path | None:
        """The newest checkpoint, None if there is none; UserError if the pointer is damaged.

        A checkpoint is whole before the pointer names it: where there is no pointer, it is the one with the highest
        step.
        """
        return self.named() or max(self.numbered().items(), default=(0, None))[1]

    def last_good(self) -> Path | None:
        """The checkpoint from before the loss left its past, if it has; else the newest one."""
        return _beside(self._last_good) if self._last_good.exists() else self.latest()

    def set_latest(self, checkpoint: Path) -> None:
        """Make a checkpoint the one that the run goes on from."""
        files.write_text(self._latest, checkpoint.name, safe=f"{checkpoint} is whole")

    def set_last_good(self, checkpoint: Path) -> None:
        """The loss is leaving its past: keep this checkpoint, unless one from before that is kept already."""
        if not self._last_good.exists():
            files.write_text(self._last_good, checkpoint.name)

    def all_good(self) -> None:
        """The loss is where it should be: the newest checkpoint is a good one."""
        files.discard(self._last_good)

    def put(self, temporary: Path, step: int, *, safe: str) -> Path:
        """Give a finished folder beside the checkpoints its name, in place of what has it: another course's."""
        target = self.checkpoint(step)
        with files.explained(target, safe=safe):
            _remove(target)
            os.replace(temporary, target)
            files.synchronise(self.checkpoints)
        return target

    def drop_old(self, step: int, keep: int) -> None:
        """Keep the newest `keep` up to this step and the last good one. Later ones are of a course that was left."""
        good, present = self.last_good(), self.numbered()
        kept = sorted(n for n in present if n <= step)[-keep:]
        for number, path in present.items():
            if number not in kept and path != good:
                with files.explained(path, "remove", safe="the newest checkpoint is whole"):
                    _remove(path)


def _remove(checkpoint: Path) -> None:
    """Take a checkpoint away, if it is there, by its name first."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.old{files.TEMPORARY}")
    shutil.rmtree(doomed, ignore_errors=True)
    if checkpoint.exists():
        os.replace(checkpoint, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def resolve_checkpoint(path: str | Path, *, needs_config: bool = True) -> Path:
    """The checkpoint folder that `path` means: itself, or the latest checkpoint of a run folder.

    UserError if there is no such folder or nothing in it to load (needs_config=False: a folder without config.json is
    also one).
    """
    path = Path(path)
    with files.explained(path, "read"):  # such as a name too long for the file system
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise UserError(f"{path} {what}: give the folder of a run or of a checkpoint")
        run = RunFolder(path)
        if (named := run.named()) is not None:
            return named
        if not needs_config or (path / "config.json").is_file():
            return path
        if run.checkpoints.is_dir():
            raise UserError(f"the run {path} has no finished checkpoint yet: train until it has saved one")
    raise UserError(f"{path} holds neither config.json nor checkpoints/latest: give a run or checkpoint folder")


def _beside(pointer: Path) -> Path:
    """The folder beside the text file `pointer` that it names; UserError unless that is exactly one that is there."""
    with files.explained(pointer.parent, "read"):
        there = sorted(p.name for p in pointer.parent.glob("[!.]*") if p.is_dir())
    remedy = f"name one of {', '.join(there)}" if there else "no checkpoint is left beside it"
    name = files.read_text(pointer, "the pointer", remedy).strip()
    if name not in there:
        shown = name if len(name) < 80 else f"{name[:80]}..."
        raise UserError(
            f"{pointer} names {shown!r}, which is not a checkpoint beside it: {remedy}{nearest(name[:80], there)}"
        )
    return pointer.parent / name
