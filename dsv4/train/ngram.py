"""What counting alone achieves: unigram and bigram models, the baselines a trained model has to beat.

They learn from the very batches the model was trained on and are scored on the very targets it is scored
on, so the comparison is at the same budget. Document boundaries need no care here: batches have no target
across one.

V vocabulary, h the token before, w the token predicted, c counts
"""

import math
from collections.abc import Iterable

import numpy as np

from dsv4.model.head import IGNORE
from dsv4.train.batches import Batch


def ngram_bits_per_byte(train: Iterable[Batch], heldout: Iterable[Batch], vocab_size: int) -> dict[str, float]:
    """Bits per byte of held-out text: {"unigram": ..., "bigram": ...}.

    train: the batches the model saw, as often as it saw them. heldout: what it is evaluated on, with at
    least one byte of text. unigram: P1(w) = (c(w) + 1) / (sum of c + V). bigram, Witten-Bell: P(w|h) =
    (c(h,w) + n(h) P1(w)) / (c(h) + n(h)) with n(h) the number of different tokens seen after h; P1(w) after
    an h never seen. Nothing is tuned. An eos counts its bits and has no bytes, as for the model.
    """
    before, after = _pairs(train)[:2]
    num_after = np.bincount(after, minlength=vocab_size)
    unigram = (num_after + 1) / (len(after) + vocab_size)

    keys, counts = np.unique(before * vocab_size + after, return_counts=True)
    num_before = np.bincount(before, minlength=vocab_size)  # c(h)
    num_followers = np.bincount(keys // vocab_size, minlength=vocab_size)  # n(h)

    h, w, num_bytes = _pairs(heldout)
    assert num_bytes > 0, "there is no held-out text to score"
    seen = _lookup(keys, counts, h * vocab_size + w)
    weight = np.where(num_before[h] > 0, num_followers[h], 1)  # an h never seen: all weight to P1
    bigram = (seen + weight * unigram[w]) / (num_before[h] + weight)
    return {
        "unigram": -float(np.log(unigram[w]).sum()) / math.log(2) / num_bytes,
        "bigram": -float(np.log(bigram).sum()) / math.log(2) / num_bytes,
    }


def _pairs(batches: Iterable[Batch]) -> tuple[np.ndarray, np.ndarray, int]:
    """(tokens, the tokens that follow them, bytes of the latter), int64 [n] each, where there is a target."""
    before, after, num_bytes = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)], 0
    for batch in batches:
        ids, targets = batch.ids.numpy(), batch.targets.numpy()
        before.append(ids[targets != IGNORE])
        after.append(targets[targets != IGNORE])
        num_bytes += batch.num_bytes
    return np.concatenate(before), np.concatenate(after), num_bytes


def _lookup(keys: np.ndarray, counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The count of each wanted key, 0 where it is not among the sorted keys."""
    if len(keys) == 0:
        return np.zeros(len(wanted), dtype=np.int64)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, counts[place], 0)
