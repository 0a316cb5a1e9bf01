"""Weights in and out: safetensors and JSON only, strict, published names."""

from dsv4.checkpoint.folder import RunFolder, resolve_checkpoint
from dsv4.checkpoint.load import load, read_config
from dsv4.checkpoint.save import save, write_tensors

__all__ = ["RunFolder", "load", "read_config", "resolve_checkpoint", "save", "write_tensors"]
