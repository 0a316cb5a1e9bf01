"""Other places for a run's records than log.jsonl: `--log trackio|wandb|tensorboard`.

The packages are imported where one is asked for. All of them work offline and ask for no account: trackio and
tensorboard keep files of their own, wandb does unless WANDB_MODE says otherwise. A resumed run goes on under the id
that stands in the run folder's tracker.json. log.jsonl is written in any case; a tracker that fails is left behind,
once aloud, and the run goes on.
"""

import importlib.util
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from dsv4.errors import UserError, nearest
from dsv4.files import make_folder, read_json, reason_of, write_json
from dsv4.settings import flat

log = logging.getLogger("dsv4")

PROJECT = "dsv4"
Record = dict[str, Any]


class Tracker(Protocol):
    def write(self, step: int, figures: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Tensorboard:
    """Event files in RUN/tensorboard: `tensorboard --logdir RUN`."""

    def __init__(self, folder: Path, run: str, settings: Record, step: int):
        from torch.utils.tensorboard import SummaryWriter

        # events of steps that a resumed run repeats are to be forgotten
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        if not step:
            self._writer.add_text("settings", "\n".join(f"    {name} = {value}" for name, value in flat(settings)))

    def write(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Files in RUN/wandb, which `wandb sync` sends where one likes; WANDB_MODE=online sends them as they come."""

    def __init__(self, folder: Path, run: str, settings: Record, step: int):
        import wandb  # type: ignore[import-not-found]

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project=PROJECT, name=folder.name, id=run, resume="allow", dir=str(folder), config=settings, mode=mode
        )

    def write(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """trackio's own local store, under the run's name and id: `trackio show --project dsv4`."""

    def __init__(self, folder: Path, run: str, settings: Record, step: int):
        import trackio  # type: ignore[import-not-found]

        self._trackio = trackio
        trackio.init(project=PROJECT, name=f"{folder.name}-{run}", config=settings, resume="allow")

    def write(self, step: int, figures: dict[str, float]) -> None:
        self._trackio.log(figures, step=step)

    def close(self) -> None:
        self._trackio.finish()


TRACKERS: dict[str, Callable[[Path, str, Record, int], Tracker]] = {
    "trackio": Trackio, "wandb": Wandb, "tensorboard": Tensorboard,
}  # fmt: skip


def check_tracker(name: str) -> None:
    """UserError, before any work, for a tracker that is unknown or not installed; "" is none."""
    if name and name not in TRACKERS:
        raise UserError(f"--log {name} is unknown: use one of {', '.join(TRACKERS)}{nearest(name, TRACKERS)}")
    if name and importlib.util.find_spec(name) is None:
        raise UserError(
            f"--log {name} needs the package {name}: pip install {name}, or leave --log out, as log.jsonl has "
            "everything in any case"
        )


@contextmanager
def tracking(name: str, folder: Path, settings: Record, step: int) -> Iterator[Callable[[Record], None]]:
    """Yields what hands a record of the run in `folder`, which stands at `step`, to a tracker; with "" to nobody."""
    check_tracker(name)
    if not name:
        yield lambda record: None
        return
    tracker: Tracker | None
    try:
        tracker = TRACKERS[name](folder, run_id(folder), settings, step)
    except UserError:
        raise
    except Exception as error:  # of another program, of whatever kind
        raise UserError(f"--log {name} did not start ({reason_of(error)}): mend that or leave --log out") from None

    def write(record: Record) -> None:
        nonlocal tracker
        if tracker is None:
            return
        try:
            tracker.write(record["step"], numbers(record))
        except Exception as error:  # another program's trouble, of whatever kind, is no reason to lose a run
            tracker = None
            log.warning("--log %s failed (%s): the run goes on, its records are in log.jsonl", name, reason_of(error))

    try:
        yield write
    finally:
        if tracker is not None:
            tracker.close()


def numbers(record: Record) -> dict[str, float]:
    """The figures of a record by flat names: sink_mass/3 is that of layer 3."""
    found = ((path.replace(".", "/"), value) for path, value in flat(record))
    return {name: float(v) for name, v in found if isinstance(v, int | float) and name != "step"}


def run_id(folder: Path) -> str:
    """The id under which trackers know the run in `folder`: drawn once, then kept in its tracker.json."""
    path = folder / "tracker.json"
    if path.exists():
        found = read_json(path, "the run's id for trackers", "delete it to begin a new one").get("id")
        if isinstance(found, str) and found.isalnum():
            return found
        raise UserError(f"{path} has no id of letters and digits: delete it to begin a new one")
    make_folder(folder)
    drawn = secrets.token_hex(4)
    write_json(path, {"id": drawn})
    return drawn
