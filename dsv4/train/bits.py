"""One bit for each token of a split, in a file beside the tokens: whether the token is to be learned."""

from collections.abc import Callable

import numpy as np


class BitWriter:
    """Writes arrays of bits one after another, eight to a byte, the first in the lowest place."""

    def __init__(self, put: Callable[[np.ndarray], object]):
        self._put, self._left = put, np.zeros(0, dtype=bool)

    def write(self, bits: np.ndarray) -> None:
        bits = np.concatenate([self._left, bits])
        whole = len(bits) // 8 * 8
        self._put(np.packbits(bits[:whole], bitorder="little"))
        self._left = bits[whole:]

    def close(self) -> None:
        """Writes the last, incomplete byte, its unused bits 0."""
        self._put(np.packbits(self._left, bitorder="little"))
        self._left = self._left[:0]


def read_bits(packed: np.ndarray, first: int, end: int) -> np.ndarray:
    """Bits [first, end) as bool."""
    start = first // 8
    bits = np.unpackbits(packed[start : -(-end // 8)], bitorder="little")
    return bits[first - start * 8 : end - start * 8].astype(bool)


def num_bytes_of(bits: int) -> int:
    return -(-bits // 8)
