"""Which files hold a checkpoint's weights: what its index names, else what looks like it. No other is ever opened."""

from pathlib import Path, PurePosixPath
from typing import Any

from dsv4 import files
from dsv4.checkpoint.headers import LONGEST_NAME
from dsv4.errors import UserError, shown

CONFIG, GENERATION, INDEX = "config.json", "generation_config.json", "model.safetensors.index.json"
_REMEDY = "fetch it again, or remove it if no file is missing"


def read_index(folder: Path) -> dict[str, str]:
    """The index of a folder: tensor name -> file relative to the folder; UserError if it is damaged.

    A file is a .safetensors file in the folder or below it, by a name that leads nowhere else.
    """
    index = folder / INDEX
    places: Any = files.read_json(index, "the index", _REMEDY).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"the index {index} has no weight_map from tensor names to file names: {_REMEDY}")
    for name in sorted(set(places.values())):
        path = PurePosixPath(name)
        leads_out = path.is_absolute() or ".." in path.parts or "\\" in name
        if leads_out or not name.isprintable() or len(name) > LONGEST_NAME or path.suffix != ".safetensors":
            raise UserError(f"the index {index} names {shown(name)}, which is no .safetensors file in there: {_REMEDY}")
    return places


def listed_files(folder: Path) -> set[str]:
    """The weight files that a folder's index names, relative to it; UserError if the index is damaged."""
    return set(read_index(folder).values())


def weight_files(folder: Path) -> list[str]:
    """The files that hold the weights, relative to the folder, all there; UserError if one that is listed is not."""
    with files.explained(folder, "read"):
        if (folder / INDEX).exists():
            names = sorted(listed_files(folder))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise UserError(f"{folder} lacks {missing[0]}, which its index lists: fetch the missing file")
        else:
            names = unlisted_files(folder)
    if not names:
        raise UserError(f"{folder} holds no .safetensors file: give the folder of a checkpoint")
    return names


def unlisted_files(folder: Path) -> list[str]:
    """The weight files of a folder without an index: model*.safetensors and mtp*.safetensors, else all there are."""
    found = [p for pattern in ("model*", "mtp*") for p in folder.glob(f"{pattern}.safetensors")]
    return sorted(p.name for p in found or folder.glob("*.safetensors"))
