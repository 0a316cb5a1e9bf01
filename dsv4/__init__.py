"""dsv4: the whole DeepSeek-V4 system in one readable package.

The stable names are here; each is imported when it is first used, so that `import dsv4` needs nothing but torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsv4.checkpoint import load, save
    from dsv4.config import ModelConfig
    from dsv4.engine import Engine
    from dsv4.errors import UserError
    from dsv4.model import Segment, Transformer

__version__ = "0.1.0"
__all__ = ["Engine", "ModelConfig", "Segment", "Transformer", "UserError", "load", "save"]

_HOME = {
    "ModelConfig": "dsv4.config",
    "UserError": "dsv4.errors",
    "Transformer": "dsv4.model",
    "Segment": "dsv4.model",
    "load": "dsv4.checkpoint",
    "save": "dsv4.checkpoint",
    "Engine": "dsv4.engine",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'dsv4' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
