"""Failures caught here: a token whose logits depend, by as much as a bit, on what else is computed beside it, on how a
prompt is cut into chunks, or on the number of threads.
"""

import random

import pytest
import torch
from torch import Tensor

from dsv4 import ops
from dsv4.measure.subjects import small_model, tokens
from dsv4.model import Transformer

pytest.importorskip("dsv4.ops.cpu", exc_type=ImportError)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return small_model((0, 4, 128, 4), mtp=0)


def alone(model: Transformer, ids: Tensor, format: str) -> Tensor:
    """Logits [n, V] of a prompt in one call, with a memory."""
    return model(ids, segments=[(len(ids), model.new_cache(format=format)[0])])


def cut(rng: random.Random, length: int) -> list[int]:
    """Chunks of a prompt: many of one token, some long ones."""
    chunks = []
    while length:
        chunks.append(min(length, rng.choice((1, 1, 2, 3, 7, 40, 130, 300))))
        length -= chunks[-1]
    return chunks


@pytest.mark.parametrize("format", ["float32", "packed"])
@torch.inference_mode()
def test_every_batch_and_every_chunking_gives_the_same_bits(model: Transformer, format: str) -> None:
    """100 compositions a format: up to 7 prompts side by side, each cut at random, by 1 to 3 threads."""
    assert ops.active("linear") == "cpu" == ops.active("sparse_attention")
    rng = random.Random(format)
    prompts = [tokens(model, n, seed=n) for n in (1, 3, 64, 127, 128, 200, 389)]
    want = [alone(model, ids, format) for ids in prompts]
    for _ in range(100):
        torch.set_num_threads(rng.choice((1, 2, 3)))
        chosen = rng.sample(range(len(prompts)), rng.randint(1, 4))
        memories = {
            i: memory for i, memory in zip(chosen, model.new_cache(batch=len(chosen), format=format), strict=True)
        }
        waiting = {i: cut(rng, len(prompts[i])) for i in chosen}
        while any(waiting.values()):
            now = [i for i in chosen if waiting[i] and rng.random() < 0.7]
            if not now:
                continue
            counts = [waiting[i].pop(0) for i in now]
            begins = [memories[i].length for i in now]
            ids = torch.cat([prompts[i][b : b + n] for i, b, n in zip(now, begins, counts, strict=True)])
            logits = model(ids, segments=[(n, memories[i]) for i, n in zip(now, counts, strict=True)])
            for i, b, part in zip(now, begins, logits.split(counts), strict=True):
                assert torch.equal(part, want[i][b : b + len(part)]), (i, b, len(part), now, counts)
