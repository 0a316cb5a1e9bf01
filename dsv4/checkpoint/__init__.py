"""Weights in and out: safetensors and JSON only, strict, published names.

Each name is imported when it is first used: what looks at headers alone (`dsv4 inspect`) does not wait for torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsv4.checkpoint.folder import RunFolder, resolve_checkpoint
    from dsv4.checkpoint.load import load, read_config
    from dsv4.checkpoint.save import save, write_tensors

__all__ = ["RunFolder", "load", "read_config", "resolve_checkpoint", "save", "write_tensors"]

_HOME = {
    "RunFolder": "folder",
    "resolve_checkpoint": "folder",
    "load": "load",
    "read_config": "load",
    "save": "save",
    "write_tensors": "save",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'dsv4.checkpoint' has no attribute {name!r}")
    return getattr(import_module(f"dsv4.checkpoint.{_HOME[name]}"), name)


class _Package(ModuleType):
    """`load` and `save` are functions here, although Python, having read their files, would put the files there."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _HOME and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
