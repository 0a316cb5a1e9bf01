"""What is computed: one device, no files. Start with transformer.py; what all models have in common is language.py."""

from dsv4.model.language import LanguageModel, Memory, Pool
from dsv4.model.segments import Segment, check_pinned
from dsv4.model.transformer import Transformer, Trunk

__all__ = ["LanguageModel", "Memory", "Pool", "Segment", "Transformer", "Trunk", "check_pinned"]
