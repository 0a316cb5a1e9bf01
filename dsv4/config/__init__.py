"""What a model is, as frozen data: V4 (v4.py, by way of published.py) and what it is compared with (controls.py)."""

from dsv4.config.controls import CONTROLS, KINDS, AnyConfig, LlamaConfig, V32Config, kind_of, preset_of, read_any
from dsv4.config.rules import RopeScaling
from dsv4.config.v4 import PRESETS, LayerKind, ModelConfig

__all__ = [
    "CONTROLS", "KINDS", "PRESETS", "AnyConfig", "LayerKind", "LlamaConfig", "ModelConfig", "RopeScaling",
    "V32Config", "kind_of", "preset_of", "read_any",
]  # fmt: skip
