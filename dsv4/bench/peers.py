"""The same weights in transformers, timed the same way, where a transformers with DeepSeek-V4 is installed.

It is loaded from a folder that our `save` writes, and its logits are compared with ours in fp32 before it is timed in
bf16: a ratio of speeds means something only between models that compute the same. Its prefill holds tokens x tokens
numbers, so long prompts are left to us.
"""

import copy
import inspect
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4.bench.speed import DTYPE, Job, speed_row, trunk_only
from dsv4.config import ModelConfig
from dsv4.measure.clock import Budget, Skip, timed
from dsv4.measure.rows import Row, difference
from dsv4.measure.sizes import Sizes
from dsv4.measure.subjects import tokens
from dsv4.model import Transformer

PEER_CHUNK = 512  # tokens in a call: in one call it would hold tokens x tokens numbers


def installed() -> str:
    """The version of transformers; Skip with the reason where there is none to compare with."""
    try:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.DeepseekV4ForCausalLM  # noqa: B018 (a lazy attribute: asking for it imports it)
    except Exception as error:  # whatever ails somebody else's import, it is a reason to go on without
        raise Skip(f"transformers cannot be compared with: {type(error).__name__}: {error}") from None
    return transformers.__version__


def jobs(preset: str, device: torch.device, sizes: Sizes, budget: Budget, ceilings: list[Row]) -> Iterator[Job]:
    """The rows of speed.jobs, as far as the peer goes; each says how far its logits were from ours."""
    config = trunk_only(ModelConfig.preset(preset))
    peer, apart = _load(config, device)

    def job(what: str, context: int, batch: int, steps: int, start: Callable[[], Callable[[], object]]) -> Job:
        def work() -> Row:
            timing = timed(start(), device, budget)
            row = speed_row("transformers", preset, config, ceilings, what, context, batch, batch * steps, timing)
            return {**row, "rms_rel_to_dsv4": apart}

        return f"transformers {preset} {what}, context {context}, batch {batch}", 6 + context / 1000, work

    def ids(batch: int, length: int) -> Tensor:
        return tokens(peer, batch * length).view(batch, length).to(device)

    for length in (n for n in sizes.prefill if n <= sizes.peer_longest):
        yield job("prefill", length, 1, length, lambda n=length: partial(_prefill, peer, ids(1, n)))
    for context in (n for n in sizes.decode_after if n <= sizes.peer_longest):
        for batch in sizes.decode_batches:
            begin = partial(_Decoding, peer, ids(1, context).expand(batch, -1), sizes.decode_steps)
            yield job("decode", context, batch, sizes.decode_steps, begin)
    batch, length = sizes.train
    yield job("forward+backward", length, batch, length, lambda: partial(_forward_backward, peer, ids(batch, length)))


def memory_name(peer: Any) -> str:
    """What this transformers calls its memory, in arguments and outputs: `cache` from 5.24 on."""
    return "cache" if "cache" in inspect.signature(peer.forward).parameters else "past_key_values"


def compare(rows: list[Row]) -> None:
    """Fill `times_transformers` of our rows that have a counterpart: our tokens per second over the peer's."""
    key = ("preset", "what", "context", "batch")
    theirs = {tuple(r[k] for k in key): r["tokens_per_second"] for r in rows if r["who"] == "transformers"}
    for row in rows:
        other = theirs.get(tuple(row[k] for k in key))
        if row["who"] == "dsv4" and other:
            row["times_transformers"] = row["tokens_per_second"] / other


def twin(ours: Transformer, dtype: torch.dtype) -> Any:
    """transformers' model with our weights, in `dtype`; Skip where there is none."""
    installed()
    from transformers import DeepseekV4ForCausalLM

    from dsv4.checkpoint import save  # needs safetensors, which comes with transformers

    with tempfile.TemporaryDirectory() as folder:
        save(ours, folder, "transformers")
        peer: Any = DeepseekV4ForCausalLM.from_pretrained(folder, dtype=dtype)
    return peer.eval()


class Theirs:
    """transformers' model reading one prompt after the other, in chunks; as Ours of frontier.py."""

    name, chunk = "transformers", PEER_CHUNK

    def __init__(self, model: Any):
        self.model, self.key = model, memory_name(model)

    def begin(self) -> None:
        self.memory: Any = None

    def read(self, ids: Tensor) -> Tensor:
        """Logits of the last token, [vocab]."""
        given = {} if self.memory is None else {self.key: self.memory}
        out = self.model(ids[None], **given, use_cache=True, logits_to_keep=1)
        self.memory = out[self.key]
        return out.logits[0, -1]

    def decoding(self) -> Callable[[Tensor], Tensor]:
        """A function that reads one token after what was read, on a memory of its own."""
        twin = Theirs(self.model)
        twin.memory = copy.deepcopy(self.memory)
        return twin.read

    def bytes(self) -> int | None:
        return None


def _load(config: ModelConfig, device: torch.device) -> tuple[Any, float]:
    """The peer in bf16 with the weights of one of our models, and how far apart the two are in fp32 (rms, relative)."""
    torch.manual_seed(0)
    ours = Transformer(config)
    wide, peer = twin(ours, torch.float32), twin(ours, DTYPE)
    ids = tokens(ours, 96)
    with torch.no_grad():
        want = ours.to(device)(ids)
        got = wide.to(device)(ids[None].to(device), use_cache=False).logits[0]
    return peer.to(device), difference(got, want)["rms_rel"]


@torch.no_grad()
def _prefill(peer: Any, ids: Tensor) -> Any:
    return peer(ids, use_cache=True, logits_to_keep=1)


class _Decoding:
    """As speed.Decoding, but for the next token, which stays on the device."""

    def __init__(self, peer: Any, ids: Tensor, steps: int):
        out = _prefill(peer, ids)
        name = memory_name(peer)
        self.peer, self.memory, self.steps = peer, {name: out[name]}, steps
        self.next = out.logits[:, -1:].argmax(dim=-1)

    @torch.no_grad()
    def __call__(self) -> None:
        for _ in range(self.steps):
            out = self.peer(self.next, **self.memory, use_cache=True)
            self.next = out.logits[:, -1:].argmax(dim=-1)


def _forward_backward(peer: Any, ids: Tensor) -> None:
    """bf16 weights, no casts: a little less work than our training step does."""
    peer.zero_grad(set_to_none=True)
    peer(ids, labels=ids, use_cache=False).loss.backward()
