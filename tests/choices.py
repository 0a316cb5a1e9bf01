"""What gates and indexers choose while a run trains, in the order of its batches however many processes share it; and
where two runs choose otherwise, how near to a tie that was."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from dsv4 import ops
from dsv4.train.balance import learned_gates
from dsv4.train.parallel.shares import rows_of
from dsv4.train.trainer import Trainer

FILE = "choices.safetensors"


class Recorder:
    """Watches a trainer's updates. kept: by "STEP.gate.LAYER" and "STEP.index.LAYER" with ".chosen", ".scores" and
    ".sizes", for each token (of the MTP block's gate, each that has a next one): the experts chosen int32 [n, K], the
    scores of all with the balance bias fp32 [n, X], and again what these are sums of, without signs; the entries
    chosen, counted from its document's first (-1: none), and the scores of all entries that it sees (-inf: no such
    entry)."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.kept = trainer, dict[str, torch.Tensor]()
        self.entries = trainer.config.data.seq_len // 4
        self.parts: dict[str, list[torch.Tensor]] = {}
        trainer.model.register_forward_hook(self._gates)
        for layer, block in enumerate(trainer.model.layers):
            if (indexer := getattr(block.attn, "indexer", None)) is not None:
                indexer.register_forward_hook(partial(self._indexer, layer))
        self._step = trainer.step
        trainer.step = self.step  # type: ignore[method-assign]

    def step(self) -> Any:
        self.parts.clear()
        number, record = self.trainer.progress.step, self._step()
        shares = self.trainer._shares(number)
        tokens, followed = rows_of(self.trainer.batches.batch(number).lengths, shares)
        for name, parts in self.parts.items():
            drafts = name.startswith(f"gate.{len(self.trainer.model.layers)}.")
            whole = parts if drafts else [rows[: len(s.rows)] for rows, s in zip(parts, shares, strict=True)]
            where = followed if drafts else tokens
            self.kept[f"{number + 1}.{name}"] = self.trainer.processes.joined(torch.cat(whole), *where)
        return record

    def write(self, folder: Path) -> None:
        if self.trainer.processes.is_first:
            save_file(self.kept, folder / FILE)

    def _keep(self, name: str, chosen: torch.Tensor, scores: torch.Tensor, sizes: torch.Tensor) -> None:
        for what, rows in (("chosen", chosen.int()), ("scores", scores.detach()), ("sizes", sizes.detach())):
            self.parts.setdefault(f"{name}.{what}", []).append(rows)

    def _gates(self, model: Any, given: Any, losses: Any) -> None:
        if torch.is_grad_enabled():
            for layer, gate in learned_gates(model).items():
                chosen, scores = torch.empty(0, gate.topk), torch.empty(0, len(gate.bias))  # no token has a next one
                if layer in losses.routing:
                    decided = losses.routing[layer][0]
                    chosen, scores = decided.chosen, decided.scores
                self._keep(f"gate.{layer}", chosen, scores + gate.bias, scores + gate.bias.abs())

    def _indexer(self, layer: int, indexer: Any, given: Any, found: Any) -> None:
        ((chosen, asked),) = found
        if chosen is None or asked is None:
            return
        seen = given[2].parts[0].groups[indexer.kind.name].visible
        start, count = seen.start[:, None], (seen.stop - seen.start)[:, None]
        place = torch.arange(self.entries)
        with torch.no_grad():
            scores, sizes = (
                ops.reference.index_scores(*of)
                .gather(1, (start + place).clamp(max=len(asked.keys) - 1))
                .masked_fill(place >= count, -torch.inf)
                for of in (asked, map(torch.abs, asked))
            )
        self._keep(f"index.{layer}", torch.where(chosen < 0, -1, chosen - start), scores, sizes)


class Other(NamedTuple):
    """A row for which two runs chose otherwise. mine, theirs: what one of them alone chose; scores: of these in each
    run, mine first. size: the largest of what these are sums of, without signs."""

    step: int
    what: str
    row: int
    mine: list[int]
    theirs: list[int]
    scores: tuple[list[float], list[float]]
    size: float

    @property
    def order(self) -> tuple[int, bool]:
        """Where in an update this is: a layer's entries are chosen before its experts."""
        kind, layer = self.what.split(".")
        return int(layer), kind == "gate"

    @property
    def gap(self) -> float:
        """How far what one run took lies from what it did not take, in either run, as a share of size."""
        return max(max(s) - min(s) for s in self.scores) / self.size


def others(one: Path, several: Path) -> Iterator[Other]:
    """The rows for which two runs' folders have other choices, update by update."""
    a, b = load_file(one / FILE), load_file(several / FILE)
    assert a.keys() == b.keys() and a
    for name in sorted((n for n in a if n.endswith(".chosen")), key=lambda n: int(n.split(".")[0])):
        step, what = name.removesuffix(".chosen").split(".", 1)
        scores = [run[name.replace(".chosen", ".scores")] for run in (a, b)]
        sizes = torch.maximum(*(run[name.replace(".chosen", ".sizes")] for run in (a, b)))
        assert a[name].shape == b[name].shape
        differ = (a[name].sort(dim=1).values != b[name].sort(dim=1).values).any(dim=1)
        for row in differ.nonzero()[:, 0].tolist():
            first, second = set(a[name][row].tolist()), set(b[name][row].tolist())
            mine, theirs = sorted(first - second), sorted(second - first)
            places = [*mine, *theirs]
            found = [s[row, places].tolist() for s in scores]
            yield Other(int(step), what, row, mine, theirs, (found[0], found[1]), float(sizes[row, places].max()))
