"""Weights in and out: safetensors and JSON only, strict, published names."""

from dsv4.checkpoint.load import load, read_config
from dsv4.checkpoint.save import save, write_atomically

__all__ = ["load", "read_config", "save", "write_atomically"]
