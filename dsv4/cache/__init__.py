"""What is remembered: one sequence's memory, layer by layer. What is computed with it lives in model/."""

from dsv4.cache.layer import Compressed, Entries, LayerMemory, Ring
from dsv4.cache.sequence import BatchMemory, SequenceMemory, Snapshot, format_name

__all__ = [
    "BatchMemory", "Compressed", "Entries", "LayerMemory", "Ring", "SequenceMemory", "Snapshot", "format_name",
]  # fmt: skip
