"""What a port implements to be judged: one class with a few functions, of which it may leave out any but `load`.

A file of one's own is enough: `dsv4 conform --adapter path/to/file.py:ClassName`, where the class has these functions
(it need not inherit from Adapter) and is made without arguments.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Best:
    """Log-probabilities of some tokens only, as a server tells them: of the tokens [n, k] after each of `rows` [n].

    A token below 0 is no answer.
    """

    rows: Tensor
    tokens: Tensor
    logprobs: Tensor


class Missing(NotImplementedError):
    """What an adapter raises, with the reason, for what its port does not have."""


class Adapter:
    """Every function raises Missing where the port has no such thing; what is left out is reported, and is no failure.

    Floating-point tensors come in `dtype` (of those that the released code holds in FP32: in FP32) and may go back in
    any dtype, on the CPU.
    """

    name = "a port"
    dtype = torch.float32
    packed = False  # whether its memory rounds rows to FP8 and index keys to FP4

    def load(self, folder: Path) -> None:
        """Load the checkpoint in `folder`: config.json and model.safetensors with the published names."""
        raise NotImplementedError(f"{type(self).__name__} cannot load")

    def logits(self, ids: Tensor, calls: list[int]) -> Tensor | Best:
        """A new sequence: feed ids int64 [T] in pieces of `calls`; the logits [T, vocab] after every token fed.

        A negative number in `calls` takes so many tokens back before the next piece.
        """
        raise Missing("logits of a sequence")

    def batch(self, ids: list[Tensor]) -> list[Tensor]:
        """The logits of several new sequences that run side by side, however the port does that."""
        raise Missing("sequences side by side")

    def layer(self, layer: int, streams: Tensor, ids: Tensor, calls: list[int]) -> Tensor:
        """Streams [T, N, M] through one layer, fed in pieces: the streams after it."""
        raise Missing("a layer by itself")

    def mtp(self, ids: Tensor) -> Tensor:
        """The MTP block's logits [T - 1, vocab]: row t reads the streams at t and the token at t+1."""
        raise Missing("an MTP block")

    def memory(self, ids: Tensor) -> dict[str, Tensor]:
        """After a prompt, of each layer I: "window I" [window, D], "entries I" [T // ratio, D], "keys I" [T // 4, Di].

        As they are read, the oldest first; index keys without their Hadamard rotation.
        """
        raise Missing("its memory")

    def part(self, what: str, layer: int, given: dict[str, Any]) -> dict[str, Tensor]:
        """One part of the loaded model; parts.py (or the manifest of --write) says what each takes and gives."""
        raise Missing(what)
