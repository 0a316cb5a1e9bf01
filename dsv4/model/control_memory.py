"""What the models of controls.py remember of one sequence: two rows per token and layer, all of them kept.

V3.2: a latent row (kv_lora_rank numbers, then the rotated qk_rope_head_dim) and an index key. Llama: a row of keys and
a row of values, heads side by side. Rows are rounded when they are written, and a query reads the newest ones back as
it reads old ones, so any chunking gives the same numbers.
"""

from typing import TypeAlias

import torch
from torch import Tensor

from dsv4.cache.layer import Entries
from dsv4.config import LlamaConfig, V32Config
from dsv4.errors import UserError
from dsv4.ops import Pool
from dsv4.ops.formats import PLAIN, Plain, v32_rows

Config: TypeAlias = V32Config | LlamaConfig
Stores: TypeAlias = tuple[Entries, Entries]
FORMATS: dict[type, tuple[str, ...]] = {
    V32Config: ("float32", "bfloat16", "packed"), LlamaConfig: ("float32", "bfloat16")
}  # fmt: skip


class ControlMemory:
    """Memory of `length` tokens; `capacity` of them are allocated from the start, more as they come.

    A call that stops half way leaves it as it was: rows beyond `length` are not read, and are written over.
    """

    def __init__(self, config: Config, format: str, capacity: int, device: torch.device):
        known = FORMATS[type(config)]
        if format not in known:
            raise UserError(f"cache format {format!r} is unknown here: use one of {', '.join(known)}")
        if format == "packed" and isinstance(config, V32Config) and config.index_head_dim & (config.index_head_dim - 1):
            raise UserError(
                f"index_head_dim={config.index_head_dim} is not a power of two, so index keys cannot be rotated and "
                "packed: use format bfloat16 or float32"
            )
        if capacity < 0:
            raise UserError(f"capacity={capacity} must not be negative")
        self.config, self.format, self.length = config, format, 0
        if isinstance(config, V32Config):
            first, second = v32_rows(config.kv_lora_rank, config.qk_rope_head_dim, config.index_head_dim, format)
        else:
            first = second = Plain((config.num_key_value_heads * config.head_dim,), PLAIN[format])
        self.layers: list[Stores] = [
            (Entries(capacity, first, device), Entries(capacity, second, device))
            for _ in range(config.num_hidden_layers)
        ]

    def bytes(self) -> int:
        """Bytes allocated by all stores."""
        return sum(store.data.untyped_storage().nbytes() for stores in self.layers for store in stores)


def check_room(config: Config, length: int) -> None:
    """UserError unless a sequence may have `length` tokens."""
    if not 0 <= length <= config.max_position_embeddings:
        raise UserError(
            f"{length} tokens do not fit: max_position_embeddings={config.max_position_embeddings}; "
            "shorten the text or use a configuration with a longer context"
        )


def remember(store: Entries | None, rows: Tensor, start: int) -> Pool:
    """Store rows [n, width] of positions start .. start+n-1; all rows so far [start + n, width], as a query reads them.

    Without a store the rows are all there are.
    """
    if store is None:
        return rows
    store.write(rows, start)
    return store.view(start + len(rows))
