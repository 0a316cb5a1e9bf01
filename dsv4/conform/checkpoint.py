"""A checkpoint, layer by layer, beside transformers on this machine: where do the two part?

Every layer of both gets the same streams, so a departure is that layer's own. Where they part the plain float64 layer
says which of the two is right, and, with each known mistake in it, what the other does.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4.conform.adapter import Adapter
from dsv4.conform.adapters.ours import Ours
from dsv4.conform.cases import IN_LAYERS
from dsv4.conform.mistakes import HASH
from dsv4.conform.plain import PlainV4
from dsv4.measure.rows import difference
from dsv4.measure.subjects import tokens

ALLOWED = {torch.float32: ("max_rel", 5e-5), torch.bfloat16: ("typical_rel", 0.05)}


@dataclass
class Row:
    """A layer, the embedding or the logits: how far apart, whether that is allowed, and who departs from plain."""

    name: str
    distance: float
    passed: bool
    plain: dict[str, float] = field(default_factory=dict)  # the distance of each side from the plain layer
    mistakes: dict[str, str] = field(default_factory=dict)  # side -> the known mistake that gives its numbers


@torch.no_grad()
def compare(
    folder: Path, count: int = 300, dtype: torch.dtype = torch.float32, note: Callable[[Row], None] = lambda row: None
) -> list[Row]:
    """Rows for the embedding, every layer and the logits of `count` random tokens. UserError without transformers."""
    from dsv4.conform.adapters.transformers import Transformers

    sides: tuple[Ours, Adapter] = Ours(dtype), Transformers(dtype)
    for side in sides:
        side.load(folder)
    return list(beside(sides[0], sides[1], count, note))


@torch.no_grad()
def beside(ours: Ours, other: Any, count: int, note: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """The same for two adapters that have loaded the checkpoint."""
    model, c = ours.model, ours.model.config
    ids = tokens(model, count)
    measure, allowed = ALLOWED.get(ours.dtype, ALLOWED[torch.bfloat16])
    rows = []

    def enter(name: str, a: Tensor, b: Tensor) -> Row:
        distance = difference(a, b)[measure]
        rows.append(Row(name, distance, distance <= allowed))
        return rows[-1]

    x = model.embed(ids).to(ours.dtype)[:, None].expand(-1, c.num_streams, -1).contiguous()
    for i in range(c.num_hidden_layers):
        mine, theirs = ours.layer(i, x, ids, [count]), other.layer(i, x, ids, [count])
        routed = "by token id" if c.uses_hash_routing(i) else "by score"
        row = enter(f"layer {i} ({c.layer_kind(i).name}, experts {routed})", mine, theirs)
        if not row.passed:
            _explain(row, ours, i, x, ids, {ours.name: mine, other.name: theirs}, measure, allowed)
        note(row)
        x = mine
    note(enter("logits", ours.logits(ids, [count]), other.logits(ids, [count])))
    return rows


def _explain(
    row: Row, ours: Ours, layer: int, x: Tensor, ids: Tensor, got: dict[str, Tensor], measure: str, allowed: float
) -> None:
    """Who is right, by the plain layer; and the mistake of who is not."""
    prefix = f"layers.{layer}."
    held = {n: t for n, t in ours.model.state_dict().items() if n.startswith(prefix)}

    def plain(*flips: str) -> Tensor:
        return PlainV4(ours.model.config, held, flips).block(prefix, layer, x.double(), ids)

    right = plain()
    row.plain = {name: difference(out, right)[measure] for name, out in got.items()}
    wrong = {name: out for name, out in got.items() if row.plain[name] > allowed}
    for mistake in (*IN_LAYERS, *HASH) if wrong else ():
        told = plain(mistake)
        for name, out in wrong.items():
            if name not in row.mistakes and difference(out, told)[measure] <= min(allowed, row.plain[name] / 3):
                row.mistakes[name] = mistake


def lines(rows: list[Row]) -> list[str]:
    """For people: a line a row, and where the two part first."""
    out = []
    for row in rows:
        more = "".join(
            f"; {name} is {far:.1e} from plain float64" + (f": {row.mistakes[name]}" if name in row.mistakes else "")
            for name, far in row.plain.items()
        )
        out.append(f"{row.name:40s} {row.distance:.1e} {'' if row.passed else 'PART'}{more}".rstrip())
    parted = [row.name for row in rows if not row.passed]
    out.append(f"they part in {len(parted)} places, first in {parted[0]}" if parted else "they are the same function")
    return out
