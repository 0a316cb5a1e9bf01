"""What the comparisons with the released inference code share: its numbers (golden/official), what a run of ours
showed, and memories that keep the official number where either rounding is right.
"""

import hashlib
import lzma
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from safetensors.torch import load as from_bytes
from torch import Tensor

from dsv4.cache import SequenceMemory
from dsv4.measure.replay import choices
from dsv4.model import Segment, Transformer
from dsv4.ops.formats import Packed, hadamard

GOLDEN = Path(__file__).parent / "golden" / "official"
SHA256 = {
    "weights": "773b80c640b9fa6569230a93ff07b3fdfc492f7d8da518c66ab5b547f283a1be",
    "cases": "6f1a6623351988b0e5c3a27486cf8a9aa11abbf75a8df0138025a8a715c2b22c",
    "weights_fp8fp4": "4c3c9bf197c1ba139da210dc58daf9da16e3883cd2b3150d2ad5ce4d067c91c1",
    "cases_fp8fp4": "264c593a754e5d1f1a0cfbea95e340e8fe51905213bc30667bd44a4b3ed841ea",
}
CLOSE = 2e-5  # two orders of summation in fp32; measured 1e-6 to 8e-6
GAP = 1e-4  # where the last chosen scores more than this above the first not chosen, the choice must be the same
SNAPPED = 1e-3  # the share of stored numbers that may lie so near a rounding border
CASES = {"p3": 3, "p131": 131, "p300": 300}  # prompts; 12 tokens follow


def unpacked(name: str) -> bytes:
    data = lzma.decompress((GOLDEN / f"{name}.safetensors.xz").read_bytes())
    assert hashlib.sha256(data).hexdigest() == SHA256[name], f"{name} is not the file that was made"
    return data


def checkpoint(path: Path, suffix: str = "") -> Path:
    """A checkpoint folder as it would be published: of model A, or with "_fp8fp4" of model Q."""
    (path / "model.safetensors").write_bytes(unpacked(f"weights{suffix}"))
    (path / "config.json").write_bytes((GOLDEN / f"config{suffix}.json").read_bytes())
    return path


def cases(suffix: str = "") -> dict[str, Tensor]:
    return from_bytes(unpacked(f"cases{suffix}"))


def memory_of(model: Transformer, format: str, count: int) -> SequenceMemory:
    """Its rings hold every row of `count` tokens, so that all can be looked at afterwards."""
    return model.new_cache(format=format, capacity=count, max_rewind=count, mtp=True)[0]


class Seen:
    """What one run of the whole model showed: logits, streams after each block, experts, chosen entries, the trunk."""

    def __init__(self, model: Transformer, ids: Tensor, chunks: list[int], memory: SequenceMemory | None):
        logits: list[Tensor] = []
        streams: list[list[Tensor]] = [[] for _ in model.layers]
        routed: list[list[Tensor]] = [[] for _ in model.layers]

        def keep(i: int):
            return lambda module, args, out: streams[i].append(out[0])

        handles = [layer.register_forward_hook(keep(i)) for i, layer in enumerate(model.layers)]
        try:
            with choices(model) as self.chosen, torch.no_grad():
                for part in ids.split(chunks):
                    self.trunk = model.trunk(part, [Segment(len(part), memory)])
                    logits.append(model.logits(self.trunk.hidden))
                    for i, routing in enumerate(self.trunk.routing):
                        routed[i].append(routing.chosen)
        finally:
            for handle in handles:
                handle.remove()
        self.logits, self.streams = torch.cat(logits), [torch.cat(s) for s in streams]
        self.routed = torch.stack([torch.cat(r) for r in routed])


def check_choices(model: Transformer, seen: Seen, golden: dict[str, Tensor], case: str, prompt: int) -> None:
    """Experts of every token, entries of the last 13: equal as sets wherever the official gap says they must be."""
    clear = golden[f"{case}/routed_gap"] > GAP
    same = (seen.routed.sort(dim=-1).values == golden[f"{case}/routed"].long().sort(dim=-1).values).all(dim=-1)
    assert same[clear].all() and clear.float().mean() > 0.9
    for row, layer in enumerate(i for i, block in enumerate(model.layers) if block.attn.indexer is not None):
        mine = seen.chosen[f"layers.{layer}.attn.indexer"][prompt - 1 :]
        for token, want in enumerate(golden[f"{case}/chosen"][row].tolist()):
            if golden[f"{case}/chosen_gap"][row, token] > GAP:
                assert sorted(mine[token]) == [entry for entry in want if entry >= 0], (layer, token)


