"""How much of everything a check does: on a GPU, and in a dry run of the script on a CPU."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Lengths in tokens. `pace` scales the guesses of how long a piece of work takes (1 = full size on a GPU)."""

    documents: tuple[int, int] = (300, 120)  # packed in one run, in the parity of whole models
    stream: int = 300  # a sequence that is fed in chunks and token by token
    presets: tuple[str, ...] = ("bench", "base")
    prefill: tuple[int, ...] = (2048, 8192, 32768)
    decode_after: tuple[int, ...] = (2048, 32768)
    decode_batches: tuple[int, ...] = (1, 8)
    decode_steps: int = 8  # timed together: two closings of a CSA group
    train: tuple[int, int] = (2, 4096)  # documents, tokens of each
    peer_longest: int = 8192  # the peer's prefill holds tokens x tokens numbers
    matmul: int = 8192
    copy_bytes: int = 1 << 31
    pace: float = 1.0


FULL = Sizes()
DRY = Sizes(
    documents=(170, 30), stream=150, presets=("tiny",), prefill=(64, 256), decode_after=(64,), decode_batches=(1, 2),
    decode_steps=4, train=(2, 96), matmul=256, copy_bytes=1 << 22, pace=0.1,
)  # fmt: skip
