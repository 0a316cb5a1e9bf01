"""What is remembered: a pool of pages and slots, and each sequence's handle. What is computed lives in model/."""

from dsv4.cache.layer import Compressed, Entries, LayerMemory, Ring
from dsv4.cache.pages import OutOfPages, Pages, format_name
from dsv4.cache.pool import Pool
from dsv4.cache.sequence import BatchMemory, SequenceMemory, Snapshot

__all__ = [
    "BatchMemory", "Compressed", "Entries", "LayerMemory", "OutOfPages", "Pages", "Pool", "Ring", "SequenceMemory",
    "Snapshot", "format_name",
]  # fmt: skip
