"""A checkpoint, layer by layer, beside transformers on this machine: where do the two part?

Every layer of both gets the same streams, so a departure is that layer's own. Where they part the plain float64 layer
says which of the two is right, and, with each known mistake in it, what the other does. A checkpoint with FP8 or FP4
matrices is read one layer at a time, unpacked to `dtype`, and transformers is given that layer in files of its own: it
would hold the whole model, and packs differently.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4.checkpoint import save
from dsv4.checkpoint.folder import resolve_checkpoint
from dsv4.checkpoint.load import open_checkpoint
from dsv4.conform.adapter import Adapter
from dsv4.conform.adapters.ours import Ours
from dsv4.conform.cases import IN_LAYERS
from dsv4.conform.mistakes import HASH
from dsv4.conform.plain import PlainV4
from dsv4.measure.rows import difference
from dsv4.measure.subjects import tokens
from dsv4.model import Transformer

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
    """Rows for every layer and the logits of `count` random tokens. UserError without transformers."""
    from dsv4.conform.adapters.transformers import Transformers

    ours, theirs = Ours(dtype), Transformers(dtype)
    _, sources, _, _ = open_checkpoint(resolve_checkpoint(folder))
    if any(source.code for source in sources.values()):
        return list(_by_layer(folder, ours, theirs, count, note))
    sides: tuple[Ours, Adapter] = ours, theirs
    for side in sides:
        side.load(folder)
    return list(beside(sides[0], sides[1], count, note))


@torch.no_grad()
def beside(ours: Ours, other: Any, count: int, note: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """The same for two adapters that have loaded the checkpoint."""
    ids, x = _beginning(ours, count)
    rows = []
    for i in range(ours.model.config.num_hidden_layers):
        mine = ours.layer(i, x, ids, [count])
        rows.append(_row(ours, i, x, ids, mine, other.name, other.layer(i, x, ids, [count])))
        note(rows[-1])
        x = mine
    rows.append(_judged("logits", ours.logits(ids, [count]), other.logits(ids, [count]), ours.dtype))
    note(rows[-1])
    return rows


def _by_layer(folder: Path, ours: Ours, theirs: Any, count: int, note: Callable[[Row], None]) -> Iterator[Row]:
    """The same, a layer in memory at a time; the logits are those of the last streams."""
    ours.load(folder, layers=[])
    layers, (ids, x) = ours.model.config.num_hidden_layers, _beginning(ours, count)
    for i in range(layers):
        ours.load(folder, layers=[i])
        mine = ours.layer(i, x, ids, [count])
        with tempfile.TemporaryDirectory() as alone:
            save(_alone(ours.model, i), alone, "transformers")
            del ours.model  # there may be room for one of the two
            theirs.load(Path(alone))
        got = theirs.layer(0, x, ids, [count])
        last = theirs.head(mine) if i == layers - 1 else None
        del theirs.model
        ours.load(folder, layers=[i])
        row = _row(ours, i, x, ids, mine, theirs.name, got)
        note(row)
        yield row
        x = mine
        if last is not None:
            row = _judged("logits of these streams", ours.head(x), last, ours.dtype)
            note(row)
            yield row


def _alone(model: Transformer, layer: int) -> Transformer:
    """A model of one of the layers, with the same embedding, norm and head."""
    c = model.config.without_drafts()
    config = c.with_(
        num_hidden_layers=1, compress_ratios=c.compress_ratios[layer : layer + 1],
        num_hash_layers=int(c.uses_hash_routing(layer)),
    )  # fmt: skip
    with torch.device("meta"):
        out = Transformer(config, model.dtype)
    out.embed, out.norm, out.head = model.embed, model.norm, model.head
    out.layers[0] = model.layers[layer]
    for name in ("hc_head_fn", "hc_head_base", "hc_head_scale"):
        setattr(out, name, getattr(model, name))
    return out


def _beginning(ours: Ours, count: int) -> tuple[Tensor, Tensor]:
    """Random ids, and the streams before the first layer."""
    model = ours.model
    ids = tokens(model, count)
    return ids, model.embed(ids).to(ours.dtype)[:, None].expand(-1, model.config.num_streams, -1).contiguous()


def _allowed(dtype: torch.dtype) -> tuple[str, float]:
    return ALLOWED.get(dtype, ALLOWED[torch.bfloat16])


def _judged(name: str, a: Tensor, b: Tensor, dtype: torch.dtype) -> Row:
    measure, allowed = _allowed(dtype)
    distance = difference(a, b)[measure]
    return Row(name, distance, distance <= allowed)


def _row(ours: Ours, i: int, x: Tensor, ids: Tensor, mine: Tensor, name: str, theirs: Tensor) -> Row:
    c = ours.model.config
    routed = "by token id" if c.uses_hash_routing(i) else "by score"
    row = _judged(f"layer {i} ({c.layer_kind(i).name}, experts {routed})", mine, theirs, ours.dtype)
    if not row.passed:
        _explain(
            row, ours, i, x, ids, {ours.name: mine, name: theirs}, *ALLOWED.get(ours.dtype, ALLOWED[torch.bfloat16])
        )
    return row


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
