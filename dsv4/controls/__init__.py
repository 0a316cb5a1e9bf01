"""What V4 is compared with, small enough to read: DeepSeek-V3.2 and a dense Llama, under the contract of V4's own model
(model/language.py). Start with transformer.py.
"""

import torch

from dsv4.config import AnyConfig, ModelConfig, V32Config
from dsv4.controls.memory import ControlMemory
from dsv4.controls.transformer import ControlTransformer, DenseTransformer, V32Transformer
from dsv4.model import LanguageModel, Transformer

__all__ = ["ControlMemory", "ControlTransformer", "DenseTransformer", "V32Transformer", "build"]


def build(
    config: AnyConfig,
    dtype: torch.dtype | str = torch.float32,
    *,
    compute_dtype: torch.dtype | str | None = None,
    recompute: bool = False,
) -> LanguageModel:
    """A new model of a configuration of any kind, V4's among them."""
    if isinstance(config, ModelConfig):
        return Transformer(config, dtype, compute_dtype=compute_dtype, recompute=recompute)
    if isinstance(config, V32Config):
        return V32Transformer(config, dtype, compute_dtype=compute_dtype, recompute=recompute)
    return DenseTransformer(config, dtype, compute_dtype=compute_dtype, recompute=recompute)