@dataclass
class Tally:
    """What has come of the rows so far: written, refused; numbers snapped, of how many."""

    rows: int = 0
    refused: int = 0
    snapped: int = 0
    numbers: int = 0


@dataclass(frozen=True, eq=False)
class Snapping(Packed):
    """A packed format that keeps the official number where either rounding is right; rows are written once, in order.

    y is stored in place of the own rounding q of x where |x - y| <= |x - q| + 2e-5 of the block's largest number.
    """

    official: Tensor = field(default_factory=lambda: torch.zeros(0, 1))
    tally: Tally = field(default_factory=Tally)

    @property
    def own(self) -> Packed:
        return Packed(**{f.name: getattr(self, f.name) for f in fields(Packed)})

    def pack(self, rows: Tensor) -> Tensor:
        data, right, snapped = self.snap(rows)
        self.tally.numbers += int((~self.official[self.tally.rows :][: len(rows)].isnan()).sum())
        self.tally.rows += len(rows)
        self.tally.refused += int((~right).any(dim=1).sum())
        self.tally.snapped += int(snapped.sum())
        return data

    def as_read(self, rows: Tensor) -> Tensor:
        return self.unpack(self.snap(rows)[0])

    def as_query(self, rows: Tensor) -> Tensor:
        return self.own.as_query(rows)

    def snap(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bytes, and which numbers [n, width] were right and which were snapped, of unrounded rows that come next."""
        if not len(rows):
            return self.own.pack(rows), torch.ones(0, 1).bool(), torch.zeros(0, 1).bool()
        x = hadamard(rows.float()) if self.rotated else rows.float()
        q, y = self.own.as_read(rows).float(), self.official[self.tally.rows :][: len(rows)].float()
        y = torch.where(y.isnan(), q, y)  # not on file
        right = (x - y).abs() <= (x - q).abs() + CLOSE * largest_of_block(self, x)
        data = replace(self.own, rotated=False).pack(torch.where(right, y, q))
        good = right.all(dim=1)
        assert torch.equal(self.unpack(data).float()[good], y[good]), "official rows have a packed form"
        return data, right, right & (q != y)


def largest_of_block(format: Packed, x: Tensor) -> Tensor:
    """For each number of x [n, width] the largest of its block; the BF16 tail is one. Not the row's: a wrong floor
    would pass in a block of tiny numbers."""
    parts = [*x[:, : format.coded].split(format.block, dim=1), *([x[:, format.coded :]] if format.tail else [])]
    return torch.cat([part.abs().amax(dim=1, keepdim=True).expand_as(part) for part in parts], dim=1)


def snap_to(memory: SequenceMemory, golden: dict[str, Tensor], case: str) -> list[Snapping]:
    """Make every store of the trunk snap to the official rows, as far as they are on file."""
    rows = golden[f"{case}/routed"].shape[1]
    out = []
    for i, layer in enumerate(memory.layers):
        stores = [(layer.window, "window")]
        stores += [(layer.attention.entries, "entries")] if layer.attention is not None else []
        stores += [(layer.index.entries, "keys")] if layer.index is not None else []
        for store, name in stores:
            official = golden.get(f"{case}/{name}/{i}", torch.zeros(0, 1))  # short prompts close no HCA group
            assert isinstance(store.format, Packed)
            if name == "window" and len(official) < rows:  # only the last ones are on file
                before = torch.full((rows - len(official), official.shape[1]), torch.nan)
                official = torch.cat([before, official.float()])
            store.format = Snapping(**vars(store.format), official=official)
            out.append(store.format)
    return out


def snapped_run(
    model: Transformer, golden: dict[str, Tensor], name: str, chunks: list[int], mode: str = "kv"
) -> tuple[Seen, SequenceMemory, int, float]:
    """The whole model on a packed memory that snaps: what it showed, rows refused, share of numbers snapped."""
    ids = golden[f"ids/{name}"]
    memory = memory_of(model, "packed", len(ids))
    stores = snap_to(memory, golden, f"{mode}/{name}")
    seen = Seen(model, ids, chunks, memory)
    tallies = [s.tally for s in stores]
    share = sum(t.snapped for t in tallies) / sum(t.numbers for t in tallies)
    return seen, memory, sum(t.refused for t in tallies), share
