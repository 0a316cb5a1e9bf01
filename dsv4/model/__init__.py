"""What is computed: one device, no files. Start with transformer.py."""

from dsv4.model.segments import Segment
from dsv4.model.transformer import Transformer, Trunk

__all__ = ["Segment", "Transformer", "Trunk"]
