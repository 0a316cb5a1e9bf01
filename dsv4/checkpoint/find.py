"""Which checkpoint a path means: a checkpoint folder is itself, a run folder its latest checkpoint."""

from pathlib import Path

from dsv4 import files
from dsv4.errors import UserError, nearest


def resolve_checkpoint(path: str | Path, *, needs_config: bool = True) -> Path:
    """The checkpoint folder that `path` means: itself, or the latest checkpoint of a run folder.

    A run folder holds `checkpoints/latest`, a text file that names one of the folders beside it. UserError if there is
    no such folder or nothing in it to load (needs_config=False: a folder without config.json is also one).
    """
    path = Path(path)
    with files.explained(path, "read"):  # such as a name too long for the file system
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise UserError(f"{path} {what}: give the folder of a run or of a checkpoint")
        latest = path / "checkpoints" / "latest"
        if latest.exists():
            return named_by(latest)
        if not needs_config or (path / "config.json").is_file():
            return path
        if (path / "checkpoints").is_dir():
            raise UserError(f"the run {path} has no finished checkpoint yet: train until it has saved one")
    raise UserError(f"{path} holds neither config.json nor checkpoints/latest: give a run or checkpoint folder")


def named_by(pointer: Path) -> Path:
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
