"""One table: the tensors of a file and where they live in the model.

Model names are the published names, except that the routed experts are stacked: `experts.w13` [X, 2, I, M] holds
`experts.E.w1.weight` and `experts.E.w3.weight`, `experts.w2` [X, M, I] holds `experts.E.w2.weight`; and that the block
in `mtp.N` is a module of its own, `mtp.N.block`, whose tensors are published beside the others of `mtp.N`. The folder
that transformers' `save_pretrained` writes has the same names under `model.`, but for the few of `_TRANSFORMERS`.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Literal

from dsv4.errors import UserError

Layout = Literal["published", "transformers"]
LAYOUTS: tuple[Layout, ...] = ("published", "transformers")
Place = tuple[int, ...]  # leading indices into a stacked tensor; () is the whole tensor

# published name -> transformers name, where it is not simply `model.` + published
_TRANSFORMERS = (
    (re.compile(r"^head\.weight$"), "head.weight"),
    (re.compile(r"^embed\.weight$"), "model.embed_tokens.weight"),
    (re.compile(r"^hc_head_(fn|base|scale)$"), r"model.hc_head.hc_\1"),
    (re.compile(r"^(layers\.\d+\.attn)\.kv_norm\.weight$"), r"model.\1.norm.weight"),
)
_MTP_BLOCK = re.compile(r"^(mtp\.\d+)\.block\.")
# Tables of angles that some writers keep: they follow from the configuration.
_DERIVED = re.compile(r"(^|\.)(rotary_emb\.\w*inv_freq|freqs_cis)$")


def file_names(name: str, shape: tuple[int, ...], layout: Layout) -> Iterator[tuple[str, Place]]:
    """The file tensors that make up model tensor `name`: (name in the file, place in the model tensor)."""
    for published, place in _published(name, shape):
        yield (published if layout == "published" else _to_transformers(published)), place


def scale_name(name: str) -> str:
    """The name of the scales of a matrix in codes, `X.weight` -> `X.scale`, in either layout."""
    return f"{name.removesuffix('weight')}scale"


def layout_of(names: Iterable[str]) -> Layout:
    """The layout that a folder's tensor names are of; one stray name does not decide it."""
    names = set(names)
    return "transformers" if "embed.weight" not in names and any(n.startswith("model.") for n in names) else "published"


def known_names(names: Iterable[str]) -> dict[str, str]:
    """Name in a layout -> name in the file, for every tensor of a folder that carries information.

    Some re-uploads put the published names under `model.`; transformers' own have another embedding there. The head is
    `lm_head.weight` to some writers of either. UserError if two tensors have one name then.
    """
    given = [n for n in names if "freq" not in n or not _DERIVED.search(n)]
    prefixed = "model.embed.weight" in given
    out: dict[str, str] = {}
    for name in given:
        plain = name.removeprefix("model.") if prefixed else name
        if plain in out:
            raise UserError(f"tensor {plain} is there twice, with and without 'model.' before it: remove one")
        out[plain] = name
    if "head.weight" not in out and "lm_head.weight" in out:
        out["head.weight"] = out.pop("lm_head.weight")
    return out


def _published(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Place]]:
    name = _MTP_BLOCK.sub(r"\1.", name)
    stem, _, leaf = name.rpartition(".")
    if not stem.endswith("ffn.experts"):
        yield name, ()
        return
    for expert in range(shape[0]):
        if leaf == "w2":
            yield f"{stem}.{expert}.w2.weight", (expert,)
        else:
            yield f"{stem}.{expert}.w1.weight", (expert, 0)
            yield f"{stem}.{expert}.w3.weight", (expert, 1)


def _to_transformers(name: str) -> str:
    for pattern, target in _TRANSFORMERS:
        if pattern.match(name):
            return pattern.sub(target, name)
    return f"model.{name}"
